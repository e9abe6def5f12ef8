"""NAS-Bench-201 as a search space."""

import jax
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas.spaces.nb201 import NasBench201Space
from jaxvision.models import nas_bench_201, zoo

SPACE = NasBench201Space(width=4, num_cells=1)


def test_samples_are_uniform_over_operations_and_edges():
    generator = np.random.default_rng(0)
    drawn = np.stack([SPACE.sample(generator) for _ in range(2000)])
    assert drawn.dtype == np.int32 and drawn.shape == (2000, *SPACE.shape)
    shares = np.stack([np.bincount(edge, minlength=5) / 2000 for edge in drawn.T])
    np.testing.assert_allclose(shares, 0.2, atol=0.035)


@pytest.mark.parametrize("replacements", [1, 2, 6])
def test_mutation_changes_just_so_many_edges(replacements):
    generator, parent = np.random.default_rng(0), np.asarray([0, 1, 2, 3, 4, 0], np.int32)
    children = np.stack([SPACE.mutate(parent, generator, replacements) for _ in range(500)])
    assert children.dtype == np.int32 and ((children >= 0) & (children < 5)).all()
    np.testing.assert_array_equal((children != parent).sum(1), replacements)
    np.testing.assert_array_equal(parent, [0, 1, 2, 3, 4, 0])
    # Every edge moves, to every other operation.
    assert all(len(set(edge)) == (4 if replacements == 6 else 5) for edge in children.T)


def test_costs_strings_functions_and_the_network():
    architecture = SPACE.from_string(nas_bench_201.BEST_ON_CIFAR10)
    assert SPACE.to_string(architecture) == nas_bench_201.BEST_ON_CIFAR10
    cost = NasBench201Space().cost(architecture)
    assert (cost.flops, cost.params, cost.layers) == (153_272_970, 1_073_466, 0)
    name, settings = SPACE.model(architecture)
    assert settings == {"architecture": nas_bench_201.BEST_ON_CIFAR10, "width": 4, "cells": 1}
    zoo.build(name, num_classes=10, **settings)
    # Node 1 has no way out, node 2's skip adds nothing: a single 3x3 convolution.
    dangling = np.asarray([3, 0, 0, 3, 0, 4], np.int32)
    stands = SPACE.function(dangling)
    np.testing.assert_array_equal(SPACE.function(stands), stands)
    assert SPACE.cost(stands).flops < SPACE.cost(dangling).flops


def test_scores_come_from_the_key_alone_one_by_one_and_in_batches():
    score = SPACE.scorer(8, 2)
    rows = np.stack([SPACE.sample(np.random.default_rng(seed)) for seed in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    single = [score(row, key) for row, key in zip(rows, keys, strict=True)]
    assert all(isinstance(value, float) for value in single[0].values())
    assert set(single[0]) == set(SPACE.proxies) - {"complexity"}
    assert score(rows[0], keys[0]) == single[0]
    assert all(value != single[0][name] for name, value in score(rows[0], keys[1]).items())
    # Masked and batched over two, the last one again to fill up.
    together = SPACE.batched_scorer(8, 2, 2)(rows, keys)
    for name, values in together.items():
        np.testing.assert_allclose(values, [each[name] for each in single], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("replacements", [0, 7])
def test_mistakes_are_named(replacements):
    with pytest.raises(ConfigError, match=f"replacements={replacements} must be between 1 and 6"):
        SPACE.mutate(np.zeros(6, np.int32), np.random.default_rng(0), replacements)
    with pytest.raises(ConfigError, match="resolution=10"):
        SPACE.scorer(10, 2)
