"""What every optax transformation of jaxvision.optim promises. A new one is added to ``CASES`` and inherits all tests.

Run as a program, the file prints the states that three steps of all cases end in; the test of several devices does so.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxvision.core import trees
from jaxvision.optim import (
    adamt,
    adamwt,
    freeze_oscillating,
    optimizers,
    scale_by_transition_rate,
    sgdt,
    with_transition_rate,
)
from tests.devices import environment

STEPS = 3


@dataclass(frozen=True)
class Case:
    """``factory(**settings, **numbers)``; the numbers are what ``optax.inject_hyperparams`` may turn into arrays."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    numbers: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self):
        return self.factory(**self.settings, **self.numbers)

    def inject(self):
        functions = tuple(name for name, value in self.settings.items() if callable(value))
        return optax.inject_hyperparams(self.factory, static_args=functions)(**self.settings, **self.numbers)


def code(w, scale):
    return jnp.round(w / scale).astype(jnp.int32)


def own_rule(target, running_rate, step_size, *, loss):
    return step_size * jnp.exp(target - running_rate) + 1e-3 * loss


class WithMemory:
    """A rule that integrates the error."""

    def init(self, initial_step_size):
        return jnp.zeros_like(initial_step_size)

    def update(self, state, target, running_rate, rate, count, *, step_size, **extra):
        state = state + target - running_rate
        return step_size * jnp.exp(0.1 * state), state


RATE = {"target": 0.1, "initial_step_size": 0.3, "momentum": 0.5}
READY = {"target": 0.1, "initial_step_size": 0.3, "rate_momentum": 0.5, "weight_decay": 0.1}
CODE = {"code_fn": code}

CASES = {
    "sgd": Case(optimizers.sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, {"nesterov": True}),
    "adam": Case(optimizers.adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adamw": Case(optimizers.adamw, {"lr": 0.1, "weight_decay": 0.1}),
    "clip": Case(optimizers.clip_by_global_norm, {"max_norm": 0.5}),
    "transition_momentum": Case(scale_by_transition_rate, RATE | {"max_step_size": 0.35}, CODE),
    "transition_additive": Case(scale_by_transition_rate, RATE, CODE | {"rule": "additive"}),
    "transition_multiplicative": Case(
        scale_by_transition_rate, RATE, CODE | {"rule": "multiplicative", "granularity": "model"}
    ),
    "transition_function": Case(scale_by_transition_rate, RATE, CODE | {"rule": own_rule}),
    "transition_memory": Case(scale_by_transition_rate, RATE, CODE | {"rule": WithMemory()}),
    "transition_lion": Case(with_transition_rate, RATE, CODE | {"direction": optax.scale_by_lion()}),
    "sgdt": Case(sgdt, READY | {"momentum": 0.9}, CODE),
    "adamt": Case(adamt, READY, CODE),
    "adamwt": Case(adamwt, READY, CODE),
    "freeze": Case(freeze_oscillating, {"threshold": 0.2, "momentum": 0.5}, CODE),
}

every = pytest.mark.parametrize("name", list(CASES))


def problem() -> tuple[Any, Any, dict[str, Any]]:
    """Parameters, gradients ``[STEPS, ...]`` and extra arguments."""
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (8, 6)}, "norm": {"bias": (8,), "scale": (8,)}}
    draw = lambda *lead: jax.tree.map(  # noqa: E731
        lambda shape: jnp.asarray(rng.normal(size=lead + shape), jnp.float32),
        shapes,
        is_leaf=lambda s: type(s) is tuple,
    )
    params, gradients = draw(), draw(STEPS)
    quantizers = jax.tree.map(lambda leaf: jnp.float32(0.5), params)
    return params, gradients, {"quantizers": quantizers, "loss": jnp.float32(0.7), "unheard_of": jnp.int32(3)}


def fold(transform, params, gradients, extra, repeat=1):
    """Parameters and state after the gradients, whose structure, shapes and dtypes don't change."""
    state = transform.init(params)
    like = kinds(state)
    for t in range(STEPS):
        gradient = at(gradients, t)
        for _ in range(repeat):
            updates, state = transform.update(gradient, state, params, **extra)
            params = optax.apply_updates(params, updates)
            assert kinds(state) == like and kinds(updates) == kinds(gradient)
    return params, state


def at(tree, t):
    return jax.tree.map(lambda leaf: leaf[t], tree)


