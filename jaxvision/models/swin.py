"""Swin transformers, with the names and the arithmetic of timm; as classifiers or as backbones of detectors.

Sources: Liu et al. 2021; timm's ``swin_transformer.py``.

Names that a tap sees (``s`` stage, ``b`` block, ``W`` windows of an image, ``w`` pixels of a window, ``h x w`` map).
The windows of one image are neighbours on the first axis: reshape [B W, ...] to [B, W, ...]. Zeros that pad the map to
whole windows are in the windows. Inputs of the layers that a quantizer replaces:

| name | value |
|---|---|
| ``patch_embed.proj`` | the image, [B, H, W, C] |
| ``layers.{s}.blocks.{b}.attn.qkv`` | input of the fused q, k, v layer, [B W, w, C] |
| ``layers.{s}.blocks.{b}.attn.q``, ``.k``, ``.v`` | operands of the products, [B W, heads, w, d]; q *after* d^-0.5 |
| ``layers.{s}.blocks.{b}.attn.softmax`` | attention probabilities, [B W, heads, w, w] float32 |
| ``layers.{s}.blocks.{b}.attn.proj`` | input of the output layer, [B W, w, C] |
| ``layers.{s}.blocks.{b}.mlp.fc1``, ``.mlp.fc2`` | inputs of the two layers, [B, h w, C] and [B, h w, mlp_ratio C] |
| ``layers.{s}.downsample.reduction`` | input of the patch merging's layer, s >= 1, [B, h w, 4 C] |
| ``head`` | input of the classifier, [B, C] |

Inputs of the layer normalisations: ``patch_embed.norm``, ``layers.{s}.blocks.{b}.norm1``, ``.norm2``,
``layers.{s}.downsample.norm``, ``norm`` (with ``features``: ``norm0``, ``norm1``, ...), all [B, h, w, C].

Everything else ends in ``.out`` and is for looking, not for quantizing: ``patch_embed.out``, ``layers.{s}.out``,
``layers.{s}.blocks.{b}.out`` and in each block ``norm1.out``, ``attn.qkv.out``, ``attn.out``, ``norm2.out``,
``mlp.fc1.out``, ``mlp.gelu.out``, ``mlp.out``; ``layers.{s}.downsample.norm.out``, ``layers.{s}.downsample.out``,
``norm.out``, ``norm{s}.out``, ``head.out``.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.attention import Attention
from jaxvision.models.layers import Dense, Dropout, DropPath, Pair, pair
from jaxvision.models.mlp import INITS, Mlp, classify, matrix_init, normalise
from jaxvision.models.patches import PatchEmbed
from jaxvision.models.windows import merge_windows, pad_to_multiple, shift_mask, split_windows, window_and_shift


class PatchMerging(nn.Module):
    """Four neighbouring pixels to one: [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 2 C], zeros below and right.

    ``reduction(norm(concat(x00, x10, x01, x11)))``, first index the row; the reduction has no bias.
    """

    layer_norm_eps: float = 1e-5
    weight_init: str = "timm"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, tap: Tap = no_tap) -> jax.Array:
        x = pad_to_multiple(x, (2, 2))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        x = normalise(x, "norm", self.layer_norm_eps, self.dtype, tap)
        reduction = Dense(
            2 * channels, use_bias=False, kernel_init=matrix_init(self.weight_init), dtype=self.dtype, name="reduction"
        )
        y = reduction(tap("reduction", x.reshape(batch, -1, 4 * channels)))
        return tap("out", y.reshape(batch, height // 2, width // 2, 2 * channels))


class SwinBlock(nn.Module):
    """Attention inside windows (shifted in every second block), then a perceptron: [B, h, w, C] -> [B, h, w, C].

    norm1, roll by minus the shift, pad with zeros to whole windows, attend inside each, and all of it back. (The
    authors' detection code pads before it rolls, which differs for maps that are no whole number of windows.)
    """

    num_heads: int
    window: tuple[int, int]
    shifted: bool = False
    shrink_windows: bool = True
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = "timm"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        mlp = Mlp(
            int(x.shape[-1] * self.mlp_ratio),
            self.dropout_rate,
            weight_init=self.weight_init,
            dtype=self.dtype,
            name="mlp",
        )
        y = normalise(x, "norm1", self.layer_norm_eps, self.dtype, tap)
        x = x + DropPath(self.drop_path_rate)(self._attend(y, train, tap), train)
        y = normalise(x, "norm2", self.layer_norm_eps, self.dtype, tap)
        y = y.reshape(len(x), -1, x.shape[-1])
        y = mlp(y, train=train, tap=scoped(tap, "mlp")).reshape(x.shape)
        return tap("out", x + DropPath(self.drop_path_rate)(y, train))

    def _attend(self, x: jax.Array, train: bool, tap: Tap) -> jax.Array:
        height, width = x.shape[1:3]
        window, shift = window_and_shift((height, width), self.window, self.shifted, shrink=self.shrink_windows)
        attention = Attention(
            self.num_heads,
            window,
            self.qkv_bias,
            self.dropout_rate,
            self.attention_dropout_rate,
            self.weight_init,
            self.dtype,
            name="attn",
        )
        if any(shift):
            x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2))
        x = pad_to_multiple(x, window)
        padded = x.shape[1:3]
        mask = shift_mask(padded, window, shift) if any(shift) else None
        x = attention(split_windows(x, window), mask, train=train, tap=scoped(tap, "attn"))
        x = merge_windows(x, window, padded)[:, :height, :width]
        return jnp.roll(x, shift, (1, 2)) if any(shift) else x


class SwinStage(nn.Module):
    """Patch merging (except in the first stage), then blocks that shift every second time.

    Attributes:
      block: makes a block, given ``shifted``, ``drop_path_rate`` and ``name``.
      drop_path_rates: one a block.
      merging: the patch merging's maker, None in the first stage.
    """

    block: Callable[..., SwinBlock]
    drop_path_rates: tuple[float, ...]
    merging: Callable[..., PatchMerging] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        if self.merging is not None:
            x = self.merging(name="downsample")(x, tap=scoped(tap, "downsample"))
        for i, rate in enumerate(self.drop_path_rates):
            block = self.block(shifted=i % 2 == 1, drop_path_rate=rate, name=f"blocks_{i}")
            x = block(x, train=train, tap=scoped(tap, f"blocks.{i}"))
        return tap("out", x)


class Swin(nn.Module):
    """Hierarchical transformer with shifted windows: images [B, H, W, C] float32 -> logits [B, K] float32.

    With ``features`` the result is one map a stage instead, [B, h_s, w_s, 2^s width] of the compute dtype, each after a
    LayerNorm of its own (``norm0``, ``norm1``, ...), and there is no head. Images are padded with zeros, below and
    right, to whole patches.

    Attributes:
      num_classes: K.
      patch_size: pixels a side, or (rows, columns).
      width: channels of stage 0; they double from stage to stage.
      depths, num_heads: blocks and heads of each stage.
      window: pixels a side, or (rows, columns).
      shrink_windows: a map no larger than the window has one window of its own size, not shifted (timm). False keeps
        window and shift everywhere, so that the weights serve images of any size (detection).
      mlp_ratio, qkv_bias, layer_norm_eps: as in ViT; eps is 1e-5 here.
      dropout_rate: after the patch embedding, the attention's output layer, GELU and fc2.
      attention_dropout_rate: of attention probabilities.
      drop_path_rate: of the last block; it grows linearly from 0 in the first.
      weight_init: ``"timm"`` or ``"fan_in"``, see :func:`jaxvision.models.mlp.matrix_init`.
      features: see above.
      dtype: compute dtype; layer normalisations, softmax and logits stay float32.

    Raises:
      ConfigError: attributes that don't fit each other, or images that don't fit the weights.
    """

    num_classes: int = 1000
    patch_size: Pair = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Pair = 7
    shrink_windows: bool = True
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = "timm"
    features: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ConfigError(f"depths={self.depths} and num_heads={self.num_heads} must have one entry a stage")
        for stage, heads in enumerate(self.num_heads):
            if self.width * 2**stage % heads:
                raise ConfigError(
                    f"num_heads={self.num_heads}: stage {stage} has {self.width * 2**stage} channels, no multiple of "
                    f"{heads} heads"
                )
        if self.weight_init not in INITS:
            raise unknown("weight_init", self.weight_init, INITS)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array | tuple[jax.Array, ...]:
        embed = PatchEmbed(
            self.width, self.patch_size, self.layer_norm_eps, self.weight_init, self.dtype, name="patch_embed"
        )
        images = pad_to_multiple(images, pair(self.patch_size))
        x = tap("patch_embed.out", embed(images, tap=scoped(tap, "patch_embed")))
        x = Dropout(self.dropout_rate)(x, train)
        maps = []
        for i, stage in enumerate(self._stages()):
            x = stage(x, train=train, tap=scoped(tap, f"layers.{i}"))
            if self.features:
                maps.append(normalise(x, f"norm{i}", self.layer_norm_eps, self.dtype, tap))
        if self.features:
            return tuple(maps)
        x = normalise(x, "norm", self.layer_norm_eps, self.dtype, tap)
        return classify(jnp.mean(x, (1, 2)), "head", self.num_classes, self.weight_init, self.dtype, tap)

    def _stages(self) -> list[SwinStage]:
        common = {"layer_norm_eps": self.layer_norm_eps, "weight_init": self.weight_init, "dtype": self.dtype}
        rates = iter(np.linspace(0.0, self.drop_path_rate, sum(self.depths)).tolist())
        stages = []
        for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads)):
            block = partial(
                SwinBlock,
                heads,
                pair(self.window),
                shrink_windows=self.shrink_windows,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                **common,
            )
            merging = partial(PatchMerging, **common) if i else None
            stages.append(SwinStage(block, tuple(islice(rates, depth)), merging, name=f"layers_{i}"))
        return stages


_SIZES = {
    "tiny": {"width": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"width": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"width": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
_FORMATS = {
    "patch4_window7_224": {"window": 7, "input_size": (224, 224), "crop_fraction": 0.9},
    "patch4_window12_384": {"window": 12, "input_size": (384, 384), "crop_fraction": 1.0},
}
_PUBLISHED = {
    f"swin_{size}_{form}": (size, form)
    for size in _SIZES
    for form in _FORMATS
    if _FORMATS[form]["window"] == 7 or size in ("base", "large")
}

PRESETS: dict[str, dict[str, Any]] = {
    name: {"patch_size": 4, "window": _FORMATS[form]["window"], **_SIZES[size]}
    for name, (size, form) in _PUBLISHED.items()
}
"""Keyword arguments of :class:`Swin` by timm's names."""

SPECS: dict[str, dict[str, Any]] = {
    name: {
        "input_size": _FORMATS[form]["input_size"],
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_fraction": _FORMATS[form]["crop_fraction"],
    }
    for name, (_, form) in _PUBLISHED.items()
}
"""How images are prepared, by the same names; the fields are those of ``vit.SPECS``."""
