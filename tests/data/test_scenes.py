import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.data import open_source
from jaxvision.data.scenes import CLASS_NAMES, scenes
from jaxvision.data.sources import Source


def test_a_scene_is_a_function_of_seed_split_and_index():
    a, b = scenes(30, 32, seed=3), scenes(50, 32, seed=3)
    assert isinstance(a, Source) and len(a) == 30 and a.num_classes == 7 and a.class_names == CLASS_NAMES[:7]
    backward = [b[i] for i in reversed(range(30))][::-1]
    taken = a.take(np.arange(30))
    assert taken.keys() == {"image", "label_map"} and taken["image"].shape == (30, 32, 32, 3)
    assert taken["image"].dtype == taken["label_map"].dtype == np.uint8 and taken["label_map"].shape == (30, 32, 32)
    for i, example in enumerate(backward):
        np.testing.assert_array_equal(example["image"], taken["image"][i])
        np.testing.assert_array_equal(example["label_map"], taken["label_map"][i])
    for other in (scenes(1, 32, seed=4), scenes(1, 32, seed=3, split="test")):
        assert not np.array_equal(other[0]["image"], taken["image"][0])
    with pytest.raises(ValueError, match="read-only"):
        a[0]["label_map"][0, 0] = 1


def test_the_set_has_what_segmentation_needs():
    """All classes, a background that can be seen past, borders of ignored pixels around whole objects."""
    taken = scenes(200, 48).take(np.arange(200))
    labels = taken["label_map"]
    assert set(np.unique(labels)) == {*range(7), 255}
    share = np.array([(labels == value).mean() for value in (*range(7), 255)])
    assert 0.5 < share[0] < 0.9 and share[1:].min() > 0.005
    present = np.array([[(row == c).any() for c in range(1, 7)] for row in labels])
    assert (present.sum(1) >= 1).all() and present.sum(1).max() == 3
    # A border lies between an object and everything else: no object touches the background.
    for one, other in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1])):
        assert not (((one == 0) & (other > 0) & (other < 255)) | ((other == 0) & (one > 0) & (one < 255))).any()


def test_without_borders_and_the_colours_of_a_class():
    with_border, without = scenes(60), scenes(60, border=0)
    for i in range(60):
        example, bare = with_border[i], without[i]
        np.testing.assert_array_equal(example["image"], bare["image"])
        assert 255 not in bare["label_map"]
        kept = example["label_map"] != 255
        np.testing.assert_array_equal(example["label_map"][kept], bare["label_map"][kept])
        for c in np.unique(bare["label_map"])[1:]:
            pixels = bare["image"][bare["label_map"] == c].mean(0)
            assert pixels.argmax() == (c - 1) % 3 and CLASS_NAMES[c].split()[0] == ("red", "green", "blue")[(c - 1) % 3]


def test_options_and_mistakes():
    assert len(open_source("scenes")) == 1200 and len(open_source("scenes", split="test")) == 300
    nine = open_source("scenes", n=40, size=32, num_classes=9, objects=(3, 3))
    assert nine.num_classes == 9 and nine.take(np.arange(40))["label_map"].max() == 255
    for options, says in (
        ({"n": 0}, "n=0"),
        ({"size": 8}, "size=8"),
        ({"num_classes": 10}, "2 to 9"),
        ({"objects": (0, 2)}, "objects="),
        ({"border": -1}, "border=-1"),
        ({"split": "val"}, "split='val' is unknown for scenes"),
    ):
        with pytest.raises(ConfigError, match=says):
            open_source("scenes", **options)
