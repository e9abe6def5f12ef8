"""Whole networks against the float64 reference: calibration, weights and quantized logits."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.methods.igq_vit import allocation, quantizers, simulate
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.models import torch_import
from jaxvision.models.swin import Swin
from jaxvision.models.vit import ViT
from jaxvision.quant import weights
from tests import arrays

ORACLES = Path(__file__).parents[2] / "oracles"
NETWORKS = sorted((ORACLES / "igq_vit").glob("network_*.npz"))


@functools.cache
def load(network, dtype):
    """Module and variables of an architecture oracle (``vit_1``, ``swin_1`` ...); one module, so one compilation."""
    stored = arrays.load(ORACLES / "vit_models" / f"{network}.npz")
    meta = {key.removeprefix("meta_"): stored[key] for key in stored if key.startswith("meta_")}
    common = {
        "num_classes": int(meta["num_classes"]),
        "patch_size": int(meta["patch_size"]),
        "width": int(meta["embed_dim"]),
        "mlp_ratio": float(meta.get("mlp_ratio", 4)),
        "qkv_bias": bool(meta.get("qkv_bias", True)),
        "dtype": dtype,
    }
    if network.startswith("swin"):
        depths, heads = (tuple(meta[key].tolist()) for key in ("depths", "num_heads"))
        module = Swin(depths=depths, num_heads=heads, window=int(meta["window_size"]), **common)
        name = "swin_tiny_patch4_window7_224"
    else:
        module = ViT(depth=int(meta["depth"]), num_heads=int(meta["num_heads"]), **common)
        name = "vit_tiny_patch16_224"
    image = jnp.asarray(np.moveaxis(stored["input_nchw"][:1], 1, -1))
    template = jax.eval_shape(module.init, jax.random.key(0), image)
    state = {key.removeprefix("w/"): stored[key] for key in stored if key.startswith("w/")}
    variables = torch_import.convert(name, state, template)
    return module, jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)


def ours(name):
    return "head" if name == "head.fc" else name


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_oracle_in_float64(path):
    oracle = arrays.load(path)
    with jax.enable_x64(True):
        module, variables = load(str(oracle["network"]), jnp.float64)
        calibration, images = (np.moveaxis(oracle[f"{key}_nchw"], 1, -1) for key in ("calibration", "input"))
        sites = sites_lib.list_sites(module.apply, variables, images.shape[1:])
        counts = {site.name: int(oracle["groups"]) for site in sites if site.grouped}
        for site, count in zip(oracle["group_override_sites"].tolist(), oracle["group_override"].tolist()):
            if site:
                counts[site] = count
        values = sites_lib.collect(module.apply, variables, calibration, sites)
        look = jax.jit(sites_lib.site_range, static_argnums=(0, 2))
        ranges = {s.name: np.asarray(look(s.kind, values[s.name], len(calibration))) for s in sites if s.grouped}
        bounds, _ = quantizers.calibrate_groups(ranges, sites, counts, iters=int(oracle["iterations"]))
        bits = int(oracle["act_bits"])
        intervals = {
            s.name: weights.tensor_interval(values[s.name], 8 if s.kind == "image" else bits)
            for s in sites
            if not s.grouped
        }
        expected = {key.partition("/")[2]: oracle[key] for key in oracle if "/" in key}
        assert {ours(name) for name in expected} == {site.name for site in sites}
        for name, value in expected.items():
            found = bounds[name][0] if name in bounds else np.asarray(intervals[ours(name)])
            np.testing.assert_allclose(found, value, rtol=1e-7, atol=1e-12, err_msg=name)
        # From here on the stored bounds, lest a rounding tie hides in the last bit of ours.
        stored = {ours(name): value for name, value in expected.items()}
        made = quantizers.igq_quantizers(sites, stored, stored, bits)
        policy = weights.WeightPolicy(int(oracle["weight_bits"]), "percentile", float(oracle["epsilon_percent"]))
        rounded = {"params": weights.quantize_params(variables["params"], policy)[0]}
        off = simulate.predict(module.apply, variables, made, simulate.switches(made, False), images)
        on = simulate.predict(module.apply, rounded, made, simulate.switches(made), images)
        np.testing.assert_allclose(off, oracle["logits_float"], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(on, oracle["logits_quantized"], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(allocation.kl_divergence(off, on), oracle["kl"], rtol=1e-6)


def test_oracle_in_float32():
    oracle = arrays.load(NETWORKS[2])
    module, variables = load(str(oracle["network"]), jnp.float32)
    images = np.moveaxis(oracle["input_nchw"], 1, -1).astype(np.float32)
    sites = sites_lib.list_sites(module.apply, variables, images.shape[1:])
    stored = {ours(k.partition("/")[2]): oracle[k].astype(np.float32) for k in oracle if "/" in k}
    made = quantizers.igq_quantizers(sites, stored, stored, int(oracle["act_bits"]))
    policy = weights.WeightPolicy(int(oracle["weight_bits"]), "percentile", float(oracle["epsilon_percent"]))
    rounded = {"params": weights.quantize_params(variables["params"], policy)[0]}
    off = simulate.predict(module.apply, variables, made, simulate.switches(made, False), images)
    on = simulate.predict(module.apply, rounded, made, simulate.switches(made), images)
    np.testing.assert_allclose(off, oracle["logits_float"], rtol=1e-4, atol=1e-4)
    # 8 bits: a code that falls on the other side of a tie moves the logits by a thousandth of their size
    np.testing.assert_allclose(on, oracle["logits_quantized"], atol=0.02 * np.abs(oracle["logits_float"]).max())
