"""The cost model against its oracle and against the specification's table."""

from pathlib import Path

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import bops
from jaxvision.methods.igq_vit.sites import Site
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "igq_vit"


def test_oracle():
    oracle = load(ORACLES / "bops_1.npz")
    for values in oracle["rows"]:
        row = dict(zip(oracle["columns"].tolist(), values.tolist()))
        n, c, d, h, g, bw, ba = (int(row[key]) for key in ("N", "C", "D", "H", "G", "bw", "ba"))
        fc = bops.fc_bops(n, c, d, bw, ba, g, int(oracle["fp_bits"]))
        assert fc == {part: row[f"fc_{part}"] for part in bops.PARTS}
        attention = bops.attention_bops(h, n, c // h, ba, g, int(oracle["fp_bits"]))
        expected = {part: row[f"attn_{part}"] for part in ("base", "range", "distance")}
        assert attention == expected | {"combine": 0, "zero_point": 0}


def block(width, heads, tokens=197):
    attention = [Site(f"blocks.0.attn.{k}", "tensor", (1, heads, tokens, width // heads), None, 0) for k in "qkv"]
    return (
        Site("blocks.0.attn.qkv", "channels", (1, tokens, width), "blocks_0/attn/qkv/kernel", 3 * width),
        *attention,
        Site("blocks.0.attn.softmax", "rows", (1, heads, tokens, tokens), None, 0),
        Site("blocks.0.attn.proj", "channels", (1, tokens, width), "blocks_0/attn/proj/kernel", width),
        Site("blocks.0.mlp.fc1", "channels", (1, tokens, width), "blocks_0/mlp/fc1/kernel", 4 * width),
        Site("blocks.0.mlp.fc2", "channels", (1, tokens, 4 * width), "blocks_0/mlp/fc2/kernel", width),
    )


@pytest.mark.parametrize(
    ("width", "heads", "groups", "bits", "base", "percent"),
    [
        (192, 3, 8, 4, 1.63e9, (3.5, 154, 1.8)),
        (384, 6, 8, 4, 6.05e9, (1.9, 83, 1.4)),
        (768, 12, 8, 4, 2.33e10, (1.0, 43, 1.2)),
        (768, 12, 12, 4, 2.33e10, (1.3, 68, 1.4)),
        (768, 12, 8, 6, 5.23e10, (0.5, 19, 0.5)),
    ],
)
def test_table_of_the_specification(width, heads, groups, bits, base, percent):
    total = bops.summary(bops.network_bops(block(width, heads), groups, bits, bits))
    np.testing.assert_allclose(total["bops/base"], base, rtol=5e-3)
    found = [100 * total[f"bops/{part}"] / total["bops/base"] for part in ("index", "combine", "zero_point")]
    np.testing.assert_allclose(found, percent, atol=0.55)
    assert total["bops/total"] == sum(total[f"bops/{p}"] for p in ("base", "index", "combine", "zero_point"))
    narrow = bops.summary(bops.network_bops(block(width, heads), groups, bits, bits, fp_bits=16))
    np.testing.assert_allclose(narrow["bops/combine"] / total["bops/combine"], (16**2 + 16) / (32**2 + 32))


def test_image_head_and_windows():
    sites = (
        Site("patch_embed.proj", "image", (1, 8, 8, 3), "patch_embed/kernel", 10),
        Site("layers.0.blocks.0.attn.v", "tensor", (4, 2, 9, 5), None, 0),
        Site("layers.0.blocks.0.attn.softmax", "rows", (4, 2, 9, 9), None, 0),
        Site("layers.0.blocks.0.attn.proj", "channels", (4, 9, 10), "layers_0/blocks_0/attn/proj/kernel", 10),
        Site("head", "tensor", (1, 10), "head/kernel", 7),
    )
    cost = bops.network_bops(sites, {"layers.0.blocks.0.attn.softmax": 2, "layers.0.blocks.0.attn.proj": 3}, 4, 6)
    assert cost["patch_embed.proj"]["base"] == 8 * 8 * 3 * 10 * 4 * 8
    assert cost["head"] == dict.fromkeys(bops.PARTS, 0) | {"base": 10 * 7 * 4 * 6}
    assert cost["layers.0.blocks.0.attn.softmax"]["base"] == 2 * 4 * 2 * 9 * 9 * 5 * 36
    assert cost["layers.0.blocks.0.attn.softmax"]["distance"] == 4 * 2 * 9 * 2 * (2 * 32**2 + 3 * 32)
    assert cost["layers.0.blocks.0.attn.proj"] == bops.fc_bops(36, 10, 10, 4, 6, 3)
    static = bops.network_bops(sites, None, 4, 6, head_groups=4)
    assert static["head"] == cost["head"] | {"combine": 3 * 7 * (32**2 + 32)}
    assert static["layers.0.blocks.0.attn.v"] == dict.fromkeys(bops.PARTS, 0)
    assert bops.network_bops(sites, None, 4, 6, head_groups=64)["head"]["combine"] == 9 * 7 * (32**2 + 32)
    sixteen = bops.network_bops(sites, None, 4, 6, image_bits=16)
    assert sixteen["patch_embed.proj"]["base"] == 8 * 8 * 3 * 10 * 4 * 16
    fixed = bops.network_bops(sites, None, 4, 6)
    assert all(sixteen[name] == fixed[name] for name in fixed if name != "patch_embed.proj")
    assert fixed["layers.0.blocks.0.attn.proj"] == dict.fromkeys(bops.PARTS, 0) | {"base": 36 * 100 * 24}
    with pytest.raises(ConfigError, match=r"no tap for its values"):
        bops.network_bops(sites[2:3], 2, 4, 6)


def test_cost_table_is_made_of_grouped_sites_only():
    sites = block(64, 4, 17)
    table = bops.cost_table(sites, (4, 8), 4, 4)
    assert table.shape == (5, 2) and table.dtype == np.int64
    names = [site.name for site in sites if site.grouped]
    eight = bops.network_bops(sites, 8, 4, 4)
    np.testing.assert_array_equal(table[:, 1], [sum(eight[name].values()) for name in names])
    growth = table[:, 1] - table[:, 0]
    assert (growth > 0).all() and growth[names.index("blocks.0.attn.softmax")] == growth.min()
