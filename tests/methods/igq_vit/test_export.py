"""The quantized model on disk: bit for bit back, readable by others, and never silently wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxvision.core import struct, trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.methods.igq_vit import export, groups, quantizers, simulate
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.models.vit import ViT
from jaxvision.quant import weights
from jaxvision.quant.activation import DynamicGroupQuantizer

MODULE = ViT(num_classes=5, patch_size=4, width=16, depth=1, num_heads=2)
IMAGES = np.random.default_rng(1).normal(size=(3, 12, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODULE.init, jax.random.key(0), IMAGES)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.5, shapes)
    sites = sites_lib.list_sites(MODULE.apply, variables, (12, 12, 3))
    ranges = {site.name: np.sort(rng.normal(size=(3, 16, 2)).astype(np.float32), -1) for site in sites if site.grouped}
    bounds, _ = quantizers.calibrate_groups(ranges, sites, 4)
    fixed = {site.name: (np.float32(-2), np.float32(3)) for site in sites if not site.grouped}
    made = quantizers.igq_quantizers(sites, bounds, fixed, 4)
    made["blocks.0.mlp.fc2"] = DynamicGroupQuantizer.create(4, 3)
    params, codes = weights.quantize_params(
        variables["params"], weights.WeightPolicy(4, "minmax", bit_rules=(("head", 8),))
    )
    return export.QuantizedModel({"params": params}, codes, made, {"name": "tiny", "num_classes": 5})


def logits(model):
    on = simulate.switches(model.quantizers)
    return simulate.forward(MODULE.apply, model.variables, model.quantizers, on, IMAGES)


def test_loaded_model_gives_the_same_logits_bit_for_bit(model, tmp_path):
    export.save(tmp_path / "sub" / "model.v1", model)
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["model.v1.json", "model.v1.safetensors"]
    loaded = export.load(tmp_path / "sub" / "model.v1")
    before, after = trees.named_leaves(model.variables), trees.named_leaves(loaded.variables)
    assert set(before) == set(after)
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name])
        assert leaf.dtype == after[name].dtype
    assert list(loaded.quantizers) == list(model.quantizers)
    assert jax.tree.structure(loaded.quantizers) == jax.tree.structure(model.quantizers)
    assert loaded.model == {"name": "tiny", "num_classes": 5}
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_another_program_can_read_it(model, tmp_path):
    """With NumPy and the documented layout alone: a kernel, and the groups of an image's channels."""
    export.save(tmp_path / "m", model)
    meta = json.loads((tmp_path / "m.json").read_text())
    arrays = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    name = "blocks_0/attn/qkv/kernel"
    codes, scale, zero = (arrays[f"weights/{name}/{field}"] for field in ("codes", "scale", "zero"))
    assert codes.dtype == np.uint8 and codes.max() <= 15 and meta["weights"][name] == {"bits": 4}
    assert meta["weights"]["head/kernel"] == {"bits": 8}
    np.testing.assert_array_equal(scale * (codes - zero), trees.named_leaves(model.variables["params"])[name])
    site = "blocks.0.attn.qkv"
    assert meta["sites"][site]["class"] == "InstanceGroupQuantizer" and meta["sites"][site]["axis"] == "channels"
    bounds, count = arrays[f"sites/{site}/bounds"][0], int(arrays[f"sites/{site}/count"])
    x = np.random.default_rng(2).normal(size=(1, 5, 16)).astype(np.float32)
    lower, upper = x[0].min(0), x[0].max(0)
    far = (lower[:, None] - bounds[:count, 0]) ** 2 + (upper[:, None] - bounds[:count, 1]) ** 2
    np.testing.assert_array_equal(model.quantizers[site].groups(jnp.asarray(x), 1)[0], far.argmin(1))
    assert not any(key.startswith("variables/") and key.endswith("/kernel") for key in arrays)
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "jaxvision.igq_vit", "name": "tiny", "num_classes": "5"}
    assert meta["model"] == {"name": "tiny", "num_classes": 5} and meta["format"] == "jaxvision.igq_vit"


def test_damage_is_found(model, tmp_path):
    export.save(tmp_path / "m", model)
    stored = tmp_path / "m.safetensors"
    data = bytearray(stored.read_bytes())
    data[-3] ^= 1
    stored.write_bytes(data)
    with pytest.raises(DataError, match=r"m\.safetensors is damaged"):
        export.load(tmp_path / "m")
    stored.unlink()
    with pytest.raises(DataError, match=r"m\.safetensors does not exist"):
        export.load(tmp_path / "m")
    (tmp_path / "n.json").write_text("{")
    (tmp_path / "n.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="not valid JSON"):
        export.load(tmp_path / "n")


def test_missing_surplus_and_foreign_arrays(model):
    arrays, metadata = export.to_flat(model)
    with pytest.raises(DataError, match=r"no array 'sites/head/scale'"):
        export.from_flat({k: v for k, v in arrays.items() if k != "sites/head/scale"}, metadata)
    with pytest.raises(DataError, match=r"'sites/tail/scale' that its JSON"):
        export.from_flat(arrays | {"sites/tail/scale": np.ones(())}, metadata)
    with pytest.raises(DataError, match="format"):
        export.from_flat(arrays, metadata | {"version": 9})


@struct.dataclass
class Doubler:
    """A researcher's own quantizer."""

    factor: jax.Array
    note: str = struct.field(pytree_node=False, default="")

    def __call__(self, x, batch_size):
        return x * self.factor


def test_own_quantizer_classes(model, tmp_path):
    own = dict(model.quantizers) | {"head": Doubler(jnp.float32(2), "mine")}
    export.save(tmp_path / "m", export.QuantizedModel(model.variables, model.codes, own, {}))
    with pytest.raises(ConfigError, match="'Doubler' is unknown"):
        export.load(tmp_path / "m")
    loaded = export.load(tmp_path / "m", classes=(Doubler,))
    assert loaded.quantizers["head"].note == "mine" and loaded.quantizers["head"].factor == 2
    assert isinstance(loaded.quantizers["blocks.0.attn.qkv"], groups.InstanceGroupQuantizer)
