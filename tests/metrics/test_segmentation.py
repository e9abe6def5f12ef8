"""Segmentation metrics against the official numbers, over any split of the pixels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.metrics import segmentation
from jaxvision.metrics.segmentation import Confusion

ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.mark.parametrize("case", range(4))
def test_the_official_numbers_of_incremental_segmentation(case):
    with np.load(ORACLES / "alife" / f"miou_{case}.npz") as oracle:
        classes = int(oracle["num_classes"])
        metric = Confusion.of(jnp.asarray(oracle["pred"]), jnp.asarray(oracle["gt"]), classes)
        np.testing.assert_array_equal(metric.matrix(), oracle["confusion"])
        scores, numbers = segmentation.class_scores(metric.matrix()), metric.compute()
        np.testing.assert_allclose(100 * scores["iou"], oracle["per_iou"], rtol=1e-12)
        np.testing.assert_allclose(100 * scores["accuracy"], oracle["per_acc"], rtol=1e-12)
        for ours, theirs in (
            ("mean_iou", "miou"), ("mean_accuracy", "macc"), ("pixel_accuracy", "pacc"), ("frequency_iou", "fwiou")
        ):  # fmt: skip
            np.testing.assert_allclose(100 * numbers[ours], oracle[theirs], rtol=1e-12)


@pytest.mark.parametrize("case", range(2))
def test_the_official_numbers_of_the_calibration_papers(case):
    with np.load(ORACLES / "calibration_metrics" / f"segmentation_{case}.npz") as oracle:
        logits, labels = oracle["logits"], oracle["labels"]
        metrics = [Confusion.of(jnp.argmax(z, -1), jnp.asarray(y), logits.shape[-1]) for z, y in zip(logits, labels)]
        total = metrics[0]
        for metric in metrics[1:]:
            total = total.merge(metric)
        numbers = segmentation.foreground_means(total.matrix())
        for ours, theirs in (("mean_iou", "fg_miou"), ("mean_dice", "fg_mdsc"), ("mean_accuracy", "fg_macc")):
            np.testing.assert_allclose(numbers[ours], oracle[theirs], rtol=1e-7)


def test_padding_ignored_pixels_and_any_split_of_the_rows():
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 4, (6, 5, 7)), rng.integers(0, 4, (6, 5, 7)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (labels[labels < 4], predictions[labels < 4]), 1)
    of = jax.jit(Confusion.of, static_argnums=2)
    np.testing.assert_array_equal(of(predictions, labels, 4).matrix(), expected)
    mask = np.array([1.0, 1, 1, 0, 0, 0])
    both = of(predictions, labels, 4, mask).merge(of(predictions, labels, 4, 1 - mask))
    np.testing.assert_array_equal(both.matrix(), expected)
    pixels = rng.random(labels.shape) < 0.5
    both = Confusion.of(predictions, labels, 4, pixels).merge(Confusion.of(predictions, labels, 4, ~pixels))
    np.testing.assert_array_equal(both.matrix(), expected)
    other = np.where(labels == 255, -1, labels.astype(int))
    np.testing.assert_array_equal(Confusion.of(predictions, other, 4, ignore=-1).matrix(), expected)


def test_counts_beyond_what_an_int32_holds():
    metric = Confusion.of(jnp.zeros((1, 300, 300), int), jnp.zeros((1, 300, 300), int), 2)
    # merging adds the halves, so many batches are the halves times their number
    many = jax.tree.map(lambda leaf: leaf * 30_000, metric)
    assert many.matrix()[0, 0] == 300 * 300 * 30_000 > 2**31
    assert many.compute()["pixel_accuracy"] == 1


def test_no_pixels_and_labels_beyond_the_classes_are_nan():
    zeros = np.zeros((2, 3, 3), int)
    for metric in (Confusion.of(zeros, zeros + 255, 3), Confusion.of(zeros, zeros + 3, 3)):
        assert all(np.isnan(value) for value in metric.compute().values()) and len(metric.compute()) == 4
    padded = Confusion.of(zeros, np.stack([zeros[0], zeros[0] + 77]), 3, np.array([1, 0]))
    assert padded.compute()["mean_iou"] == 1
