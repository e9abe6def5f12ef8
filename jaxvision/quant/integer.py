"""A quantized layer executed in integers, forward and backward, with nothing but 8-bit numbers saved in between.

With codes A of the input, K of the kernel and D of the gradient, and their steps (LBT, specification 2.8)::

    Y = (sa sk) A * K        dX_hat = (sd sk) D * K^T        dK_hat = (sa sd) A^T * D

the products are sums in int32 and each is followed by one multiplication. The straight-through gradients of the
quantizers need the input itself; it is saved as its code and the remainder in 1/254 of a step (:func:`pack`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core.errors import ConfigError
from jaxvision.quant import ewgs, gradient, trs
from jaxvision.quant.binary import RSign
from jaxvision.quant.integer_products import (
    Pair,
    conv,
    conv_grad_input,
    conv_grad_kernel,
    dense,
    dense_grad_input,
    dense_grad_kernel,
    pair,
)
from jaxvision.quant.trainable import FLOOR, known, largest, magnitude, widened
from jaxvision.quant.uniform import divide

__all__ = [
    "Pair",
    "conv",
    "conv_grad_input",
    "conv_grad_kernel",
    "dense",
    "dense_grad_input",
    "dense_grad_kernel",
    "narrow_codes",
    "pack",
    "quantized_product",
    "unpack",
]

FAR = 1e30
FINEST = 126
"""Remainders go to +-126 of 127, so that a value never comes back on the point where its code changes."""


# --- codes in 8 bits -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeRange:
    """The codes of a quantizer: from ``low`` to ``high``, ``spacing`` apart (2: the odd codes of one bit)."""

    low: int
    high: int
    spacing: int

    @property
    def dtype(self) -> Any:
        """int8 or uint8."""
        return jnp.uint8 if self.high > 127 else jnp.int8

    @property
    def bound(self) -> int:
        """The largest |code|."""
        return max(-self.low, self.high)


def code_range(quantizer: Any) -> CodeRange:
    """The range of a quantizer's codes, known while its arrays are traced; a traced width counts as 8.

    Raises:
      ConfigError: codes with a zero point, or that don't fit 8 bits.
    """
    zero, name = known(quantizer.zero()), type(quantizer).__name__
    if zero is None or zero.any():
        raise ConfigError(
            f"{name} has a zero point; integer execution takes symmetric or unsigned codes, or run it fake"
        )
    with jax.ensure_compile_time_eval():
        fields = [f.name for f in dataclasses.fields(quantizer) if f.metadata.get("pytree_node", True)]
        plain = quantizer.replace(**{field: _plain(field, getattr(quantizer, field)) for field in fields})
        channels = max([1, *(leaf.size for leaf in jax.tree.leaves(plain) if isinstance(leaf, jax.Array))])
        ends = jnp.broadcast_to(jnp.float32([[-FAR], [0], [FAR]]), (3, channels))
        low, middle, high = (int(code) for code in plain.codes(ends)[:, 0])
    if low < -128 or high > 255 or (low < 0 and high > 127):
        raise ConfigError(
            f"{name} has codes from {low} to {high}, which do not fit 8 bits; use fewer bits or fake execution"
        )
    return CodeRange(low, high, 2 if (low, high) == (-1, 1) and middle != 0 else 1)


def _plain(field: str, value: Any) -> Any:
    """A known value for a field, with which the extreme codes are those of any other value."""
    if field == "bits":
        width = known(value)
        return 8 if width is None else int(width)
    return jnp.full(jnp.shape(value), -1.0 if field == "lower" else 1.0)


def narrow_codes(quantizer: Any, x: jax.Array) -> jax.Array:
    """The codes of ``x`` as int8, or as uint8 where they go above 127 (unsigned at 8 bits or a traced width)."""
    return quantizer.codes(x).astype(code_range(quantizer).dtype)


# --- what is saved of the input --------------------------------------------------------------------------------------


def _grid(quantizer: Any) -> tuple[ArrayLike, jax.Array]:
    """Where code 0 lies in the quantizer's input, and how far codes are apart there (not in its output)."""
    if isinstance(quantizer, ewgs.EWGSActivation):
        lower = widened(quantizer.lower)
        width = jnp.maximum(widened(quantizer.upper) - lower, FLOOR)
        return lower, divide(width, largest(quantizer.bits, width.dtype))
    if isinstance(quantizer, trs.TRSActivation):
        return 0.0, (magnitude(quantizer.scale) + trs.EPSILON) * quantizer.step()
    if isinstance(quantizer, RSign):
        return widened(quantizer.shift), quantizer.step()
    return 0.0, quantizer.step()


