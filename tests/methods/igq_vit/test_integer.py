"""Integer products against the oracle, the masked reference and the simulation, for a layer and for a network."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import groups, integer, integer_products, quantizers, simulate
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.models.vit import ViT
from jaxvision.quant import uniform, weights
from jaxvision.quant.activation import AffineQuantizer
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "igq_vit"


def cases(pattern):
    return pytest.mark.parametrize("path", sorted(ORACLES.glob(pattern)), ids=lambda p: p.stem)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def masked_linear_int(codes, group, scale, zero, weight, bias):
    """The definition: a whole integer product for each group, inputs of other groups masked. G times the work."""
    w = np.asarray(weight.codes, np.int64) - np.asarray(weight.zero, np.int64)
    y = 0.0
    for m in range(len(scale)):
        x = (np.asarray(codes, np.int64) - int(zero[m])) * (np.asarray(group) == m)[:, None]
        y = y + float(scale[m]) * (x @ w)
    return y * np.asarray(weight.scale, np.float64) + np.asarray(bias, np.float64)


@cases("igq_linear_*.npz")
def test_linear_oracle(path, x64):
    oracle = load(path)
    policy = weights.WeightPolicy(int(oracle["weight_bits"]), "percentile", float(oracle["epsilon_percent"]))
    weight = weights.quantize_tensor(jnp.asarray(oracle["weight"].T), policy)
    np.testing.assert_array_equal(weight.codes.T, oracle["w_codes"])
    codes, group, scale, zero, bias = (
        jnp.asarray(oracle[name]) for name in ("codes", "group", "scale", "zero", "bias")
    )
    y = integer_products.igq_linear_int(codes, group, scale, zero, weight, bias, int(oracle["act_bits"]))
    np.testing.assert_allclose(y, oracle["y_integer_path"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(y, oracle["y"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(y, masked_linear_int(codes, group, scale, zero, weight, bias), rtol=1e-9, atol=1e-12)
    quantizer = groups.InstanceGroupQuantizer.create(
        oracle["bounds"], int(oracle["act_bits"]), clip_zero_point=bool(oracle["clip_zero_point"])
    )
    y = integer.linear_int(jnp.asarray(oracle["x"]), quantizer, weight, bias, len(codes))
    np.testing.assert_allclose(y, oracle["y_integer_path"], rtol=1e-9, atol=1e-12)


@cases("igq_softmax_*.npz")
def test_attention_oracle(path, x64):
    oracle = load(path)
    bits = int(oracle["bits"])
    quantizer = groups.InstanceGroupQuantizer.create(oracle["bounds"], bits, axis="rows")
    values = AffineQuantizer.from_interval(oracle["v_lower"], oracle["v_upper"], bits)
    out = integer.attention_int(jnp.asarray(oracle["attention"]), quantizer, jnp.asarray(oracle["v"]), values)
    np.testing.assert_allclose(out, oracle["out"], rtol=1e-6, atol=1e-12)


def test_products_are_of_int8_and_sum_in_int32():
    weight = weights.QuantizedTensor(jnp.zeros((8, 3), jnp.uint8), jnp.ones(3), jnp.zeros(3), 8)
    jaxpr = jax.make_jaxpr(integer_products.igq_linear_int, static_argnums=())(
        jnp.zeros((1, 2, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32), jnp.ones(2), jnp.zeros(2), weight, None, 8
    )
    text = str(jaxpr)
    assert text.count("dot_general") == 1 and "preferred_element_type=int32" in text
    line = next(line for line in text.splitlines() if "dot_general" in line)
    assert ":i32[" in line
    signed, offset = integer_products.signed(jnp.asarray([0, 255]), 8)
    assert signed.dtype == jnp.int8 and signed.tolist() == [-128, 127] and int(offset) == 128


def layer(bits, weight_bits, seed=0, channels=40, fan_out=7):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(3, 5, channels)) * rng.lognormal(size=(3, 1, channels)) + 0.5, jnp.float32)
    bounds, _ = groups.calibrate_bounds(groups.channel_range(x).reshape(-1, 2), 5)
    kernel = jnp.asarray(rng.normal(size=(channels, fan_out)), jnp.float32)
    weight = weights.quantize_tensor(kernel, weights.WeightPolicy(weight_bits, "minmax"))
    bias = jnp.asarray(rng.normal(size=fan_out), jnp.float32)
    return x, groups.InstanceGroupQuantizer.create(bounds, bits), weight, bias


@pytest.mark.parametrize(("bits", "weight_bits"), [(4, 4), (3, 4), (8, 8)])
def test_integer_path_equals_the_simulation(bits, weight_bits):
    x, quantizer, weight, bias = layer(bits, weight_bits)
    expected = quantizer(x, 3) @ weight.dequantize() + bias
    y = integer.linear_int(x, quantizer, weight, bias, 3)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    without = integer.linear_int(x, quantizer, weight, None, 3)
    np.testing.assert_allclose(without + bias, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 64])
def test_the_tile_does_not_matter(tile):
    x, quantizer, weight, bias = layer(4, 4)
    scale, zero = uniform.affine_params(quantizer.bounds[0, :, 0], quantizer.bounds[0, :, 1], 4)
    group = quantizer.groups(x, 3)
    codes = uniform.quantize(x, scale[group][:, None], zero[group][:, None], 4)
    found = integer_products.igq_linear_int(codes, group, scale, zero, weight, bias, 4, tile=tile)
    expected = masked_linear_int(codes, group, scale, zero, weight, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [[0] * 9, [3] * 9, [0, 1, 2, 3] * 2 + [3], [2, 0, 2, 0, 0, 0, 0, 0, 0]])
def test_tiles_hold_each_channel_once_and_one_group(group):
    channels, owner = integer_products.tile_channels(jnp.asarray(group), 4, 4)
    assert channels.shape == ((9 + 4 * 3) // 4, 4)
    real = np.asarray(channels)[np.asarray(channels) < 9]
    assert sorted(real.tolist()) == list(range(9))
    for row, m in zip(np.asarray(channels), np.asarray(owner)):
        assert {group[c] for c in row if c < 9} <= {int(m)}


def test_collapsed_groups_do_not_overflow():
    x = jnp.full((1, 3, 4), 5.0)  # constant channels: scale 1e-8, zero point -5e8
    quantizer = groups.InstanceGroupQuantizer.create(jnp.full((1, 2), 5.0), 4)
    weight = weights.quantize_tensor(jnp.asarray(np.arange(8.0).reshape(4, 2)), weights.WeightPolicy(8, "minmax"))
    y = integer.linear_int(x, quantizer, weight, None, 1)
    np.testing.assert_allclose(y, quantizer(x, 1) @ weight.dequantize(), rtol=1e-5)


# --- a whole network -------------------------------------------------------------------------------------------------


def test_network_in_integers_equals_the_simulation():
    module = ViT(num_classes=5, patch_size=4, width=16, depth=1, num_heads=2)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 12, 12, 3)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.5, shapes)
    sites = sites_lib.list_sites(module.apply, variables, (12, 12, 3))
    bounds, _ = quantizers.calibrate_groups(sites_lib.collect_ranges(module.apply, variables, images, sites), sites, 4)
    intervals = quantizers.tensor_intervals(module.apply, variables, images, sites, 8)
    made = quantizers.igq_quantizers(sites, bounds, intervals, 8)
    # The head isn't quantized here: its codes would hide small differences.
    made.pop("head")
    params, codes = weights.quantize_params(variables["params"], weights.WeightPolicy(4, "minmax"))
    layers = integer.integer_layers(sites, {"params": params}, codes)
    assert [name.split(".", 2)[2] for name in layers] == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    found = integer.forward_int(module.apply, {"params": params}, made, layers, images)
    expected = simulate.forward(module.apply, {"params": params}, made, simulate.switches(made), images)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max()))
    # The integers are what runs: other float kernels change nothing, other codes do.
    empty = jax.tree.map(lambda w: w, params)
    for name in codes:
        node = empty
        *parents, last = name.split("/")
        if parents[0] == "blocks_0":
            for key in parents:
                node = node[key]
            node[last] = jnp.full_like(node[last], jnp.nan)
    again = integer.forward_int(module.apply, {"params": empty}, made, layers, images)
    np.testing.assert_array_equal(again, found)
    tensor, bias = layers["blocks.0.mlp.fc1"]
    other = layers | {"blocks.0.mlp.fc1": (tensor.replace(scale=tensor.scale * 1.5), bias)}
    assert not np.allclose(integer.forward_int(module.apply, {"params": params}, made, other, images), found, rtol=1e-2)


def test_a_layer_whose_output_has_no_tap_is_refused():
    def apply_fn(variables, images, tap):
        return tap("blocks.0.mlp.fc1", images.reshape(len(images), 4, 3)) @ variables["params"]["kernel"]

    weight = weights.quantize_tensor(jnp.ones((3, 2)) * jnp.arange(3.0)[:, None], weights.WeightPolicy())
    quantizer = groups.InstanceGroupQuantizer.create(jnp.asarray([[-1.0, 1.0]]), 4)
    name = "blocks.0.mlp.fc1"
    with pytest.raises(ConfigError, match="no tap"):
        integer.forward_int(
            apply_fn, {"params": {"kernel": jnp.ones((3, 2))}}, {name: quantizer}, {name: (weight, None)},
            jnp.zeros((1, 2, 2, 3)),
        )  # fmt: skip


# --- one product for all groups --------------------------------------------------------------------------------------


def test_snapped_scales_are_powers_of_two_and_intervals_hold_zero():
    bounds = jnp.asarray([[-0.1, 0.2], [-1.0, 1.4], [0.5, 3.0], [-4.0, -1.0]])
    snapped, base, shift = integer_products.snap_power_of_two(bounds, 4)
    scale, zero = uniform.affine_params(snapped[:, 0], snapped[:, 1], 4)
    np.testing.assert_allclose(scale, base * 2.0 ** np.asarray(shift), rtol=1e-6)
    assert set(np.asarray(shift)) <= {0, 1, 2, 3} and len(set(np.asarray(shift))) > 1
    assert (zero >= 0).all() and (zero <= 15).all()
    assert (snapped[:, 0] <= 0).all() and (snapped[:, 1] >= 0).all()
    widened = jnp.maximum(bounds[:, 1], 0) - jnp.minimum(bounds[:, 0], 0)
    ratio = (snapped[:, 1] - snapped[:, 0]) / widened
    assert (ratio[1:] > 0.7).all() and (ratio[1:] < 1.5).all()  # the smallest may lie below the four scales


def test_one_product_equals_its_simulation():
    x, quantizer, weight, bias = layer(4, 4)
    snapped, base, shift = integer_products.snap_power_of_two(quantizer.bounds[0, :5], 4)
    pow2 = groups.InstanceGroupQuantizer.create(snapped, 4)
    scale, zero = base * 2.0**shift, jnp.round(-snapped[:, 0] / (base * 2.0**shift))
    group = pow2.groups(x, 3)
    codes = uniform.quantize(x, scale[group][:, None], zero[group][:, None], 4)
    y = integer_products.power_of_two_linear_int(codes, group, base, shift, zero, weight, bias)
    np.testing.assert_allclose(y, pow2(x, 3) @ weight.dequantize() + bias, rtol=1e-4, atol=1e-4)
    padded = integer.snapped(quantizer, 4)
    assert padded.bounds.shape == quantizer.bounds.shape and int(padded.count) == int(quantizer.count)
    np.testing.assert_allclose(
        integer.linear_int(x, padded, weight, bias, 3, one_product=True), y, rtol=1e-4, atol=1e-4
    )
    rows = groups.InstanceGroupQuantizer.create(snapped, 4, axis="rows")
    assert integer.snapped(rows, 4) is rows
    difference = np.asarray(codes) - np.asarray(zero, int)[group][:, None]
    shifted = np.left_shift(difference, np.asarray(shift)[group][:, None])
    assert np.abs(shifted).max() <= 120


@pytest.mark.parametrize(("bits", "shift"), [(3, 3), (4, 3), (5, 2), (6, 1), (7, 0)])
def test_largest_shift_keeps_int8(bits, shift):
    assert integer_products.largest_shift(bits) == shift
    assert (2**bits - 1) << shift <= 127
    with pytest.raises(ConfigError, match="bits=8"):
        integer_products.largest_shift(8)
