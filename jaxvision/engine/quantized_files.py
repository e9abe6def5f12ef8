"""What a finished run leaves of a quantized network: a weights file, codes for other programs; and the way back."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import linen as nn

from jaxvision.core.config import Config
from jaxvision.engine.quantization import FLOAT_BITS, build_network
from jaxvision.engine.recipes import Model
from jaxvision.models import integer_file, integer_folding, integer_network, weight_file
from jaxvision.models.quantized import QuantizedNetwork, kernel_names

WEIGHTS, INTEGERS = "quantized.safetensors", "integers.safetensors"


def metadata(model: Model, family: str, network: QuantizedNetwork) -> dict[str, Any]:
    """What a quantized network's weight file says of itself; ``bits`` are (weight, input) of each layer, as JSON."""
    return {
        "model": model.name,
        "num_classes": model.module.num_classes,
        "family": family,
        weight_file.BITS: json.dumps(widths(network, model.image)),
    }


def widths(network: QuantizedNetwork, image: Any) -> dict[str, list[int | None]]:
    """Widths of weight and input of each quantized layer, by its kernel's name."""
    return {name: [layer.bits.weight, layer.bits.input] for name, layer in network.check(image).items()}


def save_quantized(model: Model, family: str, network: QuantizedNetwork, variables: Any, path: Path) -> None:
    """The latent weights and the scales; ``model.init_from`` of ``trs`` takes the file again."""
    weight_file.save_variables(path, variables, metadata(model, family, network))


def save_integers(model: Model, family: str, network: QuantizedNetwork, variables: Any, path: Path) -> None:
    """Codes and steps for other programs; beside it a JSON file (``models/integer_file.py``).

    Normalisations are folded into the integer layers before them.
    """
    integers = integer_folding.fold(network, integer_network.convert(network, variables), model.image)
    described = integer_network.describe(network, integers, model.image)
    facts = metadata(model, family, network)
    integer_file.save(path.with_suffix(""), integer_file.IntegerModel(integers, described, facts))


def network_of(block: Mapping[str, Any], facts: Mapping[str, str], module: nn.Module, image: Any) -> QuantizedNetwork:
    """The network of a file of :func:`save_quantized`, with float gradients.

    Args:
      block: ``quantization`` of the run's configuration. Family and widths are the file's, as arms have their own.
      facts: the file's metadata.
      module: the float network.
      image: an example or its shape, [1, H, W, C].
    """
    saved: dict[str, list[int | None]] = json.loads(facts[weight_file.BITS])
    exactly = {name: f"^{re.escape(name)}$" for name in kernel_names(module, image)}
    wide = {name: [FLOAT_BITS if width is None else width for width in pair] for name, pair in saved.items()}
    values = {
        **block,
        "gradient": "uniform",
        "gradient_bits": FLOAT_BITS,
        "float_layers": tuple(pattern for name, pattern in exactly.items() if name not in saved),
        "bit_rules": tuple((exactly[name], (*pair, FLOAT_BITS)) for name, pair in wide.items()),
    }
    if facts["family"] != block["family"]:
        values |= {"family": facts["family"], "output_scale": None}
    return build_network(Config(values, "config.quantization"), module, image)
