from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.methods.igq_vit.baselines import ptq4vit_search as ps
from jaxvision.quant import log
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "igq_vit"


def cases(pattern):
    found = sorted(ORACLES.glob(pattern))
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def flat(x):
    return x.reshape(-1, x.shape[-1])


@cases("baseline_ptq4vit_*_linear_*.npz")
def test_official_linear_search(path):
    o = load(path)
    metric = "cosine" if "_base_" in path.stem else "hessian"
    search = ps.Search(float(o["alpha"]), float(o["beta"]), int(o["steps"]), int(o["search_rounds"]), metric)
    bits = int(o["bits"])
    kernel = o["weight"].T
    scales, scale = ps.search_linear(
        flat(o["x"]), kernel, o["bias"], flat(o["grad"]), bits, bits, search=search, blocks=int(o["weight_blocks"])
    )
    np.testing.assert_allclose(scales, o["weight_scale"], rtol=1e-5)
    np.testing.assert_allclose(scale, o["act_scale"][0], rtol=1e-5)
    x_hat = ps.symmetric_quantize(o["x"], scale, bits)
    w_hat = ps.blockwise_quantize(kernel, scales, bits)
    np.testing.assert_allclose(x_hat, o["x_hat"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w_hat.T, o["w_hat"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x_hat @ w_hat + o["bias"], o["out"], rtol=1e-4, atol=1e-5)


@cases("baseline_ptq4vit_twin_gelu_*.npz")
def test_official_twin_gelu_search(path):
    o = load(path)
    bits = int(o["bits"])
    kernel = o["weight"].T
    scales, scale = ps.search_linear(flat(o["x"]), kernel, o["bias"], flat(o["grad"]), bits, bits, form="twin_gelu")
    np.testing.assert_allclose(scales, o["weight_scale"], rtol=1e-5)
    np.testing.assert_allclose(scale, o["act_scale"][0], rtol=1e-5)
    np.testing.assert_allclose(ps.GELU_MINIMUM / 2 ** (bits - 1), o["negative_scale"], rtol=1e-7)
    x_hat = ps.input_quantize(o["x"], scale, bits, "twin_gelu")
    np.testing.assert_allclose(x_hat, o["x_hat"], rtol=1e-5, atol=1e-7)
    y = x_hat @ ps.blockwise_quantize(kernel, scales, bits) + o["bias"]
    np.testing.assert_allclose(y, o["out"], rtol=1e-4, atol=1e-5)


@cases("baseline_ptq4vit_twin_softmax_*.npz")
def test_official_twin_softmax_search(path):
    o = load(path)
    bits = int(o["bits"])
    split, scales = ps.search_attention(o["attention"], o["v"], o["grad"], bits, official_sum=True)
    assert float(split) == float(o["split"])
    np.testing.assert_allclose(scales, o["v_scale"], rtol=1e-5)
    v_hat = ps.symmetric_quantize(o["v"], scales[:, None, None], bits)
    np.testing.assert_allclose(v_hat, o["v_hat"], rtol=1e-5, atol=1e-6)
    a_hat = log.twin_softmax_quantize(o["attention"], split, bits, official_sum=True)
    np.testing.assert_allclose(a_hat @ v_hat, o["out"], rtol=1e-4, atol=1e-5)
    own, _ = ps.search_attention(o["attention"], o["v"], o["grad"], bits)
    error = [
        np.mean((o["grad"] * (o["y"] - log.twin_softmax_quantize(o["attention"], jnp.float32(s), bits) @ o["v"])) ** 2)
        for s in ps.SPLITS
    ]
    assert float(own) == ps.SPLITS[int(np.argmin(error))]


def test_skipping_repeated_rounds_changes_nothing():
    """Against a loop that really runs every round, scores computed one candidate at a time."""
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.normal(size=s).astype(np.float32) for s in ((40, 6), (6, 9), (40, 9)))
    y = x @ kernel
    search = ps.Search(steps=30, rounds=4)
    scales, scale = ps.search_linear(x, kernel, np.zeros(9, np.float32), g, 4, 4, search=search, blocks=3)
    limit = np.abs(kernel).reshape(6, 3, 3).max((0, 2)) / 7.5
    a = np.abs(x).max() / 7.5
    tried = search.factors() * np.float32(a)
    for _ in range(4):
        x_hat = ps.symmetric_quantize(x, a, 4)
        errors = []
        for f in search.factors():
            y_hat = x_hat @ ps.blockwise_quantize(kernel, jnp.asarray(f * limit, jnp.float32), 4)
            errors.append(((g * (y - y_hat)) ** 2).reshape(40, 3, 3).mean((0, 2)))
        w = search.factors()[np.argmin(errors, 0)] * limit
        w_hat = ps.blockwise_quantize(kernel, jnp.asarray(w, jnp.float32), 4)
        a = tried[np.argmin([np.mean((g * (y - ps.symmetric_quantize(x, s, 4) @ w_hat)) ** 2) for s in tried])]
    np.testing.assert_allclose(scales, w, rtol=1e-6)
    np.testing.assert_allclose(scale, a, rtol=1e-6)


def test_product_search_beats_the_full_range_in_every_head():
    rng = np.random.default_rng(1)
    q, k, g = (rng.standard_t(3, size=(2, 3, 8, 5)).astype(np.float32) for _ in range(3))
    g = np.einsum("bhnd,bhmd->bhnm", g, g)
    kt = np.swapaxes(k, -1, -2)
    scales = ps.search_product(q, kt, g, 4)
    full = [np.abs(v).max((0, 2, 3)) / 7.5 for v in (q, kt)]

    def error(pair):
        q_hat, k_hat = (ps.symmetric_quantize(v, s[:, None, None], 4) for v, s in zip((q, kt), pair))
        return np.mean((g * (q @ kt - q_hat @ k_hat)) ** 2, (0, 2, 3))

    assert np.all(error(scales) <= error([jnp.asarray(s) for s in full]))
