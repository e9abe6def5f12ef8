"""The MobileNetV2-type space: mutation as the official code's, scores equal to the official code's, padding exact."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import mbv2_program, proposals
from jaxvision.methods.az_nas.proposals import Budget
from jaxvision.methods.az_nas.spaces import mbv2
from jaxvision.models import mbv2_structure
from jaxvision.models.mbv2_structure import Block
from tests.arrays import load
from tests.models.test_mbv2_searched import named_weights

ORACLES = Path(__file__).parents[2] / "oracles" / "az_nas"
TINY = "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE2K3(8,36,2,12,1)SuperConvK1BNRELU(36,40,1,1)"


def given(weights, probes):
    """A draw of these, one a unit."""
    pairs = iter(zip(weights, probes, strict=True))
    return lambda unit, shape: next(pairs)


def measured(oracle, dtype):
    units = mbv2_structure.units(mbv2_structure.from_string(str(oracle["structure"])))
    weights = [{name: w.astype(dtype) for name, w in kernels.items()} for kernels in named_weights(oracle)]
    probes = [np.ones(oracle["feat_0"].shape, np.int8), *(oracle[f"probe_{i}"] for i in range(1, len(units)))]
    return units, weights, probes, oracle["x"].astype(dtype)


def test_statistics_of_every_unit_are_the_official_ones():
    oracle = load(ORACLES / "mbv2_net_1.npz")
    units, weights, probes, x = measured(oracle, np.float32)
    for index, unit in enumerate(units):
        numbers = mbv2_program.unit_statistics(weights[index], x, probes[index], unit.stride)
        x = numbers.features
        np.testing.assert_allclose(x, oracle[f"feat_{index}"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(numbers.entropy, oracle["expressivity_per_block"][index], rtol=1e-5)
        if index:
            np.testing.assert_allclose(numbers.sigma, oracle["sigma_max_per_block"][index - 1], rtol=1e-5)
            assert not numbers.identical


def test_scores_are_the_official_ones_in_float64():
    oracle = load(ORACLES / "mbv2_net_1.npz")
    with jax.enable_x64(True):
        units, weights, probes, x = measured(oracle, np.float64)
        scores = mbv2_program.measure(units, x, given(weights, probes))
        for name in ("expressivity", "progressivity", "trainability"):
            assert scores[name] == pytest.approx(float(oracle[name]), abs=1e-9)


def test_padded_channels_change_nothing():
    """Widths 36, 12 and 72 run as 40, 16 and 80."""
    units = mbv2_structure.units(mbv2_structure.from_string(TINY))
    draw = mbv2_program.random_draw(np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((4, 16, 16, 3)).astype(np.float32)
    drawn, cut, size = [], [], 16
    for unit in units:
        size //= unit.stride
        weights, probe = draw(unit, (4, size, size, unit.features))
        drawn.append((weights, probe))
        inside = {"conv": (unit.inputs, unit.features), "expand": (unit.inputs, unit.hidden),
                  "depthwise": (1, unit.hidden), "project": (unit.hidden, unit.features),
                  "shortcut": (unit.inputs, unit.features)}  # fmt: skip
        slices = {name: w[:, :, : inside[name][0], : inside[name][1]] for name, w in weights.items()}
        assert all(
            np.count_nonzero(w) == np.count_nonzero(slices[name]) == slices[name].size for name, w in weights.items()
        )
        cut.append((slices, probe[..., : unit.features]))
    assert drawn[1][0]["depthwise"].shape[-1] == 24 and drawn[2][1].shape[-1] == 40
    one, other = (mbv2_program.measure(units, x, given(*zip(*pairs))) for pairs in (drawn, cut))
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-5)


def test_padded_numbers_of_channels():
    assert [mbv2_program.padded(c) for c in (1, 8, 9, 40, 64, 72, 136, 2048)] == [8, 8, 16, 40, 64, 80, 160, 2048]
    for channels in range(8, 3000, 8):
        assert channels <= mbv2_program.padded(channels) <= max(1.25 * channels, channels)


def test_depthwise_layers_are_grouped_convolutions_with_their_gradients():
    rng = np.random.default_rng(0)
    for size, kernel, stride in ((8, 3, 1), (7, 3, 2), (6, 5, 2)):
        x = rng.standard_normal((2, size, size, 4)).astype(np.float32)
        w = rng.standard_normal((kernel, kernel, 1, 4)).astype(np.float32)
        pad = [(kernel // 2, kernel // 2)] * 2

        def grouped(x, w=w, pad=pad, stride=stride):
            return jax.lax.conv_general_dilated(
                x, w, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
            )

        @jax.jit
        def both(x, g, grouped=grouped, w=w, stride=stride):
            results = [jax.vjp(f, x) for f in (grouped, lambda x: mbv2_program.depthwise(x, w, stride))]
            return [(out, pull(g)[0]) for out, pull in results]

        g = rng.standard_normal((2, -(-size // stride), -(-size // stride), 4)).astype(np.float32)
        expected, own = both(x, g)
        for one, other in zip(own, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_pull_back_is_its_own_layers_where_shapes_are_those_of_another():
    """``_pull`` is compiled for the tree of a pull-back: sizes, strides and ReLUs must be part of it."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((2, 4, 4, 8)).astype(np.float32)
    for kernel_shape in ((3, 3, 1, 8), (1, 1, 8, 8)):
        kernel = rng.standard_normal(kernel_shape).astype(np.float32)
        for size, stride, activate in ((7, 2, True), (8, 2, True), (4, 1, True), (4, 1, False)):
            x = rng.standard_normal((2, size, size, 8)).astype(np.float32)
            y, pull = mbv2_program._layer(x, kernel, stride=stride, activate=activate)

            @jax.jit
            def gradient(x, g, kernel=kernel, stride=stride, activate=activate):
                def plain(x):
                    y = mbv2_program.convolve(jax.nn.relu(x) if activate else x, kernel, stride)
                    return jnp.vdot(mbv2_program.normalise(y), g)

                return jax.grad(plain)(x)

            assert y.shape == g.shape
            np.testing.assert_allclose(mbv2_program._pull(pull, g), gradient(x, g), rtol=1e-4, atol=1e-5)


