import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError
from jaxvision.data import augment, dense


def rng(seed=0):
    return np.random.default_rng(seed)


def example(height=30, width=44):
    """A label map that says which pixel of the image it belongs to: block by block the same number."""
    rows, columns = np.arange(height) // 6, np.arange(width) // 6
    labels = (rows[:, None] * 8 + columns).astype(np.uint8)
    return {"image": (labels[..., None] * np.uint8(4)).repeat(3, 2), "label_map": labels, "id": 7}


def assert_together(out, within=0):
    """Label and image moved alike, up to the mixing of neighbouring blocks; where 255 came in the image is black."""
    image, labels = out["image"], out["label_map"]
    assert image.dtype == labels.dtype == np.uint8 and image.shape == (*labels.shape, 3) and out["id"] == 7
    known = labels != 255
    assert (image[~known] == 0).all()
    assert abs(image[known][:, 0].astype(int) - labels[known] * 4).max() <= within


@pytest.mark.parametrize("size", [22, 44, 88])
def test_longest_side_and_padding_to_a_square(size):
    out = dense.resize_longest(size)(example(), None)
    assert out["image"].shape == (round(30 * size / 44), size, 3)
    nearest = Image.fromarray(example()["label_map"]).resize(out["label_map"].shape[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(out["label_map"], nearest)
    padded = dense.pad_to(size)(out, None)
    top = (size - out["image"].shape[0]) // 2
    np.testing.assert_array_equal(padded["label_map"][top : top + out["label_map"].shape[0]], out["label_map"])
    assert (padded["label_map"][:top] == 255).all() and padded["image"].shape == (size, size, 3)
    assert_together(padded, 36)
    assert dense.pad_to(10)(example(), None)["image"].shape == (30, 44, 3)


def test_padding_puts_the_odd_pixel_behind():
    out = dense.pad_to(47)(example(), None)
    known = np.argwhere(out["label_map"] != 255)
    assert known.min(0).tolist() == [8, 1] and known.max(0).tolist() == [37, 44]


def test_random_crops_are_uniform_and_move_both():
    crop, seen = dense.random_crop(28), set()
    generator = rng()
    whole = example()
    for _ in range(400):
        out = crop(whole, generator)
        assert_together(out)
        places = [
            (top, left) for top in range(3) for left in range(17)
            if np.array_equal(whole["label_map"][top : top + 28, left : left + 28], out["label_map"])
        ]  # fmt: skip
        seen.update(places)
    assert seen == {(top, left) for top in range(3) for left in range(17)}
    centre = dense.center_crop(28)(whole, None)
    np.testing.assert_array_equal(centre["label_map"], whole["label_map"][1:29, 8:36])
    with pytest.raises(ConfigError, match="a crop of 31 x 31 doesn't fit into an image of 44 x 30; put pad_to before"):
        dense.random_crop(31)(whole, generator)


def test_random_scale_and_resize():
    sizes = {dense.random_scale(0.5, 2.0)(example(), rng(seed))["image"].shape[:2] for seed in range(40)}
    heights = sorted(height for height, _ in sizes)
    assert heights[0] < 18 and heights[-1] > 52 and all(abs(w / h - 44 / 30) < 0.06 for h, w in sizes)
    assert dense.resize(20, 10)(example(), None)["label_map"].shape == (20, 10)


def test_flips_and_random_resized_crops_move_both_too():
    flipped = augment.random_horizontal_flip(1.0)(example(), rng())
    np.testing.assert_array_equal(flipped["label_map"], example()["label_map"][:, ::-1])
    assert_together(flipped)
    # ALIFE's training crop: scales above 1 never fit
    crop = augment.RandomResizedCrop(24, (0.5, 2.0), method="bilinear")
    assert_together({**crop(example(), rng(3)), "id": 7}, 36)


def test_brightness_and_contrast():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    changed = 0
    for seed in range(60):
        out = dense.random_brightness_contrast(0.3)({"image": image}, rng(seed))["image"]
        if np.array_equal(out, image):
            continue
        changed += 1
        values = out[..., 0].reshape(-1).astype(float)
        inside = np.flatnonzero((values > 0) & (values < 255))
        slope, shift = np.polyfit(inside, values[inside], 1)
        assert 0.69 < slope < 1.31 and -78 < shift < 78
        assert (np.diff(values) >= 0).all()
    assert 15 < changed < 45
    np.testing.assert_array_equal(dense.random_brightness_contrast(0.3, 0.0)({"image": image}, rng())["image"], image)


def test_hue_saturation_value():
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0], image[..., 1] = 200, 100
    hues = []
    for seed in range(50):
        out = dense.random_hsv(p=1.0)({"image": image}, rng(seed))["image"]
        before, after = (np.asarray(Image.fromarray(each).convert("HSV"))[0, 0].astype(int) for each in (image, out))
        hues.append((after[0] - before[0] + 128) % 256 - 128)
        assert abs(after[1] - before[1]) <= 32 and abs(after[2] - before[2]) <= 21
    assert max(hues) > 15 and min(hues) < -15 and max(map(abs, hues)) <= 30  # a ninth of 256 is 28
    np.testing.assert_array_equal(dense.random_hsv(p=0.0)({"image": image}, rng())["image"], image)


@pytest.mark.parametrize(("height", "width"), [(30, 44), (44, 30), (100, 20)])
def test_the_voc_recipe(height, width):
    train, held_out = dense.voc_train(32, 40), dense.voc_eval(28)
    out = train(example(height, width), rng())
    assert out["image"].shape == (32, 32, 3) and out["image"].dtype == np.float32
    assert out["label_map"].shape == (32, 32) and out["label_map"].dtype == np.uint8
    first, second = (train(example(height, width), rng(4))["image"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    plain = held_out(example(height, width), None)
    assert plain["image"].shape == (28, 28, 3) and plain["label_map"].shape == (28, 28)
    black = plain["image"][plain["label_map"] == 255]
    assert len(black) and np.allclose(black, -np.array([0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])


def test_the_square_recipe():
    out = dense.square_train(14, 16)(example(), rng())
    assert out["image"].shape == (14, 14, 3) and out["image"].dtype == np.float32
    plain = dense.square_eval(14, 16)({"image": example()["image"]}, None)["image"]
    whole = np.asarray(Image.fromarray(example()["image"]).resize((16, 16), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(plain[..., 0], (whole[1:15, 1:15, 0] - 0.485) / 0.229, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dense.resize(0, 5),
        lambda: dense.resize_longest(2.5),
        lambda: dense.resize_longest(4, "cubic"),
        lambda: dense.random_scale(0, 1),
        lambda: dense.pad_to(-1),
        lambda: dense.random_crop(0),
        lambda: dense.random_brightness_contrast(-0.1),
        lambda: dense.random_hsv(p=2.0),
    ],
)
def test_mistakes(make):
    with pytest.raises(ConfigError):
        make()
