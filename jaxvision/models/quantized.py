"""Networks whose convolutions and matrices are quantized by rule; the networks themselves aren't edited.

    rules = (Rule(r"^conv1/", None), Rule(r"^linear/", None), Rule(r"kernel$", LayerQuant(weight, input, Bits(2, 2))))
    network = QuantizedNetwork(zoo.build("resnet20", num_classes=10), rules)
    variables = network.calibrate(network.init(key, images), images)     # start values of the scales
    logits = network.apply(variables, images)

A quantized network has the parameters of the float one, by the same names, and beside each quantized ``kernel`` those
of its quantizers: ``kernel_scale``, ``input_scale``, ... (role and field), ``output_scale``. So the weights of a
float network load into it, and it is trained, saved and sharded like any other.

How it works: ``Conv``, ``Dense`` and ``PatchEmbed`` do their product in a method of its own, and Flax lets a
caller intercept the methods of modules. The interceptor here quantizes the two operands first.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core import name_rules, trees
from jaxvision.core.errors import ConfigError
from jaxvision.models.quantized_attention import AttentionInterceptor, check_product, is_size
from jaxvision.models.quantized_layer import (
    BITS,
    GRADIENT_STREAM,
    INTERVAL,
    PARTS,
    Bits,
    Interceptor,
    LayerQuant,
    Recipe,
    width,
)
from jaxvision.quant.trainable import check_positive

__all__ = ["BITS", "GRADIENT_STREAM", "INTERVAL", "Bits", "LayerQuant", "QuantizedNetwork", "Recipe", "Rule"]


@dataclass(frozen=True)
class Rule:
    """The layers whose kernel's name (``layer1_0/conv1/kernel``) the regular expression finds; None: left in float."""

    pattern: str
    layer: LayerQuant | None


def kernel_names(module: nn.Module, image: Any) -> tuple[str, ...]:
    """The kernels of all convolutions and matrices of a network, in the order of their use."""
    return tuple(_trace(module, Interceptor(lambda name: None), image).names)


def product_names(module: nn.Module, image: Any) -> tuple[str, ...]:
    """The products of attention of a network that rules can find, in the order of their use."""
    seen = AttentionInterceptor(lambda name: None)
    with nn.intercept_methods(seen):
        jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    return tuple(dict.fromkeys(seen.names))


def _trace(module: nn.Module, interceptor: Interceptor, image: Any) -> Interceptor:
    with nn.intercept_methods(interceptor):
        jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    return interceptor


def _complete(layer: LayerQuant, role: str, name: str, leaves: Mapping[str, Any]) -> bool:
    """Whether the parameters of a quantizer lie beside the kernel ``name``. A kernel without them, found by a rule
    all the same, is somebody else's layer's, or holds codes (``integer_network.py``)."""
    part = "weight" if role == "kernel" else role
    if getattr(layer.bits, part) is None:
        return True
    fields = getattr(layer, part).kind.LEARNED
    return all(f"{name.removesuffix('kernel')}{role}_{field}" in leaves for field in fields)


