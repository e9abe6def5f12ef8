"""Structures of the MobileNetV2-type space: strings, counters by the official code, network, squeeze-excite."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import mbv2_structure, zoo
from jaxvision.models.mbv2_searched import MBV2Searched, SqueezeExcite
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "az_nas"


def named_weights(oracle):
    """The oracle's kernels of each unit, by the names of the network's layers."""
    names = {"conv": "conv", "expand": "expand", "dw": "depthwise", "project": "project", "short": "shortcut"}
    for index, block in enumerate(mbv2_structure.from_string(str(oracle["structure"]))):
        prefixes = [f"w_b{index}_u{j}_" for j in range(2 * block.layers)] if block.expansion else [f"w_b{index}_"]
        for prefix in prefixes:
            yield {name: oracle[prefix + key] for key, name in names.items() if prefix + key in oracle}


def network_variables(net, oracle):
    """The oracle's weights in the network's variables; normalisations of scale 1 and shift 0."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), oracle["x"])
    leaves = {
        name: np.full(leaf.shape, name.endswith(("scale", "var")), np.float32)
        for name, leaf in trees.named_leaves(shapes).items()
    }
    for index, kernels in enumerate(named_weights(oracle)):
        for name, kernel in kernels.items():
            path = f"units_{index}/conv" if name == "conv" else f"units_{index}/{name}/conv"
            assert leaves[f"params/{path}/kernel"].shape == kernel.shape
            leaves[f"params/{path}/kernel"] = kernel
    leaves["params/fc/kernel"], leaves["params/fc/bias"] = oracle["w_fc"], oracle["w_fc_bias"]
    return trees.nested(leaves)


def test_counters_are_the_official_ones():
    oracle = load(ORACLES / "mbv2_cost_0.npz")
    for row, text in enumerate(map(str, oracle["structure"])):
        blocks = mbv2_structure.from_string(text)
        assert mbv2_structure.to_string(blocks) == text
        assert mbv2_structure.flops(blocks) == oracle["flops_224"][row]
        assert mbv2_structure.model_size(blocks) == oracle["model_size_counter"][row]
        assert mbv2_structure.num_layers(blocks) == oracle["num_layers"][row]
        assert mbv2_structure.num_params(blocks) == oracle["num_params_true"][row]
    initial = mbv2_structure.from_string(mbv2_structure.INITIAL)
    assert (mbv2_structure.flops(initial), mbv2_structure.num_layers(initial)) == (162_396_776, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be blocks such as"),
        ("SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,16,2,8)", r"block 2 of the structure, 'SuperRes.*\(8,16,2,8\)'"),
        ("SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(16,16,2,8,1)", "block 2 .* takes 16 channels but block 1 gives 8"),
        ("SuperConvK3BNRELU(1,8,2,1)", "takes 1 channels but an image has 3"),
        ("SuperConvK3BNRELU(3,8,2,1)SuperResIDWE3K3(8,16,2,8,1)", "expansion 3 and kernel size 3; there are"),
        ("SuperConvK2BNRELU(3,8,2,1)", "kernel size 2; there are"),
        ("SuperConvK3BNRELU(3,8,3,1)", "must have stride 1 or 2"),
        ("SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,16,2,0,1)", "bottleneck of at least 1"),
        ("nonsense", "block 1 of the structure, 'nonsense', must be like"),
    ],
)
def test_a_malformed_structure_is_refused_by_its_block(text, message):
    with pytest.raises(ConfigError, match=message):
        mbv2_structure.from_string(text)


def test_the_network_gives_the_official_features_and_logits():
    oracle = load(ORACLES / "mbv2_net_1.npz")
    net = zoo.build("mbv2_searched", num_classes=10, structure=str(oracle["structure"]))
    variables = network_variables(net, oracle)
    assert trees.count_parameters(variables["params"]) == oracle["num_params_true"]

    @jax.jit
    def run(variables, x):
        seen = {}
        tap = lambda name, value: seen.setdefault(name, value)  # noqa: E731
        logits, moved = net.apply(variables, x, train=True, tap=tap, mutable=["batch_stats"])
        return logits, seen, moved

    logits, seen, moved = run(variables, oracle["x"])
    np.testing.assert_allclose(logits, oracle["logits"], rtol=1e-4, atol=1e-4)
    for index in range(4):
        np.testing.assert_allclose(seen[f"units.{index}.out"], oracle[f"feat_{index}"], rtol=1e-4, atol=1e-4)
    assert "units.1.depthwise.conv" in seen and "units.0.conv" in seen and "fc" in seen
    # momentum 0.01 from zeros
    mean = moved["batch_stats"]["units_0"]["norm"]["mean"]
    assert 0 < np.max(np.abs(mean)) < 0.1


def test_squeeze_excite_gates_channels_by_the_normalised_mean():
    x = np.random.default_rng(0).standard_normal((4, 3, 3, 10)).astype(np.float32)
    module = SqueezeExcite()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert variables["params"]["reduce"]["conv"]["kernel"].shape == (1, 1, 10, 2)
    assert "bias" not in variables["params"]["expand"]["conv"]
    run = jax.jit(lambda variables, x: module.apply(variables, x, train=True, mutable=["batch_stats"])[0])
    out = run(variables, x)

    def norm(y):
        return (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-3)

    kernels = [variables["params"][name]["conv"]["kernel"][0, 0] for name in ("reduce", "expand")]
    gate = norm(np.maximum(norm(x.mean((1, 2)) @ kernels[0]), 0) @ kernels[1])
    np.testing.assert_allclose(out, x / (1 + np.exp(-gate))[:, None, None], rtol=1e-4, atol=1e-5)


def test_a_unit_starts_as_its_shortcut_and_kernels_by_their_fan_in():
    net = MBV2Searched(5, "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE2K5(8,16,2,8,1)SuperConvK1BNRELU(16,512,1,1)", True)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert not np.any(params["units_1"]["project"]["norm"]["scale"])
    assert np.all(params["units_1"]["expand"]["norm"]["scale"] == 1)
    assert not np.any(params["units_1"]["shortcut"]["conv"]["bias"])
    assert np.std(params["units_1"]["depthwise"]["conv"]["kernel"]) == pytest.approx((2 / 25) ** 0.5, rel=0.15)
    assert np.std(params["fc"]["kernel"]) == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert params["units_2"]["se"]["reduce"]["conv"]["kernel"].shape == (1, 1, 32, 8)
