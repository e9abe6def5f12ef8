"""The generic supervised step: gradients, accumulation, averages, against plain JAX and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.engine import supervised
from jaxvision.losses.classification import softmax_cross_entropy
from jaxvision.metrics import Mean

B, K = 8, 3


class Linear(nn.Module):
    """A network with a statistic that counts its training passes."""

    @nn.compact
    def __call__(self, x, train=False):
        passes = self.variable("batch_stats", "passes", jnp.zeros, (), jnp.float32)
        if train and not self.is_initializing():
            passes.value += 1
        return nn.Dense(K)(x.reshape(x.shape[0], -1))


def loss(logits, batch):
    losses = softmax_cross_entropy(logits, batch["label"], reduction="none")
    return jnp.mean(losses), {"loss": Mean.of(losses)}


def problem():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(B, 2, 2, 1)).astype(np.float32),
        "label": rng.integers(0, K, B).astype(np.int32),
    }
    module = Linear()
    return module, module.init(jax.random.key(0), batch["image"]), batch


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_step_is_one_step_of_the_optimizer_on_the_whole_batch(accumulate):
    module, variables, batch = problem()
    transform = optax.sgd(0.1)
    average = optax.constant_schedule(0.9)
    step = jax.jit(supervised.train_step(module, transform, loss, accumulate=accumulate, average_decay=average))
    state = supervised.new_state(variables, transform, average=True)
    new, metrics = step(state, batch, jax.random.key(1))

    def whole(params):
        return loss(module.apply({**variables, "params": params}, batch["image"]), batch)[0]

    value, gradients = jax.value_and_grad(whole)(variables["params"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    for got, want in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert metrics["loss"].count == B
    np.testing.assert_allclose(metrics["loss"].compute(), value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"].compute(), optax.tree.norm(gradients), rtol=1e-5)
    assert new.model_state["batch_stats"]["passes"] == accumulate
    mixed = jax.tree.map(lambda old, p: 0.9 * old + 0.1 * p, variables["params"], expected)
    for got, want in zip(jax.tree.leaves(new.extra["ema"]["params"]), jax.tree.leaves(mixed)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert new.step == state.step, "the engine counts"
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_prepare_sees_the_whole_batch_once():
    module, variables, batch = problem()
    transform, seen = optax.sgd(0.0), []

    def prepare(batch, key):
        seen.append((batch["image"].shape, key.shape))
        return {**batch, "label": jnp.zeros_like(batch["label"])}

    step = supervised.train_step(module, transform, loss, prepare=prepare, accumulate=2)
    _, metrics = step(supervised.new_state(variables, transform, average=False), batch, jax.random.key(0))
    assert seen == [((B, 2, 2, 1), ())]
    zeros = {**batch, "label": np.zeros(B, np.int32)}
    expected = loss(module.apply(variables, batch["image"]), zeros)[0]
    np.testing.assert_allclose(metrics["loss"].compute(), expected, rtol=1e-5)


def test_micro_batches_are_strided_rows():
    """Row j, j + k, ...: every device of a split batch holds its share of every micro-batch."""
    seen = []

    def forward(params, model_state, batch, key):
        jax.debug.callback(lambda rows: seen.append(rows.tolist()), batch["row"], ordered=True)
        return jnp.sum(params * 0.0), (model_state, {"rows": Mean.of(batch["row"])})

    batch = {"row": jnp.arange(6)}
    supervised.value_and_grad(forward, jnp.ones(()), {}, batch, jax.random.key(0), 2)
    jax.effects_barrier()
    assert seen == [[0, 2, 4], [1, 3, 5]]


def test_accumulate_must_divide_the_rows():
    module, variables, batch = problem()
    step = supervised.train_step(module, optax.sgd(0.1), loss, accumulate=3)
    with pytest.raises(ConfigError, match=r"accumulate=3 doesn't divide the 8 rows"):
        step(supervised.new_state(variables, optax.sgd(0.1), average=False), batch, jax.random.key(0))


def test_predict_uses_the_average_when_asked():
    module, variables, batch = problem()
    state = supervised.new_state(variables, optax.sgd(0.1), average=True)
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    assert not supervised.predict(module, state, batch["image"]).any()
    expected = module.apply(variables, batch["image"])
    np.testing.assert_allclose(supervised.predict(module, state, batch["image"], average=True), expected, rtol=1e-6)


def test_a_penalty_is_added_to_the_loss_and_the_optimizer_may_depend_on_the_state():
    module, variables, batch = problem()
    penalty = lambda params, model_state: 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))  # noqa: E731
    make = lambda state: optax.sgd(state.extra["lr"])  # noqa: E731
    state = supervised.new_state(variables, optax.sgd(0.1), average=False).replace(extra={"lr": jnp.float32(0.1)})
    plain, _ = supervised.train_step(module, make, loss)(state, batch, jax.random.key(0))
    shrunk, metrics = supervised.train_step(module, make, loss, penalty=penalty)(state, batch, jax.random.key(0))
    for before, a, b in zip(*(jax.tree.leaves(s.params) for s in (state, plain, shrunk))):
        np.testing.assert_allclose(b, a - 0.1 * before, atol=1e-6)
    np.testing.assert_allclose(metrics["penalty"].compute(), penalty(state.params, None), rtol=1e-6)


class Counting(nn.Module):
    """A layer whose backward pass counts negative gradients: they leave as the cotangent of ``counts``."""

    @nn.compact
    def __call__(self, x, train=False):
        counts = self.variable("counts", "negative", jnp.zeros, (), jnp.float32)

        @jax.custom_vjp
        def gate(y, count):
            return y

        gate.defvjp(lambda y, count: (y, None), lambda _, g: (g, jnp.sum(g < 0).astype(jnp.float32)))
        return gate(nn.Dense(K)(x.reshape(x.shape[0], -1)), counts.value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_controlled_collection_gets_what_its_cotangent_carries(accumulate):
    module, batch = Counting(), problem()[2]
    variables = module.init(jax.random.key(0), batch["image"])
    controllers = {"counts": lambda old, new: jax.tree.map(lambda a, b: a + 100 * b, old, new)}
    step = supervised.train_step(module, optax.sgd(0.1), loss, accumulate=accumulate, controllers=controllers)
    state = supervised.new_state(variables, optax.sgd(0.1), average=False)
    state, _ = jax.jit(step)(state, batch, jax.random.key(0))
    # Of the K = 3 gradients of a row only the label's is negative; a mean over micro-batches is logged.
    np.testing.assert_allclose(state.model_state["counts"]["negative"], 100 * B / accumulate)


def test_watch_and_extra_arguments_see_the_state():
    module, variables, batch = problem()
    seen = []

    def update(updates, state, params=None, *, scale):
        seen.append(scale)
        return jax.tree.map(lambda u: -scale * u, updates), state

    transform = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    watch = lambda state: {"bias": Mean.of(state.params["Dense_0"]["bias"])}  # noqa: E731
    extra = lambda params, model_state: {"scale": model_state["batch_stats"]["passes"] + 1}  # noqa: E731
    step = supervised.train_step(module, transform, loss, extra_args=extra, watch=watch)
    state = supervised.new_state(variables, transform, average=False)
    state, metrics = step(state, batch, jax.random.key(0))
    assert float(seen[0]) == 1.0
    np.testing.assert_allclose(metrics["bias"].compute(), jnp.mean(state.params["Dense_0"]["bias"]), rtol=1e-6)
