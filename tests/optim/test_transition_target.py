"""Targets against the formulas of the specification."""

import math

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.optim import transition_target
from jaxvision.optim.transition_target import initial_target


def values(schedule, steps):
    return np.asarray([float(schedule(step)) for step in steps])


def test_bits_scale_the_start():
    assert initial_target(5e-3, 2) == pytest.approx(5e-3 * math.sqrt(2))
    assert initial_target(5e-3, 2, scale_with_bits=False) == 5e-3
    assert initial_target(5e-3, 1) == 5e-3


def test_cosine_per_step_and_per_epoch():
    t = np.arange(0, 121, 7)
    smooth = transition_target(0.01, 4, "cosine", 120)
    np.testing.assert_allclose(values(smooth, t), 0.01 * (1 + np.cos(np.pi * t / 120)), atol=1e-8)
    per_epoch = transition_target(0.01, 4, "cosine", 120, steps_per_epoch=10)
    epoch = t // 10
    np.testing.assert_allclose(values(per_epoch, t), 0.01 * (1 + np.cos(np.pi * epoch / 12)), atol=1e-8)
    assert float(smooth(10**6)) == pytest.approx(0.0, abs=1e-9)


def test_step_linear_constant():
    step = transition_target(0.01, 1, "step", 400)
    np.testing.assert_allclose(
        values(step, [0, 99, 100, 200, 300, 399]), [1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-5], rtol=1e-5
    )
    own = transition_target(0.01, 1, "step", 400, boundaries=(50,), gamma=0.5)
    np.testing.assert_allclose(values(own, [49, 50]), [1e-2, 5e-3], rtol=1e-6)
    linear = transition_target(0.01, 1, "linear", 100, end=0.002)
    np.testing.assert_allclose(values(linear, [0, 50, 100, 200]), [0.01, 0.006, 0.002, 0.002], rtol=1e-5)
    np.testing.assert_allclose(values(transition_target(0.01, 1, "constant"), [0, 10**6]), 0.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.01, 9, "cosine", 10), "bits are 9"),
        ((0.0, 2, "cosine", 10), "factor 0.0"),
        ((0.5, 8, "cosine", 10), "factor 0.5 gives a transition rate of 1.41"),
        ((0.01, 2, "cosin", 10), "did you mean 'cosine'"),
        ((0.01, 2, "linear"), "'linear' needs total"),
        ((0.01, 2, "cosine", 0), "steps is 0"),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        transition_target(*arguments)
