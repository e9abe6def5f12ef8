"""PyTorch state dicts to variables and back, strictly; files are the business of ``weight_file``.

A parameter's PyTorch name follows from its name here: ``params/layer1_0/conv1/kernel`` is ``layer1.0.conv1.weight``.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.models import zoo

StateDict = dict[str, np.ndarray]

DROPPED = ("num_batches_tracked", "relative_position_index", "attn_mask")  # recomputed or of no use here
CLASSIFIERS = ("fc", "linear", "classifier", "classifier.1", "head", "head.fc", "head_dist", "segmentation_head.0")
_SHOWN = 4
_SHIFT = re.compile(r"/move\d/bias$")


# --- names and layouts ---------------------------------------------------------------------------------------------


def torch_name(name: str, family: str) -> str:
    """``params/layer1_0/bn1/scale`` -> ``layer1.0.bn1.weight``: our leaf name to the original's state-dict name."""
    collection, *modules, leaf = name.split("/")
    modules = [re.sub(r"_(\d+)(?=_|$)", r".\1", module) for module in modules]
    if collection == "batch_stats":
        leaf = {"mean": "running_mean", "var": "running_var"}[leaf]
    else:
        leaf = {"kernel": "weight", "scale": "weight", "slope": "weight"}.get(leaf, leaf)
    if modules == ["patch_embed"]:
        modules = ["patch_embed", "proj"]
    if family == "swin" and modules == ["head"]:
        modules = ["head", "fc"]
    return ".".join([*modules, leaf])


def _to_flax(name: str, array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO for convolutions, (out, in) -> (in, out) for matrices; everything else as it is, but for ReActNet's
    shifts, which are (1, C, 1, 1) there."""
    if not name.endswith("/kernel"):
        return array.reshape(-1) if _SHIFT.search(name) else array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    if not name.endswith("/kernel"):
        return array.reshape(1, -1, 1, 1) if _SHIFT.search(name) else array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _modern_names(state: Mapping[str, np.ndarray], family: str) -> StateDict:
    """Older and sister code bases' names in today's: timm's first Swin, kuangliu's ResNets, SMP before 2025; and the
    weights of a ResNet as those of DeepLab's encoder."""
    rules: list[tuple[str, str | Callable[[re.Match], str]]] = []
    if family == "swin":
        if "layers.0.downsample.reduction.weight" in state:
            rules.append((r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."))
        rules.append((r"^head\.(weight|bias)$", r"head.fc.\1"))
    elif family == "resnet":
        rules = [(r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")]
    elif family == "cifar_resnet":
        rules = [(r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")]
    elif family == "deeplab":
        rules = [(r"^decoder\.0\.", "decoder.aspp."), (r"^decoder\.1\.", "decoder.conv."),
                 (r"^decoder\.2\.", "decoder.bn.")]  # fmt: skip
        if not any(key.startswith("encoder.") for key in state):
            state = {key: value for key, value in state.items() if not key.startswith("fc.")}
            rules.append((r"^(?=(conv1|bn1|layer\d)\b)", "encoder."))
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
