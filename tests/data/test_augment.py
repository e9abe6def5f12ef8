import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError
from jaxvision.data import augment
from jaxvision.data.rand_augment import OPERATIONS, RandAugment


def image(height=40, width=60):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 30, (height, width, 3))
    return (np.stack([3 * x, 4 * y, x + y], -1) + noise).astype(np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


def test_crop_boxes_follow_torchvision():
    crop, rng = augment.RandomResizedCrop(16), generator()
    boxes = np.array([crop.box(300, 400, rng) for _ in range(4000)])
    top, left, h, w = boxes.T
    assert np.all((top >= 0) & (left >= 0) & (top + h <= 300) & (left + w <= 400))
    share, ratio = h * w / (300 * 400), w / h
    assert share.min() < 0.09 and share.min() > 0.079 and share.max() > 0.9
    assert ratio.min() > 0.745 and ratio.max() < 1.34 and abs(np.mean(np.log(ratio[share < 0.5]))) < 0.03
    room = (300 - h) > 40
    assert abs(np.mean(top[room] / (300 - h[room])) - 0.5) < 0.02 and np.any(top == 0) and np.any(top + h == 300)


def test_the_ratio_is_width_over_height():
    crop, rng = augment.RandomResizedCrop(16, scale=(0.1, 0.2), ratio=(2.0, 3.0)), generator()
    ratios = [w / h for _, _, h, w in (crop.box(300, 400, rng) for _ in range(100))]
    assert min(ratios) > 1.9 and max(ratios) < 3.1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13)), (10, 12, (0, 0, 10, 12))],
)
def test_crop_falls_back_to_the_centre(height, width, expected):
    assert augment.RandomResizedCrop(8, scale=(4.0, 4.0)).box(height, width, generator()) == expected


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_crop_is_pillows_crop_then_resize_and_moves_the_label_map(method):
    picture, crop = image(), augment.RandomResizedCrop(16, method=method)
    out = crop({"image": picture, "label_map": picture[..., 0], "label": 3}, generator(5))
    top, left, h, w = crop.box(40, 60, generator(5))
    part = Image.fromarray(np.ascontiguousarray(picture[top : top + h, left : left + w]))
    expected = part.resize((16, 16), getattr(Image.Resampling, method.upper()))
    np.testing.assert_array_equal(out["image"], np.asarray(expected))
    nearest = Image.fromarray(np.ascontiguousarray(picture[top : top + h, left : left + w, 0])).resize((16, 16), 0)
    np.testing.assert_array_equal(out["label_map"], np.asarray(nearest))
    assert out["label"] == 3


def test_flip():
    flips = [augment.random_horizontal_flip()({"image": image(), "label": 1}, generator(s)) for s in range(200)]
    mirrored = [np.array_equal(out["image"], image()[:, ::-1]) for out in flips]
    assert 70 < sum(mirrored) < 130 and all(out["label"] == 1 for out in flips)
    assert all(m or np.array_equal(out["image"], image()) for m, out in zip(mirrored, flips))


def test_grey_images_keep_their_channel():
    grey = image()[..., :1]
    jitter = augment.color_jitter(0.4, 0.4)
    for transform in (augment.RandomResizedCrop(8), augment.random_horizontal_flip(1.0), jitter):
        assert transform({"image": grey}, generator())["image"].shape[-1] == 1


def test_color_jitter():
    picture = image()
    same = augment.color_jitter()({"image": picture}, generator())["image"]
    np.testing.assert_array_equal(same, picture)
    grey, jitter = np.full((2, 2, 3), 100, np.uint8), augment.color_jitter(brightness=0.4)
    brightness = [jitter({"image": grey}, generator(s))["image"][0, 0, 0] for s in range(300)]
    assert 59 <= min(brightness) < 65 and 135 < max(brightness) <= 140
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    hues = {tuple(augment.color_jitter(hue=0.5)({"image": red}, generator(s))["image"][0, 0]) for s in range(100)}
    assert len(hues) > 50 and all(max(pixel) == 255 and min(pixel) == 0 for pixel in hues)
    jitter = augment.color_jitter(0.4, 0.4, 0.4)
    orders = {jitter({"image": picture}, generator(s))["image"].tobytes() for s in range(20)}
    assert len(orders) == 20


