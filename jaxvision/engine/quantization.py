"""The ``quantization`` block of a configuration: which layers of a network are quantized, how, and how finely."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule, kernel_names
from jaxvision.quant.families import FAMILIES, Family

FLOAT_BITS = 32
"""This width stands for float, as in the official codes."""


def build_network(config: Config, module: Any, image: Any) -> QuantizedNetwork:
    """The quantized form of ``module`` under a ``quantization`` block.

    Fields: family (a name of ``quant.families``), weight_bits, input_bits, gradient_bits (32: float), gradient (kind
    of the gradient quantizer), execution ("fake" or "int"), output_scale (None: as the family needs it), float_layers
    (regexes of the kernels left in float), bit_rules ((regex, (weight, input, gradient)), ...: other widths; the first
    that is found in a kernel's name counts), signed_inputs (regexes of kernels whose input can be negative).

    Args:
      config: the block.
      module: a network of the zoo.
      image: an example or its shape, [1, H, W, C].

    Raises:
      ConfigError: a value that can't work, a regex that finds no kernel, a layer without the normalisation that its
        quantizer needs.
    """
    name = config.family
    if name not in FAMILIES:
        raise unknown(config.where("family"), name, FAMILIES)
    family, scaled = FAMILIES[name], config.output_scale
    options = {
        "gradient": config.gradient,
        "execution": config.execution,
        "output_scale": family.output_scale if scaled is None else scaled,
        "needs_norm": family.needs_norm,
    }
    everywhere = (config.weight_bits, config.input_bits, config.gradient_bits)
    floats, signed, bit_rules = tuple(config.float_layers), tuple(config.signed_inputs), tuple(config.bit_rules)
    can_be_signed = "signed" in {field.name for field in dataclasses.fields(family.activation)}
    if signed and not can_be_signed and not family.any_sign:
        raise ConfigError(f"{config.where('signed_inputs')}={signed}, but inputs of family {name!r} are unsigned only")

    names = kernel_names(module, image)
    _check_used(config.where("float_layers"), floats, names)
    left = [kernel for kernel in names if not _found(floats, kernel)]
    _check_used(config.where("signed_inputs"), signed, left)
    _check_used(config.where("bit_rules"), [pattern for pattern, _ in bit_rules], left)
    rules = []
    for kernel in left:
        bits = next((bits for pattern, bits in bit_rules if re.search(pattern, kernel)), everywhere)
        layer = _layer(family, bits, can_be_signed and _found(signed, kernel), options, config.where("bit_rules"))
        rules.append(Rule(f"^{re.escape(kernel)}$", layer))
    network = QuantizedNetwork(module, tuple(rules))
    network.check(image)
    return network


def _layer(family: Family, bits: Sequence[int], signed: bool, options: dict[str, Any], where: str) -> LayerQuant:
    if len(bits) != 3:
        raise ConfigError(f"{where}: {bits!r} must be the three widths (weight, input, gradient)")
    settings = {**family.activation_settings, **({"signed": True} if signed else {})}
    return LayerQuant(
        Recipe(family.weight, dict(family.weight_settings)),
        Recipe(family.activation, settings),
        Bits(*(None if width == FLOAT_BITS else width for width in bits)),
        **options,
    )


def _found(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _check_used(where: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            used = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ConfigError(f"{where} has {pattern!r}, which is not a regular expression: {error}") from error
        if not used:
            raise ConfigError(
                f"{where} has {pattern!r}, which matches no layer that it could concern; "
                f"kernels are called {', '.join(names[:3])}, ..."
            )
