"""The rules of the paper, and what a rule of one's own is given."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.optim import TransitionRule, scale_by_transition_rate, transition_rules

PARAMS = {"a": jnp.asarray([1.0, -1.0, 2.0, -2.0]), "b": jnp.asarray([1.0, 1.0])}


def signs(w):
    return jnp.where(w > 0, 1, -1)


def two_steps(rule, **extra):
    """The state after two steps in which one weight of "a" changed its sign; R = 0.5, m = 0, U^0 = 2."""
    transform = scale_by_transition_rate(0.5, signs, initial_step_size=2.0, momentum=0.0, rule=rule)
    moved = {"a": PARAMS["a"].at[0].set(-1.0), "b": PARAMS["b"]}
    _, state = transform.update(PARAMS, transform.init(PARAMS), PARAMS, **extra)
    _, after = transform.update(PARAMS, state, moved, **extra)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    return after


@pytest.mark.parametrize("name", transition_rules.RULES)
def test_sound(name):
    """Up below the target, down above it, unchanged on it; never negative."""
    rule = transition_rules.resolve(name, smoothing=0.9, eta=1.0 if name == "additive" else None)
    target = jnp.full(3, 0.01)
    running = jnp.asarray([0.005, 0.01, 0.02])
    before = jnp.full(3, 0.1)
    arguments = (rule.init(before), target, running, running, jnp.int32(5))
    after, _ = rule.update(*arguments, step_size=before, initial_step_size=before)
    assert after[0] > before[0] and after[2] < before[2]
    np.testing.assert_allclose(after[1], before[1], rtol=2e-6)  # 1e-8 beside K
    arguments = (rule.init(before), target, 100 * running, running, jnp.int32(5))
    assert (rule.update(*arguments, step_size=before, initial_step_size=before)[0] >= 0).all()


def test_a_function_gets_what_it_names():
    def plain(target, running_rate, step_size):
        return step_size * (1 + target - running_rate)

    state = two_steps(plain, loss=1.0, anything=None)
    np.testing.assert_allclose([state.step_size[name] for name in "ab"], [2 * 1.25, 2 * 1.5])

    def named(target, running_rate, step_size, *, rate, count, initial_step_size, loss, other=7.0):
        return rate + 10 * count + 100 * initial_step_size + 1000 * loss + 1e4 * other

    state = two_steps(named, loss=3.0, anything=None)
    np.testing.assert_allclose([state.step_size[name] for name in "ab"], [73210.25, 73210.0])

    def everything(target, running_rate, step_size, **extra):
        assert set(extra) == {"rate", "count", "initial_step_size", "loss", "measured"}
        return 0.125  # a number is enough

    assert float(two_steps(everything, loss=3.0).step_size["b"]) == 0.125
    with pytest.raises(ConfigError, match=r"extra argument 'loss'.*loss=\.\.\."):
        two_steps(named)


class Sums(NamedTuple):
    error: jax.Array
    steps: jax.Array


class Integral:
    """A rule with memory, which looks across tensors."""

    def init(self, initial_step_size):
        return Sums(jnp.zeros_like(initial_step_size), jnp.zeros((), jnp.int32))

    def update(self, state, target, running_rate, rate, count, *, step_size, gain=1.0):
        del rate, count
        state = Sums(state.error + target - running_rate, state.steps + 1)
        return step_size + gain * jnp.mean(state.error), state


def test_an_object_has_a_memory():
    assert isinstance(Integral(), TransitionRule)
    state = two_steps(Integral(), gain=8.0)
    # The first step knows no rate, so it leaves the memory as it is.
    assert int(state.rule_state.steps) == 1
    np.testing.assert_allclose(state.rule_state.error, [0.25, 0.5])
    np.testing.assert_allclose([state.step_size[name] for name in "ab"], [5.0, 5.0])
    with pytest.raises(ConfigError, match="must be one of"):
        two_steps(Integral)
