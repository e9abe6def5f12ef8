"""The simulated network: exact when off, one program for everything, no dependence on the batch; Psi made with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import allocation, quantizers, simulate
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.models.vit import ViT
from jaxvision.quant import weights
from jaxvision.quant.activation import DynamicGroupQuantizer

BITS = 4


class Network:
    """A tiny ViT with random weights; ``apply`` counts how often it is traced."""

    def __init__(self):
        self.traces = 0
        self.module = ViT(num_classes=5, patch_size=4, width=16, depth=1, num_heads=2)
        rng = np.random.default_rng(0)
        self.images = rng.normal(size=(7, 12, 12, 3)).astype(np.float32)
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), self.images[:1])
        self.variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.5, shapes)
        self.sites = sites_lib.list_sites(self.module.apply, self.variables, (12, 12, 3))
        self.grouped = [site.name for site in self.sites if site.grouped]
        self.ranges = sites_lib.collect_ranges(self.module.apply, self.variables, self.images, self.sites)
        self.values = sites_lib.collect(self.module.apply, self.variables, self.images, self.sites)
        self.intervals = {
            site.name: weights.tensor_interval(self.values[site.name], 8 if site.kind == "image" else BITS)
            for site in self.sites
            if not site.grouped
        }
        self.codes = weights.quantize_params(self.variables["params"], weights.WeightPolicy(BITS, "minmax"))
        self.rounded = {"params": self.codes[0]}

    def apply(self, variables, images, tap):
        self.traces += 1
        return self.module.apply(variables, images, tap=tap)

    def quantizers(self, groups, bits=BITS):
        bounds, _ = quantizers.calibrate_groups(self.ranges, self.sites, groups)
        return quantizers.igq_quantizers(self.sites, bounds, self.intervals, bits)


@pytest.fixture(scope="module")
def net():
    return Network()


@pytest.fixture(scope="module")
def four(net):
    return net.quantizers(4)


def test_everything_off_is_the_float_network(net, four):
    plain = jax.jit(net.module.apply)(net.variables, net.images)
    off = simulate.forward(net.module.apply, net.variables, four, simulate.switches(four, False), net.images)
    np.testing.assert_array_equal(off, plain)


def test_all_runs_share_one_program(net, four):
    apply_fn, before = net.apply, net.traces
    eight = net.quantizers(8)
    mixed = net.quantizers({name: 3 + i for i, name in enumerate(net.grouped)}, bits=3)
    on, off = simulate.switches(four), simulate.switches(four, False)
    results = [
        simulate.forward(apply_fn, variables, q, enabled, net.images)
        for variables, q, enabled in (
            (net.variables, four, off),
            (net.variables, four, on),
            (net.rounded, four, on),
            (net.rounded, eight, on),
            (net.rounded, mixed, on),
            (net.variables, eight, simulate.switches(eight, ["blocks.0.mlp.fc2"])),
        )
    ]
    assert net.traces == before + 1
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert not np.array_equal(a, b)


def test_only_the_named_site_is_quantized(net, four):
    name = "blocks.0.mlp.fc1"
    one = simulate.forward(net.apply, net.variables, four, simulate.switches(four, [name]), net.images)

    def tap(site, x):
        return four[name](x, len(net.images)) if site == name else x

    expected = jax.jit(lambda v, x: net.module.apply(v, x, tap=tap))(net.variables, net.images)
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def test_result_does_not_depend_on_the_batch_size(net, four):
    on = simulate.switches(four)
    whole = simulate.predict(net.apply, net.rounded, four, on, net.images, batch_size=7)
    assert whole.shape == (7, 5)
    parts = simulate.predict(net.apply, net.rounded, four, on, net.images, batch_size=3)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_noise_is_measured_on_what_reaches_the_site(net, four):
    off = simulate.switches(four, False)
    _, powers = simulate.forward_with_noise(net.apply, net.variables, four, off, net.images)
    assert set(powers) == {site.name for site in net.sites}
    for name, each in powers.items():
        signal, noise = (np.asarray(power, np.float64).sum() for power in each)
        x = net.values[name].astype(np.float64)
        x_hat = np.asarray(four[name](jnp.asarray(net.values[name]), 7), np.float64)
        np.testing.assert_allclose(signal, np.square(x).sum(), rtol=1e-4)
        np.testing.assert_allclose(noise, np.square(x - x_hat).sum(), rtol=2e-2)
    logits, _ = simulate.forward_with_noise(net.apply, net.variables, four, simulate.switches(four), net.images)
    expected = simulate.forward(net.apply, net.variables, four, simulate.switches(four), net.images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_perturbation_table(net, four):
    tables = [four, net.quantizers(8)]
    names = ["blocks.0.attn.softmax", "blocks.0.mlp.fc2"]
    logits = simulate.predict(net.apply, net.variables, four, simulate.switches(four, False), net.images)
    psi = allocation.perturbation_table(net.apply, net.variables, four, tables, names, net.images, logits)
    assert psi.shape == (2, 2) and psi.dtype == np.float64 and (psi > 0).all()
    on = simulate.switches(four, [names[1]])
    changed = simulate.predict(net.apply, net.variables, tables[1], on, net.images)
    np.testing.assert_allclose(psi[1, 1], np.mean(allocation.kl_divergence(logits, changed)), rtol=1e-6)
    assert psi[1, 1] < psi[1, 0]
    whole = allocation.perturbation_table(
        net.apply, net.rounded, four, tables, names, net.images, logits, context="quantized"
    )
    replaced = simulate.predict(
        net.apply, net.rounded, four | {names[0]: tables[1][names[0]]}, simulate.switches(four), net.images
    )
    np.testing.assert_allclose(whole[0, 1], np.mean(allocation.kl_divergence(logits, replaced)), rtol=1e-6)
    with pytest.raises(ConfigError, match="context='half'"):
        allocation.perturbation_table(net.apply, net.variables, four, tables, names, net.images, logits, context="half")


def test_unknown_sites_are_named(net, four):
    with pytest.raises(ConfigError, match=r"site 'blocks.9.mlp.fc1'"):
        simulate.switches(four, ["blocks.9.mlp.fc1"])
    extra = four | {"blocks.9.mlp.fc1": four["blocks.0.mlp.fc1"]}
    with pytest.raises(ConfigError, match=r"no tap 'blocks.9.mlp.fc1'"):
        simulate.forward(net.apply, net.variables, extra, simulate.switches(extra), net.images)


# --- the quantizers of a whole network -------------------------------------------------------------------------------


def test_sites_calibrated_together_equal_sites_calibrated_alone(net):
    counts = {name: 3 if "fc" in name else 5 for name in net.grouped}
    bounds, objective = quantizers.calibrate_groups(net.ranges, net.sites, counts)
    for name in net.grouped:
        alone, history = quantizers.groups.calibrate_bounds(net.ranges[name].reshape(-1, 2), counts[name])
        assert bounds[name].shape == (1, counts[name], 2) and objective[name].shape == (1, 21)
        np.testing.assert_allclose(bounds[name][0], alone, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(objective[name][0], history, rtol=1e-3)


def test_each_head_has_its_own_quantizers_when_asked(net):
    name = "blocks.0.attn.softmax"
    bounds, _ = quantizers.calibrate_groups(net.ranges, net.sites, 4, per_head=True)
    assert bounds[name].shape == (2, 4, 2) and bounds["blocks.0.mlp.fc1"].shape == (1, 4, 2)
    second, _ = quantizers.groups.calibrate_bounds(net.ranges[name][:, 1].reshape(-1, 2), 4)
    np.testing.assert_allclose(bounds[name][1], second, rtol=1e-5, atol=1e-6)
    made = quantizers.igq_quantizers(net.sites, bounds, net.intervals, BITS)
    a = net.values[name]
    expected = quantizers.groups.igq_fake_quant_rows(a, bounds[name], BITS)
    np.testing.assert_allclose(made[name](a, 7), expected, rtol=1e-6)


def test_the_image_has_eight_bits_and_the_head_one_interval(net, four):
    assert int(four["patch_embed.proj"].bits) == 8 and int(four["head"].bits) == BITS
    found = quantizers.tensor_intervals(net.module.apply, net.variables, net.images, net.sites, BITS)
    assert list(found) == list(net.intervals)
    for name, interval in found.items():
        np.testing.assert_allclose(interval, net.intervals[name], rtol=1e-4)
    assert four["head"].scale.shape == ()


def test_layer_scale_of_the_network_equals_that_of_each_site(net, four):
    refined, factors = quantizers.refine_layer_scale(net.module.apply, net.variables, four, net.images, batch_size=7)
    assert set(factors) == set(net.grouped) and refined["head"] is four["head"]
    for name in ("blocks.0.mlp.fc2", "blocks.0.attn.softmax"):
        q = four[name]
        bounds = q.bounds[0] if q.axis == "channels" else q.bounds
        errors = quantizers.groups.layer_scale_errors(net.values[name], bounds, BITS, q.count, axis=q.axis)
        assert factors[name] == quantizers.groups.MULTIPLIERS[int(np.argmin(errors))]
        np.testing.assert_allclose(refined[name].bounds, q.bounds * factors[name], rtol=1e-6)


def test_layer_scale_keeps_to_the_clipped_zero_point(net, four):
    name = "blocks.0.mlp.fc1"
    bounds = jnp.asarray([[[1.0, 2.0], [-1.5, -0.5]]])  # without 0
    options = {"axis": "channels", "clip_zero_point": True}
    clipped = {name: quantizers.groups.InstanceGroupQuantizer.create(bounds, BITS, 2, **options)}
    _, factors = quantizers.refine_layer_scale(net.module.apply, net.variables, clipped, net.images, batch_size=7)
    errors = quantizers.groups.layer_scale_errors(net.values[name], bounds[0], BITS, clip_zero_point=True)
    assert factors[name] == quantizers.groups.MULTIPLIERS[int(np.argmin(errors))]
    unclipped = quantizers.groups.layer_scale_errors(net.values[name], bounds[0], BITS)
    assert np.argmin(unclipped) != np.argmin(errors)


def test_sequential_calibration_sees_the_quantized_network(net):
    kinds = {site.name: site.kind for site in net.sites}
    seen = {}

    def make(name, x):
        if name not in kinds:
            return None
        seen[name] = np.asarray(x)
        lower, upper = weights.tensor_interval(x, 3)
        return quantizers.activation.AffineQuantizer.from_interval(lower, upper, 3)

    made = quantizers.calibrate_sequentially(net.module.apply, net.variables, net.images, make)
    assert list(made) == list(kinds)
    np.testing.assert_array_equal(seen["patch_embed.proj"], net.values["patch_embed.proj"])
    assert np.abs(seen["blocks.0.mlp.fc2"] - net.values["blocks.0.mlp.fc2"]).mean() > 1e-2

    def tap(name, x):
        return made[name](x, 7) if name in made else x

    def record(name, x):
        if name == "head":
            final.append(x)
        return tap(name, x)

    final = []
    net.module.apply(net.variables, jnp.asarray(net.images), tap=record)
    np.testing.assert_allclose(final[0], seen["head"], rtol=1e-4, atol=1e-4)


def test_a_quantizer_for_each_channel_and_row_has_less_noise(net, four):
    for name in net.grouped:
        upper = DynamicGroupQuantizer.create(BITS, axis=four[name].axis)
        x = jnp.asarray(net.values[name])
        noise = [float(np.square(x - quantizer(x, 7)).sum()) for quantizer in (upper, four[name])]
        assert noise[0] < noise[1]
