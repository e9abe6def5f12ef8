"""Vision transformers: ViT, DeiT and distilled DeiT, with the names and the arithmetic of timm.

Sources: Dosovitskiy et al. 2021; Touvron et al. 2021; timm's ``vision_transformer.py`` and ``deit.py``.

Names that a tap sees (``i`` the block, ``N`` tokens with the prefix, ``H`` heads, ``d`` head width), in order.
Inputs of the layers that a quantizer replaces:

| name | value |
|---|---|
| ``patch_embed.proj`` | the image, [B, H, W, C] |
| ``blocks.{i}.attn.qkv`` | input of the fused q, k, v layer, [B, N, D] |
| ``blocks.{i}.attn.q``, ``.k``, ``.v`` | operands of the two products, [B, H, N, d]; q before its factor d^-0.5 |
| ``blocks.{i}.attn.softmax`` | attention probabilities, [B, H, N, N] float32 |
| ``blocks.{i}.attn.proj`` | input of the output layer, [B, N, D] |
| ``blocks.{i}.mlp.fc1``, ``blocks.{i}.mlp.fc2`` | inputs of the two layers, [B, N, D] and [B, N, mlp_ratio D] |
| ``head``, ``head_dist`` | inputs of the classifiers, [B, D] |

Inputs of the layer normalisations (their scales are what power-of-two factors act on): ``blocks.{i}.norm1``,
``blocks.{i}.norm2``, ``norm`` ([B, N, D]), or ``fc_norm`` ([B, D]) instead of ``norm`` with ``pool="average"``.

Everything else ends in ``.out`` and is for looking, not for quantizing: ``patch_embed.out`` ([B, N - prefix, D]),
``pos_embed.out`` (input of block 0), ``blocks.{i}.out`` and in each block ``norm1.out``, ``attn.qkv.out``,
``attn.out``, ``norm2.out``, ``mlp.fc1.out``, ``mlp.gelu.out``, ``mlp.out`` (both branches before the residual sum),
``norm.out``, ``fc_norm.out``, ``head.out``, ``head_dist.out``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.attention import Attention
from jaxvision.models.layers import Dropout, DropPath, Pair
from jaxvision.models.mlp import INITS, Mlp, classify, normalise, truncated_normal
from jaxvision.models.patches import PatchEmbed

POOLS = ("token", "average")


class Block(nn.Module):
    """``x += attn(norm1 x); x += mlp(norm2 x)``: [B, N, D] -> [B, N, D]. Taps: see the module."""

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = "timm"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        common = {"dropout_rate": self.dropout_rate, "weight_init": self.weight_init, "dtype": self.dtype}
        attention = Attention(
            self.num_heads,
            qkv_bias=self.qkv_bias,
            attention_dropout_rate=self.attention_dropout_rate,
            name="attn",
            **common,
        )
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), name="mlp", **common)
        y = normalise(x, "norm1", self.layer_norm_eps, self.dtype, tap)
        x = x + DropPath(self.drop_path_rate)(attention(y, train=train, tap=scoped(tap, "attn")), train)
        y = normalise(x, "norm2", self.layer_norm_eps, self.dtype, tap)
        x = x + DropPath(self.drop_path_rate)(mlp(y, train=train, tap=scoped(tap, "mlp")), train)
        return tap("out", x)


class ViT(nn.Module):
    """Pre-norm vision transformer: images [B, H, W, C] float32 -> logits [B, K] float32.

    The sizes of image and grid come from the images that ``init`` sees; the tokens are the patches row by row after
    the class token (and the distillation token). Names of parameters and taps: timm's, see the module.

    Attributes:
      num_classes: K.
      patch_size: pixels a side, or (rows, columns).
      width, depth, num_heads, mlp_ratio: D, number of blocks, heads a block, hidden width over D.
      qkv_bias: whether q, k and v have biases.
      distilled: a second token and head; the logits are the mean of the two heads, in training too (the heads alone:
        taps ``head.out``, ``head_dist.out``).
      pool: ``"token"``: norm, then the class token; ``"average"``: the mean of the patch tokens (without the class
        token), then ``fc_norm``.
      dropout_rate: after the position embedding, the attention's output layer, GELU and fc2.
      attention_dropout_rate: of attention probabilities.
      drop_path_rate: of the last block; it grows linearly from 0 in the first.
      weight_init: ``"timm"`` or ``"fan_in"``, see :func:`jaxvision.models.mlp.matrix_init`.
      position_init_std: of the position embedding (small networks trained from scratch want about 0.3).
      dtype: compute dtype; layer normalisations, softmax and logits stay float32.

    Raises:
      ConfigError: attributes that don't fit each other, or images that don't fit the weights.
    """

    num_classes: int = 1000
    patch_size: Pair = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    distilled: bool = False
    pool: str = "token"
    layer_norm_eps: float = 1e-6
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = "timm"
    position_init_std: float = 0.02
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ConfigError(f"width={self.width} is no multiple of num_heads={self.num_heads}")
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        if self.weight_init not in INITS:
            raise unknown("weight_init", self.weight_init, INITS)
        if self.distilled and self.pool != "token":
            raise ConfigError(f"distilled=True needs pool='token', got {self.pool!r}: each head reads its own token")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        x = self._embed(images, train, tap)
        drop_path_rates = np.linspace(0.0, self.drop_path_rate, self.depth)
        for i in range(self.depth):
            block = Block(
                self.num_heads,
                self.mlp_ratio,
                self.qkv_bias,
                self.layer_norm_eps,
                self.dropout_rate,
                self.attention_dropout_rate,
                float(drop_path_rates[i]),
                self.weight_init,
                self.dtype,
                name=f"blocks_{i}",
            )
            x = block(x, train=train, tap=scoped(tap, f"blocks.{i}"))
        if self.pool == "average":
            x = normalise(jnp.mean(x[:, 1:], axis=1), "fc_norm", self.layer_norm_eps, self.dtype, tap)
            return classify(x, "head", self.num_classes, self.weight_init, self.dtype, tap)
        x = normalise(x, "norm", self.layer_norm_eps, self.dtype, tap)
        logits = classify(x[:, 0], "head", self.num_classes, self.weight_init, self.dtype, tap)
        if not self.distilled:
            return logits
        distilled = classify(x[:, 1], "head_dist", self.num_classes, self.weight_init, self.dtype, tap)
        return (logits + distilled) / 2

    def _embed(self, images: jax.Array, train: bool, tap: Tap) -> jax.Array:
        """Tokens [B, N, D] of images [B, H, W, C]: patches behind the prefix tokens, plus the position embedding."""
        embed = PatchEmbed(
            self.width, self.patch_size, weight_init=self.weight_init, dtype=self.dtype, name="patch_embed"
        )
        x = embed(images, tap=scoped(tap, "patch_embed"))
        batch, rows, columns, width = x.shape
        x = tap("patch_embed.out", x.reshape(batch, -1, width))
        tokens = [self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, width), jnp.float32)]
        if self.distilled:
            tokens.append(self.param("dist_token", truncated_normal(0.02), (1, 1, width), jnp.float32))
        shape = (1, len(tokens) + rows * columns, width)
        if self.has_variable("params", "pos_embed") and self.get_variable("params", "pos_embed").shape != shape:
            raise ConfigError(
                f"an image of {images.shape[1]}x{images.shape[2]} pixels has {rows}x{columns} patches but pos_embed is "
                f"of shape {self.get_variable('params', 'pos_embed').shape}, wanted {shape}; resize the images, or "
                "pos_embed with torch_import.resize_pos_embed"
            )
        position = self.param("pos_embed", truncated_normal(self.position_init_std), shape, jnp.float32)
        prefix = [jnp.broadcast_to(token.astype(x.dtype), (batch, 1, width)) for token in tokens]
        x = jnp.concatenate([*prefix, x], axis=1) + position.astype(x.dtype)
        return tap("pos_embed.out", Dropout(self.dropout_rate)(x, train))


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
_SIZES = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
}


def _presets() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    presets, specs = {}, {}
    for size, patch, pixels in [
        *((size, 16, pixels) for size in _SIZES for pixels in (224, 384)),
        *((size, 32, pixels) for size in ("small", "base") for pixels in (224, 384)),
        ("large", 32, 384),
    ]:
        name = f"vit_{size}_patch{patch}_{pixels}"
        presets[name] = {"patch_size": patch, **_SIZES[size]}
        specs[name] = {"input_size": (pixels, pixels), "crop_fraction": 0.9 if pixels == 224 else 1.0, **_HALF}
    for size in ("tiny", "small", "base"):
        for suffix, pixels in [("224", 224), *([("384", 384)] if size == "base" else [])]:
            for distilled in (False, True):
                name = f"deit_{size}{'_distilled' if distilled else ''}_patch16_{suffix}"
                presets[name] = {"patch_size": 16, "distilled": distilled, **_SIZES[size]}
                # 0.875 is the authors' crop and the one of the published accuracies; timm now says 0.9.
                specs[name] = {
                    "input_size": (pixels, pixels),
                    "crop_fraction": 0.875 if pixels == 224 else 1.0,
                    **_IMAGENET,
                }
    return presets, specs


PRESETS, SPECS = _presets()
"""Keyword arguments of :class:`ViT`, and how images are prepared, both by timm's names.

A spec has ``input_size`` (height, width), ``mean`` and ``std`` of pixels / 255, ``interpolation`` and
``crop_fraction``: the shorter side is resized to ``floor(input_size / crop_fraction)`` before the central crop.
"""