def test_a_score_is_a_function_of_the_key_and_compiles_once_for_its_shapes():
    space = mbv2.MBV2(start=TINY)
    score, architecture = space.scorer(16, 4), space.initial
    first = score(architecture, jax.random.key(0))
    assert set(first) == set(space.proxies) and all(np.isfinite(value) for value in first.values())
    assert first["complexity"] == space.cost(architecture).flops
    programs = mbv2_program._layer._cache_size(), mbv2_program._pull._cache_size()
    assert score(architecture, jax.random.key(0)) == first
    assert score(architecture, jax.random.key(1))["trainability"] != first["trainability"]
    assert (mbv2_program._layer._cache_size(), mbv2_program._pull._cache_size()) == programs
    mbv2_program.bound_programs(sum(programs) + 1000)
    assert mbv2_program._layer._cache_size()
    mbv2_program.bound_programs(0)
    assert not mbv2_program._layer._cache_size()
    with pytest.raises(ConfigError, match="resolution=18 must be a multiple of 4"):
        space.scorer(18, 4)
    with pytest.raises(ConfigError, match="resolution=100 must be a multiple of 32"):
        mbv2.MBV2().scorer(100, 4)


def test_channel_choices_are_the_official_ones():
    oracle = load(ORACLES / "mbv2_channel_choices_0.npz")
    for channels, row in zip(oracle["channels"], oracle["choices"], strict=True):
        assert mbv2.channel_choices(int(channels)) == tuple(row[row > 0])
    assert mbv2.layer_choices(1) == (1, 2, 3) and mbv2.layer_choices(4) == (2, 3, 4, 5, 6)


