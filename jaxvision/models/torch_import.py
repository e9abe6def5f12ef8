"""Weights in and out: PyTorch checkpoints to variables and back, strictly, and this package's own weight files.

A parameter's PyTorch name follows from its name here: ``params/layer1_0/conv1/kernel`` is ``layer1.0.conv1.weight``.
Nothing in a file is executed: safetensors, or PyTorch files through :mod:`jaxvision.core.safe_pickle`.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.core.torch_file import read_torch_checkpoint
from jaxvision.models import zoo

StateDict = dict[str, np.ndarray]

FORMAT = "jaxvision"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NESTS = ("state_dict", "model", "model_ema", "net")
DROPPED = ("num_batches_tracked", "relative_position_index", "attn_mask")  # recomputed or of no use here
CLASSIFIERS = ("fc", "linear", "head", "head.fc", "head_dist")
_SHOWN = 4


# --- reading -------------------------------------------------------------------------------------------------------


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


# --- names and layouts ---------------------------------------------------------------------------------------------


def torch_name(name: str, family: str) -> str:
    """``params/layer1_0/bn1/scale`` -> ``layer1.0.bn1.weight``: our leaf name to the original's state-dict name."""
    collection, *modules, leaf = name.split("/")
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    if collection == "batch_stats":
        leaf = {"mean": "running_mean", "var": "running_var"}[leaf]
    else:
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    if modules == ["patch_embed"]:
        modules = ["patch_embed", "proj"]
    if family == "swin" and modules == ["head"]:
        modules = ["head", "fc"]
    return ".".join([*modules, leaf])


