"""Groups of parameters: who gets which rate, decay and momentum, and what stands still."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core import trees
from jaxvision.methods.trs import optimizers
from jaxvision.methods.trs.optimizers import Recipe
from jaxvision.methods.trs.variants import parse
from jaxvision.optim import oscillation_metrics, sgdt, transition_metrics
from jaxvision.quant.trs import TRSWeight

LATENT = ("block/conv/kernel",)
DEFAULTS = {"family": "trs", "baseline": "sgd", "target": 0.1, "rule": "momentum"}
RECIPE = Recipe(lambda count: jnp.where(count < 1, 1.0, 0.5), weight_decay=0.1, scale_lr=0.01)
RNG = np.random.default_rng(0)
PARAMS = {
    "block": {
        "conv": {
            "kernel": jnp.asarray(RNG.standard_normal((3, 3, 2, 4)), jnp.float32),
            "kernel_scale": jnp.float32(2.0),
            "input_scale": jnp.float32(1.5),
            "input_alpha": jnp.float32(3.0),
            "output_scale": jnp.float32(1.0),
        },
        "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    },
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    "pos_embed": jnp.ones((1, 4)),
}
QUANTIZERS = jax.tree.map(lambda leaf: None, PARAMS)
QUANTIZERS["block"]["conv"]["kernel"] = TRSWeight(jnp.float32(2.0), 1)


def gradients(step):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3 + step), PARAMS)


def run(name, lr=0.2, steps=3, recipe=RECIPE):
    """The parameters after each step, and the last optimizer state."""
    transform = optimizers.build(parse(name, **DEFAULTS), recipe, LATENT, lr)

    @jax.jit
    def update(gradient, state, params):
        updates, state = transform.update(gradient, state, params, quantizers=QUANTIZERS)
        return optax.apply_updates(params, updates), state

    params, state, seen = PARAMS, transform.init(PARAMS), [PARAMS]
    for step in range(steps):
        params, state = update(gradients(step), state, params)
        seen.append(params)
    return seen, state


def test_the_group_of_every_parameter():
    found = optimizers.labels(PARAMS, LATENT, freeze_scales=True)
    assert found == {
        "block": {
            "conv": {
                "kernel": "latent",
                "kernel_scale": "frozen",
                "input_scale": "scale",
                "input_alpha": "clip",
                "output_scale": "scale",
            },
            "bn": {"scale": "norm", "bias": "norm"},
        },
        "head": {"kernel": "float", "bias": "float"},
        "pos_embed": "float",
    }
    assert optimizers.labels(PARAMS, LATENT, freeze_scales=False)["block"]["conv"]["kernel_scale"] == "scale"
    names = ("product_q_scale", "product_k_alpha", "product_q_k_output", "qkv/kernel", "prelu/slope", "move0/bias")
    products = optimizers.labels(trees.nested(dict.fromkeys(names, 0)), LATENT, freeze_scales=True)
    groups = dict(zip(names, ("scale", "clip", "scale", "float", "norm", "norm"), strict=True))
    assert trees.named_leaves(products) == groups
    assert optimizers.labels({"kernel": 0, "bias": 0}, ("kernel",), freeze_scales=True) == {
        "kernel": "latent",
        "bias": "float",
    }


def test_sgd_groups_by_hand():
    seen, _ = run("sgd")
    rates = [0.2, 0.1, 0.1]
    float_, norm, scale, clip, buffer = 1.0, 1.0, 1.5, 3.0, None
    for step, rate in enumerate(rates):
        g = 0.3 + step
        buffer = g + 0.1 * float_ if buffer is None else 0.9 * buffer + g + 0.1 * float_
        float_, norm = float_ - rate * buffer, norm - rate * g
        scale, clip = scale - rate / 0.2 * 0.01 * g, clip - rate / 0.2 * 0.01 * (g + 0.1 * clip)
    last = seen[-1]
    np.testing.assert_allclose(last["head"]["kernel"], float_, rtol=1e-6)
    np.testing.assert_allclose(last["pos_embed"], float_, rtol=1e-6)
    np.testing.assert_allclose(last["block"]["bn"]["scale"], norm, rtol=1e-6)
    conv = last["block"]["conv"]
    np.testing.assert_allclose([conv["input_scale"], conv["input_alpha"]], [scale, clip], rtol=1e-6)
    np.testing.assert_allclose(conv["kernel_scale"], 2.0 - (1.5 - scale), rtol=1e-6)


def test_with_scheduled_rates_the_kernels_scale_stands_still_and_the_kernel_follows_sgdt():
    seen, state = run("sgdt")
    assert all(params["block"]["conv"]["kernel_scale"] == 2.0 for params in seen)
    assert seen[-1]["block"]["conv"]["input_scale"] < 1.5
    alone = sgdt(
        lambda count: 0.1 * RECIPE.shape(count), initial_step_size=0.2, momentum=0.9, weight_decay=0.1,
    )  # fmt: skip
    weight, quantizer = PARAMS["block"]["conv"]["kernel"], QUANTIZERS["block"]["conv"]["kernel"]
    memory = alone.init({"w": weight})
    for step in range(3):
        gradient = {"w": gradients(step)["block"]["conv"]["kernel"]}
        updates, memory = alone.update(gradient, memory, {"w": weight}, quantizers={"w": quantizer})
        weight = weight + updates["w"]
    np.testing.assert_allclose(seen[-1]["block"]["conv"]["kernel"], weight, rtol=1e-6)
    metrics = transition_metrics(state)
    np.testing.assert_allclose(metrics["target/block/conv/kernel"], 0.05)
    np.testing.assert_allclose(
        metrics["step_size/block/conv/kernel"], transition_metrics(memory)["step_size/w"], rtol=1e-6
    )


def test_kernels_of_a_label_share_a_rate_among_other_groups():
    """Two of two codes flip in one kernel, none of six in the other: a quarter in both."""
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(6), "bias": jnp.ones(1)}}
    quantizers = {"a": {"kernel": TRSWeight(jnp.float32(2.0), 1)}, "b": {"kernel": TRSWeight(jnp.float32(2.0), 1)}}
    quantizers["b"]["bias"] = None
    control = {"granularity": "label", "labels": functools.partial(trees.map_named, lambda name, _: "both")}
    recipe = Recipe(lambda count: 1.0, oscillation=False, control=control)
    transform = optimizers.build(parse("sgdt", **DEFAULTS), recipe, ("a/kernel", "b/kernel"), 1.0)
    gradient = jax.tree.map(jnp.zeros_like, params)
    gradient["a"]["kernel"] = jnp.full(2, 5.0)
    updates, state = transform.update(gradient, transform.init(params), params, quantizers=quantizers)
    params = optax.apply_updates(params, updates)
    _, state = transform.update(gradient, state, params, quantizers=quantizers)
    rates = transition_metrics(state)
    assert float(rates["rate/a/kernel"]) == float(rates["rate/b/kernel"]) == 0.25


@pytest.mark.parametrize("name", ["sgd", "sgdt", "freezing"])
def test_oscillation_is_measured_where_it_is_asked_for_or_needed(name):
    recipe = Recipe(RECIPE.shape, oscillation=False)
    without, whole = (
        jax.eval_shape(optimizers.build(parse(name, **DEFAULTS), each, LATENT, 0.1).init, PARAMS)
        for each in (recipe, RECIPE)
    )
    size = lambda state: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)  # noqa: E731
    weights = PARAMS["block"]["conv"]["kernel"].size
    assert size(whole) - size(without) == (0 if name == "freezing" else 11 * weights)


def test_targets_have_factors_for_the_bits():
    recipe = Recipe(RECIPE.shape, target_factors={LATENT[0]: 0.5})
    _, state = run("adamt", steps=1, recipe=recipe)
    np.testing.assert_allclose(transition_metrics(state)["target/block/conv/kernel"], 0.05)


@pytest.mark.parametrize("name", ["adam", "adamwt"])
def test_adams_arms_use_adam_everywhere(name):
    """The first step of Adam is the rate itself, whatever the gradient."""
    seen, _ = run(name, steps=1)
    last, decayed = seen[-1], 0.2 * 0.1 if name == "adamwt" else 0.0
    np.testing.assert_allclose(last["head"]["kernel"], 1 - 0.2 - decayed, rtol=1e-5)
    np.testing.assert_allclose(last["block"]["bn"]["bias"], 0.8, rtol=1e-5)
    np.testing.assert_allclose(last["block"]["conv"]["input_scale"], 1.49, rtol=1e-5)


def test_freezing_puts_an_oscillating_weight_on_its_grid_point():
    """Bounced over zero at every step, all weights exceed the frequency at once and end on +-|s|."""
    recipe = Recipe(lambda count: 1.0, momentum=0.0, freezing=lambda count: 0.015, freezing_momentum=0.01)
    transform = optimizers.build(parse("freezing", **DEFAULTS), recipe, LATENT, 1.0)
    update = jax.jit(transform.update)
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(8):
        gradient = jax.tree.map(lambda leaf: jnp.zeros_like(leaf), params)
        gradient["block"]["conv"]["kernel"] = 2 * params["block"]["conv"]["kernel"]
        updates, state = update(gradient, state, params, quantizers=QUANTIZERS)
        params = optax.apply_updates(params, updates)
    assert oscillation_metrics(state)["frozen/block/conv/kernel"] == 1
    np.testing.assert_allclose(jnp.abs(params["block"]["conv"]["kernel"]), 2.0, rtol=1e-6)
