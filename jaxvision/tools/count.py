"""Multiply-accumulates, parameters and bit operations of the networks, for one image; nothing is computed.

    python -m jaxvision.tools.count                                        every network of the zoo in float, one a line
    python -m jaxvision.tools.count --model resnet20 --bits 4 4 4          one, with W, A and G of 4 bits
    python -m jaxvision.tools.count --model resnet18 --bits 2 2 --layers   its layers

BOPs are those of ``jaxvision/quant/bops.py``: a product of a b_w- and a b_a-bit number is b_w b_a of them, float is 32
bits. Training is the forward pass, the gradient of the inputs and that of the kernels. With ``--bits`` the first and
the last layer stay in float (``--all`` quantizes them too), and so do products of two activations, as in training here.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import macs, zoo
from jaxvision.models.quantized import Bits
from jaxvision.quant import bops
from jaxvision.quant.bops import Widths
from jaxvision.tools import command_line

COLUMNS = ("network", "image", "parameters", "MACs", "W/A/G", "BOPs forward", "BOPs training")
FLOAT = Widths()


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
      layers: every product, of ``models.macs.count``.
      bits: of the quantized ones, by name.
      parameters: trained numbers, without running statistics.
    """

    layers: tuple[macs.LayerCost, ...]
    bits: dict[str, Widths]
    parameters: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass."""
        return sum(layer.macs for layer in self.layers)

    def bops(self, count: str) -> float:
        """BOPs of ``count``, "forward" or "training"."""
        return sum(bops.network(self.layers, self.bits, count).values())


def measure(
    name: str,
    image: Sequence[int] | None = None,
    classes: int = 1000,
    widths: Widths = FLOAT,
    *,
    ends: bool = False,
    **settings: object,
) -> Cost:
    """The cost of a network of the zoo.

    Args:
      name: in the zoo.
      image: (H, W, C); None: the network's own size, in colour.
      classes: K.
      widths: of the layers that are quantized.
      ends: whether the first and the last layer are, too.
      settings: attributes of the network.

    Raises:
      ConfigError: an unknown network or setting, or an image that doesn't fit.
    """
    shape = tuple(image or (*zoo.spec(name).input_size, 3))
    module = zoo.build(name, num_classes=classes, **settings)
    layers = macs.count(module, (shape[0], shape[1], shape[2]))
    kernels = [layer.name for layer in layers if layer.weights]
    chosen = kernels if ends else kernels[1:-1]
    parameters = trees.count_parameters(zoo.variable_shapes(module, shape[:2], shape[2])["params"])
    return Cost(layers, dict.fromkeys(chosen, widths), parameters)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command_line.answer("count", lambda: _run(_parser().parse_args(arguments)))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m jaxvision.tools.count", description=__doc__)
    parser.add_argument("--model", help="name in the zoo [all of them]")
    parser.add_argument("--bits", type=int, nargs="+", metavar="W A [G]", help="widths [float]")
    parser.add_argument("--all", action="store_true", help="quantize the first and the last layer, too")
    parser.add_argument("--image", type=int, nargs=3, metavar=("H", "W", "C"), help="[the network's own size]")
    parser.add_argument("--classes", type=int, default=1000, help="[1000]")
    parser.add_argument("--settings", default="{}", help="attributes of the network, JSON: '{\"depth\": 8}'")
    parser.add_argument("--layers", action="store_true", help="the layers of --model")
    return parser


def _run(options: argparse.Namespace) -> None:
    widths, settings = _widths(options.bits), _settings(options.settings)
    if options.model is None and (options.layers or settings):
        raise ConfigError("--layers and --settings are for one network; name it with --model")
    if options.image and min(options.image) < 1:
        raise ConfigError(f"--image={tuple(options.image)} must be three whole numbers of at least 1")
    for line in _lines(options, widths, settings):
        print(line, flush=True)


def _lines(options: argparse.Namespace, widths: Widths, settings: dict[str, object]) -> Iterator[str]:
    names = zoo.names() if options.model is None else (options.model,)
    spaces = (max(len(COLUMNS[0]), *map(len, names)), 11, 12, 15, 8, 20, 20)
    for name in names:
        cost = measure(name, options.image, options.classes, widths, ends=options.all, **settings)
        if name == names[0]:
            yield _row(COLUMNS, spaces)
        image = "x".join(map(str, options.image or (*zoo.spec(name).input_size, 3)))
        bits = "/".join(
            "32" if width is None else str(width) for width in (widths.weight, widths.input, widths.gradient)
        )
        numbers = (cost.bops("forward"), cost.bops("training"))
        yield _row(
            (name, image, f"{cost.parameters:,}", f"{cost.macs:,}", bits, *(f"{n:,.0f}" for n in numbers)), spaces
        )
        if options.layers:
            yield from ("", bops.table(cost.layers, cost.bits, "training"))


def _row(cells: Sequence[str], spaces: Sequence[int]) -> str:
    name, *others = cells
    return "  ".join([name.ljust(spaces[0]), *(cell.rjust(space) for cell, space in zip(others, spaces[1:]))])


def _widths(bits: Sequence[int] | None) -> Widths:
    if bits is None:
        return FLOAT
    if len(bits) not in (2, 3):
        raise ConfigError(f"--bits={tuple(bits)} must be two or three widths: weights, inputs and gradients")
    known = Bits(*(None if width == 32 else width for width in bits))
    return Widths(known.weight, known.input, known.gradient)


def _settings(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--settings={text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--settings={text!r} must be a JSON object")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
