"""Cross-entropy and KL divergence against float64 NumPy: values, gradients, extreme logits, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.losses.classification import kl_divergence, softmax_cross_entropy

B, K = 6, 5


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def example(scale=3.0):
    rng = np.random.default_rng(1)
    soft = rng.dirichlet(np.ones(K), B).astype(np.float32)
    return (rng.normal(size=(B, K)) * scale).astype(np.float32), rng.integers(0, K, B).astype(np.int32), soft


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("hard", [True, False])
def test_value_and_gradient(scale, smoothing, hard):
    logits, labels, soft = example(scale)
    target = np.eye(K)[labels] if hard else soft.astype(np.float64)
    target = (1 - smoothing) * target + smoothing / K
    losses = -(target * log_softmax(logits)).sum(-1)

    def loss(x, **kw):
        return softmax_cross_entropy(x, jnp.asarray(labels if hard else soft), label_smoothing=smoothing, **kw)

    np.testing.assert_allclose(loss(logits, reduction="none"), losses, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(loss(logits, reduction="sum"), losses.sum(), rtol=2e-6)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    np.testing.assert_allclose(value, losses.mean(), rtol=2e-6)
    expected = (np.exp(log_softmax(logits)) * target.sum(-1, keepdims=True) - target) / B
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-7)


def test_mask_weights_and_ignores_nan():
    logits, labels, soft = example()
    mask = np.asarray([1, 0, 1, 0.5, 0, 1], np.float32)
    logits[1] = np.nan
    logits[4] = np.inf
    kept = mask > 0
    losses = -log_softmax(logits[kept])[np.arange(kept.sum()), labels[kept]]
    expected = (mask[kept] * losses).sum() / mask.sum()
    loss = lambda x, t: softmax_cross_entropy(x, t, mask=jnp.asarray(mask))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert np.isfinite(gradient).all() and not gradient[1].any() and not gradient[4].any() and gradient[0].any()
    assert np.isfinite(jax.grad(loss)(jnp.asarray(logits), jnp.asarray(soft))).all()
    summed = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), mask=jnp.asarray(mask), reduction="sum")
    np.testing.assert_allclose(summed, (mask[kept] * losses).sum(), rtol=2e-6)


def test_excluded_class_with_zero_probability_costs_nothing():
    logits = jnp.asarray([[0.0, 1.0, -np.inf]])
    soft = jnp.asarray([[0.25, 0.75, 0.0]])
    value, gradient = jax.value_and_grad(softmax_cross_entropy)(logits, soft)
    expected = -(np.asarray([0.25, 0.75]) * log_softmax([0.0, 1.0])).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_half_precision_logits_are_summed_in_float32():
    logits, labels, _ = example()
    half = jnp.asarray(logits, jnp.bfloat16)
    got = softmax_cross_entropy(half, jnp.asarray(labels))
    assert got.dtype == jnp.float32
    expected = -log_softmax(np.asarray(half, np.float64))[np.arange(B), labels].mean()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_dense_logits():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 3, 4, K)).astype(np.float32)
    labels = rng.integers(0, K, (2, 3, 4)).astype(np.int32)
    got = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), reduction="none")
    expected = -np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "kwargs", "message"),
    [
        (jnp.zeros(4, jnp.int32), {}, "targets have shape"),
        (jnp.zeros((B, K + 1)), {}, "targets have shape"),
        (jnp.zeros(B, jnp.int32), {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        (jnp.zeros(B, jnp.int32), {"reduction": "average"}, "'average'"),
    ],
)
def test_misuse_is_named(targets, kwargs, message):
    with pytest.raises(ValueError, match=message):
        softmax_cross_entropy(jnp.zeros((B, K)), targets, **kwargs)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
def test_kl(scale):
    p, _, _ = example(scale)
    q = np.roll(p, 1, 0)
    log_p, log_q = log_softmax(p), log_softmax(q)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    # Divergences of nearly equal distributions are differences of float32 numbers near 1.6: absolute accuracy.
    np.testing.assert_allclose(kl_divergence(jnp.asarray(p), jnp.asarray(q)), expected, rtol=3e-6, atol=3e-7)
    gradient = jax.grad(lambda x: jnp.sum(kl_divergence(jnp.asarray(p), x)))(jnp.asarray(q))
    np.testing.assert_allclose(gradient, np.exp(log_q) - np.exp(log_p), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(kl_divergence(jnp.asarray(p), jnp.asarray(p)), 0.0)


def test_kl_with_an_excluded_class():
    p = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    log_p = log_softmax([0.0, 1.0])
    for last in (0.0, -np.inf):
        q = jnp.asarray([[0.5, 0.5, last]])
        log_q = log_softmax(q)[0, :2]
        value, gradients = jax.value_and_grad(lambda a, b: jnp.sum(kl_divergence(a, b)), argnums=(0, 1))(p, q)
        np.testing.assert_allclose(value, (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-5)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
