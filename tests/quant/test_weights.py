"""Weight quantization against its oracles; which parameters it touches; the choice of epsilon."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform, weights
from jaxvision.quant.weights import WeightPolicy
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "igq_vit"
CASES = sorted(ORACLES.glob("weight_quant_*.npz"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def policy_of(oracle):
    return WeightPolicy(int(oracle["bits"]), "percentile", float(oracle["epsilon_percent"]))


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_oracle_in_float64(path, x64):
    oracle = load(path)
    kernel = jnp.asarray(oracle["weight"].T)
    lower, upper = weights.weight_interval(kernel, policy_of(oracle))
    np.testing.assert_allclose(lower, oracle["lower"], rtol=1e-12)
    np.testing.assert_allclose(upper, oracle["upper"], rtol=1e-12)
    tensor = weights.quantize_tensor(kernel, policy_of(oracle))
    np.testing.assert_array_equal(tensor.codes.T, oracle["codes"])
    np.testing.assert_array_equal(tensor.zero, oracle["zero_point"])
    np.testing.assert_allclose(tensor.scale, oracle["scale"], rtol=1e-12)
    np.testing.assert_allclose(tensor.dequantize().T, oracle["dequantized"], rtol=1e-12)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_oracle_in_float32(path):
    oracle = load(path)
    tensor = weights.quantize_tensor(jnp.asarray(oracle["weight"].T, jnp.float32), policy_of(oracle))
    different = np.asarray(tensor.codes.T) != oracle["codes"]
    assert different.sum() <= max(1, 1e-3 * different.size)
    assert tensor.codes.dtype == jnp.uint8 and tensor.scale.dtype == jnp.float32
    np.testing.assert_allclose(tensor.scale, oracle["scale"], rtol=1e-5)


@pytest.mark.parametrize("path", sorted(ORACLES.glob("baseline_repq_uniform_*.npz")), ids=lambda p: p.stem)
def test_percentile_search_is_repq(path):
    oracle = load(path)
    x, bits = oracle["x"], int(oracle["bits"])
    if oracle["per_channel"]:
        found = weights.percentile_search(x.T if x.ndim == 2 else x.reshape(-1, x.shape[-1]), bits)
    else:
        found = weights.tensor_interval(x, bits)
    scale, zero = uniform.affine_params(*found, bits)
    # torch.quantile rounds the rank to float32, which moves the percentile by a few 1e-6
    np.testing.assert_allclose(scale.ravel(), oracle["scale"].ravel(), rtol=1e-5)
    np.testing.assert_array_equal(zero.ravel(), oracle["zero_point"].ravel())


def kernel(shape=(40, 6), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_t(2, size=shape), jnp.float32)


def squared_error(w, policy):
    return jnp.sum(jnp.square(w - weights.quantize_tensor(w, policy).dequantize()), 0)


def test_mse_line_search_matches_the_plain_loop():
    w = kernel()
    lower, upper = (np.asarray(end) for end in weights.mse_interval(w, 4))
    for c in range(w.shape[1]):
        column = np.asarray(w[:, c : c + 1])
        errors = []
        for i in range(90):
            factor = np.float32(1 - 0.01 * i)
            hat = uniform.fake_quant_interval(column, factor * column.min(), factor * column.max(), 4)
            errors.append(float(np.square(column - np.asarray(hat), dtype=np.float64).sum()))
        best = np.float32(1 - 0.01 * int(np.argmin(errors)))
        np.testing.assert_allclose([lower[c], upper[c]], [best * column.min(), best * column.max()], rtol=1e-6)
        assert errors[0] > min(errors)  # heavy tails: clipping must pay


def test_search_is_never_worse_than_its_widest_candidate():
    w = kernel((500, 8))
    assert (squared_error(w, WeightPolicy(4, "mse")) <= squared_error(w, WeightPolicy(4, "minmax"))).all()
    widest = WeightPolicy(4, "percentile", 0.001)
    assert (squared_error(w, WeightPolicy(4, "repq")) <= squared_error(w, widest) * (1 + 1e-5)).all()


@pytest.mark.parametrize("method", weights.METHODS)
def test_every_channel_is_on_its_own_and_one_tensor_has_one_scale(method):
    w = kernel((3, 3, 5, 4))
    whole = weights.quantize_tensor(w, WeightPolicy(4, method, 1.0))
    assert whole.scale.shape == (4,) and whole.codes.shape == w.shape
    alone = weights.quantize_tensor(w[..., 2:3], WeightPolicy(4, method, 1.0))
    np.testing.assert_array_equal(whole.codes[..., 2:3], alone.codes)
    assert weights.quantize_tensor(w, WeightPolicy(4, method, 1.0, "tensor")).scale.shape == ()


def tree():
    return {
        "patch_embed": {"kernel": kernel((2, 2, 3, 4)), "bias": jnp.ones(4)},
        "pos_embed": kernel((1, 5, 4)),
        "blocks_0": {"attn": {"qkv": {"kernel": kernel((4, 12), 1)}, "relative_position_bias_table": kernel((9, 2))}},
        "norm": {"scale": jnp.full(4, 1.3)},
        "head": {"kernel": kernel((4, 7), 2), "bias": jnp.ones(7)},
    }


def test_exactly_the_kernels_are_quantized():
    params = tree()
    quantized, codes = weights.quantize_params(params, WeightPolicy(4, "minmax"))
    assert set(codes) == {"patch_embed/kernel", "blocks_0/attn/qkv/kernel", "head/kernel"}
    before, after = trees.named_leaves(params), trees.named_leaves(quantized)
    assert list(before) == list(after)
    for name, leaf in after.items():
        if name in codes:
            np.testing.assert_array_equal(leaf, codes[name].dequantize())
            assert not np.array_equal(leaf, before[name])
            assert codes[name].codes.max() <= 15
        else:
            np.testing.assert_array_equal(leaf, before[name])


def test_bit_rules_and_unused_rules():
    policy = WeightPolicy(4, "minmax", bit_rules=((r"^(patch_embed|head)/", 8),))
    _, codes = weights.quantize_params(tree(), policy)
    assert {name: tensor.bits for name, tensor in codes.items()} == {
        "patch_embed/kernel": 8,
        "head/kernel": 8,
        "blocks_0/attn/qkv/kernel": 4,
    }
    assert codes["head/kernel"].codes.max() == 255
    with pytest.raises(ConfigError, match="downsample"):
        weights.quantize_params(tree(), WeightPolicy(4, bit_rules=(("downsample", 8),)))
    rules = (("head", 8), ("^head/kernel", 6))
    with pytest.raises(ConfigError, match="'head' before it takes all"):
        weights.quantize_params(tree(), WeightPolicy(4, bit_rules=rules))
    with pytest.raises(ConfigError, match="matches none"):
        weights.quantize_params(tree(), WeightPolicy(4, pattern="conv"))


def test_epsilon_is_the_one_of_least_error():
    params = tree()
    seen = {}

    def error(quantized):
        seen[len(seen)] = quantized["head"]["kernel"]
        return float(jnp.sum(jnp.square(quantized["head"]["kernel"] - params["head"]["kernel"])))

    chosen, errors = weights.choose_epsilon(params, WeightPolicy(3), error)
    assert list(errors) == list(weights.EPSILONS) and len(seen) == 5
    assert errors[chosen] == min(errors.values())
    assert len(set(errors.values())) > 1
    with pytest.raises(ConfigError, match="minmax"):
        weights.choose_epsilon(params, WeightPolicy(3, "minmax"), error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "at most 8"),
        ({"bits": 0}, "1 to 16"),
        ({"method": "max"}, "weights.method='max'"),
        ({"granularity": "row"}, "weights.granularity='row'"),
        ({"epsilon": 50.0}, "percentage"),
        ({"bit_rules": (("head", 12),)}, "at most 8"),
    ],
)
def test_wrong_policies_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        WeightPolicy(**options)