def pack(x: jax.Array, quantizer: Any) -> tuple[jax.Array, jax.Array]:
    """``x`` as codes (int8 or uint8) and remainders (int8), two bytes an element; undone by :func:`unpack`.

    The value that comes back has the same code, is clipped where x is clipped, and inside differs by at most 1/254 of
    a step (twice that for codes of one bit): straight-through gradients to x are exact, those to scales to about 1e-3.
    Exact zeros of unsigned codes stay exact. The quantizer's codes must be affine in x between its clips.
    """
    limits = code_range(quantizer)
    codes = quantizer.codes(x)
    origin, width = _grid(quantizer)
    wide = widened(x)
    offset = (254 // limits.spacing) * (divide(wide - origin, width) - codes)
    inside = jax.vjp(quantizer, wide)[1](jnp.ones_like(wide))[0] != 0
    ends = jnp.broadcast_to(jnp.asarray([[-FAR], [FAR]], wide.dtype), (2, x.shape[-1]))
    low, high = quantizer.codes(ends)
    # Next to a clip the value must stay on its side of it; code 0 of a remainder of 0 is the clip itself, exactly.
    most = jnp.where(inside & (codes == high), -1, FINEST)
    least = jnp.where(inside & (codes == low), jnp.where(low == 0, 0, 1), -FINEST)
    most = jnp.where(~inside & (codes < high), -1, most)
    least = jnp.where(~inside & (codes >= high), 1, least)
    remainder = jnp.clip(jnp.round(offset), least, most).astype(jnp.int8)
    return codes.astype(limits.dtype), remainder


def unpack(codes: jax.Array, remainder: jax.Array, quantizer: Any) -> jax.Array:
    """The input that :func:`pack` saved, float32 (or wider, as the quantizer's arrays)."""
    origin, width = _grid(quantizer)
    width = jnp.asarray(width)
    parts = remainder.astype(width.dtype) / (254 // code_range(quantizer).spacing)
    return origin + (codes.astype(width.dtype) + parts) * width


# --- a layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A matrix product (``window`` None) or a convolution (its stride, padding and dilation); static."""

    window: tuple[tuple[int, int], ...] | None = None
    groups: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of the convolutions."""
        return {**dict(zip(("stride", "padding", "dilation"), self.window or ())), "groups": self.groups}

    def forward(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """int32."""
        return dense(x, w) if self.window is None else conv(x, w, **self.options)

    def grad_input(self, d: jax.Array, w: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """int32 of the input's ``shape``."""
        return dense_grad_input(d, w) if self.window is None else conv_grad_input(d, w, shape[1:3], **self.options)

    def grad_kernel(self, x: jax.Array, d: jax.Array, shape: tuple[int, ...], bounds: tuple[int, int]) -> jax.Array:
        """int32 or float, of the kernel's ``shape``."""
        if self.window is None:
            return dense_grad_kernel(x, d, bounds=bounds)
        return conv_grad_kernel(x, d, shape[:2], **self.options, bounds=bounds)

    def in_float(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The same product of float operands."""
        if self.window is None:
            return x @ w
        stride, padding, dilation = self.window
        return jax.lax.conv_general_dilated(
            x,
            w,
            stride,
            [(p, p) for p in padding],
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


@dataclass(frozen=True)
class _Plan:
    """What is static about a layer: its product, quantizers without their arrays, and gradient quantization or None."""

    product: Product
    input: Any
    kernel: Any
    ranges: tuple[CodeRange, CodeRange]
    gradient: gradient.GradientOptions | None
    bits: int | None
    dtype: Any


def quantized_product(
    x: jax.Array,
    kernel: jax.Array,
    q_input: Any,
    q_weight: Any,
    gstate: jax.Array | None = None,
    key: Any = None,
    bits: ArrayLike | None = None,
    *,
    kind: str = "uniform",
    noise_bits: int = 32,
    exponent: int = 0,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> jax.Array:
    """``gradient_gate(product(q_input(x), q_weight(kernel)), gstate, key, bits)`` in integers, its gradients included.

    Gradients with respect to x, kernel, the quantizers' learned fields and ``gstate`` equal those of the simulation:
    to float rounding, but for the fields of ``q_input`` (about 1e-3, see :func:`pack`). Saved for the backward
    pass: two bytes an input element, and the arguments kernel, quantizers, gstate, key.

    In integers run: the forward product always; the kernel's gradient where gradients have codes with one step
    ("uniform", at most 8 bits); the input's gradient where also the kernel has one step, or each of its groups one
    output. Otherwise that product is the simulation's, of dequantized codes.

    Args:
      x: float [..., in], or [B, H, W, C] for a convolution.
      kernel: float [in, out] (a matrix product) or [kh, kw, C / groups, out].
      q_input, q_weight: trainable quantizers without zero point; one step for the input, for the kernel one or (out,).
      gstate, key, bits, kind, noise_bits, exponent: as :func:`gradient.gradient_gate` takes them;
        ``bits`` None or above 16 leaves gradients in float.
      stride, padding, dilation, groups: of a convolution.

    Returns:
      y, the type of ``x``; NaN where x or kernel has a NaN, which codes could not show.

    Raises:
      ConfigError: a missing quantizer, one with a zero point, with more than 8-bit codes, or with a step for each input
        channel; shapes that don't fit.
    """
    for name, quantizer in (("input", q_input), ("kernel", q_weight)):
        if quantizer is None:
            raise ConfigError(f"integer execution needs a quantizer of the {name}; run this layer in fake mode")
        quantizer.check()
    if jnp.size(q_input.step()) != 1:
        raise ConfigError(
            f"{type(q_input).__name__} has a step for each input channel; integer execution takes one step"
        )
    window = None if kernel.ndim == 2 else (pair(stride), pair(padding), pair(dilation))
    options = None
    if bits is not None and not gradient.is_off(bits):
        gradient.check_bits(bits, kind)
        options = gradient.GradientOptions(kind, noise_bits, exponent)
    static, traced = (bits, None) if isinstance(bits, int) else (None, bits)
    input_arrays, input_form = _split(q_input)
    kernel_arrays, kernel_form = _split(q_weight)
    ranges = code_range(q_input), code_range(q_weight)
    plan = _Plan(Product(window, groups), input_form, kernel_form, ranges, options, static, x.dtype)
    return _layer(plan, x, kernel, input_arrays, kernel_arrays, gstate, key, traced)


@dataclass(frozen=True)
class _Form:
    """A quantizer without its arrays; Python numbers stay what they are, as ``custom_vjp`` would trace them."""

    structure: Any
    numbers: tuple[Any, ...]

    def build(self, arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        leaves = [next(remaining) if number is None else number for number in self.numbers]
        return jax.tree.unflatten(self.structure, leaves)


def _split(quantizer: Any) -> tuple[list[Any], _Form]:
    leaves, structure = jax.tree.flatten(quantizer)
    numbers = tuple(leaf if isinstance(leaf, int | float) else None for leaf in leaves)
    return [leaf for leaf, number in zip(leaves, numbers) if number is None], _Form(structure, numbers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(
    plan: _Plan, x: jax.Array, kernel: jax.Array, inputs: list, kernels: list, gstate: Any, key: Any, bits: Any
) -> jax.Array:
    return _layer_forward(plan, x, kernel, inputs, kernels, gstate, key, bits)[0]


def _layer_forward(
    plan: _Plan, x: jax.Array, kernel: jax.Array, inputs: list, kernels: list, gstate: Any, key: Any, bits: Any
) -> tuple[jax.Array, Any]:
    q_input, q_weight = plan.input.build(inputs), plan.kernel.build(kernels)
    packed = pack(x, q_input)
    w = q_weight.codes(kernel).astype(plan.ranges[1].dtype)
    step = jnp.reshape(q_input.step(), ()) * q_weight.step(kernel)
    step = jnp.where(jnp.isnan(x).any() | jnp.isnan(kernel).any(), jnp.nan, step)
    y = plan.product.forward(packed[0], w).astype(step.dtype) * step
    return y.astype(plan.dtype), (*packed, kernel, inputs, kernels, gstate, key, bits)


def _layer_backward(plan: _Plan, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    codes, remainder, kernel, inputs, kernels, gstate, key, bits = saved
    g, cotangent = gradient.working(g), None
    x_step = jnp.reshape(plan.input.build(inputs).step(), ())
    q_weight = plan.kernel.build(kernels)
    w, w_step = q_weight.codes(kernel).astype(plan.ranges[1].dtype), q_weight.step(kernel)

    def in_float(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        operands = x_step * codes.astype(x_step.dtype), w_step * w.astype(w_step.dtype)
        operands = tuple(operand.astype(g.dtype) for operand in operands)
        return jax.vjp(plan.product.in_float, *operands)[1](g)

    if plan.gradient is None:
        dx_hat, dw_hat = in_float(g)
    else:
        width = bits if plan.bits is None else plan.bits
        quantized, cotangent = gradient.backward(plan.gradient, width, g, gstate, key)
        if quantized.codes.dtype != jnp.int8 or quantized.step.ndim:
            dx_hat, dw_hat = in_float(quantized.dequantize())
        else:
            d, d_step, most = quantized.codes, quantized.step, 127 if plan.bits is None else (1 << (plan.bits - 1)) - 1
            dw_hat = plan.product.grad_kernel(codes, d, kernel.shape, (plan.ranges[0].bound, most))
            dw_hat = dw_hat.astype(d_step.dtype) * (x_step * d_step)
            if (scale := _input_scale(plan, w_step, kernel.shape)) is None:
                dx_hat = in_float(quantized.dequantize())[0]
            else:
                dx_hat = plan.product.grad_input(d, w, codes.shape).astype(d_step.dtype) * (d_step * scale)
    dinputs, dx = _pull(plan.input.build, inputs, unpack(codes, remainder, plan.input.build(inputs)), dx_hat)
    dkernels, dkernel = _pull(plan.kernel.build, kernels, kernel, dw_hat)
    return dx.astype(plan.dtype), dkernel, dinputs, dkernels, cotangent, None, None


def _input_scale(plan: _Plan, step: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """The kernel's step as a factor on the input's gradient; None where it varies within the sums over outputs."""
    if step.size == 1:
        return jnp.reshape(step, ())
    return jnp.repeat(step, shape[-2]) if plan.product.groups == shape[-1] else None


def _pull(build: Callable[[list], Any], arrays: list, x: jax.Array, g: jax.Array) -> tuple[list, jax.Array]:
    """The cotangents of a quantizer's arrays and of what it quantizes."""
    x_hat, pull = jax.vjp(lambda arrays, x: build(arrays)(x), arrays, x)
    return pull(g.astype(x_hat.dtype))


_layer.defvjp(_layer_forward, _layer_backward)
