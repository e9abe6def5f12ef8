import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.engine.evaluate import compute
from jaxvision.metrics.long_tail import ClassAccuracy, groups_by_count, groups_by_rank


def example():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 10)).astype(np.float32), rng.integers(0, 9, 60).astype(np.int32)


def test_class_and_group_means_over_any_split_of_the_rows():
    logits, labels = example()
    right = logits.argmax(1) == labels
    each = [right[labels == c].mean() for c in range(9)]  # class 9 doesn't occur
    expected = {
        "mean": np.mean(each),
        "head": np.mean(each[:3]),
        "medium": np.mean(each[3:7]),
        "tail": np.mean(each[7:]),
    }
    groups = groups_by_rank(10)
    of = jax.jit(lambda z, y, mask: ClassAccuracy.of(z, y, mask, groups=groups))
    mask = (np.arange(60) < 25).astype(np.float32)
    metric = of(logits, labels, mask).merge(of(logits, labels, 1 - mask))
    assert compute({"class": metric}) == pytest.approx({f"class/{name}": value for name, value in expected.items()})
    assert np.isnan(metric.per_class()[9]) and metric.per_class()[:9].tolist() == pytest.approx(each)
    assert int(metric.count.sum()) == 60
    only = ClassAccuracy.of(jnp.asarray(logits), jnp.asarray(labels), np.zeros(60), groups=groups)
    assert all(np.isnan(value) for value in only.compute().values())


def test_rows_of_nan_are_wrong_and_labels_that_are_no_class_are_left_out():
    logits, labels = np.zeros((4, 3), np.float32), np.array([0, 0, -1, 3])
    logits[1, 2] = np.nan
    metric = ClassAccuracy.of(jnp.asarray(logits), jnp.asarray(labels))
    assert metric.correct.tolist() == [1, 0, 0] and metric.count.tolist() == [2, 0, 0]
    assert metric.compute() == {"mean": 0.5}


def test_the_groups_of_the_papers():
    assert groups_by_rank(10) == (("head", (0, 1, 2)), ("medium", (3, 4, 5, 6)), ("tail", (7, 8, 9)))
    ranges = [(name, members[0], members[-1] + 1) for name, members in groups_by_rank(100)]
    assert ranges == [("head", 0, 36), ("medium", 36, 71), ("tail", 71, 100)]
    assert groups_by_rank(3) == (("head", (0,)), ("medium", (1,)), ("tail", (2,)))
    counts = np.array([500, 101, 100, 20, 19])
    assert groups_by_count(counts) == (("many", (0, 1)), ("medium", (2, 3)), ("few", (4,)))
    assert [name for name, _ in groups_by_count(counts[:2])] == ["many"]
    for call in (lambda: groups_by_rank(2), lambda: groups_by_count(counts, 10, 20)):
        with pytest.raises(ConfigError):
            call()
