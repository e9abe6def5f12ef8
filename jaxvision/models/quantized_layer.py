"""One quantized layer: its rule, and what happens in the place of ``Conv.product`` and its like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models.layers import BatchNorm, Conv, Dense, LayerNorm, pair
from jaxvision.models.patches import PatchEmbed
from jaxvision.quant import gradient, integer

EXECUTIONS = ("fake", "int")
GRADIENT_STREAM = "gradient"
"""The rng stream of stochastic rounding. Without it gradients are rounded to nearest."""
INTERVAL = "interval"
"""The collection of the clipping factors: float32 [3] a layer, (gamma, 0, 0); see :func:`gradient.gradient_gate`."""
BITS = "bits"
"""The optional collection of widths: int32 [3] a layer (weight, input, gradient), which then replace the rule's."""
DELTA = "delta"
"""The optional collection of EWGS's deltas: float32 [2] a layer (weight, input), which then replace the rule's."""
PARTS = ("weight", "input", "gradient")


@dataclass(frozen=True)
class Bits:
    """Widths of the three tensors of a layer; None: float. Weight and input 1 to 8, gradient 2 to 16."""

    weight: int | None = None
    input: int | None = None
    gradient: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in zip(PARTS, (1, 1, 2), (8, 8, 16), strict=True):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and low <= value <= high):
                raise ConfigError(f"{name}_bits={value!r} must be a whole number from {low} to {high} (None: float)")


@dataclass(frozen=True)
class Recipe:
    """A kind of quantizer with its settings; the learned arrays come later.

    Attributes:
      kind: a trainable quantizer class of ``jaxvision.quant``.
      settings: its static fields.
    """

    kind: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    def fit(self, x: jax.Array, bits: Any) -> Any:
        """The quantizer with the start values for ``x``."""
        return self.kind.fit(x, bits, **self.settings)

    def build(self, bits: Any, learned: Mapping[str, jax.Array]) -> Any:
        """The quantizer with given values of its learned fields."""
        return self.kind(**learned, bits=bits, **self.settings)


@dataclass(frozen=True)
class LayerQuant:
    """How a layer is quantized.

    Attributes:
      weight, input: their quantizers; used where ``bits`` has a width for them.
      bits: the widths.
      gradient: kind of the gradient quantizer (``quant.gradient``), used where ``bits.gradient`` is set.
      noise_bits: of its stochastic rounding, 32 or 8.
      exponent: of the kind "piecewise".
      output_scale: multiply the output by a learned ``|output_scale|``, which starts at the ratio of the mean sizes
        of the float and of the quantized output.
      needs_norm: the quantizers drop the scale of their input, so a normalisation must follow (or ``output_scale``).
      execution: "fake" (float on the grid) or "int" (int8 codes, int32 sums, both directions).
    """

    weight: Recipe | None = None
    input: Recipe | None = None
    bits: Bits = Bits()
    gradient: str = "uniform"
    noise_bits: int = 32
    exponent: int = 0
    output_scale: bool = False
    needs_norm: bool = False
    execution: str = "fake"

    def __post_init__(self) -> None:
        if self.execution not in EXECUTIONS:
            raise unknown("execution", self.execution, EXECUTIONS)
        gradient.GradientOptions(**self.gradient_options)
        for name in ("weight", "input"):
            if getattr(self.bits, name) is not None and getattr(self, name) is None:
                raise ConfigError(f"{name}_bits={getattr(self.bits, name)}, but the rule names no {name} quantizer")
        if self.execution == "int" and (self.bits.weight is None or self.bits.input is None):
            raise ConfigError("execution='int' needs weight_bits and input_bits; a float operand has no codes")

    @property
    def gradient_options(self) -> dict[str, Any]:
        """What ``gradient.gradient_gate`` takes besides the width."""
        return {"kind": self.gradient, "noise_bits": self.noise_bits, "exponent": self.exponent}


def width(layer: LayerQuant, part: str, widths: jax.Array | None) -> Any:
    """The width of a part: the traced one where there is one, None where the rule leaves the part in float."""
    static = getattr(layer.bits, part)
    return static if static is None or widths is None else widths[PARTS.index(part)]


