"""Prepares data sets that you downloaded for :func:`jaxvision.data.open_source`.

    python -m jaxvision.tools.prepare_data cifar10 --from cifar-10-python.tar.gz --to data/cifar10
    python -m jaxvision.tools.prepare_data svhn --from SVHN --to data/svhn
    python -m jaxvision.tools.prepare_data tiny_imagenet --from tiny-imagenet-200.zip --to data/tiny_imagenet
    python -m jaxvision.tools.prepare_data cub --from CUB_200_2011.tgz --to data/cub --verify
    python -m jaxvision.tools.prepare_data voc2012 --from VOCtrainval_11-May-2012.tar --to data/voc2012 --verify
    python -m jaxvision.tools.prepare_data imagenet --from ILSVRC2012 --to data/imagenet --verify
    python -m jaxvision.tools.prepare_data nas_bench_201 --from NATS-tss-v1_0-3ffb9-simple.tar --to data/nb201.npz
    python -m jaxvision.tools.prepare_data folder --from photos.zip --to data/photos.npz --size 32

Nothing is downloaded, and nothing in the files is executed. Exit codes: 0 done, 64 wrong command or input, 74 the
target can't be written, 130 stopped by Ctrl-C.

To add a data set: write one function here that adds its arguments to a parser and returns what runs, put it into
``COMMANDS``, and put the work into ``jaxvision/data/prepare_<name>.py``, imported inside.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.tools import command_line

Run = Callable[[argparse.Namespace], str]
"""Does the work for parsed arguments and returns what to print at the end."""


def cifar10(parser: argparse.ArgumentParser) -> Run:
    """CIFAR-10 from cifar-10-python.tar.gz (or the folder unpacked from it) to train.npz and test.npz."""
    return _cifar(parser, "cifar10")


def cifar100(parser: argparse.ArgumentParser) -> Run:
    """CIFAR-100 from cifar-100-python.tar.gz (or the folder): fine labels, and coarse ones as coarse_label."""
    return _cifar(parser, "cifar100")


def _cifar(parser: argparse.ArgumentParser, kind: str) -> Run:
    _add_paths(parser, "the official archive, or the folder unpacked from it", "the folder to write")
    _add_allow_other(parser)

    def run(args: argparse.Namespace) -> str:
        from jaxvision.data.prepare_cifar import prepare_cifar

        return _summary(prepare_cifar(kind, args.source, args.target, allow_other=args.allow_other, progress=progress))

    return run


def svhn(parser: argparse.ArgumentParser) -> Run:
    """SVHN from train_32x32.mat, test_32x32.mat (and extra_32x32.mat) to train.npz, test.npz (and extra.npz)."""
    return _images(parser, "prepare_svhn", "the folder of the .mat files, or one of them")


def tiny_imagenet(parser: argparse.ArgumentParser) -> Run:
    """Tiny-ImageNet from tiny-imagenet-200.zip (or the folder unpacked from it) to train.npz and val.npz."""
    return _images(parser, "prepare_tiny_imagenet", "the official zip, or the folder unpacked from it")


def _images(parser: argparse.ArgumentParser, function: str, source: str) -> Run:
    _add_paths(parser, source, "the folder to write")
    _add_allow_other(parser)

    def run(args: argparse.Namespace) -> str:
        from jaxvision.data import prepare_images

        prepare = getattr(prepare_images, function)
        return _summary(prepare(args.source, args.target, allow_other=args.allow_other, progress=progress))

    return run


def cub(parser: argparse.ArgumentParser) -> Run:
    """CUB-200-2011 from CUB_200_2011.tgz (or the folder): its images and lists in the official layout; resumes."""
    return _layout(parser, "CUB")


def voc2012(parser: argparse.ArgumentParser) -> Run:
    """VOC 2012 segmentation from VOCtrainval_11-May-2012.tar (or a folder) in the official layout; resumes.

    SegmentationClassAug and its lists are added by the same command from their folder or archive, with --allow_other.
    """
    return _layout(parser, "VOC2012")


def _layout(parser: argparse.ArgumentParser, name: str) -> Run:
    _add_paths(parser, "the official archive, or the folder unpacked from it", "the folder to write")
    _add_allow_other(parser)
    parser.add_argument("--verify", action="store_true", help="decode every image")

    def run(args: argparse.Namespace) -> str:
        from jaxvision.data import prepare_layout

        options = {"allow_other": args.allow_other, "verify": args.verify, "progress": progress}
        layout = getattr(prepare_layout, name)
        manifest, copied = prepare_layout.prepare_layout(layout, args.source, args.target, **options)
        lines = [f"{split}: {count} images" for split, count in manifest["splits"].items()]
        lines.append(f"{copied.written} files written, {copied.kept} there before, {copied.size} bytes")
        return "\n".join(lines + (["verified: all images decode"] if args.verify else []))

    return run


def folder(parser: argparse.ArgumentParser) -> Run:
    """Class folders of images (a directory or a zip) to one npz of equal-sized images."""
    _add_paths(parser, "the directory or zip with <class>/<image>", "the npz file to write")
    parser.add_argument("--size", type=int, required=True, help="pixels: shorter side scaled, centre cut")
    parser.add_argument("--inside", default="", help="the folder in a zip that holds the class folders")
    parser.add_argument("--ignore", nargs="*", default=(), help="patterns of files to leave out, such as '*.txt'")

    def run(args: argparse.Namespace) -> str:
        from jaxvision.data.prepare_folder import pack_folder

        options = {"inside": args.inside, "ignore": tuple(args.ignore), "progress": progress}
        return _summary(pack_folder(args.source, args.target, args.size, **options))

    return run


def imagenet(parser: argparse.ArgumentParser) -> Run:
    """ImageNet (ILSVRC 2012) from folders or the official tars to train/<synset>/ and val/<synset>/; resumes."""
    _add_paths(parser, "the folder with train/ and val/ or with the tars, or one tar", "the folder to write", False)
    parser.add_argument("--val_labels", type=Path, help="for flat validation images: their synsets, one a line")
    parser.add_argument("--devkit", type=Path, help="or ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it")
    parser.add_argument("--verify", action="store_true", help="decode every image and list the broken ones")
    parser.add_argument("--threads", type=int, default=8, help="threads that decode, with --verify")

    def run(args: argparse.Namespace) -> str:
        from jaxvision.data.prepare_imagenet import broken_images, prepare_imagenet

        lines = []
        if args.source:
            options = {"val_labels": args.val_labels, "devkit": args.devkit, "progress": progress}
            manifest, done = prepare_imagenet(args.source, args.target, **options)
            for split, copied in done.items():
                facts = manifest["splits"][split]
                lines.append(
                    f"{split}: {facts['images']} images of {facts['classes']} classes, {facts['bytes']} bytes "
                    f"({copied.written} written, {copied.kept} there before)"
                )
        elif not args.verify:
            raise ConfigError("--from=DIR_OR_TAR is needed, or --verify to check what --to holds; see --help")
        if args.verify:
            count, faults = broken_images(args.target, threads=args.threads, progress=progress)
            for fault in faults:
                print(fault)
            if faults:
                raise DataError(f"{len(faults)} of {count} images in {args.target} are broken; they are listed above")
            lines.append(f"verified: all {count} images decode")
        return "\n".join(lines)

    return run


def nas_bench_201(parser: argparse.ArgumentParser) -> Run:
    """Accuracies of the 15,625 NAS-Bench-201 networks from NATS-tss-v1_0-3ffb9-simple.tar (or the folder) to an npz."""
    _add_paths(parser, "NATS-tss-v1_0-3ffb9-simple.tar, or the folder unpacked from it", "the npz file to write")

    def run(args: argparse.Namespace) -> str:
        from jaxvision.data import prepare_files, prepare_nas_bench_201
        from jaxvision.methods.az_nas import table
        from jaxvision.models.nas_bench_201 import NUM_ARCHITECTURES

        records = prepare_nas_bench_201.read_release(args.source, total=NUM_ARCHITECTURES, progress=progress)
        arrays = table.pack(records, args.source)
        prepare_files.make_folder(args.target.parent)
        prepare_files.write_npz(args.target, arrays)
        best = {name: arrays[f"{name}_test"].max() / 100 for name in table.DATASETS}
        lines = [f"{title}: best test accuracy {best[name]:.2f} %" for name, title in table.DATASETS.items()]
        return "\n".join([f"{len(records):,} architectures, sha256 {prepare_files.digest(args.target)}", *lines])

    return run


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "tiny_imagenet": tiny_imagenet,
    "cub": cub,
    "voc2012": voc2012,
    "folder": folder,
    "imagenet": imagenet,
    "nas_bench_201": nas_bench_201,
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command_line.answer("prepare_data", lambda: _run(_parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> None:
    print(options.run(options))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m jaxvision.tools.prepare_data",
        description=__doc__.split("\n\nTo add")[0],
    )
    commands = parser.add_subparsers(required=True, metavar="DATASET")
    for name, add in COMMANDS.items():
        command = commands.add_parser(name, help=add.__doc__, description=add.__doc__)
        command.set_defaults(run=add(command))
    return parser


def _add_paths(parser: argparse.ArgumentParser, source: str, target: str, required: bool = True) -> None:
    path = lambda text: Path(text).expanduser()  # noqa: E731
    parser.add_argument("--from", dest="source", type=path, required=required, metavar="PATH", help=source)
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="PATH", help=target)


def _add_allow_other(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow_other", action="store_true", help="take files that are not the official ones")


def _summary(manifest: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {facts['examples']} images of {facts['classes']} classes, sha256 {facts['sha256']}"
        for name, facts in manifest["outputs"].items()
    )


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere one line at the end."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("[bold]{task.description}"),
        bars.BarColumn(bar_width=28),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
        count = int(bar.tasks[0].completed)
    if not console.is_terminal:
        print(f"{description}: {count} done", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
