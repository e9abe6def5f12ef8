"""Bit operations: what the multiply-accumulates of a network cost at the bit widths of its layers.

A product of a b_w-bit and a b_a-bit number is b_w b_a bit operations, so a layer in float32 costs 32 * 32 a MAC.
Training multiplies three times: the output (b_w b_a), the gradient of the input (b_g b_w) and that of the kernel
(b_g b_a). Whole numbers are exact (Python's); layers come from ``models.macs.count``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from jaxvision.core.errors import ConfigError, unknown


class Layer(Protocol):
    """What is needed to know of a layer; ``models.macs.LayerCost`` has it."""

    @property
    def name(self) -> str: ...
    @property
    def macs(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def fan_in(self) -> int: ...


class Bits(Protocol):
    """Widths of a layer's operands, None: float; ``models.quantized.Bits`` or :class:`Widths`."""

    @property
    def weight(self) -> int | None: ...
    @property
    def input(self) -> int | None: ...
    @property
    def gradient(self) -> int | None: ...


class Widths(NamedTuple):
    """Bit widths of a layer's operands.

    Attributes:
      weight: of the kernel; in a product of two activations of the second operand.
      input: of the activation.
      gradient: of the output's gradient.
    """

    weight: int | None = None
    input: int | None = None
    gradient: int | None = None


def forward(macs: int, weight: int, input: int) -> int:
    """``macs b_w b_a``."""
    return macs * weight * input


def extended(macs: int, weight: int, input: int, fan_in: int) -> float:
    """``macs (b_w b_a + b_w + b_a + log2(fan_in))``: with the adders, whose width grows with the sum's length.

    ``fan_in`` is ``C_in / groups k^2``. Source: Baskin et al. 2018 (UNIQ, arXiv:1804.10969).
    """
    return macs * (weight * input + weight + input + math.log2(fan_in))


def training(macs: int, weight: int, input: int, gradient: int) -> int:
    """``macs (b_w b_a + b_g b_w + b_g b_a)``: forward, gradient of the input, gradient of the kernel."""
    return macs * (weight * input + gradient * weight + gradient * input)


COUNTS: dict[str, Callable[[Layer, int, int, int], float]] = {
    "forward": lambda layer, weight, input, gradient: forward(layer.macs, weight, input),
    "extended": lambda layer, weight, input, gradient: extended(layer.macs, weight, input, layer.fan_in),
    "training": lambda layer, weight, input, gradient: training(layer.macs, weight, input, gradient),
}


def _widths(bits: Bits, float_bits: int) -> tuple[int, int, int]:
    weight, input, gradient = (
        float_bits if width is None else width for width in (bits.weight, bits.input, bits.gradient)
    )
    return weight, input, gradient


def network(
    layers: Iterable[Layer], bits: Mapping[str, Bits], count: str = "forward", *, float_bits: int = 32
) -> dict[str, float]:
    """BOPs of one image by layer name.

    Args:
      layers: of ``models.macs.count``.
      bits: by layer name; layers that are not in it are float.
      count: ``"forward"``, ``"extended"`` or ``"training"``.
      float_bits: what float counts as: 32, or 8 where the float layers are deployed so.

    Returns:
      name -> BOPs, whole numbers except of ``"extended"``.

    Raises:
      ConfigError: an unknown count, a name in ``bits`` that no layer has, or a width below one bit.
    """
    if count not in COUNTS:
        raise unknown("count", count, COUNTS)
    layers = tuple(layers)
    names = {layer.name for layer in layers}
    for name, widths in bits.items():
        if name not in names:
            raise unknown("layer", name, names)
        if min(_widths(widths, float_bits)) < 1:
            raise ConfigError(f"the bits of {name} ({_widths(widths, float_bits)}) must be at least 1 each")
    return {layer.name: COUNTS[count](layer, *_widths(bits.get(layer.name, Widths()), float_bits)) for layer in layers}


def table(layers: Sequence[Layer], bits: Mapping[str, Bits], count: str = "forward", *, float_bits: int = 32) -> str:
    """A text table, a layer a line and a line of totals: MACs, weights, bits (W/A, with G in ``"training"``), BOPs.

    Arguments and errors as in :func:`network`.
    """
    cost = network(layers, bits, count, float_bits=float_bits)
    total, shown = sum(cost.values()), 3 if count == "training" else 2
    rows = [("layer", "MACs", "weights", "/".join("WAG"[:shown]), "BOPs", "share")]
    for layer in layers:
        widths = "/".join(map(str, _widths(bits.get(layer.name, Widths()), float_bits)[:shown]))
        share = f"{100 * cost[layer.name] / total:.1f} %"
        rows.append((layer.name, f"{layer.macs:,}", f"{layer.weights:,}", widths, f"{cost[layer.name]:,.0f}", share))
    macs, weights = sum(layer.macs for layer in layers), sum(layer.weights for layer in layers)
    rows.append(("total", f"{macs:,}", f"{weights:,}", "", f"{total:,.0f}", "100.0 %"))
    columns = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, columns[1:]))
        lines.append("  ".join([name.ljust(columns[0]), *right]))
    return "\n".join(lines)
