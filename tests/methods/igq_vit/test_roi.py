"""The detector's perturbation on random regions."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.methods.igq_vit.roi import binary_kl, roi_perturbation


def regions(seed, count=5):
    rng = np.random.default_rng(seed)
    shapes = ((count, 4), (count, 4), (count, 3, 3))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def reference(a, b):
    total = 0.0
    for r in range(len(a[0])):
        p, q = (np.exp(np.asarray(z[0][r], np.float64)) for z in (a, b))
        p, q = p / p.sum(), q / q.sum()
        total += (p * np.log(p / q)).sum() + np.square(np.asarray(a[1][r] - b[1][r], np.float64)).sum()
        m, n = (1 / (1 + np.exp(-np.asarray(z[2][r], np.float64))) for z in (a, b))
        total += (m * np.log(m / n) + (1 - m) * np.log((1 - m) / (1 - n))).mean()
    return total


def test_sum_over_regions():
    a, b = regions(0), regions(1)
    value = roi_perturbation(*zip(a, b))
    np.testing.assert_allclose(value, reference(a, b), rtol=1e-5)
    without = roi_perturbation((a[0], b[0]), (a[1], b[1]))
    assert without < value


def test_equal_predictions_cost_nothing_and_padding_counts_nothing():
    a, b = regions(0), regions(1)
    np.testing.assert_allclose(roi_perturbation(*zip(a, a)), 0, atol=1e-6)
    valid = jnp.asarray([True, True, True, False, False])
    broken = tuple(x.at[3:].set(jnp.nan) for x in b)
    expected = roi_perturbation(*zip([x[:3] for x in a], [x[:3] for x in b]))
    np.testing.assert_allclose(roi_perturbation(*zip(a, broken), valid=valid), expected, rtol=1e-6)


def test_extreme_masks_stay_finite():
    value = jax.jit(binary_kl)(jnp.asarray([-80.0, 80.0, 0.0]), jnp.asarray([80.0, -80.0, 0.0]))
    np.testing.assert_allclose(value, [80.0, 80.0, 0.0], rtol=1e-5)
