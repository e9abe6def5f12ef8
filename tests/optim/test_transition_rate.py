"""Transition-rate scheduling against the NumPy float64 reference, and every promise of its options."""

import doctest
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core import struct, trees
from jaxvision.core.errors import ConfigError
from jaxvision.optim import (
    TransitionRateState,
    adamt,
    adamwt,
    reset_codes,
    scale_by_transition_rate,
    sgdt,
    transition_metrics,
    transition_rate,
    with_transition_rate,
)
from tests.arrays import load

ORACLES = sorted((Path(__file__).parents[1] / "oracles" / "trs").glob("*_rule_*.npz"))


@struct.dataclass
class Grid:
    """The weight quantizer of the method (specification 2.1), as somebody else might write it."""

    scale: jax.Array
    bits: int = struct.field(pytree_node=False, default=2)
    symmetric: bool = struct.field(pytree_node=False, default=False)

    def codes(self, w):
        normal = w / (jnp.abs(self.scale) + 1e-6)
        if self.bits == 1:
            return (2 * jnp.round((jnp.clip(normal, -1, 1) + 1) / 2) - 1).astype(jnp.int32)
        half = 2 ** (self.bits - 1)
        return jnp.round(jnp.clip(half * normal, -half + self.symmetric, half - 1)).astype(jnp.int32)


def signs(w):
    return jnp.where(w > 0, 1, -1)


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def run(transform, params, gradients, **extra):
    """Parameters and transition-rate state after each step, in one compiled step function."""
    compiles = []

    @jax.jit
    def step(params, state, gradient, extra):
        compiles.append(None)
        updates, state = transform.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state, history = transform.init(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient, extra)
        history.append((params, state_of(state)))
    assert len(compiles) == 1
    return history


def state_of(opt_state) -> TransitionRateState:
    is_state = lambda node: isinstance(node, TransitionRateState)  # noqa: E731
    (state,) = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return state


def optimizer_of(path, oracle):
    """The ready-made optimizer of an oracle file, with its settings."""
    base, rule = path.stem.split("_")[:2]
    targets = jnp.asarray(oracle["target_rate"])
    shared = {
        "initial_step_size": float(oracle["initial_step_size"]),
        "rate_momentum": float(oracle["momentum_rate"]),
        "rule": rule,
        "eta": float(oracle["eta"]) if rule == "additive" else None,
        "initial_rate": float(oracle["running_rate_init"]),
        "weight_decay": float(oracle["weight_decay"]),
    }
    if base == "sgd":
        shared |= {"momentum": float(oracle["sgd_momentum"]), "nesterov": bool(oracle["nesterov"])}
    else:
        shared |= {name: float(oracle[f"adam_{name}"]) for name in ("b1", "b2", "eps")}
    assert bool(oracle["decoupled"]) == (base == "adamw")
    return {"sgd": sgdt, "adam": adamt, "adamw": adamwt}[base](lambda count: targets[count], **shared)


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_reference(path):
    with jax.enable_x64(True):
        oracle = load(path)
        quantizer = Grid(oracle["scale"], int(oracle["bits"]), bool(oracle["symmetric"]))
        transform = optimizer_of(path, oracle)

        @jax.jit
        def whole(w, gradients):
            def step(carry, gradient):
                w, state = carry
                updates, state = transform.update(gradient, state, w, quantizers=quantizer)
                seen = state_of(state)
                w = optax.apply_updates(w, updates)
                return (w, state), (w, seen.rate, seen.running_rate, seen.step_size, seen.codes)

            return jax.lax.scan(step, (w, transform.init(w)), gradients)[1]

        got = whole(jnp.asarray(oracle["w0"]), jnp.asarray(oracle["grads"]))
        for name, value in zip(("w", "rate", "running_rate", "step_size", "codes"), got):
            np.testing.assert_allclose(value, oracle[name], rtol=1e-8, atol=1e-8, err_msg=name)
        assert got[-1].dtype == jnp.int8
        np.testing.assert_array_equal(got[-1], oracle["codes"])


