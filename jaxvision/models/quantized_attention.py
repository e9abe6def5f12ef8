"""The two matrix products of attention with quantized operands: q k^T and softmax v.

    q_hat k_hat^T c   and   softmax_hat v_hat c        c: a learned |output scale| where the quantizers drop the scale

The modules aren't edited: :class:`jaxvision.models.attention.Attention` (ViT, DeiT, Swin) shows the operands of its
products to a tap, and the interceptor here puts one of its own there. Products have the
names that ``macs.count`` gives them, ``blocks_0/attn/q_k`` and ``blocks_0/attn/softmax_v``, and rules of their own
(``QuantizedNetwork.products``), so that a rule for kernels never reaches one. In a rule's ``LayerQuant`` the input is
the first operand, the weight the second, as in ``quant.bops``.

What is learned lies among the module's parameters: ``product_q_scale`` (operand and field), ``product_q_k_output``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap
from jaxvision.models.attention import Attention
from jaxvision.models.quantized_layer import LayerQuant, learned_quantizer

PREFIX = "product_"
PRODUCTS = {"q_k": ("q", "k"), "softmax_v": ("softmax", "v")}
"""Product -> its operands, first and second."""
SOFTMAX_PRODUCT = "softmax_v"
"""The one whose first operand is never negative."""
SUBSCRIPTS = {"q_k": "bhnd,bhmd->bhnm", "softmax_v": "bhnm,bhmd->bhnd"}
LAST = {"q_k": "k", "softmax_v": "softmax"}
"""The operand of a product that a tap sees last; the output scale is multiplied to it, as products are linear."""
PARTS = ("input", "weight")
"""What the operands are called in a rule."""


def is_size(leaf: str) -> bool:
    """Whether the last part of a parameter's name is that of a product's scale, which mustn't be 0."""
    return leaf.startswith(PREFIX) and leaf.endswith(("_scale", "_alpha", "_output"))


def check_product(name: str, layer: LayerQuant) -> None:
    """Raises ConfigError for what a product can't have."""
    if layer.bits.gradient is not None or layer.execution != "fake":
        raise ConfigError(f"{name} is a product of activations: its gradients stay float, and its execution is 'fake'")
    if layer.needs_norm and not layer.output_scale:
        raise ConfigError(
            f"{name} has quantizers that drop the scale, but no normalisation follows it; give it output_scale=True"
        )


def parameter_names(layers: Iterable[LayerQuant | None]) -> frozenset[str]:
    """The last parts of the names of all parameters that products of these rules learn."""
    names = set()
    for layer in layers:
        if layer is None:
            continue
        for product, operands in PRODUCTS.items():
            for operand, part in zip(operands, PARTS, strict=True):
                if (recipe := getattr(layer, part)) is not None:
                    names |= {f"{PREFIX}{operand}_{field}" for field in recipe.kind.LEARNED}
            names |= {f"{PREFIX}{product}_output"} if layer.output_scale else set()
    return frozenset(names)


class AttentionInterceptor:
    """Calls attention modules with a tap that quantizes the operands of their products.

    Attributes:
      names: the products met so far.
    """

    def __init__(self, find: Callable[[str], LayerQuant | None], *, fit: bool = False):
        """``find``: a product's name -> its layer, None: float; ``fit``: find start values."""
        self._find, self._fit = find, fit
        self.names: list[str] = []

    def __call__(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], context: Any) -> Any:
        module = context.module
        if not isinstance(module, Attention) or context.method_name != "__call__":
            return call(*args, **kwargs)
        layers = {}
        for product in PRODUCTS:
            name = "/".join((*module.path, product))
            self.names.append(name)
            if (layer := self._find(name)) is not None:
                check_product(name, layer)
                layers[product] = layer
        tap = _ProductTap(module, kwargs.get("tap", no_tap), layers, self._fit)
        return call(*args, **{**kwargs, "tap": tap if layers else tap.inner})


class _ProductTap:
    """The tap of one call of one module, behind the caller's own."""

    def __init__(self, module: Attention, inner: Tap, layers: Mapping[str, LayerQuant], fit: bool):
        self.inner = inner
        self._module, self._layers, self._fit = module, layers, fit
        self._seen: dict[str, tuple[jax.Array, jax.Array]] = {}

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        value = self.inner(name, value)
        product = next((product for product, operands in PRODUCTS.items() if name in operands), "")
        if (layer := self._layers.get(product)) is None:
            return value
        part = PARTS[PRODUCTS[product].index(name)]
        quantized, bits = value, getattr(layer.bits, part)
        if bits is not None:
            recipe = getattr(layer, part)
            data = value if self._fit else jnp.linspace(0, 1, 16, dtype=value.dtype)
            quantized = learned_quantizer(self._module, recipe, f"{PREFIX}{name}", bits, data, fit=self._fit)(value)
        self._seen[name] = value, quantized
        if layer.output_scale and name == LAST[product]:
            return quantized * jnp.abs(self._output_scale(product)).astype(quantized.dtype)
        return quantized

    def _output_scale(self, product: str) -> jax.Array:
        """It starts at the ratio of the mean sizes of the float and of the quantized product."""
        name = f"{PREFIX}{product}_output"
        if self._fit:
            pairs = zip(*(self._seen[operand] for operand in PRODUCTS[product]), strict=True)
            exact, found = (jnp.mean(jnp.abs(jnp.einsum(SUBSCRIPTS[product], *pair))) for pair in pairs)
            self._module.put_variable("params", name, (exact / jnp.maximum(found, 1e-12)).astype(jnp.float32))
        return self._module.param(name, lambda _: jnp.ones((), jnp.float32))
