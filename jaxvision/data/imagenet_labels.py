"""The classes of ImageNet's flat validation images: from a label file or from the development kit."""

import re
from dataclasses import dataclass
from pathlib import Path

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data.mat_file import read_structs
from jaxvision.data.prepare_files import member_path, open_tar, read_bytes

SYNSET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@dataclass(frozen=True)
class Labels:
    """Synsets of images, by name (without suffix) or by order; ``origin`` names the file they come from."""

    origin: str = ""
    by_name: dict[str, str] | None = None
    by_order: tuple[str, ...] | None = None

    @classmethod
    def read(cls, val_labels: Path | None, devkit: Path | None) -> "Labels":
        """Reads what the person gave; nothing given: labels that fail when they are asked for.

        Raises:
          ConfigError: both are given.
          DataError: the file is missing, damaged or of another form.
        """
        if val_labels and devkit:
            raise ConfigError("--val_labels and --devkit both give the labels of the validation images; give one")
        if devkit:
            return _from_devkit(devkit)
        return _from_text(val_labels) if val_labels else cls()

    def of(self, names: list[str], where: str) -> list[str]:
        """The synset of each image.

        Raises:
          DataError: there are no labels, they are of other images, or their number is another one.
        """
        if self.by_name is not None:
            stems = [name.rsplit(".", 1)[0] for name in names]
            missing = [name for name, stem in zip(names, stems) if stem not in self.by_name]
            if missing:
                raise DataError(f"{self.origin} has no label for {where}/{missing[0]}")
            return [self.by_name[stem] for stem in stems]
        if any("_test_" in name for name in names):
            raise DataError(f"{where} holds images of the test split, which has no public labels")
        if self.by_order is None:
            raise DataError(f"{where} has its images in no class folders; give --devkit or --val_labels as well")
        if len(self.by_order) != len(names):
            raise DataError(f"{self.origin} has {len(self.by_order)} labels, {where} has {len(names)} images")
        numbers = [_NUMBERED.fullmatch(name) for name in names]
        if all(numbers):  # official names carry their line number
            places = [int(number[1]) - 1 for number in numbers]
        else:
            rank = {name: place for place, name in enumerate(sorted(names))}
            places = [rank[name] for name in names]
        outside = [name for name, place in zip(names, places) if not 0 <= place < len(self.by_order)]
        if outside:
            raise DataError(f"{where}/{outside[0]} has a number above the {len(self.by_order)} labels of {self.origin}")
        return [self.by_order[place] for place in places]


def _from_text(path: Path) -> Labels:
    """``synset`` lines, or lines of an image's name and its synset separated by a comma or blanks."""
    lines = [line.strip() for line in read_bytes(path).decode("utf-8", "replace").splitlines()]
    numbered = [(number, re.split(r"[,\s]+", line)) for number, line in enumerate(lines, 1) if line]
    if numbered and numbered[0][1][0] == "ImageId":  # the head of Kaggle's LOC_val_solution.csv
        numbered = numbered[1:]
    if not numbered:
        raise DataError(f"{path} is empty; it must hold the synset of each validation image")
    ordered = SYNSET.fullmatch(numbered[0][1][0]) is not None
    names: dict[str, str] = {}
    for number, words in numbered:
        synset = words[0] if ordered else words[1] if len(words) > 1 else ""
        if not SYNSET.fullmatch(synset):
            raise DataError(f"{path} line {number} has no synset such as n01440764 where the first lines have one")
        if not ordered:
            names[re.sub(r"\.(jpe?g|png)$", "", words[0].rsplit("/", 1)[-1], flags=re.IGNORECASE)] = synset
    if ordered:
        return Labels(str(path), by_order=tuple(words[0] for _, words in numbered))
    return Labels(str(path), by_name=names)


def _from_devkit(path: Path) -> Labels:
    """``data/meta.mat`` has the synset of each number, ``data/..._ground_truth.txt`` the number of each image."""
    files = _devkit_files(path)
    rows = read_structs(files[_META], f"{_META} of {path}", "synsets") or []
    try:
        synset = {int(row["ILSVRC2012_ID"].item()): str(row["WNID"]) for row in rows}
        numbers = [int(line) for line in files[_TRUTH].split()]
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no readable development kit ({error}); download it again") from error
    wrong = [number for number in numbers if not SYNSET.fullmatch(synset.get(number, ""))]
    if wrong or not numbers:
        raise DataError(f"{path}: {_TRUTH} names class {wrong[0] if wrong else 'none'}, which {_META} doesn't have")
    return Labels(str(path), by_order=tuple(synset[number] for number in numbers))


def _devkit_files(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if path.is_dir():
        for name in (_META, _TRUTH):
            places = sorted(path.rglob(f"data/{name}"))
            if places:
                files[name] = read_bytes(places[0])
    else:
        with open_tar(path) as archive:
            for member in archive:
                place = member_path(str(path), member)
                if member.isfile() and place.name in (_META, _TRUTH) and place.parent.name == "data":
                    files[place.name] = archive.extractfile(member).read()
    for name in (_META, _TRUTH):
        if name not in files:
            raise DataError(
                f"{path} has no data/{name}; give ILSVRC2012_devkit_t12.tar.gz or the folder unpacked from it"
            )
    return files