def test_the_module_s_example_runs():
    """Somebody else's plain-JAX model, in thirty lines."""
    results = doctest.testmod(transition_rate)
    assert results.attempted > 10 and results.failed == 0


def test_first_step_knows_no_rate():
    params = {"a": weights(50)}
    ((after, state),) = run(scale_by_transition_rate(0.25, signs, initial_step_size=0.5), params, [params])
    assert float(state.rate["a"]) == 0 and float(state.running_rate["a"]) == 0.25
    assert float(state.step_size["a"]) == 0.5 and float(state.target["a"]) == 0.25
    np.testing.assert_allclose(after["a"], 0.5 * params["a"], rtol=1e-6)
    np.testing.assert_array_equal(state.codes["a"], signs(params["a"]))


def test_state_costs_a_byte_a_weight_and_owns_its_buffers():
    params = {"a": weights(40, 25), "b": weights(1000)}
    transform = scale_by_transition_rate(0.01, signs, initial_step_size=0.1)
    state = transform.init(params)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in arrays) == 2000 and {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.int8)}
    assert len(jax.tree.leaves(state)) - len(arrays) == 2 + 5 * 2
    step = jax.jit(transform.update, donate_argnums=1)
    _, after = step(params, state, params)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, transform.init(params))


@pytest.mark.parametrize("granularity", ["tensor", "label", "model"])
def test_granularity_pools_weights_not_rates(granularity):
    params = {"a": jnp.ones(10), "b": jnp.ones(30), "c": jnp.ones(60)}
    flips = {"a": 5, "b": 3, "c": 0}
    gradient = {name: jnp.where(jnp.arange(params[name].size) < flips[name], 10.0, 0.0) for name in params}
    labels = lambda params: {name: "small" if name in "ab" else "large" for name in params}  # noqa: E731
    transform = scale_by_transition_rate(
        0.1, signs, initial_step_size=1.0, granularity=granularity, labels=labels if granularity == "label" else None
    )
    zero = jax.tree.map(jnp.zeros_like, gradient)
    _, (_, state) = run(transform, params, [gradient, zero])
    expected = {"tensor": (0.5, 0.1, 0.0), "label": (0.2, 0.2, 0.0), "model": (0.08, 0.08, 0.08)}[granularity]
    np.testing.assert_allclose([state.rate[name] for name in "abc"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        [state.running_rate[name] for name in "abc"], 0.99 * 0.1 + 0.01 * np.asarray(expected), rtol=1e-6
    )


def test_a_jump_over_levels_counts_once():
    quantizer = Grid(jnp.float32(1.0), bits=3)
    transform = scale_by_transition_rate(0.1, initial_step_size=1.0)
    history = run(
        transform,
        jnp.asarray([-1.0, -1.0, 0.0, 0.0]),
        [jnp.asarray([-2.0, 0, 0, 0]), jnp.zeros(4)],
        quantizers=quantizer,
    )
    assert float(history[1][1].rate) == 0.25


def test_limits_hold_and_say_so():
    gradient = jnp.zeros(20)  # Nothing moves, so the momentum rule raises U.
    make = functools.partial(scale_by_transition_rate, 0.5, signs, initial_step_size=0.1, momentum=0.5)
    free = [float(state.step_size) for _, state in run(make(), weights(20), [gradient] * 4)]
    assert free == sorted(free) and free[-1] > 0.15
    held = [state for _, state in run(make(max_step_size=0.14), weights(20), [gradient] * 4)]
    assert [bool(state.limited) for state in held] == [step > 0.14 for step in free]
    np.testing.assert_allclose([state.step_size for state in held], np.minimum(free, 0.14), rtol=1e-6)
    low = run(make(min_step_size=0.08), weights(20), [gradient] * 6, target_rate=0.0)
    assert float(low[-1][1].step_size) == np.float32(0.08) and bool(low[-1][1].limited)


@pytest.mark.parametrize("rule", ["momentum", "multiplicative"])
def test_a_target_of_zero_freezes(rule):
    transform = scale_by_transition_rate(0.0, signs, initial_step_size=0.1, momentum=0.5, rule=rule)
    history = run(transform, weights(20), [weights(20, seed=1)] * 60)
    assert 0 <= float(history[-1][1].step_size) < 1e-12
    np.testing.assert_array_equal(history[-1][0], history[-2][0])


def test_masked_elements_neither_move_nor_count():
    params, gradient = {"a": jnp.ones(8), "b": jnp.ones(4), "c": jnp.ones(4)}, 10 * jnp.ones(8)
    mask = {"a": jnp.arange(8) < 2, "b": jnp.zeros(4, bool), "c": None}
    zero = {"a": jnp.zeros(8), "b": jnp.zeros(4), "c": jnp.zeros(4)}
    first = {"a": gradient.at[1].set(0), "b": gradient[:4], "c": gradient[:4]}
    transform = scale_by_transition_rate(0.1, signs, initial_step_size=1.0)
    _, (after, state) = run(transform, params, [first, zero], element_mask=mask)
    np.testing.assert_array_equal(after["a"], [-9, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(after["b"], params["b"])
    assert [float(state.rate[name]) for name in "abc"] == [0.5, 0.0, 1.0]
    # Without a weight that counts there is no rate: nothing winds up.
    assert float(state.step_size["b"]) == 1.0 and float(state.running_rate["b"]) == np.float32(0.1)


def test_rules_with_memory_are_told_what_was_measured():
    """K of a tensor without a weight that counts stays away from R: a sum of the difference would wind up."""

    class Sum:
        def init(self, initial_step_size):
            return jnp.zeros_like(initial_step_size)

        def update(self, state, target, running_rate, rate, count, *, measured, step_size, **extra):
            return step_size, state + jnp.where(measured, target - running_rate, 0)

    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    mask = {"a": None, "b": jnp.zeros(4, bool)}
    transform = scale_by_transition_rate(0.5, signs, initial_step_size=0.1, initial_rate=0.25, rule=Sum())
    history = run(transform, params, [jax.tree.map(jnp.zeros_like, params)] * 4, element_mask=mask)
    sums = np.asarray([state.rule_state for _, state in history])
    assert (np.diff(sums[:, 0]) > 0.2).all() and (sums[:, 1] == 0).all()
    assert float(history[-1][1].running_rate["b"]) == 0.25


def test_targets_per_layer_and_from_outside():
    params = {"a": weights(10), "b": weights(10)}
    transform = scale_by_transition_rate(
        optax.linear_schedule(0.4, 0.0, 4), signs, initial_step_size=0.1, target_scale={"a": 1.0, "b": 0.5}
    )
    history = run(transform, params, [params] * 3)
    np.testing.assert_allclose([state.target["a"] for _, state in history], [0.4, 0.3, 0.2], rtol=1e-6)
    np.testing.assert_allclose([state.target["b"] for _, state in history], [0.2, 0.15, 0.1], rtol=1e-6)
    assert float(history[0][1].running_rate["b"]) == np.float32(0.2)
    (_, state), *_ = run(transform, params, [params], target_rate=0.9)
    np.testing.assert_allclose([state.target["a"], state.target["b"]], [0.9, 0.45], rtol=1e-6)


def test_built_inside_a_traced_function():
    """The transformation, its state and its learning rate may all be traced: a grid of runs is one vmap."""
    params, gradients = weights(30), weights(5, 30, seed=1)

    @jax.jit
    @jax.vmap
    def last(step_size):
        transform = sgdt(0.05, signs, initial_step_size=step_size, rate_momentum=0.9)

        def step(carry, gradient):
            params, state = carry
            updates, state = transform.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), state_of(state).step_size

        (params_after, _), sizes = jax.lax.scan(step, (params, transform.init(params)), gradients)
        return params_after, sizes[-1]

    grid = jnp.asarray([0.01, 0.1, 1.0])
    for step_size, got, size in zip(grid, *last(grid)):
        alone = run(sgdt(0.05, signs, initial_step_size=float(step_size), rate_momentum=0.9), params, gradients)
        np.testing.assert_allclose(got, alone[-1][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(size, alone[-1][1].step_size, rtol=1e-5)


def test_quantizers_may_be_bound():
    params, gradients = {"a": weights(30)}, [{"a": weights(30, seed=seed)} for seed in range(4)]
    scale = {"a": jnp.float32(0.7)}
    code = lambda w, scale: Grid(scale).codes(w)  # noqa: E731
    late = run(sgdt(0.1, code), params, gradients, quantizers=scale)
    for transform in (sgdt(0.1, code, quantizers=scale), sgdt(0.1, functools.partial(code, scale=scale["a"]))):
        np.testing.assert_array_equal(late[-1][1].codes["a"], run(transform, params, gradients)[-1][1].codes["a"])
    wider = run(sgdt(0.1, code, quantizers=scale), params, gradients, quantizers={"a": jnp.float32(7.0)})
    assert (wider[-1][1].codes["a"] != late[-1][1].codes["a"]).any()


@pytest.mark.parametrize("hide_extra", [False, True])
def test_partition_hides_what_is_not_latent(hide_extra):
    """The quantizers may be masked beside the parameters (None or arrays at the others) or arrive whole."""
    params = {"conv": {"kernel": weights(20), "bias": weights(4)}, "norm": {"scale": weights(4)}}
    labels = {"conv": {"kernel": "latent", "bias": "float"}, "norm": {"scale": "float"}}
    quantizers = {"conv": {"kernel": Grid(jnp.float32(1.0)), "bias": None}, "norm": {"scale": None}}
    transform = optax.partition(
        {"latent": sgdt(0.1), "float": optax.sgd(0.1)}, labels, mask_compatible_extra_args=hide_extra
    )
    (after, state) = run(transform, params, [params] * 2, quantizers=quantizers)[-1]
    plain = run(
        sgdt(0.1), {"k": params["conv"]["kernel"]}, [{"k": params["conv"]["kernel"]}] * 2, quantizers={"k": Grid(1.0)}
    )
    np.testing.assert_array_equal(after["conv"]["kernel"], plain[-1][0]["k"])
    assert list(trees.named_leaves(state.step_size)) == ["conv/kernel"]
    scales = jax.tree.map(lambda leaf: jnp.float32(1.0), params)
    code = lambda w, scale: Grid(scale).codes(w)  # noqa: E731
    transform = optax.partition(
        {"latent": sgdt(0.1, code), "float": optax.sgd(0.1)}, labels, mask_compatible_extra_args=hide_extra
    )
    np.testing.assert_array_equal(
        run(transform, params, [params] * 2, quantizers=scales)[-1][0]["conv"]["kernel"], after["conv"]["kernel"]
    )


def test_metrics_and_reset_find_their_state_anywhere():
    params = {"conv": {"kernel": weights(200), "bias": weights(4)}}
    labels = {"conv": {"kernel": "latent", "bias": "float"}}
    inner = optax.chain(optax.clip_by_global_norm(1.0), sgdt(0.1, rate_momentum=0.5))
    transform = optax.apply_if_finite(optax.partition({"latent": inner, "float": optax.sgd(0.1)}, labels), 3)
    quantizers = lambda scale: {"conv": {"kernel": Grid(jnp.float32(scale)), "bias": None}}  # noqa: E731
    state = transform.init(params)
    for _ in range(2):
        _, state = transform.update(params, state, params, quantizers=quantizers(1.0))
    seen = transition_metrics(state)
    assert sorted(seen) == [
        f"{name}/conv/kernel" for name in ("limited", "rate", "running_rate", "step_size", "target")
    ]
    np.testing.assert_allclose(seen["running_rate/conv/kernel"], 0.05, rtol=1e-6)

    moved = transform.update(params, state, params, quantizers=quantizers(3.0))[1]
    assert float(transition_metrics(moved)["rate/conv/kernel"]) > 0.2
    state = reset_codes(state, params, quantizers(3.0))
    np.testing.assert_array_equal(
        state_of(state).codes["conv"]["kernel"], Grid(jnp.float32(3.0)).codes(params["conv"]["kernel"])
    )
    _, state = transform.update(params, state, params, quantizers=quantizers(3.0))
    after = transition_metrics(state)
    assert float(after["rate/conv/kernel"]) == 0
    for name in ("running_rate/conv/kernel", "step_size/conv/kernel"):
        assert float(after[name]) == float(seen[name])
    _, state = transform.update(params, state, params, quantizers=quantizers(3.0))
    assert float(transition_metrics(state)["running_rate/conv/kernel"]) == float(seen["running_rate/conv/kernel"]) / 2


def test_gradients_of_bfloat16_keep_their_dtype():
    params = weights(10)
    transform = scale_by_transition_rate(0.1, signs, initial_step_size=0.1)
    updates, _ = transform.update(params.astype(jnp.bfloat16), transform.init(params), params)
    assert updates.dtype == jnp.bfloat16


def test_any_direction():
    params = {"a": weights(20)}
    transform = with_transition_rate(optax.scale_by_lion(), 0.1, signs, initial_step_size=0.25)
    ((after, _),) = run(transform, params, [params])
    np.testing.assert_allclose(after["a"], params["a"] - 0.25 * jnp.sign(params["a"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.5}, "target is 1.5"),
        ({"initial_step_size": 0.0}, "initial_step_size is 0.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"initial_rate": -0.1}, "initial_rate is -0.1"),
        ({"granularity": "layer"}, "granularity='layer' is unknown"),
        ({"granularity": "label"}, "labels not given"),
        ({"labels": {"a": 1}}, "labels given"),
        ({"max_step_size": 0.05}, "initial_step_size is 0.1, but must be from 0.0 to 0.05"),
        ({"min_step_size": 0.5}, "must be from 0.5 to inf"),
        (
            {"initial_step_size": jnp.float32(0.1), "min_step_size": 0.5, "max_step_size": 0.2},
            "min_step_size is 0.5, but must be at most max_step_size, which is 0.2",
        ),
        ({"rule": "aditive"}, "did you mean 'additive'"),
        ({"eta": 0.1}, "eta=0.1 is the gain of the rule 'additive'"),
        ({"rule": 3}, "rule=3 must be one of momentum, additive"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        scale_by_transition_rate(**{"target": 0.1, "initial_step_size": 0.1, **arguments})


@pytest.mark.parametrize(
    ("code_fn", "params", "quantizers", "message"),
    [
        (signs, {"a": jnp.ones(3, jnp.bfloat16)}, None, "'a' is bfloat16.*keep latent weights in float32"),
        (signs, {"a": jnp.arange(3)}, None, "'a' is int32"),
        (None, {"a": jnp.ones(3)}, None, "no quantizers were given"),
        (lambda w, q: w, {"a": jnp.ones(3)}, None, "no quantizers were given"),
        (None, {"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": Grid(1.0), "b": None}, "'b' has no quantizer"),
        (None, {"a": jnp.ones(3)}, {"a": jnp.ones(())}, "'a' is a ArrayImpl without codes"),
        (None, {"a": jnp.ones(3)}, {"b": Grid(1.0)}, "quantizers must be a tree with the structure"),
        (lambda w: jnp.round(w), {"a": jnp.ones(3)}, None, "float32.*must be integers"),
        (lambda w: signs(w)[:1], {"a": jnp.ones(3)}, None, r"int32\[1\], but must be"),
    ],
)
def test_wrong_trees_are_named(code_fn, params, quantizers, message):
    transform = scale_by_transition_rate(0.1, code_fn, initial_step_size=0.1)
    with pytest.raises(ConfigError, match=message):
        transform.update(params, transform.init(params), params, quantizers=quantizers)


def test_parameters_and_state_are_needed():
    transform = scale_by_transition_rate(0.1, signs, initial_step_size=0.1)
    with pytest.raises(ConfigError, match="call update"):
        transform.update(jnp.ones(3), transform.init(jnp.ones(3)))
    with pytest.raises(ConfigError, match="no TransitionRateState"):
        transition_metrics(optax.sgd(0.1).init(jnp.ones(3)))
