"""The ``quantization`` block of a configuration: which layers of a network are quantized, how, and how finely."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxvision.core import name_rules
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
    (regexes of the kernels left in float), bit_rules (see :func:`bit_rules`), signed_inputs (regexes of kernels whose
    input can be negative). A layer that a bit rule gives a float operand computes in float under "int" as well.

    Args:
      config: the block.
      module: a network of the zoo.
      image: an example or its shape, [1, H, W, C].

    Raises:
      ConfigError: a value that can't work, a regex that decides about no kernel, a layer without the normalisation
        that its quantizer needs.
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
    floats, signed, rules = config.words("float_layers"), config.words("signed_inputs"), bit_rules(config)
    can_be_signed = "signed" in {field.name for field in dataclasses.fields(family.activation)}
    if signed and not can_be_signed and not family.any_sign:
        raise ConfigError(f"{config.where('signed_inputs')}={signed}, but inputs of family {name!r} are unsigned only")

    names = kernel_names(module, image)
    name_rules.check(config.where("float_layers"), floats, names, ordered=False)
    left = [kernel for kernel in names if name_rules.first(floats, kernel) is None]
    name_rules.check(config.where("signed_inputs"), signed, left, ordered=False)
    name_rules.check(config.where("bit_rules"), [pattern for pattern, _ in rules], left)
    layers = []
    for kernel in left:
        rule = name_rules.first([pattern for pattern, _ in rules], kernel)
        bits, own = (everywhere, options) if rule is None else (rules[rule][1], dict(options))
        if rule is not None and FLOAT_BITS in bits[:2]:
            own["execution"] = "fake"
        is_signed = can_be_signed and name_rules.first(signed, kernel) is not None
        layers.append(Rule(f"^{re.escape(kernel)}$", _layer(family, bits, is_signed, own)))
    network = QuantizedNetwork(module, tuple(layers))
    network.check(image)
    return network


def bit_rules(config: Config) -> tuple[tuple[str, tuple[Any, Any, Any]], ...]:
    """The field ``bit_rules``: (regex, (weight, input, gradient)) pairs with other widths than the common ones.

    The first that is found in a kernel's name counts.

    Raises:
      ConfigError: it is anything but pairs of a string and three widths; the widths themselves aren't looked at.
    """
    values = config.bit_rules
    for rule in values if isinstance(values, tuple | list) else (values,):
        match rule:
            case [str(), [_, _, _]]:
                continue
        raise ConfigError(
            f"{config.where('bit_rules')} has {rule!r}, which must be a regular expression and the three widths of "
            "weight, input and gradient; one rule is (('layer3',(8,8,32)),), with a comma at the end"
        )
    return tuple((pattern, tuple(widths)) for pattern, widths in values)


def _layer(family: Family, bits: Sequence[Any], signed: bool, options: dict[str, Any]) -> LayerQuant:
    settings = {**family.activation_settings, **({"signed": True} if signed else {})}
    return LayerQuant(
        Recipe(family.weight, dict(family.weight_settings)),
        Recipe(family.activation, settings),
        Bits(*(None if width == FLOAT_BITS else width for width in bits)),
        **options,
    )
