import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError
from jaxvision.data import transforms
from jaxvision.data.draws import Draws
from jaxvision.data.resize import resize_images, resize_matrix


def draws(n, step=0, seed=0):
    return Draws(seed, "train", step, n, slice(0, n))


def images(n, height=8, width=10, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def test_draws_are_rows_of_the_global_draw():
    def all_of(d):
        row = np.array([generator.normal() for generator in d.row_generators()])
        return d.uniform(2, 3, (2,)), d.integers(0, 9), d.normal(1, 2, (3, 1)), row

    whole = all_of(draws(12, step=4))
    parts = [all_of(Draws(0, "train", 4, 12, slice(i * 4, i * 4 + 4))) for i in range(3)]
    for k, values in enumerate(whole):
        np.testing.assert_array_equal(values, np.concatenate([part[k] for part in parts]))
    assert whole[0].shape == (12, 2) and whole[2].shape == (12, 3, 1) and len(draws(12)) == 12
    assert whole[0].min() >= 2 and whole[0].max() < 3
    assert not np.array_equal(whole[1], all_of(draws(12, step=5))[1])
    again = draws(3)
    first, second = ([g.normal() for g in again.row_generators()] for _ in range(2))
    assert not set(first) & set(second)
    chosen = draws(3).row_generators(np.array([True, False, True]))
    assert chosen[1] is None and chosen[2].normal() == first[2]


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_crop_offsets_are_uniform_in_0_to_8_and_pixels_are_those_of_the_padded_image(mode):
    n = 1800
    image = np.arange(1, 81, dtype=np.uint8).reshape(1, 8, 10, 1).repeat(n, 0)
    out = transforms.random_crop_with_padding(4, mode)({"image": image, "label": np.zeros(n)}, draws(n))["image"]
    padded = np.pad(image[0], ((4, 4), (4, 4), (0, 0)), mode="reflect" if mode == "reflect" else "constant")
    table = {padded[t : t + 8, s : s + 10].tobytes(): (t, s) for t in range(9) for s in range(9)}
    offsets = np.array([table[row.tobytes()] for row in out])
    for axis in range(2):
        counts = np.bincount(offsets[:, axis], minlength=9)
        assert len(counts) == 9 and np.all(abs(counts - n / 9) < 5 * np.sqrt(n / 9))
    assert len({tuple(o) for o in offsets.tolist()}) == 81  # the two axes are independent


def test_flip_probability_and_pixels():
    n = 2000
    image = images(1).repeat(n, 0)
    for p in (0.0, 0.5, 1.0):
        out = transforms.random_horizontal_flip(p)({"image": image}, draws(n))["image"]
        flipped = np.array([np.array_equal(row, image[0, :, ::-1]) for row in out])
        kept = np.array([np.array_equal(row, image[0]) for row in out])
        assert np.all(flipped ^ kept) and abs(flipped.mean() - p) < 0.05


def test_label_maps_move_with_the_image():
    n = 50
    image = images(n, channels=1)
    batch = {"image": image, "label_map": image[..., 0] // 2}
    move = transforms.compose(transforms.random_crop_with_padding(3), transforms.random_horizontal_flip())
    moved = move(batch, draws(n))
    inside = moved["label_map"] != transforms.IGNORE
    np.testing.assert_array_equal(moved["image"][..., 0][inside] // 2, moved["label_map"][inside])
    assert np.all(moved["image"][..., 0][~inside] == 0) and 0.1 < (~inside).mean() < 0.6
    small = transforms.resize((4, 5), "nearest")(batch, draws(n))
    np.testing.assert_array_equal(small["image"][..., 0] // 2, small["label_map"])


def test_normalize_is_totensor_then_normalize_in_float32():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = np.arange(256, dtype=np.uint8)[None, :, None, None].repeat(3, 3)
    out = transforms.normalize(mean, std)({"image": image}, None)["image"]
    assert out.dtype == np.float32
    f = np.float32
    for value in range(256):
        for c in range(3):
            assert out[0, value, 0, c] == (f(value) / f(255) - f(mean[c])) / f(std[c])
    floats = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 2, 2, 3)
    scaled = transforms.normalize((0.5,) * 3, (0.5,) * 3)({"image": floats}, None)["image"]
    np.testing.assert_array_equal(scaled, (floats - f(0.5)) / f(0.5))
    assert floats.max() == 1  # the input isn't written to


def test_inputs_are_never_changed_in_place():
    image = images(6).astype(np.float32)
    image.flags.writeable = False
    everything = transforms.compose(
        transforms.random_crop_with_padding(2),
        transforms.random_horizontal_flip(1.0),
        transforms.random_erasing(1.0),
        transforms.cutout(4),
        transforms.normalize((0.0,) * 3, (1.0,) * 3),
        transforms.resize(4),
    )
    for one in (everything, transforms.random_erasing(1.0), transforms.cutout(4), transforms.normalize((0.0,), (1.0,))):
        one({"image": image[..., :1] if one is not everything else image}, draws(6))


@pytest.mark.parametrize("mode", ["pixel", "zero"])
def test_random_erasing(mode):
    n, side = 1500, 20
    image = np.full((n, side, side, 2), 100, np.float32)
    out = transforms.random_erasing(0.25, mode=mode)({"image": image}, draws(n))["image"]
    changed = (out != 100).any(-1)
    assert abs(changed.any((1, 2)).mean() - 0.25) < 0.05
    areas, ratios = [], []
    for hole in changed[changed.any((1, 2))]:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        h, w = len(rows), len(columns)
        assert hole.sum() == h * w == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        areas.append(h * w / side**2)
        ratios.append(h / w)
    assert 0.01 <= min(areas) < 0.05 and 0.25 < max(areas) < 0.37
    assert min(ratios) < 0.5 and max(ratios) > 2 and abs(np.mean(np.log(ratios))) < 0.15
    erased = out[changed]
    if mode == "zero":
        assert not erased.any()
    else:
        assert abs(erased.mean()) < 0.02 and abs(erased.std() - 1) < 0.02
    with pytest.raises(ConfigError, match="put it after normalize"):
        transforms.random_erasing()({"image": images(2)}, draws(2))


def test_cutout_holes_are_centred_on_any_pixel_and_cut_at_the_border():
    n = 400
    out = transforms.cutout(4)({"image": np.ones((n, 6, 6, 1), np.float32)}, draws(n))["image"][..., 0]
    sizes = (out == 0).sum((1, 2))
    assert sizes.max() == 16 and sizes.min() == 4 and set(np.unique(sizes)) == {4, 6, 8, 9, 12, 16}
    assert (out == 0).any(0).all()


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(5, 7), (16, 12), (33, 20), (33, 7)])
def test_antialiased_resize_is_pillows_up_to_its_rounding(method, size):
    image = images(2, 17, 13)
    out = resize_images(image, size, method, antialias=True)
    for got, original in zip(out, image):
        filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[method]
        expected = np.asarray(Image.fromarray(original).resize(size[::-1], filter))
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_plain_resize_repeats_the_border_like_torch():
    np.testing.assert_array_equal(resize_matrix(2, 4, "bilinear"), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    # torch.nn.functional.interpolate(bicubic, align_corners=False), a = -0.75, doubling: weights at distance 0.25
    inner = resize_matrix(6, 12, "bicubic")[5]
    np.testing.assert_allclose(inner, [0, -0.10546875, 0.87890625, 0.26171875, -0.03515625, 0], atol=1e-7)
    assert np.allclose(resize_matrix(6, 12, "bicubic").sum(1), 1)
    np.testing.assert_array_equal(resize_matrix(4, 2, "nearest"), [[0, 1, 0, 0], [0, 0, 0, 1]])


def test_mistakes():
    for make in (
        lambda: transforms.random_crop_with_padding(0),
        lambda: transforms.random_crop_with_padding(2, "edge"),
        lambda: transforms.random_horizontal_flip(1.5),
        lambda: transforms.normalize((0.5,), (0.5, 0.5)),
        lambda: transforms.normalize((0.5,), (0.0,)),
        lambda: transforms.random_erasing(-0.1),
        lambda: transforms.random_erasing(mode="blue"),
        lambda: transforms.cutout(3),
        lambda: transforms.resize(4, "lanczos"),
        lambda: resize_matrix(4, 2, "lanczos"),
    ):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError, match="1 means for 3 channels"):
        transforms.normalize((0.5,), (0.5,))({"image": images(1)}, None)
