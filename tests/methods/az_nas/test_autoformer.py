"""AutoFormer's spaces: one masked program equals the official code's subnets; sampling, strings, errors."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import autoformer_program
from jaxvision.methods.az_nas.spaces import autoformer
from jaxvision.models import autoformer_architecture, zoo
from jaxvision.models.autoformer import TABLES
from tests.arrays import load
from tests.models import networks
from tests.models.test_autoformer import architecture

ORACLES = Path(__file__).parents[2] / "oracles" / "az_nas"
TINY = autoformer.Choices(16, (8, 16), (1, 2), (2.0, 2.5), (1, 2, 3))


def supernet(oracle, dtype):
    """The oracle's weights, blocks stacked."""
    depth = int(oracle["super_depth"])

    def stacked(key):
        return np.stack([oracle[f"w_block{i}_{key}"] for i in range(depth)]).astype(dtype)

    blocks = {name: stacked(f"attn_{name}") for name in TABLES}
    for name, key in (("qkv", "attn_qkv"), ("proj", "attn_proj"), ("fc1", "fc1"), ("fc2", "fc2")):
        blocks |= {f"{name}_kernel": stacked(f"{key}_weight"), f"{name}_bias": stacked(f"{key}_bias")}
    for name in ("ln1", "ln2"):
        blocks |= {f"{name}_scale": stacked(f"{name}_weight"), f"{name}_bias": stacked(f"{name}_bias")}
    first = (oracle[f"w_{key}"] for key in ("patch_weight", "patch_bias", "cls_token", "pos_embed"))
    patch, bias, token, position = (value.astype(dtype) for value in first)
    return autoformer_program.Supernet(patch, bias, token[0, 0], position[0], blocks)


def measured(oracle, dtype):
    """Features' entropies, singular values, guards and scores of the oracle's subnet, its last tokens."""
    chosen, depth = architecture(oracle), int(oracle["super_depth"])
    pad = (0, depth - chosen.depth)
    heads, hidden = np.pad(chosen.num_heads, pad), np.pad(chosen.hidden, pad)
    count = 2 * chosen.depth
    given = np.stack([np.ones_like(oracle["probe_1"]), *(oracle[f"probe_{i}"] for i in range(1, count))])

    @jax.jit
    def run(net, images, depth, heads, hidden):
        probes = lambda index, shape: jnp.asarray(given)[index]  # noqa: E731
        x, *numbers = autoformer_program.measure(net, images, depth, heads, hidden, probes, width=chosen.embed_dim)
        return x, numbers, autoformer_program.summarise(depth, *numbers)

    return run(supernet(oracle, dtype), oracle["x"].astype(dtype), np.int32(chosen.depth), heads, hidden)


def test_the_masked_program_gives_the_official_scores():
    oracle = load(ORACLES / "autoformer_net_1.npz")
    tokens, (entropies, sigma, identical), scores = measured(oracle, np.float32)
    np.testing.assert_allclose(tokens, oracle["feat_3"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropies, oracle["expressivity_per_feature"], rtol=1e-4)
    np.testing.assert_allclose(sigma[1:], oracle["sigma_max"], rtol=1e-4)
    assert not identical.any()
    for name in ("expressivity", "trainability"):
        np.testing.assert_allclose(scores[name], oracle[name], rtol=1e-4)


def test_the_masked_program_gives_the_official_scores_in_float64():
    oracle = load(ORACLES / "autoformer_net_1.npz")
    with jax.enable_x64(True):
        scores = measured(oracle, np.float64)[2]
        for name in ("expressivity", "trainability"):
            assert scores[name] == pytest.approx(float(oracle[name]), abs=1e-9)


def perturbed(key):
    """A supernet of TINY for 2x2 patches whose biases and scales are not those of an initialisation."""
    net = autoformer_program.init(key, TINY.super_width, 2, 40, 3, 4, 4)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), net)


def plain_parameters(net, chosen):
    """The stand-alone network's parameters: slices of a supernet."""
    width, blocks = chosen.embed_dim, jax.tree.map(np.asarray, net.blocks)
    params = {
        "patch_embed": {"kernel": net.patch[..., :width], "bias": net.patch_bias[:width]},
        "cls_token": net.cls_token[None, None, :width],
        "pos_embed": net.pos_embed[None, :, :width],
        "norm": {"scale": np.ones(width), "bias": np.zeros(width)},
        "head": {"kernel": np.zeros((width, 3)), "bias": np.zeros(3)},
    }
    for i, (heads, hidden) in enumerate(zip(chosen.num_heads, chosen.hidden, strict=True)):
        w, inner = {name: value[i] for name, value in blocks.items()}, 64 * heads
        qkv = w["qkv_kernel"][:width, : 3 * inner]
        params[f"blocks_{i}"] = {
            "attn": {
                **{name: w[name] for name in TABLES},
                "qkv": {
                    "kernel": np.concatenate([qkv[:, j::3] for j in range(3)], 1),
                    "bias": w["qkv_bias"][: 3 * inner],
                },
                "proj": {"kernel": w["proj_kernel"][:inner, :width], "bias": w["proj_bias"][:width]},
            },
            "mlp": {
                "fc1": {"kernel": w["fc1_kernel"][:width, :hidden], "bias": w["fc1_bias"][:hidden]},
                "fc2": {"kernel": w["fc2_kernel"][:hidden, :width], "bias": w["fc2_bias"][:width]},
            },
            **{f"norm{n}": {"scale": w[f"ln{n}_scale"][:width], "bias": w[f"ln{n}_bias"][:width]} for n in (1, 2)},
        }
    return {"params": params}


