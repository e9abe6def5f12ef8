"""The quantized network of each arm, and what can be known of it before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import name_rules, trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import quantization, recipes
from jaxvision.methods.lbt.control import Control
from jaxvision.models.quantized import kernel_names
from jaxvision.quant import interval

FIRST_LAST = ("fp", "8bit")


@dataclass(frozen=True)
class Built:
    """The network of an arm, and the kernels whose gradients have the member's width rather than a rule's own."""

    network: Any
    layers: Mapping[str, Any] = field(default_factory=dict)
    follows: frozenset[str] = frozenset()


def build(
    block: Config, controls: Mapping[str, Control | None], bits: int, first_last: str, model: recipes.Model
) -> dict[str, Built]:
    """The network of each arm: the module itself ("float"), or quantized with the arm's kind of gradient quantizer.

    Args:
      block: ``quantization``, without the fields gradient and gradient_bits.
      controls: by arm; None: gradients stay in float.
      bits: the width of gradients for which the network is described; that of a training is data.
      first_last: "fp": the first and the last layer are float; "8bit": W and G, and W, A and G in 8 bits.
      model: the float network.

    Raises:
      ConfigError: a value that can't work, a rule that finds no layer.
    """
    values, rules = block.to_dict(), quantization.bit_rules(block)
    floats = block.words("float_layers")
    for name in ("gradient", "gradient_bits"):
        if name in values:
            raise ConfigError(f"{block.where(name)} is set by config.arms and config.gradient_bits; leave it out")
    kernels = kernel_names(model.module, model.image)
    first, last = (f"^{kernel}$" for kernel in (kernels[0], kernels[-1]))
    if first_last == "fp":
        values["float_layers"] = (*floats, first, last)
    else:
        ends = ((first, (8, quantization.FLOAT_BITS, 8)), (last, (8, 8, 8)))
        values["bit_rules"] = (*ends, *rules)
    return {name: _network(name, chosen, values, bits, model, kernels) for name, chosen in controls.items()}


def _network(
    name: str, chosen: Control | None, values: dict[str, Any], bits: int, model: recipes.Model, kernels: tuple[str, ...]
) -> Built:
    if name == "float":
        return Built(model.module)
    if chosen is None:
        rules = tuple((pattern, (*own[:2], quantization.FLOAT_BITS)) for pattern, own in values["bit_rules"])
        gradient = {"gradient": "uniform", "gradient_bits": quantization.FLOAT_BITS, "bit_rules": rules}
    else:
        gradient = {"gradient": chosen.kind, "gradient_bits": bits}
    network = quantization.build_network(
        Config({**values, **gradient}, "config.quantization"), model.module, model.image
    )
    layers = {kernel: layer for kernel in kernels if (layer := network.find(kernel)) is not None}
    own = [pattern for pattern, _ in values["bit_rules"]]
    common = (kernel for kernel in layers if name_rules.first(own, kernel) is None)
    follows = frozenset(kernel for kernel in common if layers[kernel].bits.gradient is not None)
    return Built(network, layers, follows)


def check_scales(built: Mapping[str, Built], model: recipes.Model) -> None:
    """Raises ConfigError for a quantized kernel of a weights file that is constant: its interval would be 0."""
    if model.pretrained is None:
        return
    leaves = trees.named_leaves(model.pretrained["params"])
    for each in built.values():
        for kernel in each.layers:
            if f"params/{kernel}" not in model.kept and np.ptp(np.asarray(leaves[kernel])) == 0:
                raise ConfigError(
                    f"config.model.init_from: all values of {kernel} are equal, so its quantizer would have the scale "
                    "0; add it to config.quantization.float_layers, or start from other weights"
                )


def too_few(built: Built, alphas: tuple[float, ...], widths: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """One line where the target clip ratio alpha / (2^b - 1) is a handful of elements in some layer; else "".

    Args:
      built: with the controller.
      alphas, widths: of its trainings.
      shape: of a batch of images.
    """
    outputs = built.network.output_shapes(jax.ShapeDtypeStruct(shape, jnp.float32))
    sizes = {name: outputs[name].size for name in built.follows}
    cases = [(size * alpha / (2**bits - 1), name, size, alpha, bits)
             for name, size in sizes.items() for alpha in alphas for bits in widths]  # fmt: skip
    few = [case for case in cases if interval.warn_if_too_few(*case[2:])]
    if not few:
        return ""
    _, name, *worst = min(few)
    return (
        f"{name.removesuffix('/kernel')}: {interval.warn_if_too_few(*worst)}; so it is in {len(few)} of {len(cases)} "
        "combinations of layer, alpha and width"
    )
