"""Mixup and CutMix against timm's formulas, and the same on 8 pmapped devices as on one."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.models import mixing
from tests.devices import environment

B, H, W, K = 8, 9, 12, 5


def example():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(B, H, W, 3)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, K, B).astype(np.int32))


def mixed(seed, smoothing=0.1, **options):
    images, labels = example()
    targets = mixing.soft_targets(labels, K, smoothing)
    return images, targets, *jax.jit(lambda key: mixing.mix(key, images, targets, **options))(jax.random.key(seed))


def timm_target(labels, lam, smoothing):
    """timm's mixup_target: on and off values, the partner from the flipped batch."""
    off = smoothing / K
    hot = lambda y: np.where(np.eye(K)[y] > 0, 1.0 - smoothing + off, off)  # noqa: E731
    return hot(labels) * lam + hot(labels[::-1]) * (1 - lam)


@pytest.mark.parametrize("seed", range(3))
def test_mixup(seed):
    images, _, out, targets = mixed(seed, mixup_alpha=0.8)
    labels = np.asarray(example()[1])
    other = np.asarray(images)[::-1]
    lam = np.mean((np.asarray(out) - other) / (np.asarray(images) - other))
    assert 0 < lam < 1
    np.testing.assert_allclose(out, lam * np.asarray(images) + (1 - lam) * other, atol=1e-5)
    np.testing.assert_allclose(targets, timm_target(labels, lam, 0.1), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix_copies_a_box_and_counts_its_true_area(seed):
    images, _, out, targets = mixed(seed, cutmix_alpha=1.0)
    images, out, labels = np.asarray(images), np.asarray(out), np.asarray(example()[1])
    taken = (out != images).all(-1)
    assert (taken == taken[0]).all()
    np.testing.assert_array_equal(out[:, taken[0]], images[::-1][:, taken[0]])
    rows, columns = taken[0].any(1), taken[0].any(0)
    np.testing.assert_array_equal(taken[0], rows[:, None] & columns[None])
    np.testing.assert_allclose(targets, timm_target(labels, 1 - taken[0].mean(), 0.1), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lam", [1.0, 0.9, 0.5, 0.0])
def test_box_is_timms(seed, lam):
    key = jax.random.key(seed)
    inside = np.asarray(mixing.cut_box(key, jnp.float32(lam), (H, W)))
    key_y, key_x = jax.random.split(key)
    cy, cx = (int(jax.random.randint(k, (), 0, size)) for k, size in ((key_y, H), (key_x, W)))
    cut_h, cut_w = int(H * np.sqrt(1 - lam)), int(W * np.sqrt(1 - lam))
    expected = np.zeros((H, W), bool)
    yl, yh = np.clip([cy - cut_h // 2, cy + cut_h // 2], 0, H)
    xl, xh = np.clip([cx - cut_w // 2, cx + cut_w // 2], 0, W)
    expected[yl:yh, xl:xh] = True
    np.testing.assert_array_equal(inside, expected)


def test_switching_and_probability():
    images, labels = example()
    targets = mixing.soft_targets(labels, K)
    options = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "prob": 0.5, "switch_prob": 0.5}
    run = jax.jit(jax.vmap(lambda key: mixing.mix(key, images, targets, **options)[0]))
    out = np.asarray(run(jax.random.split(jax.random.key(0), 400)))
    changed = (out != np.asarray(images)).reshape(400, B, -1).all(-1).all(-1)
    # Mixup changes every pixel, an unmixed batch none, CutMix some (or, with a box of no pixels, none).
    untouched = (out == np.asarray(images)).reshape(400, -1).all(-1)
    assert 0.18 < changed.mean() < 0.32
    assert 0.43 < untouched.mean() < 0.62
    assert (~changed & ~untouched).mean() > 0.15


def test_mean_lam_is_one_half():
    images = jnp.stack([jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 1))])
    targets = mixing.soft_targets(jnp.asarray([0, 1]), 2)
    run = jax.jit(jax.vmap(lambda key: mixing.mix(key, images, targets, mixup_alpha=0.8)[1][0, 0]))
    lam = np.asarray(run(jax.random.split(jax.random.key(1), 2000)))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert abs(lam.mean() - 0.5) < 0.03 and abs(lam.var() - 1 / (4 * 2.6)) < 0.01


def test_off_is_the_identity():
    images, targets, out, mixed_targets = mixed(0)
    np.testing.assert_array_equal(out, images)
    np.testing.assert_array_equal(mixed_targets, targets)
    images, _, out, _ = mixed(0, mixup_alpha=0.8, prob=0.0)
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("options", [{"mixup_alpha": -1.0}, {"prob": 1.5}, {"switch_prob": -0.5}])
def test_misuse_is_named(options):
    images, labels = example()
    with pytest.raises(ValueError, match=next(iter(options))):
        mixing.mix(jax.random.key(0), images, mixing.soft_targets(labels, K), **options)


PMAP = """
import jax, jax.numpy as jnp, numpy as np
from jaxvision.core import devices
from jaxvision.models import mixing
assert jax.device_count() == 8
rng = np.random.default_rng(0)
images = rng.normal(size=(16, 6, 6, 3)).astype(np.float32)
targets = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 16)]
def mix(key, images, targets):
    return mixing.mix(key, images, targets, mixup_alpha=0.8, cutmix_alpha=1.0)
def on_device(*arguments):
    with devices.device_axis("data"):
        return mix(*arguments)
single = jax.jit(mix)
mapped = jax.pmap(on_device, axis_name="data", in_axes=(None, 0, 0))
kinds = set()
for seed in range(6):
    key = jax.random.key(seed)
    want = single(key, images, targets)
    got = mapped(key, images.reshape(8, 2, 6, 6, 3), targets.reshape(8, 2, 4))
    for a, b in zip(got, want):
        np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, rtol=1e-6, atol=1e-6)
    kinds.add(bool((np.asarray(want[0]) == images).any()))
assert kinds == {True, False}, kinds
print("same")
"""


def test_pmap_on_8_devices_is_jit():
    done = subprocess.run([sys.executable, "-c", PMAP], env=environment(8), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"
