"""Update rules against torch.optim's, written out in float64 NumPy; and what every optax transform must bear."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.optim import optimizers

STEPS = 5


def problem():
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (3, 4)}, "norm": {"scale": (4,), "bias": (4,)}}
    draw = lambda: jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
    return draw(), [draw() for _ in range(STEPS)]


def run(transform, params, gradients):
    """The parameters after each step, the whole sequence in one compiled step function."""
    compiles = []

    @jax.jit
    def step(params, state, gradient):
        compiles.append(None)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state, history = transform.init(params), []
    for gradient in gradients:
        params, state = step(params, state, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient))
        history.append(params)
    assert len(compiles) == 1
    return history


def torch_sgd(p, gradients, lr, momentum, nesterov, weight_decay):
    buffer, history = None, []
    for t, g in enumerate(gradients):
        g = g + weight_decay * p
        if momentum:
            buffer = g.copy() if buffer is None else momentum * buffer + g
            g = g + momentum * buffer if nesterov else buffer
        p = p - lr(t) * g
        history.append(p)
    return history


def torch_adam(p, gradients, lr, b1, b2, eps, weight_decay, decoupled):
    m, v, history = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(gradients, 1):
        if decoupled:
            p = p * (1 - lr(t - 1) * weight_decay)
        else:
            g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - lr(t - 1) / (1 - b1**t) * m / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)
        history.append(p)
    return history


def halving(step):
    return 0.1 * 0.5**step


CASES = {
    "sgd": (
        lambda mask: optimizers.sgd(halving, 0.0, False, 0.01, mask),
        lambda p, g, wd: torch_sgd(p, g, halving, 0.0, False, 0.01 * wd),
    ),
    "momentum": (
        lambda mask: optimizers.sgd(halving, 0.9, False, 0.3, mask),
        lambda p, g, wd: torch_sgd(p, g, halving, 0.9, False, 0.3 * wd),
    ),
    "nesterov": (
        lambda mask: optimizers.sgd(halving, 0.9, True, 0.3, mask),
        lambda p, g, wd: torch_sgd(p, g, halving, 0.9, True, 0.3 * wd),
    ),
    "adam": (
        lambda mask: optimizers.adam(halving, 0.8, 0.9, 1e-6, 0.3, mask),
        lambda p, g, wd: torch_adam(p, g, halving, 0.8, 0.9, 1e-6, 0.3 * wd, False),
    ),
    "adamw": (
        lambda mask: optimizers.adamw(halving, 0.8, 0.9, 1e-6, 0.3, mask),
        lambda p, g, wd: torch_adam(p, g, halving, 0.8, 0.9, 1e-6, 0.3 * wd, True),
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_update_rule_is_torchs(name, masked):
    make, reference = CASES[name]
    params, gradients = problem()
    history = run(make(optimizers.decay_mask(optimizers.NORMS_AND_BIASES) if masked else None), params, gradients)
    series = [trees.named_leaves(gradient) for gradient in gradients]
    for leaf, start in trees.named_leaves(params).items():
        decayed = not masked or leaf == "conv/kernel"
        expected = reference(start, [gradient[leaf] for gradient in series], float(decayed))
        for got, want in zip(history, expected):
            np.testing.assert_allclose(trees.named_leaves(got)[leaf], want, rtol=2e-5, atol=2e-6)


def test_first_momentum_buffer_is_the_gradient():
    transform = optimizers.sgd(1.0, momentum=0.9)
    gradient = {"w": jnp.asarray([2.0, -3.0])}
    updates, _ = transform.update(gradient, transform.init(gradient), gradient)
    np.testing.assert_array_equal(updates["w"], [-2.0, 3.0])


@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_clip_is_torch_clip_grad_norm(max_norm):
    _, gradients = problem()
    gradient = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradients[0])
    transform = optimizers.clip_by_global_norm(max_norm)
    clipped, _ = transform.update(gradient, transform.init(gradient))
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients[0])))
    factor = min(1.0, max_norm / (norm + 1e-6))
    assert (factor < 1) == (max_norm == 1.0)
    for name, leaf in trees.named_leaves(clipped).items():
        np.testing.assert_allclose(leaf, trees.named_leaves(gradients[0])[name] * factor, rtol=1e-5)


FACTORIES = {
    "sgd": (optimizers.sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (optimizers.adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adamw": (optimizers.adamw, {"lr": 0.1, "weight_decay": 0.1}),
    "clip": (optimizers.clip_by_global_norm, {"max_norm": 0.5}),
}


def f32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.mark.parametrize("name", FACTORIES)
def test_contract(name):
    """Extra arguments, chain, masked, partition, inject_hyperparams, MultiSteps; stable structure and dtypes."""
    factory, arguments = FACTORIES[name]
    params, gradients = problem()
    params, gradient = f32(params), f32(gradients[0])
    plain = factory(**arguments)
    expected, after = plain.update(gradient, plain.init(params), params)
    _, later = plain.update(gradient, after, params, value=jnp.float32(1.0), unheard_of=3)
    assert jax.tree.structure(after) == jax.tree.structure(later) == jax.tree.structure(plain.init(params))
    shapes = lambda tree: jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)  # noqa: E731
    assert shapes(after) == shapes(plain.init(params)) and shapes(expected) == shapes(gradient)

    labels = {"conv": "a", "norm": "b"}
    frozen = jax.tree.map(jnp.zeros_like, params["norm"])
    for wrapped, norm in (
        (optax.chain(optax.identity(), plain), expected["norm"]),
        (optax.inject_hyperparams(factory)(**arguments), expected["norm"]),
        (optax.MultiSteps(plain, 1), expected["norm"]),
        (optax.masked(plain, {"conv": True, "norm": False}), gradient["norm"]),
        (optax.partition({"a": plain, "b": optax.set_to_zero()}, labels), frozen),
    ):
        updates, _ = jax.jit(wrapped.update)(gradient, wrapped.init(params), params)
        if name != "clip" or norm is expected["norm"]:  # Clipping looks at all leaves it is shown.
            np.testing.assert_allclose(updates["conv"]["kernel"], expected["conv"]["kernel"], rtol=1e-5, atol=1e-7)
        for key in norm:
            np.testing.assert_allclose(updates["norm"][key], norm[key], rtol=1e-5, atol=1e-7)


def test_bfloat16_gradients_keep_their_dtype():
    params = {"w": jnp.ones((4,), jnp.bfloat16)}
    for factory, arguments in FACTORIES.values():
        transform = factory(**arguments)
        updates, _ = transform.update(params, transform.init(params), params)
        assert updates["w"].dtype == jnp.bfloat16


def test_decay_mask_names_what_matches_nothing():
    params, _ = problem()
    assert trees.named_leaves(optimizers.decay_mask(())(params)) == {
        "conv/kernel": True,
        "norm/bias": True,
        "norm/scale": True,
    }
    assert not trees.named_leaves(optimizers.decay_mask(("^norm/",))(params))["norm/scale"]
    with pytest.raises(ConfigError, match=r"'pos_embed', which matches no parameter.*conv/kernel"):
        optimizers.decay_mask(("bias$", "pos_embed"))(params)
    with pytest.raises(ConfigError, match="not a regular expression"):
        optimizers.decay_mask(("(",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.sgd(-0.1), "lr is -0.1"),
        (lambda: optimizers.sgd(0.1, momentum=-1), "momentum is -1"),
        (lambda: optimizers.sgd(0.1, nesterov=True), "momentum is 0"),
        (lambda: optimizers.adam(0.1, b1=1.0), "b1 is 1.0"),
        (lambda: optimizers.adamw(0.1, weight_decay=float("nan")), "weight_decay is nan"),
        (lambda: optimizers.clip_by_global_norm(0.0), "max_norm is 0.0"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
