"""NAS-Bench-201: strings, exact costs, which cells compute the same, the network against the official one."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import nas_bench_201, torch_import, zoo
from jaxvision.models import nas_bench_201_graph as graph
from jaxvision.models.nas_bench_201 import CONV_1X1, CONV_3X3, EDGES
from tests.arrays import load
from tests.methods.az_nas import networks as oracles
from tests.models import networks

ORACLES = Path(__file__).parents[1] / "oracles" / "az_nas"
BEST = 11_663


@pytest.fixture(scope="module")
def every():
    return nas_bench_201.all_architectures()


# --- strings and numbers -------------------------------------------------------------------------------------------


def test_strings_and_indices_invert_each_other(every):
    assert every.shape == (15_625, 6) and every.dtype == np.int32
    for index in (0, 1, 5_338, BEST, 15_624):
        operations = nas_bench_201.from_index(index)
        np.testing.assert_array_equal(operations, every[index])
        assert nas_bench_201.to_index(operations) == index
        text = nas_bench_201.to_string(operations)
        np.testing.assert_array_equal(nas_bench_201.from_string(text), operations)
    assert nas_bench_201.to_string(every[BEST]) == nas_bench_201.BEST_ON_CIFAR10
    assert nas_bench_201.to_string([0, 1, 2, 3, 4, 0]) == (
        "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|none~0|", "three nodes joined by '\\+', not 1"),
        ("|none~0|+|none~0|+|none~0|none~1|none~2|", "node 2, '\\|none~0\\|', must be 2 edge"),
        ("|none~0|+|none~0|none~1|+|none~0|conv~1|none~2|", "edge 3<-1 is 'conv~1'"),
        ("|none~0|+|none~0|none~0|+|none~0|none~1|none~2|", "edge 2<-1 is 'none~0'.*followed by ~1"),
    ],
)
def test_a_malformed_string_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        nas_bench_201.from_string(text)


def test_an_index_outside_is_named():
    with pytest.raises(ConfigError, match="between 0 and 15,624"):
        nas_bench_201.from_index(15_625)


# --- cost ----------------------------------------------------------------------------------------------------------


def test_costs_are_the_official_ones(every):
    given = load(ORACLES / "nb201_cost_0.npz")
    for name, resolution, classes in (("cifar10", 32, 10), ("cifar100", 32, 100), ("imagenet16_120", 16, 120)):
        flops = nas_bench_201.flops(given["arch_ops"], resolution, classes)
        np.testing.assert_array_equal(flops, given[f"flops_{name}"])
        np.testing.assert_array_equal(nas_bench_201.parameters(given["arch_ops"], classes), given[f"params_{name}"])
    flops, parameters = nas_bench_201.flops(every, 32, 10), nas_bench_201.parameters(every, 10)
    assert (flops.min(), flops.max()) == (7_783_050, 220_119_690)
    assert (parameters.min(), parameters.max()) == (73_306, 1_531_546)
    assert len(np.unique(flops)) == len(np.unique(parameters)) == 28


def test_the_networks_have_as_many_parameters_as_counted():
    for index, width, cells in ((BEST, 16, 5), (5_338, 4, 2), (0, 8, 1)):
        operations = nas_bench_201.from_index(index)
        settings = {"architecture": nas_bench_201.to_string(operations), "width": width, "cells": cells}
        shapes = zoo.variable_shapes(zoo.build("nas_bench_201", num_classes=7, **settings), (8, 8))
        counted = nas_bench_201.parameters(operations, 7, width, cells)
        assert trees.count_parameters(shapes["params"]) == counted


# --- what a cell computes ------------------------------------------------------------------------------------------


def test_disconnected_and_identity_cells_are_as_many_as_in_the_benchmark(every):
    assert graph.is_disconnected(every).sum() == 341
    assert graph.is_identity(every).sum() == 400
    assert graph.is_identity(np.asarray([1, 0, 4, 0, 1, 0])) and not graph.is_identity(np.asarray([1, 0, 0, 1, 1, 0]))
    text = {graph.canonical(cell) for cell in every[graph.is_identity(every)]}
    assert text == {"x"}
    assert {graph.canonical(cell) for cell in every[graph.is_disconnected(every)]} == {"0"}


def test_live_edges_in_jax_are_those_in_numpy(every):
    np.testing.assert_array_equal(graph.live(jnp.asarray(every[::50])), graph.live(every[::50]))
    np.testing.assert_array_equal(graph.prune(jnp.asarray(every[::50])), graph.prune(every[::50]))
    # A path exists exactly where one of the four lists of edges is free of none.
    paths = [(3,), (0, 4), (1, 5), (0, 2, 5)]
    expected = np.zeros(every.shape, bool)
    for path in paths:
        expected[:, path] |= (every[:, path] != 0).all(1)[:, None]
    np.testing.assert_array_equal(graph.live(every), expected)


def output(operations, kernels, x):
    """A cell with random pointwise kernels for its convolutions, in float64: enough to tell functions apart. Pooling
    is a fixed linear map that commutes with nothing else."""
    nodes = [x, 0 * x, 0 * x, 0 * x]
    for edge, (node, source) in enumerate(EDGES):
        y = nodes[source]
        if operations[edge] in (CONV_1X1, CONV_3X3):
            y = np.maximum(y, 0) @ kernels[edge]
            y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
            # So that the two kinds of convolution are different functions.
            y = y if operations[edge] == CONV_1X1 else y + 0.5 * y[::-1]
        elif operations[edge] == 4:
            y = (y + np.roll(y, 1, 0) + np.roll(y, 3, 0)) / 3
        if operations[edge]:
            nodes[node] = nodes[node] + y
    return nodes[3]


def same_function(one, other, generator):
    """Whether some exchange of the convolutions' kernels makes the outputs equal."""
    x, kernels = generator.normal(size=(7, 3)), generator.normal(size=(6, 3, 3))
    one, other = graph.prune(one), graph.prune(other)
    convolutions = [[e for e in range(6) if cell[e] in (CONV_1X1, CONV_3X3)] for cell in (one, other)]
    if len(convolutions[0]) != len(convolutions[1]):
        return False
    expected = output(one, kernels, x)
    for order in itertools.permutations(convolutions[0]):
        exchanged = kernels.copy()
        exchanged[convolutions[1]] = kernels[list(order)]
        if np.allclose(output(other, exchanged, x), expected, rtol=0, atol=1e-9):
            return True
    return False


