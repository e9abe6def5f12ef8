from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.methods.igq_vit.baselines import repq
from jaxvision.methods.igq_vit.calibration import Calibration
from jaxvision.models.swin import Swin
from jaxvision.models.vit import ViT
from jaxvision.quant import log, uniform, weights
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "igq_vit"


def cases(pattern):
    found = sorted(ORACLES.glob(pattern))
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


@cases("baseline_repq_uniform_*.npz")
def test_official_interval_search(path):
    o = load(path)
    x, bits = o["x"], int(o["bits"])
    if o["per_channel"] and x.ndim == 2:
        x = x.T  # a weight: the first axis are its channels
    flat = x.reshape(-1, x.shape[-1] if o["per_channel"] else 1)
    scale, zero = uniform.affine_params(*weights.percentile_search(flat, bits), bits)
    np.testing.assert_allclose(scale, o["scale"].reshape(scale.shape), rtol=1e-5)
    np.testing.assert_array_equal(zero, o["zero_point"].reshape(zero.shape))
    x_hat = uniform.fake_quant(flat, scale, zero, bits).reshape(x.shape)
    expected = o["dequantized"].T if x.shape != o["x"].shape else o["dequantized"]
    np.testing.assert_allclose(x_hat, expected, rtol=1e-5, atol=1e-6)


@cases("baseline_repq_logsqrt2_*.npz")
def test_official_log_sqrt2_search(path):
    o = load(path)
    delta = repq.log_sqrt2_delta(o["x"], int(o["bits"]))
    np.testing.assert_allclose(delta, o["delta"], rtol=1e-5)
    np.testing.assert_allclose(log.log_sqrt2_quantize(o["x"], delta, int(o["bits"])), o["dequantized"], rtol=1e-5)


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


@cases("baseline_repq_reparam_*.npz")
def test_official_reparameterisation(path):
    o = load(path)
    new = repq.reparameterize(
        {"scale": o["ln_weight"], "bias": o["ln_bias"]},
        {"kernel": o["weight"].T, "bias": o["bias"]},
        o["channel_scale"],
        o["channel_zero_point"],
    )
    for got, key in (
        (new.scale, "tensor_scale"),
        (new.zero, "tensor_zero_point"),
        (new.norm["scale"], "new_ln_weight"),
        (new.norm["bias"], "new_ln_bias"),
        (new.linear["kernel"].T, "new_weight"),
        (new.linear["bias"], "new_bias"),
    ):
        np.testing.assert_allclose(got, o[key], rtol=1e-5, atol=2e-6, err_msg=key)
    y = norm(o["x"], np.asarray(new.norm["scale"]), np.asarray(new.norm["bias"])) @ new.linear["kernel"]
    np.testing.assert_allclose(y + new.linear["bias"], o["y"], rtol=1e-4, atol=2e-5)
    # The scales come from the same search.
    x = norm(o["x"], o["ln_weight"], o["ln_bias"]).astype(np.float32)
    interval = weights.percentile_search(x.reshape(-1, x.shape[-1]), 4)
    np.testing.assert_allclose(uniform.affine_params(*interval, 4)[0], o["channel_scale"], rtol=1e-4)


def test_without_the_shift_the_quantizer_stays_what_it_was_channel_by_channel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    scale, zero = uniform.affine_params(jnp.asarray(x.min(0)), jnp.asarray(x.max(0)), 4)
    ones = jnp.ones(6)
    layer = {"kernel": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)}
    new = repq.reparameterize({"scale": ones, "bias": 0 * ones}, layer, scale, zero, shift=False)
    before = uniform.fake_quant(jnp.asarray(x), scale, zero, 4) @ layer["kernel"]
    after = uniform.fake_quant(x * new.norm["scale"], new.scale, new.zero, 4) @ new.linear["kernel"]
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def random_variables(module, images):
    """Every leaf random (a fresh LayerNorm would hide mistakes), and nothing to compile."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), images[:1])
    rng = np.random.default_rng(1)

    def leaf(name, like):
        fan_in = np.prod(like.shape[:-1]) if name.endswith("kernel") else 10
        return (rng.normal(size=like.shape) / np.sqrt(fan_in) + name.endswith("scale")).astype(np.float32)

    return trees.map_named(leaf, shapes)


NETWORKS = {
    "vit": ViT(num_classes=5, patch_size=4, width=12, depth=1, num_heads=2),
    # 7x7 map in windows of 3 (padded to 9x9), then 4x4 (padded to 6x6).
    "swin": Swin(num_classes=5, patch_size=2, width=8, depths=(1, 1), num_heads=(2, 2), window=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_reparameterised_network_is_the_original_in_float(name):
    module = NETWORKS[name]
    images = np.random.default_rng(2).normal(size=(4, 16, 16, 3) if name == "vit" else (4, 14, 14, 3))
    images = images.astype(np.float32)
    context = Calibration.create(module.apply, random_variables(module, images), images)
    variables, quantizers = repq.reparameterize_network(context, 4)
    before, after = (jax.jit(module.apply)(v, images) for v in (context.variables, variables))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())
    assert set(quantizers) == {s.name for s in context.sites if s.name.endswith(("qkv", "fc1", "reduction"))}
    scales = [np.asarray(q.scale) for q in quantizers.values()]
    assert all(scale.ndim == 0 for scale in scales)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), variables, context.variables)["params"]
    assert not any(jax.tree.leaves(changed["norm"])) and not any(jax.tree.leaves(changed["head"]))
