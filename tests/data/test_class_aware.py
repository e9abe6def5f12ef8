import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.data.class_aware import ClassAwareSampler
from jaxvision.data.pipeline import EvalBatches, TrainBatches
from jaxvision.data.scenes import scenes
from jaxvision.data.sources import ArraySource

LABELS = np.repeat([0, 1, 2], [20, 7, 2])


def sampler(batch_size=12, **options):
    return ClassAwareSampler(LABELS, 3, batch_size, **{"seed": 0, "stream": "train", **options})


def stream(made, n):
    steps = [made.indices(step) for step in range(-(-n // made.batch_size))]
    return np.concatenate(steps)[:n]


def test_every_class_has_its_turn_of_four_in_each_cycle():
    """The rule of the official generator, read off a long stream."""
    indices = stream(sampler(), 12 * 50)
    turns = LABELS[indices].reshape(-1, 4)
    assert (turns == turns[:, :1]).all()
    cycles = turns[:, 0].reshape(-1, 3)
    assert (np.sort(cycles, 1) == [0, 1, 2]).all() and len({tuple(cycle) for cycle in cycles.tolist()}) == 6
    for label, size in enumerate((20, 7, 2)):
        own = indices[LABELS[indices] == label]
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(whole, 1) == np.flatnonzero(label == LABELS)).all()  # each once before any comes again
        assert len({tuple(cycle) for cycle in whole.tolist()}) > 1


def test_epochs_and_random_access():
    made = sampler()
    assert made.epoch_size == 60 and made.steps_per_epoch == 5
    assert sampler(7).steps_per_epoch == 8 and sampler(7, drop_remainder=False).steps_per_epoch == 9
    assert [made.locate(position)[0] for position in (0, 59, 60)] == [0, 0, 1]
    whole = stream(made, 200)
    np.testing.assert_array_equal([sampler().locate(position)[1] for position in range(199, -1, -1)], whole[::-1])
    np.testing.assert_array_equal(stream(sampler(8), 200), whole)
    assert not np.array_equal(stream(sampler(seed=1), 60), whole[:60])
    assert not np.array_equal(stream(sampler(stream="other"), 60), whole[:60])
    with pytest.raises(IndexError, match="negative"):
        made.indices(-1)


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (np.array([0, 0, 2]), {}, "class 1 has none; hold out fewer"),
        (LABELS, {"batch_size": 61}, "batch_size=61 is larger than an epoch of 60"),
        (LABELS, {"per_class": 0}, "class_aware=0"),
        (LABELS, {"seed": -1}, "seed=-1"),
        (LABELS, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_mistakes(labels, options, says):
    with pytest.raises(ConfigError, match=says):
        ClassAwareSampler(labels, 3, **{"batch_size": 2, "seed": 0, "stream": "train", **options})


def source():
    image = np.zeros((len(LABELS), 2, 2, 1), np.uint8)
    image[:, 0, 0, 0] = np.arange(len(LABELS))
    return ArraySource(image, LABELS)


@pytest.mark.parametrize("by_example", [False, True])
def test_batches_carry_the_number_of_each_example(by_example):
    options = {"example_transform": lambda example, rng: example} if by_example else {}
    for class_aware in (0, 2):
        batches = TrainBatches(source(), 6, seed=3, class_aware=class_aware, index=True, num_threads=0, **options)
        for step in (4, 0):
            batch = batches.batch_at(step)
            assert batch["index"].dtype == np.int32
            np.testing.assert_array_equal(batch["index"], batch["image"][:, 0, 0, 0])
            parts = [batches.batch_at(step, i, 3)["index"] for i in range(3)]
            np.testing.assert_array_equal(np.concatenate(parts), batch["index"])
        other = batches.with_seed(4).batch_at(0)
        np.testing.assert_array_equal(other["index"], other["image"][:, 0, 0, 0])
        assert not np.array_equal(other["index"], batch["index"])
        assert batches.steps_per_epoch == (10 if class_aware else 4)
    held_out = EvalBatches(source(), 8, index=True, num_threads=0, **options)
    rows = [held_out.batch_at(i) for i in range(4)]
    index = np.concatenate([row["index"][row["mask"] > 0] for row in rows])
    np.testing.assert_array_equal(index, np.arange(29))
    assert held_out.subset(np.array([5, 9]), 2).batch_at(0)["index"].tolist() == [0, 1]
    assert "index" not in EvalBatches(source(), 8).batch_at(0)


def test_what_a_source_must_have():
    with pytest.raises(ConfigError, match="doesn't know the labels"):
        TrainBatches(scenes(8), 4, seed=0, class_aware=1)
    with pytest.raises(ConfigError, match="class_aware=1 is a random order"):
        TrainBatches(source(), 4, seed=0, class_aware=1, shuffle=False)
