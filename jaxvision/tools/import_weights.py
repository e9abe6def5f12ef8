"""Brings PyTorch weights in: checks that they fit a network exactly, and writes them as one of our files.

    python -m jaxvision.tools.import_weights --from resnet50.pth --model resnet50 --to resnet50.safetensors
    python -m jaxvision.tools.import_weights --from deit.pth --model deit_small_patch16_224 --check --beside_timm
    python -m jaxvision.tools.import_weights --from resnet20.safetensors --model resnet20 --check --images test.npz
    python -m jaxvision.tools.import_weights --from resnet20.pth --model resnet20 --images test.npz --logits logits.npz

The last one's file is what jaxvision.tools.calibration reads: how calibrated is a released network?

Nothing in the file is executed. Exit codes: 0 done, 64 a file or an option that is wrong.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvision.benchmarks import torch_timm
from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError, StorageError
from jaxvision.models import torch_import, weight_file, zoo
from jaxvision.tools import command_line

_BATCH = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command_line.answer("import_weights", lambda: run(_parser().parse_args(arguments)))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m jaxvision.tools.import_weights", description=__doc__)
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="FILE", help="the .safetensors, .pth, .pt, ... file")
    add("--model", required=True, metavar="NAME", help="the network, for example resnet50 or deit_tiny_patch16_224")
    add("--num_classes", type=int, metavar="N", help="default: as many as the file's classifier has")
    add("--to", type=Path, metavar="OUT.safetensors", help="write the converted weights there")
    add("--check", action="store_true", help="convert, run a fixed input through the network, print what came out")
    add("--beside_timm", action="store_true", help="with --check: timm's logits of the same input beside ours")
    add("--images", type=Path, metavar="FILE.npz", help="classify its `image` (N,H,W,C uint8) and compare with `label`")
    add("--logits", type=Path, metavar="OUT.npz", help="write the logits of --images and their labels there")
    add("--drop", action="append", default=[], metavar="KEY", help="a tensor or module of the file to leave out")
    add("--skip_unknown", action="store_true", help="pass over objects in a PyTorch file that are no weights")
    return parser


def run(options: argparse.Namespace) -> None:
    """Converts, then checks, classifies and writes as the options say.

    Raises:
      ConfigError, DataError: see :mod:`jaxvision.models.weight_file` and :mod:`jaxvision.models.torch_import`; an
        images file that is missing, damaged or doesn't fit the network.
      StorageError: --logits can't be written.
    """
    if not (options.to or options.check or options.images):
        raise ConfigError("nothing to do: give --to OUT.safetensors, --check or --images FILE.npz")
    if options.to and options.to.suffix != ".safetensors":
        raise ConfigError(f"--to {options.to} must end in .safetensors")
    if options.beside_timm and not options.check:
        raise ConfigError("--beside_timm compares what --check computes: give both")
    if options.logits and not options.images:
        raise ConfigError(f"--logits {options.logits} needs --images FILE.npz, whose logits these are")
    if options.logits and options.logits.suffix != ".npz":
        raise ConfigError(f"--logits {options.logits} must end in .npz")
    name, spec = options.model, zoo.spec(options.model)
    if options.images and spec.dense:
        raise ConfigError(f"--images classifies images, but {name} labels their pixels; use --check")
    state = weight_file.load_state_dict(options.source, name, skip_unknown=options.skip_unknown)
    num_classes = options.num_classes
    if num_classes is None:
        num_classes = torch_import.classifier_size(name, state)
    model = zoo.build(name, num_classes=num_classes)
    template = zoo.variable_shapes(model, spec.input_size)
    try:
        variables = torch_import.convert(name, state, template, drop=options.drop)
    except DataError as error:
        raise DataError(f"{options.source}: {error}") from error
    dropped = [key for key in state if torch_import.is_dropped(key, options.drop)]
    print(f"{name}: {trees.count_parameters(variables['params']):,} parameters, {num_classes} classes")
    print(f"dropped keys: {', '.join(dropped) or 'none'}")
    apply = jax.jit(lambda variables, images: model.apply(variables, images))
    if options.check:
        images = fixed_images(spec.input_size)
        logits = np.asarray(apply(variables, images), np.float64)
        print(check(logits))
        if options.beside_timm:
            kept = {key: value for key, value in state.items() if key not in dropped}
            print(beside(logits, torch_timm.logits(name, kept, images, num_classes)))
    if options.images:
        images, labels = _read_images(options.images, spec.input_size)
        logits = classify(apply, variables, spec, images)
        right = int(np.sum(np.argmax(logits, -1) == labels))
        print(f"top-1: {right} of {len(images)} right ({100 * right / len(images):.2f} %)")
        if options.logits:
            _save_logits(options.logits, logits, labels)
    if options.to:
        weight_file.save_variables(options.to, variables, {"model": name, "num_classes": num_classes})
        print(f"wrote {options.to}")


def fixed_images(input_size: tuple[int, int]) -> np.ndarray:
    """Float32 [2, H, W, 3], standard normal from NumPy's seed 0."""
    return np.random.default_rng(0).standard_normal((2, *input_size, 3)).astype(np.float32)


def check(logits: np.ndarray) -> str:
    """One line about the logits of :func:`fixed_images`, any shape.

    Raises:
      DataError: the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise DataError("the network's output for a fixed input is not finite: the weights hold NaN or infinite values")
    total, size = logits.sum(), np.abs(logits).mean()
    return f"logits of a fixed input: shape {logits.shape}, finite, sum {total:.5g}, mean magnitude {size:.5g}"


def beside(logits: np.ndarray, peer: np.ndarray) -> str:
    """Three lines: the first logits of the first image here and in timm, and the largest difference of all."""

    def first(values: np.ndarray) -> str:
        return "  ".join(f"{value:9.5f}" for value in values[0, :6])

    worst = np.abs(logits - peer).max()
    return (
        f"here  {first(logits)}\ntimm  {first(peer)}\n"
        f"largest difference to timm {worst:.1e}, of {np.abs(peer).max():.3g}, the largest logit"
    )


def classify(apply: Any, variables: Any, spec: zoo.Spec, images: np.ndarray) -> np.ndarray:
    """The logits float32 [N, K] of images uint8 [N, H, W, 3], normalised as the network wants them."""
    mean, std = np.float32(spec.mean), np.float32(spec.std)
    logits = []
    for start in range(0, len(images), _BATCH):
        part = (images[start : start + _BATCH].astype(np.float32) / 255 - mean) / std
        real = len(part)
        # The last batch is filled up so that there is one compiled program.
        part = np.concatenate([part, np.zeros((_BATCH - real, *part.shape[1:]), np.float32)])
        logits.append(np.asarray(apply(variables, part))[:real])
    return np.concatenate(logits)


def _save_logits(path: Path, logits: np.ndarray, labels: np.ndarray) -> None:
    try:
        np.savez(path, logits=logits, labels=labels)
    except OSError as error:
        raise StorageError(f"{path} can't be written ({error.strerror or error})") from error
    print(f"wrote {path}")


def _read_images(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["image"], file["label"]
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; --images wants the arrays `image` and `label`") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} can't be read as an npz file ({error})") from error
    if images.dtype != np.uint8 or images.shape[1:] != (*size, 3) or not len(images):
        wanted = f"uint8 (N, {size[0]}, {size[1]}, 3)"
        raise DataError(f"{path}: `image` is {images.dtype} {images.shape}, but the network takes {wanted}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: `label` is {labels.dtype} {labels.shape}, but must be integers ({len(images)},)")
    return images, labels


if __name__ == "__main__":
    sys.exit(main())
