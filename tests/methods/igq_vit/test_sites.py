"""Finding sites in the package's networks and looking at their values."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.models import zoo
from jaxvision.models.swin import Swin
from jaxvision.models.vit import ViT

IMAGES = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def swin():
    """Stage 0: 8x8 in four windows; stage 1: 4x4 in one."""
    module = Swin(num_classes=3, patch_size=2, width=8, depths=(1, 1), num_heads=(2, 2), window=4, mlp_ratio=2.0)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IMAGES[:1])
    variables = jax.tree.map(lambda s: 0.5 * rng.normal(size=s.shape).astype(np.float32), shapes)
    return module.apply, variables, sites_lib.list_sites(module.apply, variables, (16, 16, 3))


@pytest.mark.parametrize(
    ("name", "grouped", "kinds"),
    [
        ("vit_base_patch16_224", 60, {"image": 1, "channels": 48, "rows": 12, "tensor": 37}),
        ("deit_tiny_distilled_patch16_224", 60, {"image": 1, "channels": 48, "rows": 12, "tensor": 38}),
        ("swin_small_patch4_window7_224", 5 * 24 + 3, {"image": 1, "channels": 99, "rows": 24, "tensor": 73}),
    ],
)
def test_sites_of_published_networks(name, grouped, kinds):
    module = zoo.build(name, num_classes=1000)
    variables = zoo.variable_shapes(module, (224, 224))
    found = sites_lib.list_sites(module.apply, variables, (224, 224, 3))
    assert Counter(site.kind for site in found) == kinds
    assert sum(site.grouped for site in found) == grouped
    params = variables["params"]
    for site in found:
        if site.kind in ("channels", "image") or site.name.startswith("head"):
            leaf = params
            for key in site.weight.split("/"):
                leaf = leaf[key]
            assert site.fan_out == leaf.shape[-1]
            assert site.kind == "image" or site.shape[-1] == leaf.shape[0]
        else:
            assert site.weight is None and site.fan_out == 0


def test_names_kinds_and_shapes(swin):
    found = {site.name: site for site in swin[2]}
    first = "layers.0.blocks.0."
    assert list(found)[:9] == ["patch_embed.proj"] + [
        first + name
        for name in ("attn.qkv", "attn.q", "attn.k", "attn.v", "attn.softmax", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert found[first + "attn.qkv"].shape == (4, 16, 8) and found[first + "attn.qkv"].tokens == 64
    assert found[first + "attn.softmax"].shape == (4, 2, 16, 16) and found[first + "attn.softmax"].kind == "rows"
    reduction = found["layers.1.downsample.reduction"]
    assert (reduction.kind, reduction.tokens, reduction.shape[-1], reduction.fan_out) == ("channels", 16, 32, 16)
    assert found["head"].kind == "tensor" and found["head"].weight == "head/kernel"


def test_an_input_of_one_token_is_no_group_site():
    def apply_fn(variables, images, tap):
        return tap("blocks.0.mlp.fc1", images.reshape(len(images), -1)) @ variables["params"]["w"]

    variables = {"params": {"w": jnp.ones((12, 2))}}
    (site,) = sites_lib.list_sites(apply_fn, variables, (2, 2, 3))
    assert site.kind == "tensor"


def test_networks_without_sites_or_with_one_twice_are_refused():
    def silent(variables, images, tap):
        return tap("stem", images).sum((1, 2))

    def twice(variables, images, tap):
        return tap("head", tap("head", images)).sum((1, 2))

    with pytest.raises(ConfigError, match=r"no quantization site .*stem"):
        sites_lib.list_sites(silent, {"params": {}}, (2, 2, 3))
    with pytest.raises(ConfigError, match="'head' twice"):
        sites_lib.list_sites(twice, {"params": {}}, (2, 2, 3))


def test_values_and_ranges_do_not_depend_on_the_chunk(swin):
    apply_fn, variables, sites = swin

    @jax.jit
    def watch(variables, images):
        seen = {}
        apply_fn(variables, images, tap=lambda name, x: seen.setdefault(name, x))
        return seen

    seen = watch(variables, IMAGES)
    values = sites_lib.collect(apply_fn, variables, IMAGES, sites, chunk=2)
    ranges = sites_lib.collect_ranges(apply_fn, variables, IMAGES, sites, chunk=2)
    for site in sites:
        np.testing.assert_allclose(values[site.name], seen[site.name], rtol=1e-4, atol=1e-5)
        x = values[site.name]
        if site.kind == "channels":
            x = np.moveaxis(x.reshape(5, -1, x.shape[-1]), 1, -1)
        elif site.kind != "rows":
            x = x.reshape(5, -1)
        np.testing.assert_allclose(ranges[site.name], np.stack([x.min(-1), x.max(-1)], -1), rtol=1e-4, atol=1e-5)


def test_ranges_of_windows(swin):
    apply_fn, variables, sites = swin
    site = next(site for site in sites if site.name == "layers.0.blocks.0.attn.qkv")
    x = sites_lib.collect(apply_fn, variables, IMAGES, [site])[site.name]
    windows = sites_lib.collect_ranges(apply_fn, variables, IMAGES, [site], instance="window")[site.name]
    assert windows.shape == (20, 8, 2)
    np.testing.assert_allclose(windows, np.stack([x.min(1), x.max(1)], -1), rtol=1e-5, atol=1e-6)


def test_average_pooling_and_grey_images():
    module = ViT(num_classes=3, patch_size=4, width=8, depth=1, num_heads=2, pool="average")
    variables = zoo.variable_shapes(module, (8, 8), channels=1)
    found = sites_lib.list_sites(module.apply, variables, (8, 8, 1))
    assert [site.name for site in found if site.kind == "tensor"][-1] == "head"
    assert found[0].shape == (1, 8, 8, 1)
