"""Instance-aware groups against their oracles, and the properties that the method promises."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import groups
from jaxvision.methods.igq_vit.groups import InstanceGroupQuantizer
from jaxvision.quant import uniform, weights
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "igq_vit"


def cases(pattern):
    found = sorted(ORACLES.glob(pattern))
    assert found, pattern
    return pytest.mark.parametrize("path", found, ids=lambda p: p.stem)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# --- oracles -----------------------------------------------------------------------------------------------------


@cases("assign_*.npz")
def test_assign_oracle(path, x64):
    oracle = load(path)
    ranges, bounds = jnp.asarray(oracle["channel_range"]), jnp.asarray(oracle["bounds"])
    if "x" in oracle:
        np.testing.assert_array_equal(groups.channel_range(jnp.asarray(oracle["x"])), ranges)
    np.testing.assert_allclose(groups.distance(ranges, bounds), oracle["distance"], rtol=1e-12)
    np.testing.assert_array_equal(groups.assign(ranges, bounds), oracle["group"])
    padded = groups.pad_bounds(bounds, 16)
    np.testing.assert_array_equal(groups.assign(ranges, padded, len(bounds)), oracle["group"])


@cases("calibrate_[1-4]*.npz")
def test_calibrate_oracle(path, x64):
    oracle = load(path)
    samples, count, iters = jnp.asarray(oracle["samples"]), int(oracle["groups"]), int(oracle["iterations"])
    initial = jnp.asarray(oracle["initial"]) if "initial" in oracle else None
    if initial is None:
        np.testing.assert_allclose(groups.initial_bounds(samples, count), oracle["trajectory"][0], rtol=1e-12)
    bounds, objective = groups.calibrate_bounds(samples, count, iters, initial=initial)
    np.testing.assert_allclose(bounds, oracle["bounds"], rtol=1e-7)
    np.testing.assert_allclose(objective, oracle["objective"], rtol=1e-7)
    np.testing.assert_array_equal(groups.assign(samples, bounds), oracle["assignment"])
    one, _ = groups.calibrate_bounds(samples, count, 1, initial=initial)
    np.testing.assert_allclose(one, oracle["trajectory"][1], rtol=1e-7)


@cases("calibrate_[1-4]*.npz")
def test_calibrate_oracle_in_float32(path):
    oracle = load(path)
    initial = jnp.asarray(oracle["initial"], jnp.float32) if "initial" in oracle else None
    samples = jnp.asarray(oracle["samples"], jnp.float32)
    found = groups.calibrate_bounds(samples, int(oracle["groups"]), int(oracle["iterations"]), initial=initial)
    np.testing.assert_allclose(found[0], oracle["bounds"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], oracle["objective"], rtol=1e-4)


def plain_calibration(samples, count, iters):
    """Section 2.3 of the specification as loops."""
    ordered = samples[np.argsort(samples[:, 1] - samples[:, 0], kind="stable")]
    edges = [g * len(samples) // count for g in range(count + 1)]
    bounds = np.stack([ordered[edges[g] : edges[g + 1]].mean(0) for g in range(count)])
    for _ in range(iters):
        group = np.argmin([np.square(samples - b).sum(1) for b in bounds], 0)
        bounds = np.stack([samples[group == g].mean(0) if (group == g).any() else bounds[g] for g in range(count)])
    return bounds


def test_softmax_rows_pooled_over_heads_or_for_each_head(x64):
    attention = jax.nn.softmax(2 * np.random.default_rng(0).normal(size=(4, 3, 10, 10)))
    ranges = groups.row_range(jnp.asarray(attention))
    shared, _ = groups.calibrate_bounds(ranges.reshape(-1, 2), 6)
    np.testing.assert_allclose(shared, plain_calibration(np.asarray(ranges).reshape(-1, 2), 6, 20), rtol=1e-9)
    samples = jnp.moveaxis(ranges, 1, 0).reshape(3, -1, 2)
    per_head, _ = groups.calibrate_layers(samples, 6)
    expected = np.stack([plain_calibration(np.asarray(head), 6, 20) for head in samples])
    np.testing.assert_allclose(per_head, expected, rtol=1e-9)


@cases("igq_linear_*.npz")
def test_igq_linear_oracle(path, x64):
    oracle = load(path)
    x, bounds, bits = jnp.asarray(oracle["x"]), jnp.asarray(oracle["bounds"]), int(oracle["act_bits"])
    clip = bool(oracle["clip_zero_point"])
    scale, zero = uniform.affine_params(bounds[:, 0], bounds[:, 1], bits, clip_zero_point=clip)
    group = groups.assign(groups.channel_range(x), bounds)
    np.testing.assert_array_equal(group, oracle["group"])
    np.testing.assert_array_equal(zero, oracle["zero"])
    codes = uniform.quantize(x, scale[group][:, None], zero[group][:, None], bits)
    np.testing.assert_array_equal(codes, oracle["codes"])
    policy = weights.WeightPolicy(int(oracle["weight_bits"]), "percentile", float(oracle["epsilon_percent"]))
    w_hat = weights.quantize_tensor(jnp.asarray(oracle["weight"].T), policy).dequantize()
    np.testing.assert_allclose(w_hat.T, oracle["w_hat"], rtol=1e-12)
    bias = jnp.asarray(oracle["bias"])
    x_hat = groups.igq_fake_quant_channels(x, bounds, bits, clip_zero_point=clip)
    np.testing.assert_allclose(x_hat, oracle["x_hat"], rtol=1e-12)
    y = groups.igq_linear(x, w_hat, bias, bounds, bits, clip_zero_point=clip)
    np.testing.assert_allclose(y, oracle["y"], rtol=1e-6, atol=1e-12)


@cases("igq_softmax_*.npz")
def test_igq_softmax_oracle(path, x64):
    oracle = load(path)
    attention, bounds, bits = jnp.asarray(oracle["attention"]), jnp.asarray(oracle["bounds"]), int(oracle["bits"])
    quantizer = InstanceGroupQuantizer.create(bounds, bits, axis="rows")
    np.testing.assert_array_equal(quantizer.groups(attention, len(attention)), oracle["group"])
    a_hat = quantizer(attention, len(attention))
    np.testing.assert_allclose(a_hat, oracle["a_hat"], rtol=1e-12, atol=1e-15)
    v = jnp.asarray(oracle["v"])
    v_hat = AffineQuantizer.from_interval(oracle["v_lower"], oracle["v_upper"], bits)(v, len(v))
    np.testing.assert_allclose(v_hat, oracle["v_hat"], rtol=1e-12)
    np.testing.assert_allclose(a_hat @ v_hat, oracle["out"], rtol=1e-6, atol=1e-12)


@cases("igq_linear_*.npz")
def test_igq_linear_oracle_in_float32(path):
    oracle = load(path)
    x, bounds = (jnp.asarray(oracle[name], jnp.float32) for name in ("x", "bounds"))
    quantizer = InstanceGroupQuantizer.create(bounds, int(oracle["act_bits"]))
    np.testing.assert_array_equal(quantizer.groups(x, len(x)), oracle["group"])
    x_hat = np.asarray(quantizer(x, len(x)))
    off = ~np.isclose(x_hat, oracle["x_hat"], rtol=1e-5, atol=1e-6)
    assert off.sum() <= max(1, 1e-3 * off.size)


# --- properties --------------------------------------------------------------------------------------------------


def activations(batch=6, tokens=9, channels=10, seed=0):
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(size=(batch, 1, channels))
    return jnp.asarray(rng.normal(size=(batch, tokens, channels)) * scale + rng.normal(size=channels), jnp.float32)


def calibrated(x, num_groups, **options):
    return groups.calibrate_bounds(groups.channel_range(x).reshape(-1, 2), num_groups, **options)


def test_objective_does_not_increase(x64):
    for seed in range(5):
        x = activations(seed=seed).astype(jnp.float64)
        _, objective = calibrated(x, 4)
        assert (np.diff(objective) <= 1e-12 * objective[0]).all()
        assert objective[-1] < objective[0]


def test_result_does_not_depend_on_the_batch():
    x = activations()
    quantizer = InstanceGroupQuantizer.create(calibrated(x, 4)[0], 4)
    whole = quantizer(x, len(x))
    for size in (1, 2, 3):
        parts = [quantizer(x[i : i + size], size) for i in range(0, len(x), size)]
        np.testing.assert_array_equal(whole, jnp.concatenate(parts))


def test_images_differ_in_their_assignment():
    x = activations()
    group = np.asarray(InstanceGroupQuantizer.create(calibrated(x, 4)[0], 4).groups(x, len(x)))
    assert (group != group[0]).any()


def test_permuting_channels_permutes_the_result():
    x = activations()
    quantizer = InstanceGroupQuantizer.create(calibrated(x, 4)[0], 4)
    order = np.random.default_rng(1).permutation(x.shape[-1])
    np.testing.assert_array_equal(quantizer(x[..., order], len(x)), quantizer(x, len(x))[..., order])


def test_one_group_is_one_quantizer_with_the_mean_bounds():
    x = activations()
    bounds, _ = calibrated(x, 1)
    mean = np.asarray(groups.channel_range(x)).reshape(-1, 2).mean(0)
    np.testing.assert_allclose(bounds[0], mean, rtol=1e-6)
    expected = AffineQuantizer.from_interval(bounds[0, 0], bounds[0, 1], 4)(x, len(x))
    np.testing.assert_array_equal(InstanceGroupQuantizer.create(bounds, 4)(x, len(x)), expected)


@pytest.mark.parametrize("extra", [0, 7])
def test_as_many_groups_as_channels_reach_the_upper_bound(extra):
    x = activations(batch=2, channels=5)
    count = 2 * 5 + extra
    bounds, objective = calibrated(x, count)
    assert objective[-1] == 0
    quantizer = InstanceGroupQuantizer.create(bounds, 4, max_groups=count)
    np.testing.assert_array_equal(quantizer(x, 2), DynamicGroupQuantizer.create(4)(x, 2))


def test_as_many_groups_as_rows_reach_the_upper_bound():
    a = jax.nn.softmax(3 * activations(2, 4, 4).reshape(2, 1, 4, 4))
    bounds, _ = groups.calibrate_bounds(groups.row_range(a).reshape(-1, 2), 8)
    quantizer = InstanceGroupQuantizer.create(bounds, 4, axis="rows")
    np.testing.assert_array_equal(quantizer(a, 2), DynamicGroupQuantizer.create(4, axis="rows")(a, 2))


def test_padding_groups_changes_nothing():
    x = activations()
    bounds, _ = calibrated(x, 3)
    narrow = InstanceGroupQuantizer.create(bounds, 4, max_groups=3)
    # the padding would be the nearest for a channel around 0
    wide = InstanceGroupQuantizer.create(bounds, 4, max_groups=16)
    small = x * 1e-3
    np.testing.assert_array_equal(wide(small, len(x)), narrow(small, len(x)))
    assert wide.bounds.shape == (1, 16, 2) and wide.groups(small, len(x)).max() < 3


def test_envelope_covers_its_members():
    x = activations()
    samples = groups.channel_range(x).reshape(-1, 2)
    bounds, _ = groups.calibrate_bounds(samples, 4, 1, "envelope")
    group = groups.assign(samples, groups.initial_bounds(samples, 4))
    for g in np.unique(group):
        members = np.asarray(samples)[np.asarray(group) == g]
        np.testing.assert_array_equal(bounds[g], [members[:, 0].min(), members[:, 1].max()])


def test_layers_at_once_equal_layers_one_by_one():
    samples = jnp.stack([groups.channel_range(activations(seed=s)).reshape(-1, 2) for s in range(3)])
    bounds, objective = groups.calibrate_layers(samples, 4)
    mapped = jax.vmap(lambda s: groups.calibrate_bounds(s, 4)[0])(samples)
    for i in range(3):
        alone = groups.calibrate_bounds(samples[i], 4)
        np.testing.assert_allclose(bounds[i], alone[0], rtol=1e-5)
        np.testing.assert_allclose(objective[i], alone[1], rtol=1e-4)
        np.testing.assert_allclose(mapped[i], alone[0], rtol=1e-5)


def test_layer_scale_errors_are_those_of_the_scaled_bounds():
    x = activations(tokens=4) + 4  # intervals that miss 0, so that clipped zero points matter
    bounds, _ = calibrated(x, 2)
    found = {}
    for clip in (False, True):
        found[clip] = groups.layer_scale_errors(x, bounds, 6, clip_zero_point=clip)
        errors = [
            np.mean(np.square(x - groups.igq_fake_quant_channels(x, bounds * np.float32(f), 6, clip_zero_point=clip)))
            for f in groups.MULTIPLIERS
        ]
        np.testing.assert_allclose(found[clip], errors, rtol=1e-5)
    assert groups.MULTIPLIERS[int(np.argmin(found[False]))] > 1  # few tokens, many levels: clipping dominates
    assert not np.allclose(found[False], found[True])
    rows = jax.nn.softmax(x.reshape(6, 1, 4, 10))
    per_row, _ = groups.calibrate_bounds(groups.row_range(rows).reshape(-1, 2), 2)
    errors = groups.layer_scale_errors(rows, per_row[None], 4, axis="rows")
    expected = np.mean(np.square(rows - groups.igq_fake_quant_rows(rows, per_row[None] * np.float32(1.5), 4)))
    np.testing.assert_allclose(errors[-1], expected, rtol=1e-5)


def test_windows_of_an_image_are_assigned_together_unless_asked():
    x = activations(batch=6)  # two images of three windows
    bounds, _ = calibrated(x, 4)
    image = InstanceGroupQuantizer.create(bounds, 4)
    expected = image(x.reshape(2, 27, 10), 2).reshape(x.shape)
    np.testing.assert_array_equal(image(x, 2), expected)
    window = InstanceGroupQuantizer.create(bounds, 4, instance="window")
    np.testing.assert_array_equal(window(x, 2), image(x, 6))
    assert not np.array_equal(window(x, 2), image(x, 2))


def test_clipped_zero_point_squeezes_intervals_without_zero():
    x = activations() * 0.1 + 5
    bounds, _ = calibrated(x, 2)
    free = InstanceGroupQuantizer.create(bounds, 4)(x, len(x))
    clipped = InstanceGroupQuantizer.create(bounds, 4, clip_zero_point=True)(x, len(x))
    assert np.abs(free - x).mean() < 0.3 < 3 < np.abs(clipped - x).mean()


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="m_step='median'"):
        groups.calibrate_bounds(jnp.zeros((4, 2)), 2, 3, "median")
    with pytest.raises(ConfigError, match="above max_groups=4"):
        InstanceGroupQuantizer.create(jnp.zeros((5, 2)), 4, max_groups=4)
    with pytest.raises(ConfigError, match="per head"):
        InstanceGroupQuantizer.create(jnp.zeros((3, 5, 2)), 4)
    with pytest.raises(ConfigError, match="axis='heads'"):
        InstanceGroupQuantizer.create(jnp.zeros((5, 2)), 4, axis="heads")
