"""The ``quantization`` block of a configuration: which layers of a network are quantized, how, and how finely."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxvision.core import name_rules, struct
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models.quantized import (
    Bits,
    LayerQuant,
    QuantizedNetwork,
    Recipe,
    Rule,
    kernel_names,
    product_names,
)
from jaxvision.models.quantized_attention import SOFTMAX_PRODUCT
from jaxvision.quant.binary import BinaryWeight
from jaxvision.quant.families import FAMILIES, Family
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.pact import PACT
from jaxvision.quant.trainable import three_deviations

FLOAT_BITS = 32
"""This width stands for float, as in the official codes."""


def build_network(config: Config, module: Any, image: Any) -> QuantizedNetwork:
    """The quantized form of ``module`` under a ``quantization`` block.

    Fields: family (a name of ``quant.families``), weight_bits, input_bits, gradient_bits (32: float), gradient (kind
    of the gradient quantizer), noise_bits (32 or 8, of the random numbers that round gradients), exponent (of the kind
    "piecewise": its narrow interval is 2^-(exponent + 4) of the wide one), execution ("fake" or "int"), output_scale
    (None: as the family needs it), float_layers (regexes of the kernels left in float), bit_rules (see
    :func:`bit_rules`), signed_inputs (regexes of kernels whose input can be negative), and where the block has it
    products (of attention, see :func:`product_rules`). A layer that a bit rule gives a
    float operand computes in float under "int" as well.

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
        "noise_bits": config.noise_bits,
        "exponent": config.exponent,
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
    network = QuantizedNetwork(module, tuple(layers), _products(config, family, module, image))
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


def check_start(network: QuantizedNetwork, params: Any, *fields: str) -> None:
    """Raises ConfigError where a quantizer of ``params``, known now, has a value that it can't start from.

    ``fields`` of the configuration decide about the start, beside those that the sentence names anyway.
    """
    try:
        network.check_fitted(params)
    except ConfigError as error:
        raise ConfigError(
            f"the first batch starts no network: {error}; leave the layer in config.quantization.float_layers, or look "
            f"at {' and '.join(('config.model.init_from', 'config.data', *fields))}"
        ) from error


def product_rules(config: Config) -> tuple[tuple[str, tuple[Any, Any]], ...]:
    """The field ``products``: (regex, (first, second)) pairs, the products of attention with quantized operands.

    Names are ``blocks_0/attn/q_k`` (operands q and k) and ``blocks_0/attn/softmax_v``. A block without the field has
    float products.

    Raises:
      ConfigError: it is anything but pairs of a string and two widths; the widths themselves aren't looked at.
    """
    values = config.get("products", ())
    for rule in values if isinstance(values, tuple | list) else (values,):
        match rule:
            case [str(), [_, _]]:
                continue
        raise ConfigError(
            f"{config.where('products')} has {rule!r}, which must be a regular expression and the widths of both "
            "operands; one rule is (('q_k',(8,8)),), with a comma at the end"
        )
    return tuple((pattern, tuple(widths)) for pattern, widths in values)


def _products(config: Config, family: Family, module: Any, image: Any) -> tuple[Rule, ...]:
    """One rule for each quantized product: the family's input quantizers, signed but for the softmax's.

    The product's scale is learned where the quantizers drop it.
    """
    rules = product_rules(config)
    if not rules:
        return ()
    kind, settings = family.activation, dict(family.activation_settings)
    can_be_signed = "signed" in {field.name for field in dataclasses.fields(kind)}
    if not can_be_signed and not family.any_sign:
        raise ConfigError(
            f"{config.where('products')} is set, but inputs of family {config.family!r} are unsigned only, and q, k "
            "and v have both signs"
        )
    signed = Recipe(kind, {**settings, "signed": True} if can_be_signed else settings)
    patterns, names = [pattern for pattern, _ in rules], product_names(module, image)
    if not names:
        raise ConfigError(f"{config.where('products')} is set, but the network has no attention with such products")
    name_rules.check(config.where("products"), patterns, names)
    found = []
    for name in names:
        if (index := name_rules.first(patterns, name)) is None:
            continue
        first, second = (None if width == FLOAT_BITS else width for width in rules[index][1])
        softmax = name.rpartition("/")[-1] == SOFTMAX_PRODUCT
        layer = LayerQuant(
            signed,
            Recipe(kind, settings) if softmax else signed,
            Bits(second, first),
            output_scale=family.needs_norm,
            needs_norm=family.needs_norm,
        )
        found.append(Rule(f"^{re.escape(name)}$", layer))
    return tuple(found)


@struct.dataclass
class OneBitPACT(PACT):
    """PACT that starts at 3 std(x) / sqrt(1 - 2 / pi), as TRS: at one bit nothing but the maximum passes half of it."""

    @classmethod
    def fit(cls, x: jax.Array, bits: Any) -> "OneBitPACT":
        """The quantizer with that start value."""
        return cls(three_deviations(x, half_normal=True), bits).check_width()


def _layer(family: Family, bits: Sequence[Any], signed: bool, options: dict[str, Any]) -> LayerQuant:
    """A layer; LSQ and PACT, whose papers begin at two bits, have a substitute at one.

    LSQ's weights are mean|w| sign(w) of each channel there, as LSQ has no two codes for them; PACT starts elsewhere.
    """
    settings = {**family.activation_settings, **({"signed": True} if signed else {})}
    weight, activation = Recipe(family.weight, dict(family.weight_settings)), Recipe(family.activation, settings)
    if bits[0] == 1 and family.weight is LSQ:
        weight = Recipe(BinaryWeight)
    if bits[1] == 1 and family.activation is PACT:
        activation = Recipe(OneBitPACT)
    return LayerQuant(
        weight,
        activation,
        Bits(*(None if width == FLOAT_BITS else width for width in bits)),
        **options,
    )
