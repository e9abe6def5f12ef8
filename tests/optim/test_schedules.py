"""Schedules against the formulas of torch.optim.lr_scheduler and timm, written out in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.optim import schedules


def values(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float64)


def recursive_cosine(base, t_max, eta_min):
    """torch.optim.lr_scheduler.CosineAnnealingLR.get_lr, in its recursive form, with step() called t_max times."""
    lrs = [base]
    for t in range(1, t_max + 1):
        if (t - 1 - t_max) % (2 * t_max) == 0:
            lrs.append(lrs[-1] + (base - eta_min) * (1 - math.cos(math.pi / t_max)) / 2)
        else:
            lrs.append(
                (1 + math.cos(math.pi * t / t_max)) / (1 + math.cos(math.pi * (t - 1) / t_max)) * (lrs[-1] - eta_min)
                + eta_min
            )
    return np.asarray(lrs)


def test_cosine_is_torch_cosine_annealing():
    got = values(schedules.cosine(0.3, 20, end=0.01), 21)
    np.testing.assert_allclose(got, recursive_cosine(0.3, 20, 0.01), rtol=2e-6)


def test_cosine_after_warmup_is_torch_sequential():
    got = values(schedules.cosine(0.4, 24, warmup_steps=4, warmup_start=0.04), 30)
    warm = [0.4 * (0.1 + 0.9 * t / 4) for t in range(4)]  # LinearLR(start_factor=0.1, total_iters=4)
    expected = np.concatenate([warm, recursive_cosine(0.4, 20, 0.0), np.zeros(5)])
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-8)


def test_timm_cosine_keeps_counting_through_the_warmup():
    got = values(schedules.timm_cosine(5e-4, 30, warmup_steps=5, warmup_start=1e-6, end=1e-5), 33)
    for t, value in enumerate(got):
        if t < 5:
            expected = 1e-6 + t * (5e-4 - 1e-6) / 5
        elif t < 30:
            expected = 1e-5 + 0.5 * (5e-4 - 1e-5) * (1 + math.cos(math.pi * t / 30))
        else:
            expected = 1e-5
        assert value == pytest.approx(expected, rel=2e-6)


def test_multistep_is_torch_multistep():
    got = values(schedules.multistep(0.1, (6, 9), warmup_steps=3, warmup_start=0.01), 12)
    expected = [0.01, 0.04, 0.07] + [0.1] * 3 + [0.01] * 3 + [0.001] * 3
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    np.testing.assert_allclose(values(schedules.multistep(0.1, ()), 3), 0.1, rtol=1e-6)


def test_linear_polynomial_constant():
    np.testing.assert_allclose(values(schedules.linear(1.0, 0.5, 2), 4), [1.0, 0.75, 0.5, 0.5])
    expected = [0.2 * (1 - min(t, 4) / 4) ** 0.9 for t in range(6)]
    np.testing.assert_allclose(values(schedules.polynomial(0.2, 4), 6), expected, rtol=2e-6)
    np.testing.assert_allclose(values(schedules.constant(0.25), 3), 0.25)


def test_staircase_holds_for_an_epoch():
    got = values(schedules.staircase(schedules.linear(0.0, 1.0, 6), 3), 7)
    np.testing.assert_allclose(got, [0, 0, 0, 0.5, 0.5, 0.5, 1.0])


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.1),
        schedules.linear(0.1, 0.0, 5),
        schedules.polynomial(0.1, 5),
        schedules.cosine(0.1, 5, warmup_steps=2),
        schedules.timm_cosine(0.1, 5, warmup_steps=2),
        schedules.multistep(0.1, (3,)),
        schedules.staircase(schedules.cosine(0.1, 5), 2),
    ],
)
def test_schedules_give_float32_scalars_for_ints_and_traced_steps(schedule):
    eager = schedule(4)
    traced = jax.jit(schedule)(jnp.asarray(4, jnp.int32))
    assert jnp.shape(eager) == () and traced.dtype == jnp.float32
    assert float(eager) == pytest.approx(float(traced), rel=1e-6)


def test_epochs_to_steps():
    assert schedules.epochs_to_steps(2.5, 10) == 25
    assert schedules.epochs_to_steps(0, 10) == 0
    for epochs, steps in ((-1, 10), (math.inf, 10), (math.nan, 10), (1, 0)):
        with pytest.raises(ConfigError):
            schedules.epochs_to_steps(epochs, steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.cosine(0.1, 10, warmup_steps=11), "warmup_steps is 11"),
        (lambda: schedules.cosine(-0.1, 10), "peak is -0.1"),
        (lambda: schedules.cosine(0.1, 0), "steps is 0"),
        (lambda: schedules.timm_cosine(0.1, 10, end=math.nan), "end is nan"),
        (lambda: schedules.multistep(0.1, (5, 5)), "boundaries"),
        (lambda: schedules.multistep(0.1, (2,), warmup_steps=3), "warm-up"),
        (lambda: schedules.linear(0.1, 0.0, 1.5), "steps is 1.5"),
        (lambda: schedules.staircase(schedules.constant(0.1), 0), "every is 0"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
