"""CUB-200-2011 and VOC 2012: the files that are needed, copied in the official layout; can be killed and continued."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxvision.core.errors import DataError
from jaxvision.data import cub, voc
from jaxvision.data.folder import ListedSource
from jaxvision.data.prepare_archive import archive_items, describe_source
from jaxvision.data.prepare_files import Progress, read_bytes, silent, write_json
from jaxvision.data.prepare_journal import Copied, copy_items

Opened = ListedSource | voc.VocSource


@dataclass(frozen=True)
class Layout:
    """A data set that is used as it comes.

    Attributes:
      name: of the data set.
      archives: the official archives' names and MD5.
      select: see :data:`jaxvision.data.prepare_archive.Select`.
      splits: the splits in a folder.
      open: ``(folder, split) -> source``, which checks the lists.
    """

    name: str
    archives: dict[str, str]
    select: Callable[[PurePosixPath], str | None]
    splits: Callable[[Path], tuple[str, ...]]
    open: Callable[[Path, str], Opened]


def prepare_layout(
    layout: Layout,
    source: Path,
    target: Path,
    *,
    allow_other: bool = False,
    verify: bool = False,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Copied]:
    """Copies the needed files, opens every split, and writes ``manifest.json``.

    Parts that come separately (VOC's masks of SegmentationClassAug, their lists) are added to the same target by one
    call each, the main archive first.

    Args:
      layout: :data:`CUB` or :data:`VOC2012`.
      source: the official archive, another tar or zip, or a folder.
      target: the folder to write.
      allow_other: True takes an archive whose MD5 is not that of the official one.
      verify: True also decodes every image (and mask) of the splits.
      progress: shows how far it is.

    Returns:
      What ``manifest.json`` holds (for each source: files, bytes and a digest over all names and contents; examples of
      each split), and what this call copied.

    Raises:
      DataError: naming the file that is missing, damaged or in contradiction to another.
      StorageError: the target can't be written.
    """
    described = describe_source(source, layout.archives, allow_other)
    manifest = _manifest(layout, target)
    items = archive_items(source, layout.select)
    copied = copy_items(items, target, description=f"{layout.name}: files", progress=progress)
    if not copied.written + copied.kept:
        names = " or ".join(layout.archives)
        raise DataError(f"{source} holds no file of {layout.name}; give {names} or the folder unpacked from it")
    facts = {"files": copied.written + copied.kept, "bytes": copied.size, "blake2b": copied.digest}
    manifest["sources"][source.name] = {**described, **facts}
    for split in layout.splits(target):
        opened = layout.open(target, split)
        manifest["splits"][split] = len(opened)
        if verify:
            with progress(f"{layout.name}: decoding {split}", None) as advance:
                advance(opened.verify())
    write_json(target / "manifest.json", manifest)
    return manifest, copied


def _manifest(layout: Layout, target: Path) -> dict[str, Any]:
    """The manifest to complete."""
    path = target / "manifest.json"
    if path.is_file():
        try:
            old = json.loads(read_bytes(path))
            if old["dataset"] == layout.name:
                return {"dataset": layout.name, "sources": dict(old["sources"]), "splits": {}}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no manifest of {layout.name}; give another --to or remove it") from error
        raise DataError(f"{path} is the manifest of {old['dataset']}, not of {layout.name}; give another --to")
    return {"dataset": layout.name, "sources": {}, "splits": {}}


def _select_cub(path: PurePosixPath) -> str | None:
    """``images.txt`` and the other lists, ``images/<class>/<image>``; attributes and parts are left out."""
    parts = path.parts[path.parts.index(cub.TOP) + 1 :] if cub.TOP in path.parts else path.parts
    if len(parts) == 1 and parts[0] in cub.LISTS:
        return parts[0]
    return "/".join(parts) if len(parts) == 3 and parts[0] == "images" else None


def _select_voc(path: PurePosixPath) -> str | None:
    """Images, masks, and the lists of segmentation; instances, boxes and the other lists are left out."""
    folder, suffix = "/".join(path.parts[-3:-1]), path.suffix.lower()
    if folder == voc.LISTS[0] and suffix == ".txt":
        return f"{voc.LISTS[0]}/{path.name}"
    kinds = {voc.IMAGES: ".jpg", voc.MASKS: ".png", voc.AUGMENTED: ".png", voc.LISTS[1]: ".txt"}
    parent = path.parent.name
    return f"{parent}/{path.name}" if kinds.get(parent) == suffix else None


def _voc_splits(folder: Path) -> tuple[str, ...]:
    lists = [file for place in voc.LISTS for file in sorted((folder / place).glob("*.txt"))]
    if not lists:
        raise DataError(f"{folder} has no list in {voc.LISTS[0]}/; prepare the main archive before its additions")
    return tuple(dict.fromkeys(file.stem for file in lists if file.stem != "test"))  # its masks aren't public


def _open_voc(folder: Path, split: str) -> voc.VocSource:
    """With the masks that the list belongs to: the additional ones where the official masks don't have them all."""
    try:
        return voc.VocSource(folder, split)
    except DataError:
        if not (folder / voc.AUGMENTED).is_dir():
            raise
        return voc.VocSource(folder, split, masks=voc.AUGMENTED)


CUB = Layout(
    name="cub",
    archives={"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"},
    select=_select_cub,
    splits=lambda folder: cub.SPLITS,
    open=cub.cub,
)
VOC2012 = Layout(
    name="voc2012",
    archives={"VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd"},
    select=_select_voc,
    splits=_voc_splits,
    open=_open_voc,
)
