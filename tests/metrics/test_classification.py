"""Classification metrics against NumPy, over any split of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.metrics import classification

B, K = 40, 7


def example():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(B, K)).astype(np.float32) * 3
    return a, (a + rng.normal(size=(B, K))).astype(np.float32), rng.integers(0, K, B).astype(np.int32)


def log_softmax(x):
    x = np.asarray(x, np.float64) - np.max(x, -1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expected(a, b, labels):
    order = np.argsort(-a, axis=-1, kind="stable")
    p, log_p, log_q = np.exp(log_softmax(a)), log_softmax(a), log_softmax(b)
    return {
        "top1": np.mean(order[:, 0] == labels),
        "top3": np.mean((order[:, :3] == labels[:, None]).any(-1)),
        "nll": -log_p[np.arange(len(labels)), labels].mean(),
        "kl": (p * (log_p - log_q)).sum(-1).mean(),
        "agreement": np.mean(a.argmax(-1) == b.argmax(-1)),
    }


def metrics(a, b, labels, mask=None):
    return {
        "top1": classification.accuracy(a, labels, mask),
        "top3": classification.accuracy(a, labels, mask, k=3),
        "nll": classification.cross_entropy(a, labels, mask),
        "kl": classification.kl_divergence(a, b, mask),
        "agreement": classification.agreement(a, b, mask),
    }


@pytest.mark.parametrize("batch", [B, 16, 7])
def test_every_batch_size_gives_the_same_numbers(batch):
    a, b, labels = example()
    merged = None
    for start in range(0, B, batch):
        rows = np.arange(start, start + batch)
        mask = (rows < B).astype(np.float32)
        part = [np.where(mask[:, None], x[rows % B], np.nan) for x in (a, b)]
        found = jax.jit(metrics)(*map(jnp.asarray, (*part, labels[rows % B], mask)))
        merged = found if merged is None else {name: merged[name].merge(found[name]) for name in found}
    for name, value in expected(a, b, labels).items():
        assert merged[name].count == B
        np.testing.assert_allclose(merged[name].compute(), value, rtol=2e-6)


def test_without_mask_all_rows_count():
    a, b, labels = example()
    for name, mean in metrics(*map(jnp.asarray, (a, b, labels))).items():
        np.testing.assert_allclose(mean.compute(), expected(a, b, labels)[name], rtol=2e-6)


def test_ties_go_to_the_lower_class_and_nan_is_wrong():
    logits = jnp.asarray([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [np.nan, 2.0, 0.0], [0.0, 2.0, np.nan]])
    labels = jnp.asarray([0, 1, 0, 1])
    assert classification.accuracy(logits, labels).total == 1
    assert classification.accuracy(logits, labels, k=2).total == 2
    assert classification.accuracy(logits, labels, k=9).total == 2
    with pytest.raises(ValueError, match="k is 0"):
        classification.accuracy(logits, labels, k=0)


def test_extreme_logits():
    logits = jnp.asarray([[1e4, 0.0], [-1e4, 0.0], [0.0, -jnp.inf]])
    labels = jnp.asarray([0, 0, 0])
    np.testing.assert_allclose(classification.cross_entropy(logits, labels).total, 1e4)
    np.testing.assert_allclose(classification.kl_divergence(logits, logits).total, 0.0)