@dataclass(frozen=True)
class QuantizedNetwork:
    """A linen module with quantized layers; ``init`` and ``apply`` are those of the module.

    Attributes:
      module: the float network.
      rules: in order of precedence: the first whose pattern is found in the kernel's name decides. A layer that no
        rule finds stays float.
      products: the same for the products of attention, by their names (``quantized_attention.py``).
    """

    module: nn.Module
    rules: tuple[Rule, ...]
    products: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for rule in (*self.rules, *self.products):
            try:
                re.compile(rule.pattern)
            except re.error as error:
                raise ConfigError(f"the rule {rule.pattern!r} is not a regular expression: {error}") from error

    def find(self, name: str) -> LayerQuant | None:
        """The first rule's layer for the kernel ``name``."""
        return next((rule.layer for rule in self.rules if re.search(rule.pattern, name)), None)

    def find_product(self, name: str) -> LayerQuant | None:
        """The first rule's layer for the product ``name`` (``blocks_0/attn/q_k``)."""
        return next((rule.layer for rule in self.products if re.search(rule.pattern, name)), None)

    @contextlib.contextmanager
    def intercepting(self, layers: Interceptor, *, fit: bool = False) -> Iterator[None]:
        """The context in which the module's own ``init`` and ``apply`` are quantized."""
        products = AttentionInterceptor(self.find_product, fit=fit)
        with nn.intercept_methods(layers), nn.intercept_methods(products):
            yield

    def init(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Fresh variables, traceable. Scales of kernels fit them, those of inputs [0, 1] until :meth:`calibrate`."""
        with self.intercepting(Interceptor(self.find)):
            return self.module.init(key, *args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs. rngs may have ``gradient`` beside ``dropout``."""
        with self.intercepting(Interceptor(self.find)):
            return self.module.apply(variables, *args, **kwargs)

    def calibrate(self, variables: Any, images: jax.Array) -> Any:
        """``variables`` with every quantizer at its start values for ``images`` [B, H, W, C], traceable.

        One forward pass in training mode, in which each layer first fits its quantizers to its kernel and to what
        its quantized predecessors give it, as the official codes do in their first training step; batch statistics
        are used and not moved.
        """
        with self.intercepting(Interceptor(self.find, fit=True), fit=True):
            rngs = {"dropout": jax.random.key(0)}
            mutable = [name for name in variables if name != BITS]
            _, updated = self.module.apply(variables, images, train=True, mutable=mutable, rngs=rngs)
        return {**variables, "params": updated["params"]}

    def check(self, image: Any) -> dict[str, LayerQuant]:
        """The quantized layers by kernel name, found by tracing alone.

        Raises:
          ConfigError: a rule that decides about no kernel, or a layer that needs a normalisation after it and has none.
        """
        seen = _trace(self.module, Interceptor(self.find, checks=True), image)
        seen.finish()
        name_rules.check("the network's rules", [rule.pattern for rule in self.rules], seen.names)
        self.check_products(image)
        return {name: layer for name in seen.names if (layer := self.find(name)) is not None}

    def check_products(self, image: Any) -> dict[str, LayerQuant]:
        """The quantized products of attention by name, found by tracing alone; names and widths fit ``quant.bops``.

        Raises:
          ConfigError: a rule that decides about no product, or a layer that a product can't have.
        """
        if not self.products:
            return {}
        names = product_names(self.module, image)
        name_rules.check("the network's rules for products", [rule.pattern for rule in self.products], names)
        found = {name: layer for name in names if (layer := self.find_product(name)) is not None}
        for name, layer in found.items():
            check_product(name, layer)
        return found

    def quantizers(self, params: Any, role: str = "kernel", bits: Any = None) -> Any:
        """The quantizer of every quantized kernel (or ``role="input"``) in a tree like ``params``, None elsewhere.

        The quantizers see through ``stop_gradient``; ``bits`` is the collection of that name, if there is one.
        """
        leaves = trees.named_leaves(params)
        widths = trees.named_leaves(bits) if bits else {}
        part = "weight" if role == "kernel" else role

        def one(name: str, leaf: Any) -> Any:
            layer = self.find(name) if name.rsplit("/", 1)[-1] == "kernel" else None
            recipe = getattr(layer, part, None)
            scope = name.removesuffix("kernel")
            if recipe is None or not _complete(layer, role, name, leaves):
                return None
            if (chosen := width(layer, part, widths.get(f"{scope}widths"))) is None:
                return None
            learned = {f: jax.lax.stop_gradient(leaves[f"{scope}{role}_{f}"]) for f in recipe.kind.LEARNED}
            return recipe.build(chosen, learned)

        return trees.map_named(one, params)

    def check_fitted(self, params: Any) -> None:
        """Raises ConfigError where a quantizer's values, known now, are none: a scale of 0, or one that isn't finite.

        Under ``jit`` such a scale passes as the smallest there is (``quant.trainable.FLOOR``).
        """
        for role in ("kernel", "input"):
            found = jax.tree_util.tree_leaves_with_path(self.quantizers(params, role), is_leaf=callable)
            for path, quantizer in found:
                try:
                    quantizer.check()
                except ConfigError as error:
                    what = "" if role == "kernel" else "the input of "
                    raise ConfigError(f"{what}{trees.path_name(path)} can't be quantized: {error}") from error
        for name, leaf in trees.named_leaves(params).items():
            scope, _, last = name.rpartition("/")
            if last == "output_scale" or is_size(last):
                check_positive(scope, **{last: leaf})

    def layers(self, params: Any) -> tuple[str, ...]:
        """The names of the quantized kernels in a parameter tree."""
        leaves = trees.named_leaves(params)
        kernels = {name: self.find(name) for name in leaves if name.rsplit("/", 1)[-1] == "kernel"}
        return tuple(
            name
            for name, layer in kernels.items()
            if layer is not None
            and _complete(layer, "input", name, leaves)
            and (_complete(layer, "kernel", name, leaves) or f"{name}_step" in leaves)
        )

    def with_bits(self, variables: Any, bits: Mapping[str, Bits] | Bits) -> Any:
        """``variables`` with the collection ``bits``: widths as data, so that other widths compile nothing anew.

        A tensor that its rule leaves in float stays float whatever is given here.
        """
        names = self.layers(variables["params"])
        tree: dict[str, Any] = {}
        for name in names:
            chosen = bits if isinstance(bits, Bits) else bits[name]
            values = [getattr(chosen, part) or 0 for part in PARTS]
            node = tree
            for part in name.split("/")[:-1]:
                node = node.setdefault(part, {})
            node["widths"] = jnp.asarray(values, jnp.int32)
        return {**variables, BITS: tree}

    def output_shapes(self, image: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of the output of each quantized layer by kernel name, found by tracing alone."""
        return _trace(self.module, Interceptor(self.find), image).outputs

    def output_gradients(
        self, variables: Any, loss: Callable[[Any], jax.Array], *args: Any, **kwargs: Any
    ) -> dict[str, jax.Array]:
        """The gradients G of a loss with respect to the output of each quantized layer, not yet quantized.

        For starts, searches and diagnostics; training itself never keeps such a tensor. Gradients that pass
        quantized layers on their way are quantized there, as in training.

        Args:
          variables: of the network.
          loss: maps what ``apply(variables, *args, **kwargs)`` returns to a float32 ().

        Returns:
          By the kernel's name, of the output's shape and type.
        """

        def run(probes: Mapping[str, jax.Array]) -> tuple[jax.Array, Interceptor]:
            seen = Interceptor(self.find, probes=probes)
            with self.intercepting(seen):
                return loss(self.module.apply(variables, *args, **kwargs)), seen

        shapes: dict[str, jax.ShapeDtypeStruct] = {}
        jax.eval_shape(lambda: shapes.update(run({})[1].outputs))
        zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        return jax.grad(lambda probes: run(probes)[0])(zeros)