def _to_flax(name: str, array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO for convolutions, (out, in) -> (in, out) for matrices; everything else as it is."""
    if not name.endswith("/kernel"):
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    if not name.endswith("/kernel"):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _modern_names(state: Mapping[str, np.ndarray], family: str) -> StateDict:
    """Older and sister code bases' names in today's: timm's first Swin, kuangliu's ResNets."""
    rules: list[tuple[str, str | Callable[[re.Match], str]]] = []
    if family == "swin":
        if "layers.0.downsample.reduction.weight" in state:
            rules.append((r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."))
        rules.append((r"^head\.(weight|bias)$", r"head.fc.\1"))
    elif family == "resnet":
        rules = [(r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")]
    elif family == "cifar_resnet":
        rules = [(r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")]
    renamed = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if key in renamed:
            raise DataError(f"the checkpoint names '{key}' twice, in an older and a newer spelling")
        renamed[key] = value
    return renamed


def classifier_size(name: str, state: Mapping[str, np.ndarray]) -> int:
    """How many classes the checkpoint's classifier has.

    Raises:
      DataError: it has none.
    """
    state = _modern_names(state, zoo.spec(name).family)
    for key in CLASSIFIERS:
        if (weight := state.get(f"{key}.weight")) is not None:
            return int(weight.shape[0])
    raise DataError(f"the checkpoint has no classifier ({', '.join(CLASSIFIERS)}); give the number of classes")


# --- conversion ----------------------------------------------------------------------------------------------------


def convert(
    name: str,
    state_dict: Mapping[str, np.ndarray],
    template: Any,
    *,
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    grid: tuple[int, int] | None = None,
) -> Any:
    """The variables of model ``name`` from a PyTorch state dict, strictly.

    Every key is used or dropped, every parameter set, every shape equal. A ViT position embedding of another grid is
    resized (:func:`resize_pos_embed`).

    Args:
      name: of the zoo.
      state_dict: PyTorch name -> array, convolutions OIHW, matrices (out, in).
      template: the model's variables or their shapes (``zoo.variable_shapes``).
      drop: names in the checkpoint (of a tensor, or of a module and all in it) that the model has no use for.
      keep: PyTorch names whose variables stay as they are in ``template``, for example ``("fc",)`` to fine-tune on
        other classes; keys of the checkpoint under them are dropped.
      grid: (rows, columns) of the model's patches, where they are not a square.

    Returns:
      A tree like ``template`` of NumPy arrays with its dtypes.

    Raises:
      DataError: the checkpoint doesn't fit; names the first tensors that are missing, unexpected or of another shape.
      ConfigError: a name in ``drop`` or ``keep`` that matches nothing.
    """
    family = zoo.spec(name).family
    drop, keep = tuple(drop), tuple(keep)
    wanted = {torch_name(leaf_name, family): leaf_name for leaf_name in trees.named_leaves(template)}
    for what, prefixes, keys in (("drop", drop, state_dict), ("keep", keep, wanted)):
        for prefix in prefixes:
            if not any(_under(key, (prefix,)) for key in keys):
                where = "the checkpoint" if what == "drop" else name
                raise ConfigError(f"{what} names '{prefix}', but {where} has no such tensor or module")
    state = {key: value for key, value in state_dict.items() if not is_dropped(key, drop)}
    state = {key: value for key, value in _modern_names(state, family).items() if not _under(key, keep)}
    state = _fit_pos_embed(state, template, grid)
    arrays = {wanted[key]: _to_flax(wanted[key], value) for key, value in state.items() if key in wanted}
    missing = [key for key, leaf in wanted.items() if leaf not in arrays and not _under(key, keep)]
    _check_fit(name, template, arrays, missing, [key for key in state if key not in wanted], family)

    def fill(leaf_name, leaf):
        if leaf_name in arrays:
            return np.array(arrays[leaf_name], dtype=leaf.dtype, order="C")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ConfigError(f"{torch_name(leaf_name, family)} is to be kept, but the template has only its shape")
        return np.asarray(leaf)

    return trees.map_named(fill, template)


def is_dropped(key: str, drop: Iterable[str] = ()) -> bool:
    """Is this key of a checkpoint left out: bookkeeping (``DROPPED``), or named by ``drop``?"""
    return key.rsplit(".", 1)[-1] in DROPPED or _under(key, drop)


def _under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _check_fit(
    name: str, template: Any, arrays: StateDict, missing: list[str], unexpected: list[str], family: str
) -> None:
    shapes = {leaf: tuple(value.shape) for leaf, value in trees.named_leaves(template).items() if leaf in arrays}
    other = [leaf for leaf, shape in shapes.items() if arrays[leaf].shape != shape]
    for leaf in other:
        key, have, want = torch_name(leaf, family), arrays[leaf].shape, shapes[leaf]
        module = key.rpartition(".")[0]
        if module in CLASSIFIERS and have[:-1] == want[:-1]:
            raise DataError(
                f"the checkpoint's classifier '{module}' has {have[-1]} classes, the model {name} {want[-1]}: set "
                f"num_classes={have[-1]}, or leave the classifier as it is in the model with keep=('{module}',)"
            )
    mismatched = [f"{torch_name(leaf, family)} {arrays[leaf].shape} for {shapes[leaf]}" for leaf in other]
    problems = [
        f"{len(items)} {what} ({', '.join(items[:_SHOWN])}{', ...' if len(items) > _SHOWN else ''})"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if items
    ]
    if problems:
        raise DataError(f"the checkpoint does not fit {name}: {'; '.join(problems)}")


def export_state_dict(name: str, variables: Any) -> StateDict:
    """The PyTorch-named, PyTorch-shaped state dict of ``variables``: the inverse of :func:`convert`."""
    family = zoo.spec(name).family
    leaves = trees.named_leaves(variables)
    return {torch_name(leaf, family): np.array(_to_torch(leaf, np.asarray(v)), order="C") for leaf, v in leaves.items()}


# --- position embeddings -------------------------------------------------------------------------------------------


def resize_pos_embed(
    pos_embed: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int
) -> np.ndarray:
    """A ViT position embedding for another grid of patches: bicubic with antialiasing, prefix tokens untouched.

    [1, num_prefix + h w, D] float32 -> [1, num_prefix + h' w', D]. Source: timm ``resample_abs_pos_embed``.
    """
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    width = pos_embed.shape[-1]
    image = np.asarray(patches, np.float32).reshape(1, *old_grid, width)
    resized = jax.image.resize(image, (1, *new_grid, width), "cubic", antialias=True)
    return np.concatenate([prefix, np.asarray(resized).reshape(1, -1, width)], 1)


def _fit_pos_embed(state: StateDict, template: Any, grid: tuple[int, int] | None) -> StateDict:
    leaves = trees.named_leaves(template)
    target, source = leaves.get("params/pos_embed"), state.get("pos_embed")
    if target is None or source is None or source.shape == target.shape or source.ndim != 3:
        return state
    num_prefix = sum(f"params/{token}" in leaves for token in ("cls_token", "dist_token"))
    old, new = _square(source.shape[1] - num_prefix), grid or _square(target.shape[1] - num_prefix)
    return {**state, "pos_embed": resize_pos_embed(source, old, new, num_prefix)}


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens or not side:
        raise DataError(
            f"a position embedding of {tokens} patches is no square grid, so it can't be resized without knowing its "
            "rows and columns; resize it with torch_import.resize_pos_embed first"
        )
    return side, side


# --- this package's weight files -----------------------------------------------------------------------------------


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


def load_state_dict(path: str | os.PathLike, name: str, *, skip_unknown: bool = False) -> StateDict:
    """The PyTorch-named tensors for model ``name`` in a foreign file (:func:`read_state_dict`) or in one of ours.

    Raises:
      DataError: as in :func:`read_state_dict`, or one of our files holds another model.
    """
    state = read_state_dict(path, skip_unknown=skip_unknown)
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        return state
    if metadata.get("model") != name:
        raise DataError(f"{path} holds a {metadata.get('model')}, not a {name}")
    family = zoo.spec(name).family
    return {torch_name(leaf, family): _to_torch(leaf, value) for leaf, value in state.items()}


def load_pretrained(
    path: str | os.PathLike, name: str, template: Any, *, drop: Iterable[str] = (), keep: Iterable[str] = ()
) -> Any:
    """What ``config.init_from`` means: the variables of model ``name`` from one of our files or a PyTorch one.

    Arguments and result as in :func:`convert`.

    Raises:
      DataError, ConfigError: as in :func:`load_state_dict` and :func:`convert`.
    """
    state = load_state_dict(path, name)
    try:
        return convert(name, state, template, drop=drop, keep=keep)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
