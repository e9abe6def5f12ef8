"""Splits of published code: its fixtures, and its lines run beside ours."""

from pathlib import Path

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.data import splits
from jaxvision.data.sources import ArraySource, Subset, labels_of
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "rankmixup"


def test_the_cifar_split_is_the_official_one():
    oracle = load(ORACLES / "cifar_split_0.npz")
    train, validation = splits.shuffled(50_000, 5_000, int(oracle["seed"]))
    np.testing.assert_array_equal(validation, oracle["val_indices"])
    np.testing.assert_array_equal(train[:100], oracle["first_100_train_indices"])
    assert len(train) == 45_000 and len(set(train) | set(validation)) == 50_000


def test_the_tiny_imagenet_split_is_the_official_one():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 12))
    train, validation = splits.per_class(labels, 21, seed=1)
    np.random.seed(1)
    members = {}
    for i, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(i)
    official_train, official_validation = [], []
    for indices in members.values():
        np.random.shuffle(indices)
        official_train += indices[:-3]
        official_validation += indices[-3:]
    assert train.tolist() == official_train and validation.tolist() == official_validation
    assert np.bincount(labels[validation]).tolist() == [3] * 7


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("imbalance", [0.1, 0.02, 0.01])
def test_long_tail_counts_are_the_official_ones(classes, imbalance):
    expected = load(ORACLES / "longtail_counts_0.npz")[f"cifar{classes}_if_{imbalance}"]
    np.testing.assert_array_equal(splits.long_tail_counts(50_000, classes, imbalance), expected)


def test_long_tail_examples_are_the_official_ones():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    chosen = splits.long_tail(labels, 5, 0.1)
    np.random.seed(0)
    official = []
    for label, count in enumerate(splits.long_tail_counts(200, 5, 0.1)):
        indices = np.where(labels == label)[0]
        np.random.shuffle(indices)
        official += indices[:count].tolist()
    assert chosen.tolist() == official
    assert np.bincount(labels[chosen]).tolist() == [40, 22, 12, 7, 4]
    assert splits.long_tail(labels, 5, 1.0).size == 200


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: splits.shuffled(10, 10, 0), "validation_size=10 is not between 0 and the 10 examples"),
        (lambda: splits.shuffled(10, 2, -1), "seed=-1"),
        (lambda: splits.per_class(np.repeat([0, 1], 5), 3, 0), "validation_size=3 is no multiple of the 2 classes"),
        (lambda: splits.per_class(np.repeat([0, 4], [5, 2]), 4, 0), "class 4 has only 2"),
        (lambda: splits.long_tail_counts(100, 10, 0.0), "imbalance=0.0"),
        (lambda: splits.long_tail_counts(100, 10, 0.05), "leaves class 7 without images"),
        (lambda: splits.long_tail(np.repeat([0, 1], [2, 8]), 2, 0.5), "keeps 5 images of class 0, which has 2"),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


def test_a_subset_knows_its_labels_and_says_where_there_are_none():
    source = ArraySource(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 2, 1]))
    assert Subset(Subset(source, np.array([3, 2, 1])), np.array([0, 1])).labels.tolist() == [1, 2]
    with pytest.raises(ConfigError, match="object doesn't know the labels"):
        labels_of(object())
