"""Weight files: PyTorch's (safetensors or pickled) and this package's own, read without executing anything.

:mod:`jaxvision.core.safe_pickle` reads the pickled ones. What is in them becomes variables in ``torch_import``.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.core.torch_file import read_torch_checkpoint
from jaxvision.models import torch_import
from jaxvision.models.torch_import import StateDict

FORMAT = "jaxvision"
BITS = "bits"
"""The metadata's field that a quantized network has: (weight, input) of each layer by its kernel's name, as JSON."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NESTS = ("state_dict", "model", "model_ema", "net")


# --- foreign files ---------------------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike, *, skip_unknown: bool = False) -> StateDict:
    """The tensors of a checkpoint by their PyTorch names, as NumPy arrays.

    ``.safetensors``, or PyTorch (``TORCH_SUFFIXES``). The usual wrappers (``state_dict``, ``model``,
    ``model_ema``, ``net``) and the prefix ``module.`` are taken off.

    Args:
      path: the file.
      skip_unknown: True passes over objects in a PyTorch file that are no weights (training arguments, an optimizer)
        without making them; False refuses the file.

    Raises:
      DataError: the file is missing, damaged, wants to run code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a .safetensors or a PyTorch .pth file")
    if path.suffix == ".safetensors":
        values = _read_safetensors(path)[0]
    elif path.suffix in TORCH_SUFFIXES:
        values = _unwrap(read_torch_checkpoint(path, skip_unknown=skip_unknown))
    else:
        raise DataError(f"{path} ends in '{path.suffix}'; weights come as .safetensors, {', '.join(TORCH_SUFFIXES)}")
    tensors = isinstance(values, Mapping) and all(isinstance(value, np.ndarray) for value in values.values())
    if not values or not tensors:
        raise DataError(f"{path} holds no state dict (a flat dictionary of tensors), under none of {', '.join(NESTS)}")
    return {str(key).removeprefix("module."): value for key, value in values.items()}


def _unwrap(values: Any) -> Any:
    while isinstance(values, Mapping):
        inner = next((values[key] for key in NESTS if isinstance(values.get(key), Mapping)), None)
        if inner is None:
            return values
        values = inner
    return values


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    """Tensors and metadata."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} can't be read as safetensors ({error})") from error


def widths_text(widths: Iterable[Sequence[int | None]]) -> str:
    """``W2A2`` for (weight, input) of all layers, where None is 32 bits; ``mixed bits`` if they differ."""
    found = {tuple(32 if width is None else width for width in pair) for pair in widths}
    return "W{}A{}".format(*found.pop()) if len(found) == 1 else "mixed bits"


# --- this package's files --------------------------------------------------------------------------------------------


def save_variables(path: str | os.PathLike, variables: Any, metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file with our slash-joined names; complete or not at all.

    Args:
      path: the file.
      variables: ``{"params": ..., "batch_stats": ...}``.
      metadata: at least ``model`` (its zoo name) and ``num_classes``; values become strings.

    Raises:
      ConfigError: metadata without these, or a path that can't be written.
    """
    if absent := [key for key in ("model", "num_classes") if key not in metadata]:
        raise ConfigError(f"the metadata of a weight file needs {' and '.join(absent)}")
    path = Path(path)
    arrays = {leaf: np.array(value, order="C") for leaf, value in trees.named_leaves(variables).items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {"format": FORMAT, **{key: str(value) for key, value in metadata.items()}}
        safetensors.numpy.save_file(arrays, partial, text)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} can't be written ({error})") from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file; ``format`` is "jaxvision" in ours. Empty for other kinds of files."""
    return _read_safetensors(Path(path))[1] if Path(path).suffix == ".safetensors" else {}


def load_variables(path: str | os.PathLike, template: Any) -> Any:
    """The variables of a file of :func:`save_variables`: a tree like ``template``, NumPy arrays with its dtypes.

    Raises:
      DataError: the file is damaged, not one of ours, or its names or shapes differ from the template's.
    """
    arrays, metadata = _read_safetensors(Path(path))
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is no jaxvision weight file; convert it with python -m jaxvision.tools.import_weights")
    leaves = trees.named_leaves(template)
    for name in sorted(leaves.keys() | arrays.keys()):
        have, want = (tuple(d[name].shape) if name in d else "absent" for d in (arrays, leaves))
        if have != want:
            raise DataError(f"{path} does not fit: {name} is {have} in the file, {want} in the model")
    return trees.map_named(lambda name, leaf: arrays[name].astype(leaf.dtype), template)


# --- either ----------------------------------------------------------------------------------------------------------


def load_state_dict(path: str | os.PathLike, name: str, *, skip_unknown: bool = False) -> StateDict:
    """The PyTorch-named tensors for model ``name`` in a foreign file (:func:`read_state_dict`) or in one of ours.

    Raises:
      DataError: as in :func:`read_state_dict`, or one of our files holds another model or a quantized network.
    """
    state = read_state_dict(path, skip_unknown=skip_unknown)
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        return state
    if metadata.get("model") != name:
        raise DataError(f"{path} holds a {metadata.get('model')}, not a {name}")
    if BITS in metadata:
        widths = widths_text(json.loads(metadata[BITS]).values())
        raise DataError(f"{path} holds a network quantized to {widths}, which only trs starts from; give float weights")
    return torch_import.export_state_dict(name, state)


def load_pretrained(
    path: str | os.PathLike, name: str, template: Any, *, drop: Iterable[str] = (), keep: Iterable[str] = ()
) -> Any:
    """What ``config.init_from`` means: the variables of model ``name`` from one of our files or a PyTorch one.

    Arguments and result as in :func:`torch_import.convert`.

    Raises:
      DataError, ConfigError: as in :func:`load_state_dict` and :func:`torch_import.convert`.
    """
    state = load_state_dict(path, name)
    try:
        return torch_import.convert(name, state, template, drop=drop, keep=keep)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
