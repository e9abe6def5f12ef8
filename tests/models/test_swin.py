"""Swin against timm's numbers and names, its windows, its taps, and its use as a backbone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.core.trees import count_parameters, named_leaves
from jaxvision.models import swin, windows, zoo
from jaxvision.models.attention import Attention
from tests.models import networks
from tests.models.networks import recorded

ZOO_NAME = "swin_tiny_patch4_window7_224"
NETWORKS = ("swin_1", "swin_2", "swin_3_padded")
INTERMEDIATES = {
    "patch_embed_out": "patch_embed.out",
    "norm_out": "norm.out",
    "head_in": "head",
    "stage0_block1_norm1_out": "layers.0.blocks.1.norm1.out",
    "stage0_block1_qkv_in": "layers.0.blocks.1.attn.qkv",
    "stage0_block1_attn_proj_out": "layers.0.blocks.1.attn.out",
    **{f"stage{s}_merge_norm_out": f"layers.{s}.downsample.norm.out" for s in (1, 2)},
    **{f"stage{s}_merge_out": f"layers.{s}.downsample.out" for s in (1, 2)},
    **{f"stage{s}_block1_softmax": f"layers.{s}.blocks.1.attn.softmax" for s in range(3)},
    **{f"stage{s}_block{b}_out": f"layers.{s}.blocks.{b}.out" for s in range(3) for b in range(2)},
}
TINY = partial(swin.Swin, num_classes=5, patch_size=2, width=8, depths=(2, 1), num_heads=(2, 4), window=4)
IMAGES = np.random.default_rng(0).standard_normal((2, 20, 12, 3)).astype(np.float32)  # maps of 10x6 and 5x3: padded


def build(data, **changes):
    settings = {
        "num_classes": int(data["meta_num_classes"]),
        "patch_size": int(data["meta_patch_size"]),
        "width": int(data["meta_embed_dim"]),
        "depths": tuple(data["meta_depths"].tolist()),
        "num_heads": tuple(data["meta_num_heads"].tolist()),
        "window": int(data["meta_window_size"]),
        "layer_norm_eps": float(data["meta_ln_eps"]),
    }
    return swin.Swin(**{**settings, **changes})


drawn = partial(networks.drawn, images=IMAGES)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_intermediates_are_timms(name):
    data, images = networks.oracle(name)
    networks.assert_timms_intermediates(ZOO_NAME, build(data), data, images, INTERMEDIATES, at_least=14)


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_logits_are_timms(name):
    networks.assert_timms_float64_logits(ZOO_NAME, build, *networks.oracle(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_shifts_indices_and_masks_are_timms(name):
    data, _ = networks.oracle(name)
    full = (int(data["meta_window_size"]),) * 2
    for stage, block, *rest in data["meta_blocks_info"].tolist():
        size, window, shift = (tuple(rest[i : i + 2]) for i in (0, 2, 4))
        assert windows.window_and_shift(size, full, block % 2 == 1) == (window, shift)
        index = data[f"stage{stage}_relative_position_index"]
        np.testing.assert_array_equal(windows.relative_position_index(window), index)
        mask = data.get(f"stage{stage}_block{block}_attn_mask")
        assert (mask is not None) == any(shift)
        if mask is not None:
            padded = tuple(-(-side // w) * w for side, w in zip(size, window))
            np.testing.assert_array_equal(windows.shift_mask(padded, window, shift), mask)


def test_a_window_that_is_not_square():
    assert windows.window_and_shift((3, 9), (4, 6), True) == ((3, 6), (0, 3))
    assert windows.window_and_shift((3, 9), (4, 6), True, shrink=False) == ((4, 6), (2, 3))
    index = windows.relative_position_index((2, 3))
    for i in range(6):
        for j in range(6):
            rows, columns = i // 3 - j // 3 + 1, i % 3 - j % 3 + 2
            assert index[i, j] == rows * 5 + columns
    assert sorted(set(index.reshape(-1).tolist())) == list(range(3 * 5))
    # Nothing shifts along the rows, so pixels see each other whatever their row; the last columns came from the front.
    mask = np.asarray(windows.shift_mask((2, 6), (2, 3), (0, 1)))
    assert mask.shape == (2, 6, 6)
    assert not mask[0].any()
    wrapped = np.tile([False, False, True], 2)
    np.testing.assert_array_equal(mask[1], np.where(wrapped[:, None] == wrapped[None], 0, -100))


def test_splitting_and_merging_windows():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    cut = windows.split_windows(x, (2, 3))
    assert cut.shape == (8, 6, 3)
    np.testing.assert_array_equal(cut[5], x[1, :2, 3:].reshape(6, 3))  # second image, first row of windows, second
    np.testing.assert_array_equal(windows.merge_windows(cut, (2, 3), (4, 6)), x)
    padded = windows.pad_to_multiple(x, (3, 4))
    assert padded.shape == (2, 6, 8, 3)
    np.testing.assert_array_equal(padded[:, :4, :6], x)
    assert not np.any(padded[:, 4:]) and not np.any(padded[:, :, 6:])


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_full_size_names_and_shapes_are_the_checkpoints(size):
    name = f"swin_{size}_patch4_window7_224"
    keys, parameters = networks.key_list(name)
    shapes = zoo.variable_shapes(swin.Swin(**swin.PRESETS[name]), swin.SPECS[name]["input_size"])
    assert networks.exported_shapes(name, shapes) == keys
    assert count_parameters(shapes) == parameters


def test_every_preset_builds_at_its_size():
    assert swin.PRESETS.keys() == swin.SPECS.keys()
    for name, settings in swin.PRESETS.items():
        pixels = int(name.rsplit("_", 1)[1])
        assert swin.SPECS[name]["input_size"] == (pixels, pixels)
        shapes = zoo.variable_shapes(swin.Swin(**{**settings, "depths": (1, 1, 1, 1)}), (pixels, pixels))["params"]
        width, heads, window = settings["width"], settings["num_heads"], settings["window"]
        assert shapes["head"]["kernel"].shape == (8 * width, 1000)
        for stage in range(4):
            table = shapes[f"layers_{stage}"]["blocks_0"]["attn"]["relative_position_bias_table"]
            assert table.shape == ((2 * window - 1) ** 2, heads[stage])


def test_taps_name_each_place_once_with_an_images_windows_together():
    module, block = TINY(), networks.BLOCK_SITES
    variables = drawn(module, 1)
    first = [f"layers.0.blocks.{i}.{site}" for i in range(2) for site in block]
    second = [f"layers.1.downsample.{site}" for site in ("norm", "reduction")] + [
        f"layers.1.blocks.0.{s}" for s in block
    ]
    expected = ["patch_embed.proj", "patch_embed.norm", *first, *second, "norm", "head"]
    assert networks.sites(module, variables, IMAGES) == expected

    seen = recorded(module, variables, IMAGES)[1]
    assert seen["layers.0.blocks.0.attn.qkv"].shape == (2 * 6, 16, 8)
    assert seen["layers.0.blocks.0.attn.q"].shape == (2 * 6, 2, 16, 4)
    assert seen["layers.0.blocks.0.attn.softmax"].shape == (2 * 6, 2, 16, 16)
    assert seen["layers.0.blocks.0.mlp.fc1"].shape == (2, 10 * 6, 8)
    assert seen["layers.1.downsample.reduction"].shape == (2, 5 * 3, 32)
    assert seen["layers.1.blocks.0.attn.qkv"].shape == (2 * 2, 12, 16)  # 5x3 map: windows of 4x3
    assert seen["head"].shape == (2, 16)
    alone = recorded(module, variables, IMAGES[1:])[1]
    whole, second_image = seen["layers.0.blocks.1.attn.qkv"], alone["layers.0.blocks.1.attn.qkv"]
    np.testing.assert_allclose(whole[6:], second_image, rtol=1e-4, atol=1e-5)
    # q comes with its factor: the softmax follows from q, k and the bias table alone.
    q, k = (seen[f"layers.0.blocks.0.attn.{x}"] for x in "qk")
    table = variables["params"]["layers_0"]["blocks_0"]["attn"]["relative_position_bias_table"]
    logits = np.einsum("bhnd,bhmd->bhnm", q, k) + table[windows.relative_position_index((4, 4))].transpose(2, 0, 1)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen["layers.0.blocks.0.attn.softmax"], weights, rtol=1e-4, atol=1e-6)


SITES = [
    "patch_embed.proj",
    "patch_embed.norm",
    *(f"layers.0.blocks.1.{site}" for site in networks.BLOCK_SITES),
    "layers.1.downsample.norm",
    "layers.1.downsample.reduction",
    "norm",
    "head",
]


def test_each_tapped_value_is_the_one_used():
    module = TINY()
    variables = drawn(module, 2)

    @jax.jit
    def run(chosen):
        def replace(name, value):
            # A ramp, which unlike a constant survives softmax and layer normalisation.
            ramp = value * jnp.linspace(0.0, 2.0, value.shape[-1])
            return jnp.where(chosen == SITES.index(name), ramp, value) if name in SITES else value

        return module.apply(variables, IMAGES, tap=replace)

    plain = run(-1)
    for i, site in enumerate(SITES):
        assert float(jnp.max(jnp.abs(run(i) - plain))) > 1e-4, site


def test_features_are_one_normalised_map_a_stage():
    module = TINY(features=True)
    variables = drawn(module, 3)
    assert variables["params"]["layers_1"]["downsample"]["reduction"].keys() == {"kernel"}
    assert {"norm0", "norm1"} <= variables["params"].keys()
    assert not {"norm", "head"} & variables["params"].keys()
    maps, seen = recorded(module, variables, IMAGES)
    assert [x.shape for x in maps] == [(2, 10, 6, 8), (2, 5, 3, 16)]
    for i, x in enumerate(maps):
        raw = np.asarray(seen[f"layers.{i}.out"], np.float64)
        normed = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-5)
        weights = variables["params"][f"norm{i}"]
        np.testing.assert_allclose(x, normed * weights["scale"] + weights["bias"], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(seen[f"norm{i}"], seen[f"layers.{i}.out"])


def test_windows_of_one_size_serve_images_of_any_size():
    module = TINY(features=True, shrink_windows=False)
    variables = drawn(module, 4)
    run = jax.eval_shape
    assert [x.shape for x in run(module.apply, variables, np.zeros((1, 6, 14, 3)))] == [(1, 3, 7, 8), (1, 2, 4, 16)]
    # 5x13 pixels are padded to whole patches of 2.
    assert [x.shape for x in run(module.apply, variables, np.zeros((1, 5, 13, 3)))] == [(1, 3, 7, 8), (1, 2, 4, 16)]
    with pytest.raises(ConfigError, match="windows of 3x4 and a table of shape"):
        run(TINY().apply, drawn(TINY(), 4), np.zeros((1, 6, 14, 3)))


def test_gradients_are_finite_and_reach_every_parameter():
    module = TINY()
    variables = drawn(module, 5)

    @jax.jit
    def gradient(variables):
        return jax.grad(lambda v: -jax.nn.log_softmax(module.apply(v, IMAGES, train=True))[:, 0].mean())(variables)

    for name, leaf in named_leaves(gradient(variables)).items():
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name


def test_noise_is_a_function_of_the_key_and_of_the_image():
    module = TINY(depths=(1,), num_heads=(2,), attention_dropout_rate=0.3)
    variables = drawn(module, 6)
    train = jax.jit(lambda key, images: module.apply(variables, images, train=True, rngs={"dropout": key}))
    first = train(jax.random.key(6), IMAGES)
    np.testing.assert_array_equal(first, train(jax.random.key(6), IMAGES))
    assert np.abs(first - train(jax.random.key(7), IMAGES)).max() > 1e-4
    rows = train(jax.random.key(6), np.repeat(IMAGES[:1], 2, axis=0))
    np.testing.assert_array_equal(rows[0], first[0])
    assert np.abs(rows[0] - rows[1]).max() > 1e-4


def test_bfloat16_computes_narrow_and_keeps_softmax_and_logits_wide():
    variables = drawn(TINY(), 7)
    logits, seen = recorded(TINY(dtype=jnp.bfloat16), variables, IMAGES)
    assert logits.dtype == seen["layers.0.blocks.1.attn.softmax"].dtype == jnp.float32
    assert seen["layers.0.blocks.1.mlp.fc2"].dtype == seen["layers.1.out"].dtype == jnp.bfloat16
    wide = recorded(TINY(), variables, IMAGES)[0]
    assert 0 < np.abs(logits - wide).max() < 0.05 * np.abs(wide).max()


def test_initial_values():
    module = Attention(8, window=(4, 6))
    params = jax.jit(module.init)(jax.random.key(8), np.zeros((1, 24, 64), np.float32))["params"]
    assert np.std(params["qkv"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert params["relative_position_bias_table"].shape == (7 * 11, 8)
    assert np.std(params["relative_position_bias_table"]) == pytest.approx(0.02, rel=0.1)
    assert not np.any(params["qkv"]["bias"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_heads": (2, 4, 8)}, "one entry a stage"),
        ({"num_heads": (3, 4)}, "stage 0 has 8 channels, no multiple of 3 heads"),
        ({"weight_init": "xavier"}, "fan_in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        TINY(**settings)