def test_mutation_keeps_strides_ends_and_widths_and_draws_types_as_the_official_code():
    space, rng = mbv2.MBV2(), np.random.default_rng(0)
    counts = dict.fromkeys(mbv2.TYPES, 0)
    initial = space.decode(space.initial)
    for _ in range(2000):
        child = space.mutate(space.initial, rng, 1)
        blocks = space.decode(child)
        assert child.dtype == np.int32 and child.shape == space.shape
        mbv2_structure.from_string(space.to_string(child))  # widths fit
        assert [block.stride for block in blocks] == [block.stride for block in initial]
        assert str(blocks[-1]) == f"SuperConvK1BNRELU({blocks[-2].features},2048,1,1)"
        changed = [
            block for block, old in zip(blocks, initial, strict=True)
            if (block.features, block.layers, block.bottleneck, block.expansion, block.kernel)
            != (old.features, old.layers, old.bottleneck, old.expansion, old.kernel)
        ]  # fmt: skip
        assert len(changed) <= 1
        for block in changed:
            if block.expansion:
                counts[block.expansion, block.kernel] += 1
    total, weights = sum(counts.values()), np.asarray(mbv2.OFFICIAL_WEIGHTS)
    # 4 of 6 blocks are residual; E6K3 is a little rarer, as the unchanged block has it.
    assert total > 1200 and weights.sum() == 89
    np.testing.assert_allclose(np.array(list(counts.values())) / total, weights / 89, atol=0.03)
    even = mbv2.MBV2(uniform_types=True)
    assert np.mean([even.decode(even.mutate(even.initial, rng, 6))[1].kernel == 7 for _ in range(300)]) > 0.15


def test_blocks_of_six_layers_are_split():
    block = Block(3, 16, 32, 2, 7, 6, 8)
    assert [(b.inputs, b.stride, b.layers) for b in mbv2.split((block,))] == [(16, 2, 3), (32, 1, 4)]
    assert mbv2.split((Block(3, 16, 32, 2, 5, 6, 8),)) == (Block(3, 16, 32, 2, 5, 6, 8),)
    assert len(mbv2.split((Block(3, 16, 32, 2, 7),))) == 1  # convolutions are not
    space = mbv2.MBV2()
    text = mbv2_structure.INITIAL.replace("(96,128,2,96,1)", "(96,128,2,96,12)")
    assert [b.layers for b in space.decode(space.mutate(space.from_string(text), np.random.default_rng(0), 0))] == [
        1, 1, 1, 1, 3, 3, 6, 1,
    ]  # fmt: skip


def test_the_space_gives_strings_costs_and_a_network():
    space = mbv2.MBV2()
    assert space.to_string(space.initial) == mbv2_structure.INITIAL
    np.testing.assert_array_equal(space.from_string(mbv2_structure.INITIAL), space.initial)
    cost = space.cost(space.initial)
    assert (cost.flops, cost.layers) == (162_396_776, 6)
    assert space.model(space.initial) == ("mbv2_searched", {"structure": mbv2_structure.INITIAL, "use_se": True})
    assert space.sample(np.random.default_rng(0)).shape == space.shape
    with pytest.raises(ConfigError, match="33 blocks is longer than the 32"):
        space.from_string("SuperConvK3BNRELU(3,8,2,1)" + 32 * "SuperConvK3BNRELU(8,8,1,1)")


def test_a_child_of_more_blocks_than_fit_is_none_and_the_search_draws_again():
    text = "SuperConvK3BNRELU(3,8,2,1)" + 31 * "SuperResIDWE1K3(8,8,1,8,5)"
    space, rng = mbv2.MBV2(start=text), np.random.default_rng(0)
    children = [space.mutate(space.initial, rng, 1) for _ in range(30)]
    # A block of 6 or 7 layers is split; fewer are not.
    assert {child is None for child in children} == {True, False}
    rejected = sum(proposals.within_budget(space, Budget(), 50, lambda: space.sample(rng))[1] for _ in range(5))
    assert rejected > 0
    full = mbv2.MBV2(start=text.replace("8,5)", "8,6)", 1))
    with pytest.raises(ConfigError, match=r"in 3 tries \(all left the space\); widen"):
        proposals.within_budget(full, Budget(), 3, lambda: full.mutate(full.initial, rng, 0))
