"""The networks of the MobileNetV2-type search space of ZenNAS, ZiCo and AZ-NAS (``SuperResIDWE`` structures).

Beside MobileNetV2: every residual unit ends in a ReLU (there is no linear bottleneck and no ReLU6), each layer has two
units, and normalisations have an epsilon of 1e-3. :mod:`jaxvision.models.mbv2_structure` has the strings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models import mbv2_structure
from jaxvision.models.layers import BatchNorm, Conv, Dense, Initializer, global_avg_pool

PRESETS: dict[str, dict[str, Any]] = {"mbv2_searched": {}}

EPS = 1e-3


class ConvNorm(nn.Module):
    """A convolution ``conv`` without bias (or with) and its normalisation ``norm``: [B, H, W, C] -> [B, H', W', D].

    Taps: ``conv``, the input.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    scale_init: Initializer = nn.initializers.ones
    momentum: float = 0.01
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        conv = Conv(
            self.features, self.kernel, stride=self.stride, padding=self.kernel // 2, groups=self.groups,
            use_bias=self.use_bias, kernel_init="kaiming_in", bias_init=nn.initializers.zeros, dtype=self.dtype,
            name="conv",
        )  # fmt: skip
        norm = BatchNorm(self.momentum, EPS, self.scale_init, dtype=self.dtype, name="norm")
        return norm(conv(tap("conv", x)), train=train)


class SqueezeExcite(nn.Module):
    """``x sigmoid(expand(relu(reduce(mean x))))``: [B, H, W, D] -> the same; the mean is over pixels, both layers are
    normalised, ``reduce`` has ``round(D / 4)`` channels."""

    momentum: float = 0.01
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        channels = x.shape[-1]
        layer = {"momentum": self.momentum, "dtype": self.dtype}
        y = global_avg_pool(x)[:, None, None]
        y = nn.relu(ConvNorm(round(channels / 4), **layer, name="reduce")(y, train, scoped(tap, "reduce")))
        y = ConvNorm(channels, **layer, name="expand")(y, train, scoped(tap, "expand"))
        return x * nn.sigmoid(y)


class ResidualUnit(nn.Module):
    """``relu(project(relu(depthwise(relu(expand x)))) + shortcut x)``: [B, H, W, C] -> [B, H', W', D].

    ``expand`` and ``project`` are 1x1; ``shortcut`` is absent where the input itself is added.
    """

    unit: mbv2_structure.Unit
    use_se: bool = False
    zero_init_residual: bool = True
    momentum: float = 0.01
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        unit, common = self.unit, {"momentum": self.momentum, "dtype": self.dtype}

        def layer(x: jax.Array, name: str, features: int, **settings: Any) -> jax.Array:
            return ConvNorm(features, **settings, **common, name=name)(x, train, scoped(tap, name))

        y = nn.relu(layer(x, "expand", unit.hidden))
        y = nn.relu(layer(y, "depthwise", unit.hidden, kernel=unit.kernel, stride=unit.stride, groups=unit.hidden))
        if self.use_se:
            y = SqueezeExcite(**common, name="se")(y, train, scoped(tap, "se"))
        scale_init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = layer(y, "project", unit.features, scale_init=scale_init)
        if unit.projection:
            x = layer(x, "shortcut", unit.features, stride=unit.stride, use_bias=True)
        return nn.relu(y + x)


class MBV2Searched(nn.Module):
    """[B, H, W, 3] float32 -> logits [B, num_classes] float32.

    ``units_0`` ... in the order of :func:`jaxvision.models.mbv2_structure.units`, global average, ``fc``. Taps see the
    input of every convolution (``units.3.depthwise.conv``) and of ``fc``, and ``units.3.out``, the feature that AZ-NAS
    looks at. Initial values are those of the official training: Kaiming normal over the fan-in (of a depthwise kernel:
    its own k^2 values), biases 0.

    Attributes:
      num_classes: K.
      structure: string of :mod:`jaxvision.models.mbv2_structure`. It starts with the three channels of an RGB image;
        images of others fit too.
      use_se: squeeze-excite behind every depthwise convolution; found networks are trained with it, searched without.
      zero_init_residual: the last normalisation of a unit starts at 0, so that the unit starts as its shortcut.
      bn_momentum: of the running statistics, in PyTorch's sense. The recipe's 0.01 needs hundreds of steps before an
        evaluation means anything; 0.1 suits short runs.

    Raises:
      ConfigError: a malformed structure; says which block.
    """

    num_classes: int
    structure: str = mbv2_structure.INITIAL
    use_se: bool = False
    zero_init_residual: bool = True
    bn_momentum: float = 0.01
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        mbv2_structure.from_string(self.structure)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        common = {"momentum": self.bn_momentum, "dtype": self.dtype}
        for index, unit in enumerate(mbv2_structure.units(mbv2_structure.from_string(self.structure))):
            name, scope = f"units_{index}", scoped(tap, f"units.{index}")
            if unit.hidden:
                x = ResidualUnit(unit, self.use_se, self.zero_init_residual, **common, name=name)(x, train, scope)
            else:
                x = nn.relu(ConvNorm(unit.features, unit.kernel, unit.stride, **common, name=name)(x, train, scope))
            x = tap(f"units.{index}.out", x)
        x = global_avg_pool(x)
        fc = Dense(
            self.num_classes, kernel_init="kaiming_in", bias_init=nn.initializers.zeros, dtype=self.dtype, name="fc"
        )
        return fc(tap("fc", x)).astype(jnp.promote_types(self.dtype, jnp.float32))