def test_cells_are_taken_together_exactly_where_their_functions_are_equal(every):
    """Of each of some functions two cells; of cells that look alike (the same numbers of live operations) pairs."""
    representatives, generator = graph.representatives(), np.random.default_rng(0)
    assert (representatives[representatives] == representatives).all()
    cost = nas_bench_201.flops(every, 32, 10)
    assert (cost[representatives] <= cost).all()
    assert len(np.unique(representatives)) == 5_044
    chosen = generator.choice(15_625, 400, replace=False)
    for index in chosen:
        assert same_function(every[index], every[representatives[index]], generator), index
    kinds = {}
    for index in np.unique(representatives):
        kinds.setdefault(tuple(sorted(graph.prune(every[index]))), []).append(index)
    pairs = [pair for alike in kinds.values() for pair in itertools.combinations(alike, 2)]
    for pair in generator.choice(pairs, 400, replace=False):
        assert not same_function(*every[pair], generator), pair


def test_a_convolution_used_twice_is_not_two():
    """conv_a(x) + conv_b(x) and 2 conv_a(x): equal text in the benchmark's paper, another distribution."""
    two, twice = [3, 3, 0, 0, 1, 1], [3, 0, 1, 0, 1, 1]
    assert graph.canonical(two) == "3x3_0(x)+3x3_1(x)"
    assert graph.canonical(twice) == "3x3_0(x)+3x3_0(x)"


# --- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", oracles.NETS)
def test_logits_are_the_official_ones(number):
    net = oracles.oracle(number)
    operations = net["arch_ops"]
    settings = {"width": int(net["C"]), "cells": int(net["N"]), "architecture": nas_bench_201.to_string(operations)}
    module = zoo.build("nas_bench_201", num_classes=10, **settings)
    weights = oracles.draws(net).weights
    variables = oracles.variables(weights, operations, (net["w_fc_w"], net["w_fc_b"]))
    shapes = zoo.variable_shapes(module, (8, 8))
    statistics = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["batch_stats"])
    assert jax.tree.map(np.shape, variables["params"]) == jax.tree.map(np.shape, shapes["params"])
    apply = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable="batch_stats"))
    logits, moved = apply({**variables, "batch_stats": statistics}, net["x"])
    np.testing.assert_allclose(logits, net["logits"], rtol=1e-4, atol=1e-5)
    # A tenth of the unbiased variance of 512 values, which the stem's features have as 1.
    variance = moved["batch_stats"]["stem_1"]["var"]
    stem = nas_conv(net["x"], net["w_stem_w"])
    np.testing.assert_allclose(variance, 0.1 * stem.reshape(-1, 4).var(0, ddof=1), rtol=1e-4)


def nas_conv(x, kernel):
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    return np.einsum("bhwcij,ijcd->bhwd", windows, kernel)


def test_names_are_nats_benchs_and_taps_see_every_layer():
    module = zoo.build("nas_bench_201", num_classes=10, width=4, cells=1)
    shapes = zoo.variable_shapes(module, (8, 8))
    names = set(networks.exported_shapes("nas_bench_201", shapes))
    assert {"stem.0.weight", "cells.0.layers.4.op.1.weight", "cells.1.conv_a.op.2.running_mean",
            "cells.3.downsample.1.weight", "lastact.0.weight", "classifier.bias"} <= names  # fmt: skip
    assert not any(name.startswith("cells.0.layers.3.") for name in names)  # a skip
    x = np.zeros((2, 8, 8, 3), np.float32)
    seen = {}

    def tap(name, value):
        seen[name] = value.shape
        return value

    jax.eval_shape(lambda v: module.apply(v, x, tap=tap), shapes)
    layers = {name.removesuffix(".weight") for name, shape in networks.exported_shapes("nas_bench_201", shapes).items()
              if len(shape) in (2, 4)}  # fmt: skip
    assert set(seen) == layers
    assert seen["cells.3.conv_b.op.1"] == (2, 2, 2, 16)


def test_weights_survive_the_state_dict():
    module = zoo.build("nas_bench_201", num_classes=3, width=2, cells=1)
    variables = networks.drawn(module, 0, np.zeros((1, 8, 8, 3), np.float32))
    state = torch_import.export_state_dict("nas_bench_201", variables)
    assert torch_import.classifier_size("nas_bench_201", state) == 3


def test_training_reaches_every_parameter():
    module = zoo.build("nas_bench_201", num_classes=3, width=2, cells=1)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = networks.drawn(module, 1, images)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = module.apply({**variables, "params": params}, images, train=True, mutable="batch_stats")
            return -jax.nn.log_softmax(logits)[:, 0].mean()

        return jax.grad(loss)(params)

    for name, leaf in trees.named_leaves(gradient(variables["params"])).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"architecture": "|skip_connect~0|"}, "three nodes"), ({"cells": 0}, "cells=0 must be at least 1")],
)
def test_mistakes_are_named(settings, message):
    module = zoo.build("nas_bench_201", num_classes=2, **settings)
    with pytest.raises(ConfigError, match=message):
        zoo.variable_shapes(module, (8, 8))
