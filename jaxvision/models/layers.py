"""Layers with PyTorch's arithmetic, for NHWC images and float32 parameters.

Flax's own layers differ where published numbers rest on PyTorch: padding at stride 2, the running variance, the
epsilon of a normalisation, initial values. ``dtype`` is the compute dtype everywhere; statistics are float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models.convolution import Geometry, convolve
from jaxvision.models.normalisation import batch_count, normalise, normalise_by_batch

Initializer = Callable[..., jax.Array]
Pair = int | tuple[int, int]


def pair(value: Pair) -> tuple[int, int]:
    """``(value, value)``, or the tuple itself: kernel sizes, strides, paddings as PyTorch takes them."""
    return (value, value) if isinstance(value, int) else tuple(value)


# --- initial values ------------------------------------------------------------------------------------------------


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(fan_in, fan_out)`` of a kernel ``[..., in, out]`` as PyTorch counts them (in: a group's inputs)."""
    field = math.prod(shape[:-2])
    return field * shape[-2], field * shape[-1]


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """``U(-b, b), b = 1 / sqrt(fan_in)``: PyTorch's default kernel, ``kaiming_uniform_(a=sqrt(5))``."""
    bound = 1.0 / math.sqrt(fans(shape)[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def kaiming_normal_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """``N(0, 2 / fan_in)``: ``kaiming_normal_`` with its defaults, He et al. 2015."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2.0 / fans(shape)[0])


def kaiming_normal_out(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """``N(0, 2 / fan_out)``: ``kaiming_normal_(mode="fan_out", nonlinearity="relu")``, the torchvision ResNets."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2.0 / fans(shape)[1])


def truncated_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """``N(0, .02^2)`` within +-2 (absolute, so nothing is cut off in practice): timm's ``trunc_normal_(std=.02)``."""
    return jnp.clip(jax.random.normal(key, shape, dtype) * 0.02, -2.0, 2.0)


KERNEL_INITS: dict[str, Initializer] = {
    "torch": uniform_fan_in,
    "kaiming_in": kaiming_normal_in,
    "kaiming_out": kaiming_normal_out,
    "truncated_normal": truncated_normal,
}


def _kernel_init(init: str | Initializer) -> Initializer:
    if callable(init):
        return init
    if init not in KERNEL_INITS:
        raise unknown("kernel_init", init, KERNEL_INITS)
    return KERNEL_INITS[init]


def _bias_init(init: Initializer | None, kernel_init: str | Initializer, kernel_shape: tuple[int, ...]) -> Initializer:
    """PyTorch's ``U(+-1 / sqrt(fan_in))``, which re-initialised kernels keep; zeros beside a truncated normal."""
    if init is not None:
        return init
    if kernel_init == "truncated_normal":
        return nn.initializers.zeros
    bound = 1.0 / math.sqrt(fans(kernel_shape)[0])
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


# --- convolution and matrix ----------------------------------------------------------------------------------------


class Conv(nn.Module):
    """``torch.nn.Conv2d``: [B, H, W, C] -> [B, H', W', features], ``H' = floor((H + 2p - d(k-1) - 1) / s) + 1``.

    Zero padding is explicit and symmetric (``"SAME"`` is not, at stride 2). Parameters: ``kernel`` float32
    [kh, kw, C / groups, features], ``bias`` float32 [features].

    Attributes:
      kernel_init: a name of ``KERNEL_INITS`` or an initializer.
      bias_init: None for the one that belongs to the kernel's (see ``_bias_init``).
    """

    features: int
    kernel_size: Pair
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: str | Initializer = "torch"
    bias_init: Initializer | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise ConfigError(
                f"a convolution from {channels} to {self.features} channels can't be split into groups={self.groups}"
            )
        shape = (*pair(self.kernel_size), channels // self.groups, self.features)
        kernel = self.param("kernel", _kernel_init(self.kernel_init), shape, jnp.float32)
        y = self.product(x, kernel)
        if self.use_bias:
            init = _bias_init(self.bias_init, self.kernel_init, shape)
            y = y + self.param("bias", init, (self.features,), jnp.float32).astype(self.dtype)
        return y

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution without its bias; a method so that ``models.quantized`` can intercept it."""
        geometry = Geometry(pair(self.stride), pair(self.padding), pair(self.dilation), self.groups)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), geometry)


class Dense(nn.Module):
    """``torch.nn.Linear``: [..., D] -> [..., features], ``x kernel + bias``.

    Parameters: ``kernel`` float32 [D, features], ``bias`` float32 [features]; initial values as in :class:`Conv`.
    """

    features: int
    use_bias: bool = True
    kernel_init: str | Initializer = "torch"
    bias_init: Initializer | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init(self.kernel_init), shape, jnp.float32)
        y = self.product(x, kernel)
        if self.use_bias:
            init = _bias_init(self.bias_init, self.kernel_init, shape)
            y = y + self.param("bias", init, (self.features,), jnp.float32).astype(self.dtype)
        return y

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """``x kernel`` without the bias; a method so that ``models.quantized`` can intercept it."""
        return jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))


# --- normalisation -------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """``torch.nn.SyncBatchNorm`` over the last axis: ``(x - mean) / sqrt(var + eps) * scale + bias``.

    Training: mean and biased variance of the *global* batch over all axes but the last, in float32 and in two passes
    (``E[x^2] - E[x]^2`` cancels), with gradients through both; then
      running <- (1 - momentum) running + momentum (mean, var n / (n - 1))
    where n counts the values of a channel over all devices. Evaluation: the running values. The update is stored
    when the collection ``batch_stats`` is mutable.

    Parameters ``scale``, ``bias``, statistics ``mean``, ``var``: float32 [C].

    Raises:
      ConfigError: training on a single value a channel, whose variance is undefined.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        if not train or self.is_initializing():
            return normalise(x, running_mean.value, running_var.value, scale, bias, self.eps).astype(self.dtype)
        count = batch_count(x)
        y, mean, var = normalise_by_batch(x, scale, bias, self.eps)
        if self.is_mutable_collection("batch_stats"):
            unbiased = var * (count / (count - 1))
            running_mean.value += self.momentum * (jax.lax.stop_gradient(mean) - running_mean.value)
            running_var.value += self.momentum * (jax.lax.stop_gradient(unbiased) - running_var.value)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """``torch.nn.LayerNorm`` over the last axis: ``(x - mean) / sqrt(var + eps) * scale + bias``, biased variance.

    Float32 [..., D] inside, two passes. Parameters ``scale``, ``bias`` float32 [D]. PyTorch's default eps is 1e-5,
    timm's ViT uses 1e-6.
    """

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, -1, keepdims=True)
        var = jnp.mean(jnp.square(centred), -1, keepdims=True)
        return (centred * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


# --- pooling -------------------------------------------------------------------------------------------------------


def max_pool(x: jax.Array, window: Pair, stride: Pair | None = None, padding: Pair = 0) -> jax.Array:
    """``torch.nn.MaxPool2d`` of [B, H, W, C]: symmetric padding with -inf, sizes rounded down; stride None: window."""
    pads = [(p, p) for p in pair(padding)]
    return nn.max_pool(x, pair(window), pair(window if stride is None else stride), pads)


def avg_pool(
    x: jax.Array, window: Pair, stride: Pair | None = None, padding: Pair = 0, *, count_include_pad: bool = True
) -> jax.Array:
    """``torch.nn.AvgPool2d`` of [B, H, W, C]: by default the zeros of the padding count in the mean."""
    pads = [(p, p) for p in pair(padding)]
    strides = pair(window if stride is None else stride)
    return nn.avg_pool(x, pair(window), strides, pads, count_include_pad=count_include_pad)


def adaptive_avg_pool(x: jax.Array, size: Pair) -> jax.Array:
    """``torch.nn.AdaptiveAvgPool2d``: [B, H, W, C] -> [B, *size, C]; cell i is the mean of rows
    ``floor(i H / size) .. ceil((i + 1) H / size)``, and columns likewise."""

    def cells(x, axis, count):
        length = x.shape[axis]
        bounds = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        means = [jnp.mean(jax.lax.slice_in_dim(x, low, high, axis=axis), axis) for low, high in bounds]
        return jnp.stack(means, axis)

    rows, columns = pair(size)
    return cells(cells(x, 1, rows), 2, columns)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """The mean over the pixels, in float32: [B, H, W, C] -> [B, C], dtype of ``x``."""
    return jnp.mean(x.astype(jnp.float32), (1, 2)).astype(x.dtype)


# --- noise ---------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """``torch.nn.Dropout``: in training each value is 0 with probability ``rate``, else divided by ``1 - rate``.

    Each row of [B, ...] has its own key, made from its number in the global batch, so the mask does not depend on how
    many devices share the batch. Needs the rng ``"dropout"``, the same on every device.

    Raises:
      ConfigError: ``rate`` is outside [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return _drop(self, x, x.shape[1:], train)


class DropPath(nn.Module):
    """Stochastic depth: in training a row of [B, ...] is 0 with probability ``rate``, else divided by ``1 - rate``.

    Source: Huang et al. 2016 as in timm's ``DropPath`` (``scale_by_keep``). Keys and errors as in :class:`Dropout`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return _drop(self, x, (1,) * (x.ndim - 1), train)


def _drop(module: Dropout | DropPath, x: jax.Array, mask_shape: tuple[int, ...], train: bool) -> jax.Array:
    if not 0 <= module.rate < 1:
        raise ConfigError(f"{type(module).__name__} rate={module.rate} must be at least 0 and below 1")
    if not train or module.rate == 0:
        return x
    keep = 1.0 - module.rate
    keys = devices.row_keys(module.make_rng("dropout"), x.shape[0])
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, keep, mask_shape))(keys)
    return jnp.where(mask, x / keep, 0).astype(x.dtype)
