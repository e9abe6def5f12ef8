"""Bit operations: the oracles' totals, the three counts by hand, the table, mistakes."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import bops
from jaxvision.quant.bops import Widths

ORACLES = Path(__file__).parents[1] / "oracles" / "quantizers"


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    macs: int
    weights: int
    fan_in: int


LAYERS = (Layer("stem", 100, 10, 27), Layer("conv", 5000, 50, 64), Layer("fc", 7, 7, 8))


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_oracles(case, width):
    with np.load(ORACLES / f"bops_{case}.npz") as file:
        oracle = dict(file)
    layers = [Layer(f"layer{i}", int(m), int(w), 1) for i, (m, w) in enumerate(zip(oracle["macs"], oracle["weights"]))]
    bits = {layer.name: Widths(width, width) for layer, kind in zip(layers, oracle["kind"]) if kind == 1}
    assert sum(bops.network(layers, bits).values()) == oracle[f"bops_w{width}a{width}"]


def test_counts_by_hand():
    bits = {"conv": Widths(2, 3, 5)}
    assert bops.network(LAYERS, bits) == {"stem": 100 * 1024, "conv": 5000 * 6, "fc": 7 * 1024}
    assert bops.network(LAYERS, bits, "training") == {
        "stem": 100 * 3072,
        "conv": 5000 * (2 * 3 + 5 * 2 + 5 * 3),
        "fc": 7 * 3072,
    }
    assert bops.network(LAYERS, bits, "extended") == {
        "stem": pytest.approx(100 * (1024 + 64 + math.log2(27))),
        "conv": 5000 * (6 + 2 + 3 + 6),
        "fc": 7 * (1024 + 64 + 3),
    }


def test_float_is_none_and_may_be_deployed_in_eight_bits():
    half = {"conv": Widths(weight=4)}
    assert bops.network(LAYERS, half)["conv"] == 5000 * 4 * 32
    assert bops.network(LAYERS, half, float_bits=8) == {"stem": 6400, "conv": 5000 * 4 * 8, "fc": 7 * 64}
    weights_and_activations = {"conv": Widths(4, 4)}
    assert bops.network(LAYERS, weights_and_activations, "training")["conv"] == 5000 * (16 + 2 * 4 * 32)


def test_counts_beyond_64_bits_are_exact():
    assert bops.training(2**62 + 1, 8, 8, 8) == 192 * (2**62 + 1)


def test_table():
    bits = {"conv": Widths(4, 4, 4)}
    lines = bops.table(LAYERS, bits).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "MACs", "weights", "W/A", "BOPs", "share"],
        ["stem", "100", "10", "32/32", "102,400", "54.0", "%"],
        ["conv", "5,000", "50", "4/4", "80,000", "42.2", "%"],
        ["fc", "7", "7", "32/32", "7,168", "3.8", "%"],
        ["total", "5,107", "67", "189,568", "100.0", "%"],
    ]
    assert len({len(line) for line in lines}) == 1
    trained = bops.table(LAYERS, bits, "training", float_bits=8).splitlines()
    assert "W/A/G" in trained[0] and "8/8/8" in trained[1] and "4/4/4" in trained[2]
    assert f"{107 * 192 + 5000 * 48:,}" in trained[-1]


@pytest.mark.parametrize(
    ("bits", "count", "message"),
    [
        ({"cnov": Widths(2, 2)}, "forward", "layer='cnov' is unknown; did you mean 'conv'"),
        ({"conv": Widths(0, 2)}, "forward", r"the bits of conv \(\(0, 2, 32\)\) must be at least 1 each"),
        ({}, "fwd", "count='fwd' is unknown"),
    ],
)
def test_mistakes_are_named(bits, count, message):
    with pytest.raises(ConfigError, match=message):
        bops.network(LAYERS, bits, count)
