"""The integer program and the perturbation against their oracles."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import allocation
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "igq_vit"


@pytest.mark.parametrize("path", sorted(ORACLES.glob("perturbation_*.npz")), ids=lambda p: p.stem)
def test_perturbation_oracle(path):
    oracle = load(path)
    with jax.enable_x64(True):
        kl = np.asarray(allocation.kl_divergence(oracle["logits_fp"], oracle["logits_q"]))
    np.testing.assert_allclose(kl, oracle["kl"], rtol=1e-9)
    np.testing.assert_allclose(kl.mean(), oracle["mean"], rtol=1e-9)
    kl = allocation.kl_divergence(oracle["logits_fp"].astype(np.float32), oracle["logits_q"].astype(np.float32))
    np.testing.assert_allclose(kl, oracle["kl"], rtol=1e-3, atol=1e-6)


def test_kl_is_zero_for_equal_predictions_and_finite_for_extreme_ones():
    logits = jnp.asarray([[0.0, 200.0, -300.0], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(allocation.kl_divergence(logits, logits + 5), 0, atol=1e-6)
    assert np.isfinite(allocation.kl_divergence(logits, -logits)).all()


@pytest.mark.parametrize("solver", allocation.SOLVERS)
@pytest.mark.parametrize("path", sorted(ORACLES.glob("allocate_*.npz")), ids=lambda p: p.stem)
def test_allocation_oracle(path, solver):
    oracle = load(path)
    psi, cost, budget = oracle["perturbation"], oracle["cost"], float(oracle["budget"])
    choice = allocation.allocate(psi, cost, budget, solver=solver)
    assert allocation.total(cost, choice) <= budget
    # The dynamic program's grid of a million bins is coarser than the costs of the largest case.
    rtol = 1e-9 if solver == "milp" or budget <= allocation.DP_BINS else 1e-3
    np.testing.assert_allclose(allocation.total(psi, choice), oracle["objective"], rtol=rtol)
    assert allocation.total(psi, choice) <= oracle["uniform_objective"]


@pytest.mark.parametrize("solver", allocation.SOLVERS)
def test_small_programs_equal_brute_force(solver):
    rng = np.random.default_rng(3)
    for _ in range(20):
        psi = rng.random((4, 3))
        cost = rng.integers(1, 30, (4, 3)) * 1_000_000
        budget = float(rng.integers(cost.min(1).sum(), cost.max(1).sum() + 1))
        choice = allocation.allocate(psi, cost, budget, solver=solver)
        assert allocation.total(cost, choice) <= budget
        every = [np.asarray(c) for c in itertools.product(range(3), repeat=4)]
        best = min(allocation.total(psi, c) for c in every if allocation.total(cost, c) <= budget)
        np.testing.assert_allclose(allocation.total(psi, choice), best, rtol=1e-12)


@pytest.mark.parametrize("solver", allocation.SOLVERS)
def test_edges_of_the_budget(solver):
    psi = np.asarray([[3.0, 1.0], [2.0, 0.5]])
    cost = np.asarray([[10.0, 20.0], [10.0, 20.0]])
    np.testing.assert_array_equal(allocation.allocate(psi, cost, 20, solver=solver), [0, 0])
    np.testing.assert_array_equal(allocation.allocate(psi, cost, 30, solver=solver), [1, 0])
    np.testing.assert_array_equal(allocation.allocate(psi, cost, 1e12, solver=solver), [1, 1])
    np.testing.assert_array_equal(allocation.allocate(psi, np.zeros((2, 2)), 0, solver=solver), [1, 1])
    np.testing.assert_array_equal(allocation.allocate(psi, cost / 3, 20 / 3 + 1e-9, solver=solver), [0, 0])


def test_an_impossible_budget_names_the_smallest_one():
    with pytest.raises(ConfigError, match=r"budget of 19 .* smallest possible is 20"):
        allocation.allocate(np.ones((2, 2)), np.full((2, 2), 10.0), 19)


@pytest.mark.parametrize(
    ("psi", "cost"), [(np.ones((2, 2)), np.ones((2, 3))), (np.full((2, 2), np.nan), np.ones((2, 2)))]
)
def test_wrong_tables_are_refused(psi, cost):
    with pytest.raises(ConfigError, match="finite tables of one shape"):
        allocation.allocate(psi, cost, 10)


def test_unknown_solver():
    with pytest.raises(ConfigError, match="solver='greedy'"):
        allocation.allocate(np.ones((1, 1)), np.ones((1, 1)), 1, solver="greedy")