class Interceptor:
    """What happens at each method call of a module while the network is traced.

    Attributes:
      names: the kernels met so far.
      outputs: shape and type of the output of each quantized layer, by the kernel's name.
      operands: those of each quantized operand, by the kernel's name and the role.
    """

    def __init__(
        self,
        find: Callable[[str], LayerQuant | None],
        *,
        fit: bool = False,
        checks: bool = False,
        probes: Mapping[str, jax.Array] | None = None,
        operands: Mapping[str, jax.Array] | None = None,
    ):
        """``fit``: find start values; ``checks``: raise on missing norms; ``probes``: added to the outputs.

        ``operands`` are added to quantized operands, by kernel's name and role (``conv1/kernel:input``).
        """
        self._find, self._fit, self._checks, self._probes = find, fit, checks, probes or {}
        self._operands = operands or {}
        self._pending = ""
        self.names: list[str] = []
        self.outputs: dict[str, jax.ShapeDtypeStruct] = {}
        self.operands: dict[str, jax.ShapeDtypeStruct] = {}

    def __call__(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], context: Any) -> Any:
        module = context.module
        if isinstance(module, BatchNorm | LayerNorm) and context.method_name == "__call__":
            self._pending = ""
        if isinstance(module, BatchNorm) and context.method_name == "__call__" and _is_folded(module):
            return (args[0] + module.get_variable("params", "bias")).astype(module.dtype)
        if not isinstance(module, Conv | Dense | PatchEmbed) or context.method_name != "product":
            return call(*args, **kwargs)
        name = "/".join((*module.path, "kernel"))
        self.finish()
        self.names.append(name)
        layer = self._find(name)
        if layer is None:
            return call(*args, **kwargs)
        if layer.needs_norm and not layer.output_scale:
            self._pending = name
        y = _product(module, layer, call, *args, fit=self._fit, seen=lambda *operand: self._operand(name, *operand))
        self.outputs[name] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y + self._probes[name] if name in self._probes else y

    def _operand(self, kernel: str, role: str, value: jax.Array) -> jax.Array:
        name = f"{kernel}:{role}"
        self.operands[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return value + self._operands[name] if name in self._operands else value

    def finish(self) -> None:
        """Raises ConfigError where a quantizer without post-scale isn't followed by a normalisation."""
        if self._checks and self._pending:
            raise ConfigError(
                f"{self._pending} has a quantizer that drops the scale, but no normalisation follows the layer; "
                "give it output_scale=True, or leave it in float"
            )


def _is_folded(module: BatchNorm) -> bool:
    """Whether the layer before has taken over all but the bias (``integer_folding.py``)."""
    left = module.has_variable("params", "bias") and not module.has_variable("params", "scale")
    return left and not module.is_initializing()


def _product(
    module: nn.Module,
    layer: LayerQuant,
    product: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    fit: bool,
    seen: Callable[[str, jax.Array], jax.Array],
) -> jax.Array:
    """The product of a quantized layer, inside its module's scope; ``seen`` maps (role, quantized operand) to it."""
    widths = module.get_variable(BITS, "widths") if module.has_variable(BITS, "widths") else None
    q_input = _quantizer(module, layer, "input", x, widths, fit)
    if jnp.issubdtype(kernel.dtype, jnp.integer):
        y = _integer_inference(module, product, x, kernel, q_input)
    else:
        q_kernel = _quantizer(module, layer, "kernel", kernel, widths, fit)
        bits = width(layer, "gradient", widths)
        gate, key = _gradient_state(module) if bits is not None else (None, None)
        if layer.execution == "int" and not fit and not module.is_initializing():
            options = {**layer.gradient_options, **_description(module)}
            y = integer.quantized_product(x, kernel, q_input, q_kernel, gate, key, bits, **options)
            y = y.astype(module.dtype)
        else:
            operands = (("input", x, q_input), ("kernel", kernel, q_kernel))
            y = product(*(value if q is None else seen(role, q(value)) for role, value, q in operands))
            y = y if bits is None else gradient.gradient_gate(y, gate, key, bits, **layer.gradient_options)
    if layer.output_scale:
        y = y * jnp.abs(_output_scale(module, product, x, kernel, y, fit)).astype(y.dtype)
    return y


def _gradient_state(module: nn.Module) -> tuple[jax.Array, jax.Array | None]:
    """The layer's (gamma, 0, 0) and its key of this step."""
    gate = module.variable(INTERVAL, "gamma", lambda: jnp.asarray([1.0, 0.0, 0.0], jnp.float32)).value
    return gate, module.make_rng(GRADIENT_STREAM) if module.has_rng(GRADIENT_STREAM) else None


def _description(module: nn.Module) -> dict[str, Any]:
    """The shape of a layer's product, as ``quant.integer`` takes it; empty for a matrix."""
    if isinstance(module, Dense):
        return {}
    names = ("stride", "padding", "dilation")
    return {**{name: pair(getattr(module, name)) for name in names}, "groups": module.groups}


def _quantizer(module: nn.Module, layer: LayerQuant, role: str, x: jax.Array, widths: Any, fit: bool) -> Any:
    """The quantizer of an operand (role "kernel" or "input"), its learned fields parameters of the layer; None: float.

    ``init`` gets a dummy image, which says nothing about the inputs: their fields fit a ramp from 0 to 1 there.
    """
    part = "weight" if role == "kernel" else role
    if (bits := width(layer, part, widths)) is None:
        return None
    data = x
    if role == "input" and not fit:
        data = jnp.broadcast_to(jnp.linspace(0, 1, 16, dtype=x.dtype)[:, None], (16, x.shape[-1]))
    quantizer = learned_quantizer(module, getattr(layer, part), role, bits, data, fit=fit)
    if module.has_variable(DELTA, "delta") and hasattr(quantizer, "delta"):
        quantizer = quantizer.replace(delta=module.get_variable(DELTA, "delta")[PARTS.index(part)])
    return quantizer


def learned_quantizer(module: nn.Module, recipe: Recipe, role: str, bits: Any, data: jax.Array, *, fit: bool) -> Any:
    """A quantizer whose learned fields are parameters ``{role}_{field}`` of ``module``.

    They start at what fits ``data``: at initialisation, and again whenever ``fit`` is set.
    """
    names = [(f"{role}_{name}", name) for name in recipe.kind.LEARNED]
    if fit or module.is_initializing():
        start = recipe.fit(data, bits)
        values = {full: getattr(start, name) for full, name in names}
        for full, value in values.items():
            if fit:
                module.put_variable("params", full, value)
            module.param(full, lambda _, value=value: value)
    return recipe.build(bits, {name: module.get_variable("params", full) for full, name in names})


def _output_scale(
    module: nn.Module, product: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, y: jax.Array, fit: bool
) -> jax.Array:
    if fit:
        ratio = jnp.mean(jnp.abs(product(x, kernel))) / jnp.maximum(jnp.mean(jnp.abs(y)), 1e-12)
        module.put_variable("params", "output_scale", ratio.astype(jnp.float32))
    return module.param("output_scale", lambda _: jnp.ones((), jnp.float32))


def _integer_inference(
    module: nn.Module, product: Callable[..., jax.Array], x: jax.Array, codes: jax.Array, q_input: Any
) -> jax.Array:
    """The product with a kernel that is stored as int8 or int4 codes and a float ``kernel_step``."""
    step, codes = module.get_variable("params", "kernel_step"), codes.astype(jnp.int8)
    if q_input is None or jnp.size(q_input.step()) != 1:
        return product(x if q_input is None else q_input(x), codes.astype(jnp.float32) * step)
    forward, shape = integer.dense if isinstance(module, Dense) else integer.conv, _description(module)
    zero, factor = q_input.zero(), jnp.reshape(q_input.step(), ()) * step
    if isinstance(zero, int) and zero == 0:
        sums = forward(integer.narrow_codes(q_input, x), codes, **shape)
    else:  # codes 0..2^b - 1; the padding stands for 0, not for code 0
        narrow = q_input.codes(x).astype(jnp.uint8)
        ones = forward(jnp.ones_like(narrow[:1]), codes, **shape)
        sums = forward(narrow, codes, **shape) - jnp.reshape(zero, ()).astype(jnp.int32) * ones
    return (sums.astype(jnp.float32) * factor).astype(module.dtype)
