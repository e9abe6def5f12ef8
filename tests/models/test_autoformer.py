"""AutoFormer's subnets: strings, counters by the official code, relative positions, logits and features."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import autoformer_architecture, zoo
from jaxvision.models.autoformer import TABLES, relative_positions
from jaxvision.models.autoformer_architecture import Architecture
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "az_nas"


def architecture(oracle):
    """Of an oracle's subnet."""
    return Architecture(
        int(oracle["embed_dim"]), tuple(map(int, oracle["num_heads"])), tuple(map(float, oracle["mlp_ratio"]))
    )


def subnet(oracle):
    """The stand-alone network's parameters: the official slices of the oracle's supernet."""
    chosen = architecture(oracle)
    width = chosen.embed_dim
    leaves = {
        "patch_embed/kernel": oracle["w_patch_weight"][..., :width],
        "patch_embed/bias": oracle["w_patch_bias"][:width],
        "cls_token": oracle["w_cls_token"][..., :width],
        "pos_embed": oracle["w_pos_embed"][..., :width],
        "norm/scale": oracle["w_norm_weight"][:width],
        "norm/bias": oracle["w_norm_bias"][:width],
        "head/kernel": oracle["w_head_weight"][:width],
        "head/bias": oracle["w_head_bias"],
    }
    for i, (heads, hidden) in enumerate(zip(chosen.num_heads, chosen.hidden, strict=True)):
        w = {name.removeprefix(f"w_block{i}_"): value for name, value in oracle.items() if f"_block{i}_" in name}
        inner = 64 * heads
        kernel = w["attn_qkv_weight"][:width, : 3 * inner]
        leaves |= {
            f"blocks_{i}/attn/qkv/kernel": np.concatenate([kernel[:, part::3] for part in range(3)], 1),
            f"blocks_{i}/attn/qkv/bias": w["attn_qkv_bias"][: 3 * inner],
            f"blocks_{i}/attn/proj/kernel": w["attn_proj_weight"][:inner, :width],
            f"blocks_{i}/attn/proj/bias": w["attn_proj_bias"][:width],
            f"blocks_{i}/mlp/fc1/kernel": w["fc1_weight"][:width, :hidden],
            f"blocks_{i}/mlp/fc1/bias": w["fc1_bias"][:hidden],
            f"blocks_{i}/mlp/fc2/kernel": w["fc2_weight"][:hidden, :width],
            f"blocks_{i}/mlp/fc2/bias": w["fc2_bias"][:width],
        }
        leaves |= {f"blocks_{i}/attn/{name}": w[f"attn_{name}"] for name in TABLES}
        for number in (1, 2):
            leaves[f"blocks_{i}/norm{number}/scale"] = w[f"ln{number}_weight"][:width]
            leaves[f"blocks_{i}/norm{number}/bias"] = w[f"ln{number}_bias"][:width]
    return {"params": trees.nested(leaves)}


@pytest.mark.parametrize("size", "TSB")
def test_counters_are_the_official_ones(size):
    oracle = load(ORACLES / f"autoformer_cost_{size}.npz")
    texts = []
    for row, depth in enumerate(oracle["depth"]):
        found = Architecture(
            int(oracle["embed_dim"][row]),
            tuple(map(int, oracle["num_heads"][row, :depth])),
            tuple(map(float, oracle["mlp_ratio"][row, :depth])),
        )
        assert autoformer_architecture.flops(found) == oracle["complexity"][row]
        assert autoformer_architecture.num_params(found) == oracle["num_params"][row]
        texts.append(autoformer_architecture.to_string(found))
        assert autoformer_architecture.from_string(texts[-1]) == found
    names = {"T": "TINY", "S": "SMALL", "B": "BASE"}
    assert texts[0] == getattr(autoformer_architecture, names[size])
    shapes = zoo.variable_shapes(zoo.build("autoformer", num_classes=1000, architecture=texts[0]), (224, 224))
    assert trees.count_parameters(shapes["params"]) == oracle["num_params"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with the width"),
        ("E192", "must start with the width and have a block"),
        ("192-H3R4", "must start with the width"),
        ("E192-H3R4-H3-H4R4", "block 2 is 'H3'; it must be heads and MLP ratio, like H3R3.5"),
        ("E192-H0R4", "block 1 is 'H0R4'"),
        ("E192-H3R0", "block 1 is 'H3R0'"),
    ],
)
def test_a_malformed_architecture_is_refused_by_its_block(text, message):
    with pytest.raises(ConfigError, match=message):
        zoo.build("autoformer", num_classes=10, architecture=text)


def test_relative_positions_are_key_minus_query_clipped_and_0_for_the_class_token():
    vertical, horizontal = relative_positions(2, 17)
    assert vertical.shape == horizontal.shape == (35, 35)
    assert not vertical[0].any() and not horizontal[:, 0].any()
    assert (vertical[1, 1], horizontal[1, 1]) == (15, 15)
    assert (vertical[1, 18], horizontal[1, 18]) == (16, 15)  # one row further down
    assert (vertical[18, 3], horizontal[18, 3]) == (14, 17)
    assert (horizontal[1, 17], horizontal[17, 1]) == (29, 1)  # 16 columns count as 14


def test_the_network_gives_the_official_features_and_logits():
    oracle = load(ORACLES / "autoformer_net_1.npz")
    text = autoformer_architecture.to_string(architecture(oracle))
    net = zoo.build("autoformer", num_classes=10, architecture=text)
    variables = subnet(oracle)
    expected = jax.eval_shape(net.init, jax.random.key(0), oracle["x"])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    assert trees.count_parameters(variables) == oracle["num_params"]

    @jax.jit
    def run(variables, x):
        seen = {}
        logits = net.apply(variables, x, tap=lambda name, value: seen.setdefault(name, value))
        return logits, seen

    logits, seen = run(variables, oracle["x"])
    np.testing.assert_allclose(logits, oracle["logits"], rtol=1e-4, atol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(seen[f"blocks.{i}.attn_sum.out"], oracle[f"feat_{2 * i}"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen[f"blocks.{i}.out"], oracle[f"feat_{2 * i + 1}"], rtol=1e-4, atol=1e-5)
    assert {"patch_embed.proj", "blocks.0.attn.q", "blocks.1.mlp.fc2", "norm", "head"} <= set(seen)


def test_initial_values_and_an_image_of_another_size():
    net = zoo.build("autoformer", num_classes=10, architecture="E64-H2R2", patch_size=4, drop_path_rate=0.1)
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params = variables["params"]
    for leaf in (params["blocks_0"]["attn"]["qkv"]["kernel"], params["blocks_0"]["attn"]["rel_v_h"]):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.05)
    assert np.abs(params["patch_embed"]["kernel"]).max() <= 48**-0.5
    assert not np.any(params["blocks_0"]["mlp"]["fc1"]["bias"])
    with pytest.raises(ConfigError, match="has 2x4 patches but pos_embed"):
        net.apply(variables, jnp.zeros((1, 8, 16, 3)))