def kinds(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def step_all(params, states, gradient, extra):
    """One step of every case, each with its own parameters."""
    out = {}
    for name, case in CASES.items():
        updates, state = case.make().update(gradient, states[name], params[name], **extra)
        out[name] = optax.apply_updates(params[name], updates), state
    return {name: pair[0] for name, pair in out.items()}, {name: pair[1] for name, pair in out.items()}


def run_all(place=lambda tree: tree):
    """Parameters and states of every case after all steps; one compiled program that was called ``STEPS`` times."""
    params, gradients, extra = problem()
    params = {name: place(params) for name in CASES}
    init = jax.jit(lambda params: {name: case.make().init(params[name]) for name, case in CASES.items()})
    states, step = init(params), jax.jit(step_all)
    for t in range(STEPS):
        params, states = step(params, states, place(at(gradients, t)), extra | {"loss": jnp.float32(t)})
    return params, states, step._cache_size()


@pytest.fixture(scope="module")
def whole():
    return run_all()


def assert_same(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (name, a), b in zip(trees.named_leaves(got).items(), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_allclose(a, b, err_msg=name, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


def test_one_compile(whole):
    assert whole[2] == 1


def wrapped(case):
    """Name -> (the case inside a wrapper, how often a gradient must be given until it counts)."""
    return {
        "chain": (optax.chain(optax.identity(), case.make()), 1),
        "inject": (case.inject(), 1),
        "guarded": (optax.apply_if_finite(case.make(), 3), 1),
        "accumulated": (optax.MultiSteps(case.make(), 2), 2),
    }


# Uncompiled, or compiling would be all that the tests' time goes into; compiled programs: test_one_compile and below.
@every
def test_wrapped_is_plain(name):
    """In a chain, with injected hyperparameters, guarded against NaN, accumulated; unknown arguments are borne."""
    case = CASES[name]
    params, gradients, extra = problem()
    with jax.disable_jit():
        plain, _ = fold(case.make(), params, gradients, extra)
        for transform, repeat in wrapped(case).values():
            assert_same(fold(transform, params, gradients, extra, repeat)[0], plain)
    assert np.abs(plain["conv"]["kernel"] - params["conv"]["kernel"]).max() > 1e-3


@every
def test_masked_and_partitioned(name):
    """What is hidden isn't seen, isn't touched and costs no state; extra arguments may be masked too, or whole."""
    case = CASES[name]
    params, gradients, extra = problem()
    mask = {"conv": {"kernel": True}, "norm": {"bias": False, "scale": False}}
    labels = jax.tree.map(lambda shown: "a" if shown else "b", mask)
    groups = {"a": case.make(), "b": optax.set_to_zero(), "empty": case.make()}
    alone = extra | {"quantizers": extra["quantizers"]["conv"]}
    with jax.disable_jit():
        plain, _ = fold(case.make(), params["conv"], gradients["conv"], alone)
        for transform in (
            optax.masked(case.make(), mask, mask_compatible_extra_args=True),
            optax.partition(groups, labels, mask_compatible_extra_args=True),
            optax.partition(groups, labels),
        ):
            after, state = fold(transform, params, gradients, extra)
            assert_same(after["conv"], plain)
            assert not any(leaf.shape == (8,) for leaf in jax.tree.leaves(state))
    assert_same(after["norm"], params["norm"], rtol=0)


@every
def test_a_bad_gradient_leaves_the_state(name):
    params, gradients, extra = problem()
    transform = optax.apply_if_finite(CASES[name].make(), 3)
    with jax.disable_jit():
        _, state = transform.update(at(gradients, 0), transform.init(params), params, **extra)
        bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), at(gradients, 1))
        updates, after = transform.update(bad, state, params, **extra)
    assert_same(after.inner_state, state.inner_state, rtol=0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


@every
def test_float32_stays_float32_under_x64(name):
    params, gradients, extra = problem()
    transform = CASES[name].make()
    state = transform.init(params)
    with jax.enable_x64(True):
        updates, after = jax.eval_shape(lambda *a: transform.update(*a, **extra), at(gradients, 0), state, params)
    assert kinds(after) == kinds(state) and kinds(updates) == kinds(params)


def test_wrappers_compiled():
    params, gradients, extra = problem()
    for way, (transform, repeat) in (ways := wrapped(CASES["sgdt"])).items():
        update = jax.jit(lambda *a, transform=transform, **_: transform.update(*a, **extra))
        compiled = optax.GradientTransformationExtraArgs(transform.init, update)
        ways[way] = fold(compiled, params, gradients, extra, repeat)[0]
        assert update._cache_size() == 1
        assert_same(ways[way], ways["chain"])


def test_state_survives_orbax_and_numpy_bit_for_bit(whole, tmp_path):
    _, states, _ = whole
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), states
        )
        restored = checkpointer.restore(tmp_path / "states", abstract)
    leaves, treedef = jax.tree.flatten(states)
    np.savez(tmp_path / "states.npz", *leaves)
    with np.load(tmp_path / "states.npz") as saved:
        again = treedef.unflatten(saved[f"arr_{i}"] for i in range(len(leaves)))
    for copy in (restored, again):
        assert jax.tree.structure(copy) == treedef
        for a, b in zip(jax.tree.leaves(copy), leaves, strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def as_lists(params, states):
    return {name: np.asarray(leaf).tolist() for name, leaf in trees.named_leaves([params, states]).items()}


def test_one_and_eight_devices_agree(whole):
    """Integers (codes, counts) exactly, floats to the order in which the norm of the clip is summed."""
    done = subprocess.run([sys.executable, __file__], env=environment(8), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    devices, sharded = json.loads(done.stdout.splitlines()[-1])
    assert devices == 8
    for name, leaf in trees.named_leaves(list(whole[:2])).items():
        exact = not jnp.issubdtype(leaf.dtype, jnp.floating)
        np.testing.assert_allclose(
            sharded[name], leaf, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7, err_msg=name
        )


def shard(tree):
    """Every leaf cut into eight along its first axis."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))


if __name__ == "__main__":
    print(json.dumps([jax.device_count(), as_lists(*run_all(shard)[:2])]))
