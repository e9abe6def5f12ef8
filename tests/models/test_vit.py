"""ViT and DeiT against timm's numbers and names, and what a tap, a key and a dtype do to them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.trees import count_parameters, named_leaves
from jaxvision.models import mlp, vit, zoo
from jaxvision.models.layers import Dropout, DropPath
from tests.models import networks
from tests.models.networks import recorded

ZOO_NAME = "vit_base_patch16_224"
NETWORKS = ("vit_1", "vit_2", "vit_3_gray_avgpool", "deit_distilled_1")
INTERMEDIATES = {
    "patch_embed_out": "patch_embed.out",
    "blocks_in": "pos_embed.out",
    "norm_out": "norm.out",
    "head_in": "head",
    **{f"block{i}_out": f"blocks.{i}.out" for i in range(3)},
    "block0_norm1_out": "blocks.0.norm1.out",
    "block0_qkv_out": "blocks.0.attn.qkv.out",
    "block0_softmax": "blocks.0.attn.softmax",
    "block0_proj_in": "blocks.0.attn.proj",
    "block0_attn_out": "blocks.0.attn.out",
    "block0_norm2_out": "blocks.0.norm2.out",
    "block0_fc1_out": "blocks.0.mlp.fc1.out",
    "block0_gelu_out": "blocks.0.mlp.gelu.out",
    "block0_mlp_out": "blocks.0.mlp.out",
}
TINY = partial(vit.ViT, num_classes=5, patch_size=4, width=16, depth=2, num_heads=2)
IMAGES = np.random.default_rng(0).standard_normal((3, 8, 12, 3)).astype(np.float32)


def build(data, **changes):
    settings = {
        "num_classes": int(data["meta_num_classes"]),
        "patch_size": int(data["meta_patch_size"]),
        "width": int(data["meta_embed_dim"]),
        "depth": int(data["meta_depth"]),
        "num_heads": int(data["meta_num_heads"]),
        "mlp_ratio": float(data["meta_mlp_ratio"]),
        "qkv_bias": bool(data["meta_qkv_bias"]),
        "distilled": bool(data["meta_distilled"]),
        "pool": vit.POOLS[int(data["meta_pool"])],
        "layer_norm_eps": float(data["meta_ln_eps"]),
    }
    return vit.ViT(**{**settings, **changes})


drawn = partial(networks.drawn, images=IMAGES)


@pytest.fixture(scope="module")
def tiny():
    return drawn(TINY(), 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_intermediates_are_timms(name):
    data, images = networks.oracle(name)
    networks.assert_timms_intermediates(ZOO_NAME, build(data), data, images, INTERMEDIATES, at_least=13)


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_logits_are_timms(name):
    networks.assert_timms_float64_logits(ZOO_NAME, build, *networks.oracle(name))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_full_size_names_and_shapes_are_the_checkpoints(name):
    keys, parameters = networks.key_list(name)
    shapes = zoo.variable_shapes(vit.ViT(**vit.PRESETS[name]), vit.SPECS[name]["input_size"])
    assert networks.exported_shapes(name, shapes) == keys
    assert count_parameters(shapes) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deit_tiny_patch16_224", 5_717_416),
        ("deit_small_patch16_224", 22_050_664),
        ("deit_base_patch16_224", 86_567_656),
        ("vit_large_patch16_224", 304_326_632),
        ("vit_base_patch32_224", 88_224_232),
    ],
)
def test_parameter_counts(name, parameters):
    shapes = zoo.variable_shapes(vit.ViT(**vit.PRESETS[name]), vit.SPECS[name]["input_size"])
    assert count_parameters(shapes) == parameters


def test_every_preset_builds_at_its_size():
    assert vit.PRESETS.keys() == vit.SPECS.keys()
    for name, settings in vit.PRESETS.items():
        pixels = int(name.rsplit("_", 1)[1])
        assert vit.SPECS[name]["input_size"] == (pixels, pixels)
        module = vit.ViT(**{**settings, "depth": 1})
        tokens = (pixels // settings["patch_size"]) ** 2 + 1 + settings.get("distilled", False)
        shapes = zoo.variable_shapes(module, (pixels, pixels))["params"]
        assert shapes["pos_embed"].shape == (1, tokens, settings["width"])


def test_taps_name_each_place_once_and_give_the_operands(tiny):
    blocks = [f"blocks.{i}.{site}" for i in range(2) for site in networks.BLOCK_SITES]
    assert networks.sites(TINY(), tiny, IMAGES) == ["patch_embed.proj", *blocks, "norm", "head"]

    seen = recorded(TINY(), tiny, IMAGES)[1]
    np.testing.assert_array_equal(seen["patch_embed.proj"], IMAGES)
    q, k, v = (seen[f"blocks.1.attn.{x}"] for x in "qkv")
    assert q.shape == k.shape == v.shape == (3, 2, 7, 8)
    logits = np.einsum("bhnd,bhmd->bhnm", q, k) * 8**-0.5  # q comes without its factor
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen["blocks.1.attn.softmax"], weights, rtol=1e-5, atol=1e-6)
    joined = np.einsum("bhnm,bhmd->bnhd", weights, v).reshape(3, 7, 16)
    np.testing.assert_allclose(seen["blocks.1.attn.proj"], joined, rtol=1e-4, atol=1e-6)


SITES = ["patch_embed.proj", "norm", "head"] + [f"blocks.0.{site}" for site in networks.BLOCK_SITES]


def test_each_tapped_value_is_the_one_used():
    images = IMAGES[:1, :8, :8]
    module = TINY(depth=1)
    variables = networks.drawn(module, 2, images)

    @jax.jit
    def run(chosen):
        def replace(name, value):
            # A ramp, which unlike a constant survives softmax and layer normalisation.
            ramp = value * jnp.linspace(0.0, 2.0, value.shape[-1])
            return jnp.where(chosen == SITES.index(name), ramp, value) if name in SITES else value

        return module.apply(variables, images, tap=replace)

    plain = run(-1)
    for i, site in enumerate(SITES):
        assert float(jnp.max(jnp.abs(run(i) - plain))) > 1e-4, site


def test_uniform_attention_averages_the_values(tiny):
    def uniform(name, value):
        return jnp.full_like(value, 1 / value.shape[-1]) if name.endswith("softmax") else value

    @jax.jit
    def run(variables):
        seen = {}
        TINY(depth=1).apply(variables, IMAGES, tap=lambda name, value: seen.setdefault(name, uniform(name, value)))
        return seen

    seen = run(tiny)
    mean = np.asarray(seen["blocks.0.attn.v"]).mean(2, keepdims=True)
    expected = np.broadcast_to(mean, (3, 2, 7, 8)).transpose(0, 2, 1, 3).reshape(3, 7, 16)
    np.testing.assert_allclose(seen["blocks.0.attn.proj"], expected, rtol=1e-5, atol=1e-7)


def test_distilled_logits_are_the_mean_of_two_heads():
    module = TINY(distilled=True)
    variables = drawn(module, 3)
    logits, seen = recorded(module, variables, IMAGES)
    assert seen["head"].shape == seen["head_dist"].shape == (3, 16)
    np.testing.assert_array_equal(seen["head_dist"], seen["norm.out"][:, 1])
    np.testing.assert_allclose(logits, (seen["head.out"] + seen["head_dist.out"]) / 2, rtol=1e-6)


def test_gradients_are_finite_and_reach_every_parameter():
    module = TINY(
        depth=2, distilled=True, dropout_rate=0.1, attention_dropout_rate=0.1, drop_path_rate=0.1, weight_init="fan_in"
    )
    variables = drawn(module, 4)

    @jax.jit
    def gradient(variables, key):
        def loss(variables):
            logits = module.apply(variables, IMAGES, train=True, rngs={"dropout": key})
            return -jax.nn.log_softmax(logits)[:, 0].mean()

        return jax.grad(loss)(variables)

    for name, leaf in named_leaves(gradient(variables, jax.random.key(5))).items():
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name


def test_noise_is_a_function_of_the_key_and_of_the_row(tiny):
    module = TINY(dropout_rate=0.2, attention_dropout_rate=0.2, drop_path_rate=0.5)
    train = jax.jit(lambda key, images: module.apply(tiny, images, train=True, rngs={"dropout": key}))
    first = train(jax.random.key(6), IMAGES)
    np.testing.assert_array_equal(first, train(jax.random.key(6), IMAGES))
    assert np.abs(first - train(jax.random.key(7), IMAGES)).max() > 1e-4
    same = np.repeat(IMAGES[:1], 3, axis=0)
    rows = train(jax.random.key(6), same)
    assert min(np.abs(rows[0] - rows[1]).max(), np.abs(rows[1] - rows[2]).max()) > 1e-4
    np.testing.assert_array_equal(rows[0], first[0])
    np.testing.assert_array_equal(jax.jit(module.apply)(tiny, IMAGES), jax.jit(TINY().apply)(tiny, IMAGES))


@pytest.mark.parametrize(
    ("rate", "places"),
    [("dropout_rate", 7), ("attention_dropout_rate", 2), ("drop_path_rate", 2)],  # drop path is 0 in the first block
)
def test_where_noise_enters(rate, places, tiny):
    module, active = TINY(**{rate: 0.5}), []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, (Dropout, DropPath)) and context.module.rate > 0:
            active.append(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(partial(module.apply, train=True), tiny, IMAGES, rngs={"dropout": jax.random.key(0)})
    assert len(active) == places


def test_bfloat16_computes_narrow_and_keeps_parameters_softmax_and_logits_wide(tiny):
    module = TINY(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), IMAGES))} == {
        jnp.dtype("float32")
    }
    logits, seen = recorded(module, tiny, IMAGES)
    assert logits.dtype == seen["blocks.0.attn.softmax"].dtype == jnp.float32
    assert seen["blocks.0.mlp.fc2"].dtype == seen["blocks.1.out"].dtype == jnp.bfloat16
    wide = recorded(TINY(), tiny, IMAGES)[0]
    assert 0 < np.abs(logits - wide).max() < 0.05 * np.abs(wide).max()


def test_initial_values():
    images = np.zeros((1, 16, 16, 1), np.float32)
    settings = {"width": 64, "depth": 1, "num_heads": 2, "patch_size": 2}
    params = jax.jit(vit.ViT(**settings).init)(jax.random.key(8), images)["params"]
    block = params["blocks_0"]
    assert np.std(block["mlp"]["fc1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["pos_embed"]) == pytest.approx(0.02, rel=0.05)
    assert 0.45 < np.abs(params["patch_embed"]["kernel"]).max() <= 0.5  # PyTorch's uniform, fan-in 4
    assert not np.any(block["attn"]["qkv"]["bias"]) and np.any(params["patch_embed"]["bias"])

    module = vit.ViT(**settings, weight_init="fan_in", position_init_std=0.3)
    params = jax.jit(module.init)(jax.random.key(8), images)["params"]
    block = params["blocks_0"]
    assert np.std(block["mlp"]["fc1"]["kernel"]) == pytest.approx(1 / 8, rel=0.05)
    assert np.std(block["mlp"]["fc2"]["kernel"]) == pytest.approx(1 / 16, rel=0.05)
    assert np.std(params["patch_embed"]["kernel"]) == pytest.approx(1 / 2, rel=0.2)
    assert np.std(params["pos_embed"]) == pytest.approx(0.3, rel=0.05)
    assert not np.any(params["patch_embed"]["bias"])
    wide = mlp.truncated_normal(1.0)(jax.random.key(9), (20_000,))
    assert 1.99 < np.abs(wide).max() <= 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_heads": 3}, "width=16 is no multiple of num_heads=3"),
        ({"pool": "mean"}, "average"),
        ({"weight_init": "xavier"}, "fan_in"),
        ({"distilled": True, "pool": "average"}, "distilled"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        TINY(**settings)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 10, 12, 3), "10x12 pixels is no whole number of 4x4 patches"),
        ((1, 8, 12, 1), "1 channels but the weights are for 3"),
        ((1, 8, 8, 3), "2x2 patches but pos_embed"),
    ],
)
def test_images_that_do_not_fit_the_weights_are_refused(tiny, shape, text):
    with pytest.raises(ConfigError, match=text):
        TINY().apply(tiny, np.zeros(shape, np.float32))


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_gelu_is_the_exact_one(dtype, rtol):
    x = np.linspace(-4, 8, 1001).astype(dtype)
    wide = x.astype(np.float64)
    expected = 0.5 * wide * (1 + scipy.special.erf(wide / np.sqrt(2)))
    y = mlp.gelu(jnp.asarray(x))
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rtol, atol=1e-6)