def operate(name, level, sign=1, picture=None, **options):
    picture = image() if picture is None else picture
    return np.asarray(RandAugment(**options).operate(Image.fromarray(picture), name, level, sign))


def test_rand_augment_operations_against_their_definitions():
    picture = image()
    np.testing.assert_array_equal(operate("Invert", 5), 255 - picture)
    np.testing.assert_array_equal(operate("Posterize", 9), picture & 0b10000000)  # 4 - int(3.6) = 1 bit
    np.testing.assert_array_equal(operate("Posterize", 2), picture & 0b11110000)
    assert not operate("Posterize", 10).any()
    np.testing.assert_array_equal(operate("Solarize", 5), np.where(picture < 128, picture, 255 - picture))
    np.testing.assert_array_equal(operate("Solarize", 0), picture)
    added = np.where(picture < 128, np.minimum(255, picture.astype(int) + 99), picture)
    np.testing.assert_array_equal(operate("SolarizeAdd", 9), added)
    bright = operate("Brightness", 5, -1).astype(int)
    assert np.abs(bright - picture * 0.55).max() <= 1
    assert np.abs(operate("Brightness", 10, -1) - picture * 0.1).max() <= 1
    grey = np.asarray(Image.fromarray(picture).convert("L")).astype(float)[..., None]
    assert np.abs(operate("Color", 5, -1) - (grey + 0.55 * (picture - grey))).max() <= 1.5
    shifted = operate("TranslateX", 10, 1, method="bilinear")  # 0.45 * 60 = 27 pixels
    np.testing.assert_array_equal(shifted[:, :32], picture[:, 27:59])
    assert np.all(shifted[:, 34:] == (124, 116, 104))
    down = operate("TranslateY", 5, -1, fill=(1, 2, 3), method="bilinear")  # -9 pixels
    np.testing.assert_array_equal(down[10:], picture[1:31])
    assert np.all(down[:8] == (1, 2, 3))
    stretched = operate("AutoContrast", 3, picture=picture // 4 + 60)
    assert stretched.min() == 0 and stretched.max() >= 254  # Pillow rounds down
    np.testing.assert_array_equal(operate("Rotate", 0), picture)
    turned = Image.fromarray(picture).rotate(-27, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    np.testing.assert_array_equal(operate("Rotate", 9, -1), np.asarray(turned))


def test_rand_augment_has_timms_fifteen_operations_and_they_grow_with_the_level():
    assert len(OPERATIONS) == 15
    constant = {"AutoContrast", "Equalize", "Invert"}
    picture = image()
    for name in OPERATIONS:
        weak, strong = (np.abs(operate(name, level).astype(int) - picture).mean() for level in (2, 9))
        assert weak == strong if name in constant else strong > weak, name


def test_rand_augment_applies_each_drawn_operation_half_of_the_time():
    unchanged = 0
    for seed in range(300):
        out = RandAugment()({"image": image(12, 16), "label": 2}, generator(seed))
        assert out["image"].shape == (12, 16, 3) and out["image"].dtype == np.uint8 and out["label"] == 2
        unchanged += np.array_equal(out["image"], image(12, 16))
    assert 50 < unchanged < 110  # 1/4, and a few operations that change nothing here
    a, b = (RandAugment()({"image": image()}, generator(7))["image"] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    never = RandAugment(p=0.0)({"image": image()}, generator())["image"]
    np.testing.assert_array_equal(never, image())


def test_mistakes():
    for make in (
        lambda: augment.RandomResizedCrop(8, method="lanczos"),
        lambda: augment.RandomResizedCrop(8, scale=(0.0, 1.0)),
        lambda: augment.RandomResizedCrop(8, ratio=(2.0, 1.0)),
        lambda: augment.random_horizontal_flip(-1),
        lambda: augment.color_jitter(-0.1),
        lambda: augment.color_jitter(hue=0.6),
        lambda: RandAugment(magnitude=11),
        lambda: RandAugment(num_ops=0),
        lambda: RandAugment(method="box"),
    ):
        with pytest.raises(ConfigError):
            make()
