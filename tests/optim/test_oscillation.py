"""Oscillation tracking and freezing against the official order of operations, written as a loop; dampening."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.optim import dampening_loss, freeze_oscillating, oscillation, oscillation_metrics, sgdt

MOMENTUM, THRESHOLD = 0.1, 0.3


def official(series, threshold):
    """Nagel et al.'s loop over one weight's codes: frequency, frozen and the code used, at each step."""
    last, direction, frequency, average, frozen, held, out = series[0], 0, 0.0, float(series[0]), False, 0, []
    for code in series:
        code = held if frozen else code
        move = np.sign(code - last)
        frequency = MOMENTUM * (move * direction == -1) + (1 - MOMENTUM) * frequency
        direction = move if move else direction
        if frequency > threshold and not frozen:
            frozen, held = True, int(np.round(average))
        average = MOMENTUM * code + (1 - MOMENTUM) * average
        last = code
        out.append((frequency, frozen, held if frozen else code))
    return out


@pytest.mark.parametrize("threshold", [THRESHOLD, 2.0])
def test_tracking_is_the_official_loop(threshold):
    rng = np.random.default_rng(0)
    series = rng.integers(-2, 2, (40, 30))
    series[:, :5] = 1  # never moves
    series[:, 5:10] = np.arange(40)[:, None] % 2
    series[:, 10:15] = np.minimum(np.arange(40)[:, None], 1)  # one change isn't an oscillation
    step = jax.jit(lambda last, codes: oscillation.track(last, codes, MOMENTUM, threshold))
    state = oscillation.start(jnp.asarray(series[0]))
    expected = [official(column, threshold) for column in series.T]
    for t, codes in enumerate(series):
        state = step(state, jnp.asarray(codes, jnp.int8))
        frequency, frozen, used = zip(*[column[t] for column in expected])
        np.testing.assert_array_equal(state.frozen, frozen)
        np.testing.assert_array_equal(state.codes, used)
        np.testing.assert_allclose(np.where(frozen, 0, state.frequency), np.where(frozen, 0, frequency), atol=1e-6)
    assert state.frozen.any() == (threshold < 1) and not state.frozen[:5].any() and not state.frozen[10:15].any()


class Step:
    """w_hat = step * codes."""

    def __init__(self, size):
        self.size = size

    def codes(self, w):
        return jnp.round(w / self.size).astype(jnp.int32)


jax.tree_util.register_pytree_node(Step, lambda q: ((q.size,), None), lambda _, children: Step(*children))


def back_and_forth(latent_fn, sizes):
    """A weight pushed over the transition point at every step, and one that rests; latents after each step."""
    transform = optax.chain(
        optax.sgd(1.0), freeze_oscillating(threshold=THRESHOLD, momentum=MOMENTUM, latent_fn=latent_fn)
    )
    params = {"a": jnp.asarray([0.3, 0.1])}
    state, history = transform.init(params), []
    step = jax.jit(lambda g, s, p, size: transform.update(g, s, p, quantizers={"a": Step(size)}))
    for t, size in enumerate(sizes):
        push = {"a": jnp.asarray([0.3, 0.0]) * (-1.0) ** (t + 1)}
        updates, state = step(push, state, params, jnp.float32(size))
        params = optax.apply_updates(params, updates)
        history.append(params["a"])
    return np.asarray(history), oscillation_metrics(state)


def test_oscillating_weights_are_held_where_they_lie():
    history, metrics = back_and_forth(None, [1.0] * 20)
    assert (history[1:5, 0] != history[:4, 0]).all() and (history[-10:, 0] == history[-1, 0]).all()
    np.testing.assert_array_equal(history[:, 1], np.float32(0.1))
    assert {name: float(value) for name, value in metrics.items()} == {"oscillating/a": 0.5, "frozen/a": 0.5}


def test_or_put_in_the_middle_of_their_code():
    history, _ = back_and_forth(lambda codes, q: q.size * codes, [1.0] * 15 + [0.5] * 5)
    code = np.round(history[-1, 0] / 0.5)
    assert history[-1, 0] == 0.5 * code and history[10, 0] == code  # the code stays when the scale moves


def test_measuring_alone_changes_nothing():
    params, gradient = {"a": jnp.asarray([0.4, 0.6])}, {"a": jnp.asarray([1.0, -1.0])}
    transform = freeze_oscillating(lambda w: jnp.round(w).astype(jnp.int32), threshold=None)
    state = transform.init(params)
    for _ in range(4):
        updates, state = transform.update(gradient, state, params)
        gradient = jax.tree.map(jnp.negative, gradient)
        np.testing.assert_array_equal(updates["a"], -gradient["a"])
    assert float(oscillation_metrics(state)["frozen/a"]) == 0


def test_behind_transition_rate_scheduling():
    """Frozen weights stop counting as transitions by themselves: they don't move."""
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)}
    transform = optax.chain(
        sgdt(0.1, initial_step_size=1.0, momentum=0.0),
        freeze_oscillating(threshold=lambda t: 0.05 + 0 * t, momentum=0.1),
    )
    state = transform.init(params)
    step = jax.jit(lambda g, s, p: transform.update(g, s, p, quantizers={"a": Step(jnp.float32(1.0))}))
    for t in range(12):
        gradient = {"a": jnp.full(50, 0.8 * (-1.0) ** t)}
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    frozen = np.asarray(state[1].weights["a"].frozen)
    assert frozen.any()
    np.testing.assert_array_equal(np.asarray(updates["a"])[frozen], 0.0)


def test_dampening():
    w = jnp.asarray([-3.0, -0.4, 0.3, 1.2])
    low, high, step = jnp.float32(-2.0), jnp.float32(1.0), jnp.float32(1.0)
    w_hat = step * jnp.clip(jnp.round(w), low, high)
    loss = lambda w, step: dampening_loss(w, step * w_hat, step * low, step * high)  # noqa: E731
    np.testing.assert_allclose(loss(w, step), 0.16 + 0.09, rtol=1e-6)
    slope, scale_slope = jax.grad(loss, argnums=(0, 1))(w, step)
    np.testing.assert_allclose(slope, [0, 2 * -0.4, 2 * 0.3, 0], rtol=1e-6)
    assert float(scale_slope) == 0
    assert dampening_loss(w.astype(jnp.bfloat16), w_hat, low, high).dtype == jnp.float32


def test_wrong_values_are_named():
    with pytest.raises(ConfigError, match=r"momentum is 1\.5"):
        freeze_oscillating(momentum=1.5, threshold=0.1)
    with pytest.raises(ConfigError, match="threshold is 0"):
        freeze_oscillating(threshold=0)
    with pytest.raises(ConfigError, match="no FreezeState"):
        oscillation_metrics(optax.sgd(0.1).init(jnp.ones(2)))
