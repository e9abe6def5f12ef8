from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxvision.core.errors import ConfigError
from jaxvision.data import builtin, procedural
from jaxvision.data.sources import Source, stack


def test_digits_split_is_fixed_and_complete():
    train, test, whole = (builtin.digits(split, raw=True) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(whole)) == (1297, 500, 1797) and train.num_classes == 10
    everything = np.concatenate([s.take(np.arange(len(s)))["image"] for s in (train, test)])
    assert everything.dtype == np.uint8 and everything.shape == (1797, 8, 8, 1) and everything.max() == 16
    np.testing.assert_array_equal(everything, whole.take(np.arange(1797))["image"])
    bunch = load_digits()
    assert sorted(row.tobytes() for row in everything) == sorted(row.tobytes() for row in bunch.images.astype(np.uint8))
    # the split itself: it must never change
    np.testing.assert_array_equal(train.labels[:8], bunch.target[np.random.RandomState(0).permutation(1797)[:8]])
    np.testing.assert_array_equal(test.labels[:12], [0, 9, 6, 9, 8, 4, 5, 8, 1, 6, 3, 0])
    assert np.bincount(test.labels).min() > 35


def test_digits_are_in_0_to_1():
    raw, scaled = builtin.digits("test", raw=True)[7], builtin.digits("test")[7]
    assert scaled["image"].dtype == np.float32 and scaled["label"] == raw["label"]
    np.testing.assert_array_equal(scaled["image"] * 16, raw["image"])


def test_noise_belongs_to_the_image_and_the_cut_moves():
    clean, noisy = builtin.digits("all"), builtin.digits("all", noise=0.35)
    difference = noisy.take(np.arange(1797))["image"] - clean.take(np.arange(1797))["image"]
    assert abs(difference.std() - 0.35) < 0.003 and abs(difference.mean()) < 0.003
    train, test = (builtin.digits(split, num_train=750, noise=0.35) for split in ("train", "test"))
    assert (len(train), len(test)) == (750, 1047)
    for part, first in ((train, 0), (test, 750)):
        np.testing.assert_array_equal(part[7]["image"], noisy[first + 7]["image"])
        assert part[7]["label"] == noisy[first + 7]["label"]


def test_digits16_is_bilinear_without_aligned_corners():
    small, large = builtin.digits("train", raw=True)[3]["image"][..., 0], builtin.digits16("train")[3]["image"]
    assert large.shape == (16, 16, 1) and large.dtype == np.float32
    x = (small / 16 - 0.5) / 0.5
    for i in range(16):
        for j in range(16):
            y0, x0 = (min(max((k + 0.5) / 2 - 0.5, 0), 7) for k in (i, j))
            top, left = int(y0), int(x0)
            below, right = min(top + 1, 7), min(left + 1, 7)
            fy, fx = y0 - top, x0 - left
            upper = (1 - fx) * x[top, left] + fx * x[top, right]
            lower = (1 - fx) * x[below, left] + fx * x[below, right]
            assert large[i, j, 0] == np.float32((1 - fy) * upper + fy * lower)


def test_shapes_are_deterministic_lazy_and_differ():
    a, b = procedural.shapes(40, 24, seed=3), procedural.shapes(40, 24, seed=3)
    assert isinstance(a, Source) and len(a) == 40 and a.num_classes == 8 == len(a.class_names)
    forward, backward = [a[i] for i in range(40)], [b[i] for i in reversed(range(40))][::-1]
    for x, y in zip(forward, backward):
        np.testing.assert_array_equal(x["image"], y["image"])
    assert forward[0]["image"].shape == (24, 24, 3) and forward[0]["image"].dtype == np.uint8
    assert len({x["image"].tobytes() for x in forward}) == 40
    assert [int(x["label"]) for x in forward] == [i % 8 for i in range(40)] == a.labels.tolist()
    for other in (procedural.shapes(40, 24, seed=4), procedural.shapes(40, 24, seed=3, split="test")):
        assert not np.array_equal(other[0]["image"], forward[0]["image"])
    longer = procedural.shapes(50, 24, seed=3)
    np.testing.assert_array_equal(longer[39]["image"], forward[39]["image"])
    assert a[-1]["label"] == a[39]["label"]
    with pytest.raises(IndexError):
        a[40]


def test_shapes_take_equals_getitem_and_threads_agree():
    source, fresh = procedural.shapes(16, 16, label_map=True), procedural.shapes(16, 16, label_map=True)
    indices = np.array([3, 3, 15, 0])
    taken, stacked = source.take(indices), stack([fresh[int(i)] for i in indices])
    assert taken.keys() == {"image", "label", "label_map"}
    for name in taken:
        assert taken[name].dtype == stacked[name].dtype
        np.testing.assert_array_equal(taken[name], stacked[name])
    order, shared = list(range(16)) * 4, procedural.shapes(16, 16)
    with ThreadPoolExecutor(4) as pool:
        for i, example in zip(order, pool.map(shared.__getitem__, order)):
            np.testing.assert_array_equal(example["image"], source[i]["image"])


def test_the_label_map_covers_a_visible_shape_inside_the_image():
    source = procedural.shapes(64, 32, label_map=True)
    for i in range(64):
        example = source[i]
        inside = example["label_map"] > 0
        assert example["label_map"].dtype == np.uint8 and example["label_map"].shape == (32, 32)
        assert set(np.unique(example["label_map"])) == {0, int(example["label"]) + 1}
        assert 0.01 < inside.mean() < 0.6
        assert not inside[[0, -1]].all() and not inside[:, [0, -1]].all()
        pixels = example["image"].astype(float)
        assert np.abs(pixels[inside].mean(0) - pixels[~inside].mean(0)).max() > 40


def test_nearest_neighbour_on_shapes_is_above_chance_and_below_perfect():
    """The task can be learned from the silhouette, and position and rotation make it no triviality."""
    train, test = procedural.shapes(800, 16, label_map=True), procedural.shapes(160, 16, split="test", label_map=True)

    def features(source):
        maps = source.take(np.arange(len(source)))["label_map"] > 0
        centred = [np.roll(m, tuple(8 - np.rint(np.argwhere(m).mean(0)).astype(int)), (0, 1)) for m in maps]
        return np.stack(centred).reshape(len(maps), -1).astype(np.float32)

    a, b = features(train), features(test)
    nearest = ((b[:, None] - a[None]) ** 2).sum(-1).argmin(1)
    accuracy = (train.labels[nearest] == test.labels).mean()
    assert 0.5 < accuracy < 1.0


def test_mistakes():
    for make in (
        lambda: builtin.digits("tset"),
        lambda: builtin.digits("train", num_train=1797),
        lambda: builtin.digits("train", num_train=0),
        lambda: builtin.digits("train", noise=-0.1),
        lambda: builtin.digits("train", noise=0.1, raw=True),
        lambda: builtin.digits16("val"),
        lambda: procedural.shapes(0),
        lambda: procedural.shapes(5, 4),
        lambda: procedural.shapes(5, seed=-1),
        lambda: procedural.shapes(5, num_classes=9),
    ):
        with pytest.raises(ConfigError):
            make()
