import numpy as np
import pytest

from jaxvision.core.errors import DataError
from jaxvision.data.sources import ArraySource, Source, Subset, npz_source, stack


def arrays(n=7, k=3):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8), np.arange(n) % k


def test_take_equals_stacked_getitem_and_dtypes():
    image, label = arrays()
    source = ArraySource(image, label.astype(np.uint8), ("a", "b", "c"))
    indices = np.array([6, 0, 3, 3])
    taken, stacked = source.take(indices), stack([source[int(i)] for i in indices])
    assert taken.keys() == stacked.keys() == {"image", "label"}
    for name in taken:
        assert taken[name].dtype == stacked[name].dtype
        np.testing.assert_array_equal(taken[name], stacked[name])
    assert taken["label"].dtype == np.int32 and taken["image"].dtype == np.uint8
    assert isinstance(source, Source) and len(source) == 7 and source.num_classes == 3
    np.testing.assert_array_equal(source.labels, label)


def test_grey_images_get_a_channel_and_default_names():
    source = ArraySource(np.zeros((4, 8, 8), np.float32), np.array([0, 3, 1, 2]))
    assert source[0]["image"].shape == (8, 8, 1)
    assert source.class_names == ("0", "1", "2", "3")


def test_extra_leaves_travel_along():
    image, label = arrays()
    source = ArraySource(image, label, extra={"label_map": np.arange(7 * 20).reshape(7, 4, 5)})
    np.testing.assert_array_equal(source.take(np.array([2]))["label_map"], np.arange(40, 60).reshape(1, 4, 5))


def test_an_example_cannot_be_written_through_but_the_callers_array_stays_writable():
    image, label = arrays()
    source = ArraySource(image, label)
    with pytest.raises(ValueError, match="read-only"):
        source[0]["image"][0] = 0
    image[0] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.zeros((7, 4), np.uint8)}, ("(7, 4)", "(N, H, W, C)")),
        ({"image": np.zeros((7, 4, 4, 3), np.float64)}, ("float64", "uint8")),
        ({"label": np.zeros(7, np.float32)}, ("float32", "integers")),
        ({"label": np.zeros((7, 1), np.int32)}, ("(7, 1)", "integers")),
        ({"label": np.zeros(6, np.int32)}, ("7 rows", "6")),
        ({"label": np.array([0, 1, 2, 3, 0, 0, 0])}, ("label 3", "example 3", "0..2")),
        ({"label": np.array([0, 1, -1, 0, 0, 0, 0])}, ("label -1", "example 2")),
        ({"num_classes": 5}, ("3 class names", "5 classes")),
        ({"extra": {"weight": np.zeros(3)}}, ("'weight' has 3 rows", "7")),
        ({"image": np.zeros((0, 4, 4, 3), np.uint8), "label": np.zeros(0, int)}, ("no examples",)),
    ],
)
def test_wrong_arrays(change, words):
    image, label = arrays()
    arguments = {"image": image, "label": label, "class_names": ("a", "b", "c"), "name": "here"} | change
    with pytest.raises(DataError) as error:
        ArraySource(**arguments)
    assert "\n" not in str(error.value)
    for word in ("here", *words):
        assert word in str(error.value)


def test_subset():
    image, label = arrays()
    subset = Subset(ArraySource(image, label), np.array([5, 1]))
    assert len(subset) == 2 and subset.num_classes == 3 and subset.in_memory
    np.testing.assert_array_equal(subset[0]["image"], image[5])
    np.testing.assert_array_equal(subset.take(np.array([1, 0]))["image"], image[[1, 5]])
    for wrong in (np.array([7]), np.array([-1]), np.array([], int), np.array([True, False])):
        with pytest.raises(DataError):
            Subset(ArraySource(image, label), wrong)


def test_stack_names_differing_shapes():
    examples = [{"image": np.zeros((4, 5, 3))}, {"image": np.zeros((6, 5, 3))}]
    with pytest.raises(DataError, match=r"'image' shapes, such as \(4, 5, 3\) and \(6, 5, 3\); add an example"):
        stack(examples)


def test_npz_round_trip(tmp_path):
    image, label = arrays()
    np.savez_compressed(tmp_path / "a.npz", image=image, label=label.astype(np.uint8), class_names=["x", "y", "z"])
    source = npz_source(tmp_path / "a.npz")
    assert source.class_names == ("x", "y", "z") and all(type(name) is str for name in source.class_names)
    np.testing.assert_array_equal(source.take(np.arange(7))["image"], image)
    np.savez(tmp_path / "b.npz", image=image[..., 0], label=label)
    source = npz_source(tmp_path / "b.npz", num_classes=10)
    assert source.num_classes == 10 and source[0]["image"].shape == (4, 5, 1)


def npz_cases():
    image, label = arrays()
    return {
        "keys": ({"image": image, "y": label}, ("no array 'label'", "image, y")),
        "empty": ({}, ("no array 'image'", "none")),
        "lengths": ({"image": image, "label": label[:3]}, ("7 rows", "3")),
        "range": ({"image": image, "label": label, "class_names": ["a", "b"]}, ("label 2 of example 2", "0..1")),
        "pickled": ({"image": image, "label": label.astype(object)}, ("can't be read", "write it again")),
    }


@pytest.mark.parametrize("case", ["keys", "empty", "lengths", "range", "pickled"])
def test_npz_faults(tmp_path, case):
    content, words = npz_cases()[case]
    path = tmp_path / "bad.npz"
    np.savez(path, **content)
    with pytest.raises(DataError) as error:
        npz_source(path)
    assert "\n" not in str(error.value)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_npz_that_is_missing_cut_or_not_an_npz(tmp_path):
    with pytest.raises(DataError, match=r"gone.npz doesn't exist"):
        npz_source(tmp_path / "gone.npz")
    image, label = arrays()
    np.savez(tmp_path / "a.npz", image=image, label=label)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[200] ^= 255
    (tmp_path / "flipped.npz").write_bytes(damaged)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "nothing.npz").write_bytes(b"")
    for name in ("cut", "flipped", "text", "nothing"):
        with pytest.raises(DataError, match=rf"{name}.npz can't be read as an npz"):
            npz_source(tmp_path / f"{name}.npz")
    np.save(tmp_path / "single.npy", image)
    with pytest.raises(DataError, match=r"single.npy is a single array"):
        npz_source(tmp_path / "single.npy")