def test_masks_equal_the_plain_network_and_one_program_serves_a_width():
    net, images = perturbed(jax.random.key(0)), np.random.default_rng(1).standard_normal((2, 8, 8, 3), np.float32)
    probes = lambda index, shape: jnp.where(jnp.arange(np.prod(shape)).reshape(shape) % 3 == index % 3, 1.0, -1.0)  # noqa: E731
    measure = jax.jit(partial(autoformer_program.measure, probes=probes, width=8))
    for text in ("E8-H1R2.5", "E8-H1R2-H2R2.5-H1R2"):
        chosen = autoformer_architecture.from_string(text)
        pad = (0, 3 - chosen.depth)
        tokens, entropies, _, _ = measure(
            net, images, np.int32(chosen.depth), np.pad(chosen.num_heads, pad), np.pad(chosen.hidden, pad)
        )
        plain = zoo.build("autoformer", num_classes=3, architecture=text, patch_size=4)
        _, features = networks.recorded(plain, plain_parameters(net, chosen), images)
        np.testing.assert_allclose(tokens, features[f"blocks.{chosen.depth - 1}.out"], rtol=1e-4, atol=1e-4)
        assert np.count_nonzero(entropies) == 2 * chosen.depth
    assert measure._cache_size() == 1


def test_scores_are_functions_of_the_key_with_one_program_a_width():
    space = autoformer.AutoFormer("t", TINY, patch_size=4)
    score, before = space.scorer(8, 4), autoformer_program.score._cache_size()
    one, other = (space.from_string(text) for text in ("E8-H1R2.5", "E8-H1R2-H2R2.5-H1R2"))
    first = score(one, jax.random.key(0))
    assert set(first) == set(space.proxies) and all(np.isfinite(value) for value in first.values())
    assert score(one, jax.random.key(0)) == first
    assert score(one, jax.random.key(1))["expressivity"] != first["expressivity"]
    assert score(other, jax.random.key(0))["expressivity"] > first["expressivity"]  # six features, not two
    assert autoformer_program.score._cache_size() == before + 1
    with pytest.raises(ConfigError, match="resolution=10 must be a multiple of the patch size, 4"):
        space.scorer(10, 4)


def test_the_spaces_sample_mutate_and_write_architectures():
    rng = np.random.default_rng(0)
    for size, choices in autoformer.SIZES.items():
        space = autoformer.AutoFormer(size)
        drawn = [space.sample(rng) for _ in range(40)]
        for architecture_ in [*drawn, *(space.mutate(one, rng, 3) for one in drawn)]:
            assert architecture_.dtype == np.int32 and architecture_.shape == space.shape
            np.testing.assert_array_equal(space.from_string(space.to_string(architecture_)), architecture_)
        assert {int(one[0]) for one in drawn} == set(choices.depths)
        assert {int(one[1]) for one in drawn} == set(choices.widths)
        assert not np.array_equal(space.mutate(drawn[0], rng, 8), drawn[0])
    space = autoformer.AutoFormer("t")
    found = space.from_string(autoformer_architecture.TINY)
    assert (space.cost(found).flops, space.cost(found).params) == (1_380_128_376, 5_921_032)
    assert space.model(found) == ("autoformer", {"architecture": autoformer_architecture.TINY})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            autoformer_architecture.TINY.replace("E192", "E200"),
            "the width is 200; the space 'autoformer_t' has 192, 216",
        ),
        ("E192-H3R4", "the depth is 1; .* has 12, 13, 14"),
        (autoformer_architecture.TINY.replace("H3R3.5", "H5R3.5", 1), "number of heads of block 2 is 5; .* has 3, 4"),
        (autoformer_architecture.TINY.replace("R4", "R2", 1), "MLP ratio of block 4 is 2; .* has 3.5, 4"),
    ],
)
def test_an_architecture_outside_the_space_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        autoformer.AutoFormer("t").from_string(text)


def test_an_unknown_size_is_refused():
    with pytest.raises(ConfigError, match="size='x' is unknown; there are: t, s, b"):
        autoformer.AutoFormer("x")
