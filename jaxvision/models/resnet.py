"""ResNet-18/34/50/101 (He et al. 2015, arXiv:1512.03385) as torchvision builds them, for large and small images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.heads import pooled_vector, scaled_logits
from jaxvision.models.layers import BatchNorm, Conv, Dense, Dropout, max_pool

PRESETS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": "basic", "stage_sizes": (2, 2, 2, 2)},
    "resnet34": {"block": "basic", "stage_sizes": (3, 4, 6, 3)},
    "resnet50": {"block": "bottleneck", "stage_sizes": (3, 4, 6, 3)},
    "resnet101": {"block": "bottleneck", "stage_sizes": (3, 4, 23, 3)},
}

# The small-image networks are those of the calibration literature (official code of ACLS, MbLS, FLSD): their CIFAR
# network keeps PyTorch's default initialisation, the other two are Kaiming normal over the fan-out.
STEMS = {"imagenet": "kaiming_out", "cifar": "torch", "tiny_imagenet": "kaiming_out"}
EXPANSION = {"basic": 1, "bottleneck": 4}


class Block(nn.Module):
    """``relu(branch(x) + shortcut(x))``.

    basic: conv1 3x3 (stride), conv2 3x3, each with BN. bottleneck: conv1 1x1, conv2 3x3 (stride, dilation), conv3 1x1
    to 4 x features ("v1.5": He et al. put the stride into conv1). The shortcut is a 1x1 convolution and BN
    (``downsample.0``, ``downsample.1``) where stride or channels change.
    """

    kind: str
    features: int
    stride: int = 1
    dilation: int = 1
    zero_init: bool = False
    conv_init: str = "kaiming_out"
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        def conv_norm(x, name, norm_name, features, size, *, stride=1, dilation=1, scale_init=nn.initializers.ones):
            layer = Conv(
                features, size, stride=stride, padding=dilation * (size // 2), dilation=dilation, use_bias=False,
                kernel_init=self.conv_init, dtype=self.dtype, name=name.replace(".", "_"),
            )  # fmt: skip
            norm = self.norm(dtype=self.dtype, scale_init=scale_init, name=norm_name)
            return norm(layer(tap(name, x)), train=train)

        out = self.features * EXPANSION[self.kind]
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        strided = {"stride": self.stride, "dilation": self.dilation}
        if self.kind == "basic":
            y = nn.relu(conv_norm(x, "conv1", "bn1", self.features, 3, **strided))
            y = conv_norm(y, "conv2", "bn2", out, 3, dilation=self.dilation, scale_init=last)
        else:
            y = nn.relu(conv_norm(x, "conv1", "bn1", self.features, 1))
            y = nn.relu(conv_norm(y, "conv2", "bn2", self.features, 3, **strided))
            y = conv_norm(y, "conv3", "bn3", out, 1, scale_init=last)
        if self.stride != 1 or x.shape[-1] != out:
            x = conv_norm(x, "downsample.0", "downsample_1", out, 1, stride=self.stride)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32.

    Taps see the input of every convolution and of ``fc`` under its torchvision name (``layer1.0.conv1``).

    Attributes:
      num_classes: 0 returns the pooled features [B, D] float32 instead.
      stem: "imagenet" (7x7 stride 2, then max-pool), "cifar" (3x3, no pool; for 32x32) or "tiny_imagenet" (3x3, no
        pool; the head reads 2x2 means, flattened channel first as PyTorch does; for 64x64).
      strides: of the four stages; (1, 2, 2, 1) is the "last stride 1" of re-identification.
      replace_stride_with_dilation: for stages 2-4; (False, True, True) has output stride 8, as in torchvision.
      dilate_first_block: the first block of a dilated stage has the stage's dilation too (DeepLab of ALIFE and of
        segmentation_models_pytorch) instead of the previous stage's (torchvision).
      zero_init_residual: the last BN scale of every block starts at 0 (Goyal et al. 2017, section 5.1).
      features: return the list of the four stage outputs [B, H_s, W_s, C_s] instead of logits; no ``fc``.
      dropout: rate before ``fc``.
      temp: divides the logits.
      conv_init: a name of ``layers.KERNEL_INITS``; None takes the stem's (``STEMS``).
      norm: makes the normalisation layers: ``norm(dtype=, scale_init=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: an unknown block or stem, tuples of the wrong length, or a ``temp`` that is not positive.
    """

    num_classes: int
    block: str = "bottleneck"
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stem: str = "imagenet"
    strides: tuple[int, ...] = (1, 2, 2, 2)
    replace_stride_with_dilation: tuple[bool, ...] = (False, False, False)
    dilate_first_block: bool = False
    zero_init_residual: bool = False
    features: bool = False
    dropout: float = 0.0
    temp: float = 1.0
    conv_init: str | None = None
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array | list[jax.Array]:
        self._check()
        conv_init = self.conv_init or STEMS[self.stem]
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        stem = Conv(
            self.width, size, stride=stride, padding=size // 2, use_bias=False, kernel_init=conv_init,
            dtype=self.dtype, name="conv1",
        )  # fmt: skip
        x = nn.relu(self.norm(dtype=self.dtype, name="bn1")(stem(tap("conv1", x)), train=train))
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)
        outputs = []
        for stage, plan in enumerate(self._plan()):
            for index, (stride, dilation) in enumerate(plan):
                block = Block(
                    self.block, self.width * 2**stage, stride, dilation, self.zero_init_residual, conv_init,
                    self.norm, self.dtype, name=f"layer{stage + 1}_{index}",
                )  # fmt: skip
                x = block(x, train, scoped(tap, f"layer{stage + 1}.{index}"))
            outputs.append(x)
        return outputs if self.features else self._head(x, train, tap)

    def _head(self, x: jax.Array, train: bool, tap: Tap) -> jax.Array:
        x = pooled_vector(x, 2 if self.stem == "tiny_imagenet" else 1)
        if not self.num_classes:
            return x.astype(jnp.float32)
        x = Dropout(self.dropout, name="drop")(x, train)
        return scaled_logits(Dense(self.num_classes, dtype=self.dtype, name="fc")(tap("fc", x)), self.temp)

    def _plan(self) -> list[list[tuple[int, int]]]:
        """(stride, dilation) of every block of every stage."""
        dilation, plan = 1, []
        dilate = (False, *self.replace_stride_with_dilation)
        for size, stride, dilated in zip(self.stage_sizes, self.strides, dilate, strict=True):
            previous = dilation
            if dilated:
                dilation, stride = dilation * stride, 1
            first = dilation if self.dilate_first_block else previous
            plan.append([(stride, first)] + [(1, dilation)] * (size - 1))
        return plan

    def _check(self) -> None:
        if self.block not in EXPANSION:
            raise unknown("block", self.block, EXPANSION)
        if self.stem not in STEMS:
            raise unknown("stem", self.stem, STEMS)
        lengths = {
            "stage_sizes": (self.stage_sizes, 4),
            "strides": (self.strides, 4),
            "replace_stride_with_dilation": (self.replace_stride_with_dilation, 3),
        }
        for name, (value, length) in lengths.items():
            if len(value) != length:
                raise ConfigError(f"{name}={value!r} must have {length} entries")
