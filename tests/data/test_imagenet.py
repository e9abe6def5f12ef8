"""ImageNet preprocessing against torchvision's stored results, and against Pillow's fixed-point resampling in NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError
from jaxvision.data import imagenet
from jaxvision.data.rand_augment import RandAugment
from tests.arrays import load

ORACLE = Path(__file__).parents[1] / "oracles" / "imagenet" / "evaluation.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def reference_weights(size_in, size_out, kernel, support):
    """Rows of (first input, integer weights of 22 fractional bits) as in Pillow's Resample.c."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size_out):
        centre = (i + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), size_in)
        weights = [kernel(abs((j - centre + 0.5) / stretch)) for j in range(first, last)]
        total = sum(weights)
        fixed = [int(math.copysign(0.5, w) + w / total * 2**22) for w in weights]
        rows.append((first, np.array(fixed, np.int64)))
    return rows


def bicubic(x):
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return -0.5 * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0


def bilinear(x):
    return max(0.0, 1.0 - x)


def reference_resize(image, height, width, method):
    """Across, rounded to 8 bits, then down: ``(2**21 + sum of weight * pixel) >> 22``, clipped."""
    kernel, support = {"bicubic": (bicubic, 2.0), "bilinear": (bilinear, 1.0)}[method]

    def along(axis, image, size):
        if image.shape[axis] == size:
            return image
        moved = np.moveaxis(image, axis, 0).astype(np.int64)
        rows = [
            np.clip((2**21 + np.tensordot(w, moved[first : first + len(w)], 1)) >> 22, 0, 255)
            for first, w in reference_weights(image.shape[axis], size, kernel, support)
        ]
        return np.moveaxis(np.stack(rows), 0, axis)

    return along(0, along(1, image, width), height)


def reference_eval(image, size, fraction, method):
    short = math.floor(size / fraction)
    h, w = image.shape[:2]
    if h < w:
        h, w = short, int(short * w / h)
    else:
        h, w = int(short * h / w), short
    resized = reference_resize(image, h, w, method)
    top, left = round((h - size) / 2.0), round((w - size) / 2.0)
    pixels = resized[top : top + size, left : left + size].astype(np.float32)
    return (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


def photo(height, width):
    """Smooth waves and hard noise, so that both overshoot and rounding matter."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 127 * np.sin(x[..., None] / (3.0, 5.1, 7.7) + y[..., None] / (2.1, 9.3, 4.4))
    noise = np.random.default_rng(height * 1000 + width).integers(-90, 90, (height, width, 3))
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_evaluation_preprocessing_is_torchvisions(method):
    """Resize, CenterCrop, ToTensor and Normalize of torchvision 0.29.1 on Pillow images made by :func:`photo`."""
    stored = load(ORACLE)
    for index, (height, width, size, fraction) in enumerate(stored["cases"]):
        transform = imagenet.imagenet_eval(int(size), float(fraction), MEAN, STD, method)
        out = transform({"image": photo(int(height), int(width)), "label": 1}, None)["image"]
        np.testing.assert_array_equal(out, stored[f"{method}_{index}"], err_msg=f"{height}x{width}")


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "size", "fraction"),
    [
        (53, 37, 32, 0.875),  # portrait, odd, hardly shrinking
        (37, 53, 32, 0.9),  # landscape; 32 / 0.9 = 35.55
        (36, 36, 32, 0.875),  # the shorter side is there already
        (36, 71, 32, 0.875),
        (21, 19, 32, 0.875),  # growing
        (201, 300, 33, 0.875),  # odd crop, shrinking 5 times
        (500, 31, 32, 1.0),
        (97, 98, 33, 0.95),
        (375, 500, 224, 0.875),  # a common ImageNet size
    ],
)
def test_evaluation_preprocessing_to_the_pixel(height, width, size, fraction, method):
    image = photo(height, width)
    out = imagenet.imagenet_eval(size, fraction, MEAN, STD, method)({"image": image, "label": 1}, None)
    assert out["image"].shape == (size, size, 3) and out["image"].dtype == np.float32 and out["label"] == 1
    np.testing.assert_array_equal(out["image"], reference_eval(image, size, fraction, method))


@pytest.mark.parametrize(
    ("size", "fraction", "shorter"), [(224, 0.875, 256), (224, 0.9, 248), (384, 1.0, 384), (224, 0.95, 235)]
)
def test_shorter_side(size, fraction, shorter, monkeypatch):
    seen = []

    def spy(picture, side, method):
        seen.append(side)
        return picture.resize((side, side))

    monkeypatch.setattr(imagenet, "resize_shorter_side", spy)
    imagenet.imagenet_eval(size, fraction)({"image": photo(8, 8)}, None)
    assert seen == [shorter]


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(500, 300, (426, 256)), (300, 500, (256, 426)), (7, 7, (256, 256))]
)
def test_the_longer_side_is_cut_off_not_rounded(width, height, expected):
    assert imagenet.resize_shorter_side(Image.new("RGB", (width, height)), 256).size == expected


@pytest.mark.parametrize(("side", "offset"), [(32, 0), (33, 0), (34, 1), (35, 2), (36, 2), (37, 2), (39, 4)])
def test_centre_crop_rounds_halves_to_even(side, offset):
    ramp = np.arange(side, dtype=np.uint8)
    picture = Image.fromarray(ramp[None].repeat(side, 0))
    assert np.asarray(imagenet.center_crop(picture, 32))[0, 0] == offset
    assert np.asarray(imagenet.center_crop(picture.transpose(Image.Transpose.ROTATE_270), 32)).shape == (32, 32)


@pytest.mark.parametrize("options", [{}, {"jitter": 0.4}, {"rand_augment": RandAugment()}])
def test_training_preprocessing(options):
    transform = imagenet.imagenet_train(24, **options)
    example = {"image": photo(50, 40), "label": 4}
    a, b, c = (transform(example, np.random.default_rng(seed))["image"] for seed in (1, 1, 2))
    assert a.shape == (24, 24, 3) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_mistakes():
    for make in (
        lambda: imagenet.imagenet_eval(224, 1.1),
        lambda: imagenet.imagenet_eval(224, 0),
        lambda: imagenet.imagenet_eval(method="lanczos"),
        lambda: imagenet.imagenet_train(jitter=0.4, rand_augment=RandAugment()),
    ):
        with pytest.raises(ConfigError):
            make()
