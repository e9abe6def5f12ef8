"""CRL on the official code's pairs, values and gradients; its state; masked rows; the edge 0/0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.losses.correctness_ranking import CorrectnessHistory, count_correct, crl, pair_targets, with_epoch
from tests.arrays import load
from tests.losses.oracle import FOLDER, check


def history(counts, epochs_done):
    return with_epoch(CorrectnessHistory(jnp.asarray(counts, jnp.int32), jnp.ones((), jnp.int32)), epochs_done)


def example(rows=7, classes=4, samples=20):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(rows, classes)) * 2).astype(np.float32)
    index = rng.choice(samples, rows, replace=False).astype(np.int32)
    counts = rng.integers(1, 6, samples)
    return logits, rng.integers(0, classes, rows).astype(np.int32), index, history(counts, 6)


@jax.jit
def ranking(logits, labels, past, index, where):
    return jax.value_and_grad(lambda z: crl(z, labels, history=past, sample_index=index, where=where).extra)(logits)


@pytest.mark.parametrize("k", range(2))
def test_official_pairs_value_and_gradient(k):
    data = load(FOLDER / "calibration_metrics" / f"crl_{k}.npz")
    index, labels = data["sample_index"], np.zeros(len(data["logits"]), np.int32)
    past = history(data["correctness_count"], int(data["epochs_done"]))
    sign, size = pair_targets(past, index, np.roll(index, -1))
    np.testing.assert_array_equal(sign, data["pair_target"])
    check(size, data["pair_margin"])
    value, gradient = ranking(data["logits"], labels, past, index, np.ones(len(index), bool))
    check(value, data["ranking_loss"])
    check(gradient, data["grad"])


@pytest.mark.parametrize("kind", ["max", "entropy", "margin"])
def test_kinds_of_confidence(kind):
    logits, labels, index, past = example()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ordered = np.sort(p, -1)
    kinds = {"max": ordered[:, -1], "entropy": (p * np.log(p)).sum(-1) / np.log(4)}
    r = {**kinds, "margin": ordered[:, -1] - ordered[:, -2]}[kind]
    count = np.asarray(past.correct_count)
    kappa = ((count - count.min()) / (6 - count.min()))[index]
    difference = kappa - np.roll(kappa, -1)
    sign = np.sign(difference)
    shift = np.abs(difference) / np.where(sign == 0, 1, sign)
    expected = np.maximum(-sign * (r - np.roll(r, -1) - shift), 0).mean()
    loss = jax.jit(lambda z: crl(z, labels, history=past, sample_index=index, confidence=kind, weight=0.5))(logits)
    check(loss.extra, expected)
    check(loss.total, loss.ce + 0.5 * loss.extra)


def test_gradient_of_the_margin_goes_to_two_classes_even_for_ties():
    logits, past = np.asarray([[0, 2, 2, 2], [0, 0, 5, 0]], np.float32), history([3, 0], 4)
    run = lambda z: crl(z, jnp.zeros(2, jnp.int32), history=past, sample_index=jnp.arange(2), confidence="margin")  # noqa: E731
    gradient = jax.jit(jax.grad(lambda z: run(z).extra))(logits)
    assert gradient[0, 1] < 0 < gradient[0, 2] and abs(gradient[0, 3]) < 1e-7


def test_masked_rows_are_skipped_in_the_pairs():
    logits, labels, index, past = example()
    where = np.asarray([0, 1, 1, 0, 1, 1, 0], bool)
    wild = np.where(where, index, 99)
    value, gradient = ranking(np.where(where[:, None], logits, np.nan), labels, past, wild, where)
    kept, kept_gradient = ranking(logits[where], labels[where], past, index[where], np.ones(4, bool))
    check(value, kept)
    check(gradient[where], kept_gradient)
    assert not gradient[~where].any()
    value, gradient = ranking(logits, labels, past, index, np.zeros(7, bool))
    assert value == 0 and not gradient.any()


def test_no_history_no_signal():
    logits, labels, index, _ = example()
    for past in (CorrectnessHistory.create(20), history(np.full(20, 3), 3), history(np.ones(20), 1)):
        value, gradient = ranking(logits, labels, past, index, np.ones(7, bool))
        assert value == 0 and not gradient.any()


def test_sample_outside_the_training_set():
    logits, labels, index, past = example()
    for wrong in (20, -1):
        index[2] = wrong
        assert np.isnan(ranking(logits, labels, past, index, np.ones(7, bool))[0])


def test_counting():
    logits, labels, index, past = example()
    right = logits.argmax(-1) == labels
    labels[:3] = logits.argmax(-1)[:3]
    right[:3] = True
    right[1] = False
    where = np.arange(7) != 1
    new = jax.jit(lambda past: count_correct(past, logits, labels, sample_index=index, where=where))(past)
    expected = np.asarray(past.correct_count).copy()
    expected[index[right]] += 1
    np.testing.assert_array_equal(new.correct_count, expected)
    assert new.correct_count.dtype == jnp.int32 and new.max_correct == past.max_correct


def test_largest_possible_count_by_epoch():
    past = CorrectnessHistory.create(3)
    assert [int(with_epoch(past, epochs).max_correct) for epochs in range(5)] == [1, 1, 2, 3, 4]


def test_wrong_settings():
    logits, labels, index, past = example()
    with pytest.raises(ConfigError, match="confidence='maxx' is unknown; did you mean 'max'"):
        crl(logits, labels, history=past, sample_index=index, confidence="maxx")
    with pytest.raises(ConfigError, match="sample_index has 3 entries, but there are 7 labels"):
        crl(logits, labels, history=past, sample_index=index[:3])
    with pytest.raises(ConfigError, match="train_size=0 must be at least 1"):
        CorrectnessHistory.create(0)
