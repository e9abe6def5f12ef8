"""Quantized networks: names, rules, start values, widths as data, gradients, and the two executions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.core.types import no_tap
from jaxvision.models import torch_import, zoo
from jaxvision.models.layers import BatchNorm, Conv, Dense, global_avg_pool
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule, kernel_names
from jaxvision.quant.families import FAMILIES
from tests.models.networks import SMALL, drawn

STEM_AND_HEAD = Rule(r"^conv1/|^linear/", None)


def recipes(family, **input_settings):
    chosen = FAMILIES[family]
    return (
        Recipe(chosen.weight, dict(chosen.weight_settings)),
        Recipe(chosen.activation, {**chosen.activation_settings, **input_settings}),
    )


def layer(family="lbt", bits=None, *, input_settings=None, **options):
    chosen = FAMILIES[family]
    options = {"needs_norm": chosen.needs_norm, "output_scale": chosen.output_scale, **options}
    return LayerQuant(*recipes(family, **(input_settings or {})), bits or Bits(4, 4), **options)


def resnet(family="lbt", bits=None, rules=(STEM_AND_HEAD,), **options):
    name, settings, _ = SMALL["cifar_a"]
    module = zoo.build(name, num_classes=5, **settings)
    return QuantizedNetwork(module, (*rules, Rule("kernel$", layer(family, bits, **options))))


def loss_of(logits, labels=(0, 3)):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], 1))


class Mixed(nn.Module):
    """Stem, a depthwise, a pointwise and a strided convolution, a sum, a matrix: a network that compiles quickly."""

    @nn.compact
    def __call__(self, x, train=False, tap=no_tap):
        def conv(x, name, features, size, stride=1, groups=1):
            layer = Conv(features, size, stride=stride, padding=size // 2, groups=groups, use_bias=False, name=name)
            return BatchNorm(name=f"{name}_norm")(layer(tap(name, x)), train)

        x = nn.relu(conv(x, "stem", 6, 3, 2))
        x = nn.relu(conv(x, "depthwise", 6, 3, groups=6))
        x = nn.relu(x + conv(x, "pointwise", 6, 1))
        x = nn.relu(conv(x, "strided", 8, 3, 2))
        return Dense(5, name="head")(tap("head", global_avg_pool(x)))


def mixed(family="lbt", bits=None, **options):
    return QuantizedNetwork(Mixed(), (Rule("^stem/|^head/", None), Rule("kernel$", layer(family, bits, **options))))


class Plain(nn.Module):
    """conv, ReLU, matrix: small enough to be written down again by hand."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(Conv(4, 3, stride=2, padding=1, name="conv")(x))
        return Dense(3, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)


def started(network, images):
    return jax.jit(network.init)(jax.random.key(0), images)


def calibrated(network, images):
    make = jax.jit(lambda key, x: network.calibrate(network.init(key, x), x))
    return make(jax.random.key(0), images)


# --- parameters ------------------------------------------------------------------------------------------------------


def test_a_quantized_network_has_the_float_ones_parameters_and_its_quantizers(images):
    network = resnet("ewgs", Bits(2, 3, 4))
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    module_names = set(trees.named_leaves(jax.eval_shape(network.module.init, jax.random.key(0), images)))
    quantized = [name.removesuffix("kernel") for name in network.check(images)]
    own = ("kernel_lower", "kernel_upper", "input_lower", "input_upper", "output_scale")
    expected = {f"params/{scope}{part}" for scope in quantized for part in own}
    expected |= {f"interval/{scope}gamma" for scope in quantized}
    assert len(quantized) == 6
    assert set(trees.named_leaves(variables)) == module_names | expected


def test_the_float_parameters_start_as_in_the_float_network(images):
    network = mixed()
    quantized = trees.named_leaves(started(network, images))
    for name, leaf in trees.named_leaves(started(network.module, images)).items():
        np.testing.assert_array_equal(quantized[name], leaf, err_msg=name)


def test_without_widths_the_network_is_the_float_one(images):
    network = mixed(bits=Bits())
    variables = drawn(network.module, 0, images)
    assert set(trees.named_leaves(variables)) == set(trees.named_leaves(drawn(network, 0, images)))
    np.testing.assert_array_equal(
        jax.jit(network.apply)(variables, images), jax.jit(network.module.apply)(variables, images)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_initializes_calibrates_and_runs(family, images):
    network = mixed(family, Bits(1, 1) if family in ("binary", "reactnet") else Bits(3, 3))
    network.check(images)

    def run(images):
        variables = network.init(jax.random.key(0), images)
        fitted = network.calibrate(variables, images)
        return variables, network.apply(variables, images), network.apply(fitted, images)

    variables, before, after = jax.jit(run)(images)
    assert np.isfinite(before).all() and np.isfinite(after).all()
    assert np.array_equal(before, after) == (not FAMILIES[family].activation.LEARNED)
    for role in ("kernel", "input"):  # known now, so that every quantizer checks its values
        for quantizer in jax.tree.leaves(network.quantizers(variables["params"], role), is_leaf=callable):
            quantizer.check()


# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_counts(images):
    wide, narrow = layer(bits=Bits(8, 8)), layer(bits=Bits(2, 2))
    rules = (Rule("layer2", wide), Rule("conv2/kernel$", None), Rule("layer", narrow))
    module = resnet().module
    found = QuantizedNetwork(module, rules).check(images)
    assert found == {
        "layer1_0/conv1/kernel": narrow,
        "layer2_0/conv1/kernel": wide,
        "layer2_0/conv2/kernel": wide,
        "layer3_0/conv1/kernel": narrow,
    }
    assert list(found) == [name for name in kernel_names(module, images) if name in found]
    shadowed = QuantizedNetwork(module, (*rules, Rule("layer3", wide)))
    message = r"has 'layer3', which decides nothing: 'layer' and 'conv2/kernel\$' before it takes all its layers"
    with pytest.raises(ConfigError, match=message):
        shadowed.check(images)


def test_a_rule_that_matches_nothing_is_an_error(images):
    with pytest.raises(ConfigError, match=r"'layer9', which matches no layer .*; kernels are called conv1/kernel"):
        resnet(rules=(Rule("layer9", None),)).check(images)


def test_a_rule_that_is_no_expression_is_an_error():
    with pytest.raises(ConfigError, match=r"the rule 'conv\(' is not a regular expression: missing \)"):
        resnet(rules=(Rule("conv(", None),))


def test_a_missing_normalisation_is_an_error(images):
    module = resnet().module
    with pytest.raises(ConfigError, match=r"^linear/kernel has a quantizer that drops the scale, but no normalisation"):
        QuantizedNetwork(module, (Rule("kernel$", layer("trs")),)).check(images)
    assert QuantizedNetwork(module, (Rule("kernel$", layer("trs", output_scale=True)),)).check(images)
    assert QuantizedNetwork(module, (Rule("kernel$", layer("lbt")),)).check(images)
    assert QuantizedNetwork(module, (Rule("^linear", None), Rule("kernel$", layer("trs")))).check(images)


def test_a_normalisation_must_come_before_the_next_product():
    vit = zoo.build("vit_tiny_patch16_224", num_classes=3, **SMALL["vit"][1])
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ConfigError, match="blocks_0/attn/qkv/kernel has a quantizer that drops the scale"):
        QuantizedNetwork(vit, (Rule("attn/qkv", layer("trs")),)).check(image)


@pytest.mark.parametrize("case", ["wide", "densenet", "deeplab"])
def test_networks_of_calibration_quantize_by_rule(case):
    """Every convolution is found, dilated ones too, and each has a normalisation behind it, but the classifier's."""
    name, settings, size = SMALL[case]
    module = zoo.build(name, num_classes=5, **settings)
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    classifier = {"wide": "^fc/", "densenet": "^linear/", "deeplab": "^segmentation_head_0/"}[case]
    network = QuantizedNetwork(module, (Rule(classifier, None), Rule("kernel$", layer("trs", Bits(4)))))
    leaves = trees.named_leaves(zoo.variable_shapes(module, (size, size))["params"])
    kernels = {leaf for leaf in leaves if leaf.endswith("kernel") and not leaf.startswith(classifier[1:])}
    assert len(kernels) > 6 and set(network.check(image)) == kernels


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bits(9, 4), "weight_bits=9 must be a whole number from 1 to 8"),
        (lambda: Bits(4, 0), "input_bits=0 must be a whole number from 1 to 8"),
        (lambda: Bits(4, 4, 1), "gradient_bits=1 must be a whole number from 2 to"),
        (lambda: Bits(4.0), "weight_bits=4.0 must be a whole number"),
        (lambda: Bits(True), "weight_bits=True must be a whole number"),
        (lambda: LayerQuant(bits=Bits(4)), "weight_bits=4, but the rule names no weight quantizer"),
        (lambda: LayerQuant(recipes("lbt")[0], bits=Bits(4, 4)), "input_bits=4, but the rule names no input quantizer"),
        (lambda: layer(execution="integer"), "execution='integer' is unknown; did you mean 'int'"),
        (lambda: layer(bits=Bits(4), execution="int"), "execution='int' needs weight_bits and input_bits"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# --- start values ----------------------------------------------------------------------------------------------------


def published_start(family, role, x):
    """Start values by the papers' formulas, in float64."""
    x = np.asarray(x, np.float64)
    if family == "lsq":
        return 2 * np.abs(x).mean() / np.sqrt(2**3 - 1 if role == "kernel" else 2**4 - 1)
    return 3 * x.std(ddof=1) / (1 if role == "kernel" else np.sqrt(1 - 2 / np.pi))


def inputs_by_layer(network, variables, images):
    """What the layers are given in training mode."""

    def run(variables):
        seen = {}
        tap = lambda name, x: seen.setdefault(name, x)  # noqa: E731
        network.apply(variables, images, train=True, mutable=["batch_stats"], tap=tap)
        return seen

    return jax.jit(run)(variables)


@pytest.mark.parametrize("family", ["trs", "lbt", "lsq"])
def test_calibration_gives_the_published_start_values(family, images):
    """Each layer's input is what its quantized predecessors give in training mode."""
    network = mixed(family)
    variables = calibrated(network, images)
    params, seen = trees.named_leaves(variables["params"]), inputs_by_layer(network, variables, images)
    for name in network.layers(variables["params"]):
        scope = name.removesuffix("kernel")
        x = seen[scope.strip("/")]
        expected = published_start(family, "kernel", params[name])
        np.testing.assert_allclose(params[f"{scope}kernel_scale"], expected, rtol=1e-5)
        np.testing.assert_allclose(params[f"{scope}input_scale"], published_start(family, "input", x), rtol=1e-5)


def test_calibration_moves_nothing_else(images):
    network = mixed("ewgs", Bits(3, 3, 4))
    variables = started(network, images)
    after = trees.named_leaves(jax.jit(network.calibrate)(variables, images))
    before = trees.named_leaves(variables)
    assert before.keys() == after.keys()
    moved = {name.rsplit("/", 1)[-1] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"input_upper", "output_scale"}  # the inputs come from a ReLU: their lower end is 0 from the start


def test_the_output_scale_starts_at_the_ratio_of_the_mean_sizes(images):
    network = QuantizedNetwork(Mixed(), (Rule("^strided/", layer("ewgs")),))
    variables = calibrated(network, images)
    own = variables["params"]["strided"]
    x = inputs_by_layer(network, variables, images)["strided"]
    conv = Conv(8, 3, stride=2, padding=1, use_bias=False)
    (kernel,), (q_input,) = (
        jax.tree.leaves(network.quantizers(variables["params"], role), is_leaf=callable) for role in ("kernel", "input")
    )
    run = jax.jit(lambda x, kernel: conv.apply({"params": {"kernel": kernel}}, x))
    y_float, y = run(x, own["kernel"]), run(q_input(x), kernel(own["kernel"]))
    np.testing.assert_allclose(own["output_scale"], np.abs(y_float).mean() / np.abs(y).mean(), rtol=1e-5)


# --- widths as data --------------------------------------------------------------------------------------------------


def test_traced_widths_give_what_static_ones_give_and_compile_once(images):
    traces = []
    free = mixed(bits=Bits(8, 8, 8))
    variables = calibrated(free, images)

    def run(network):
        def value(params, rest):
            traces.append(1)
            return loss_of(network.apply({"params": params, **rest}, images, train=True, mutable=["batch_stats"])[0])

        return jax.jit(jax.value_and_grad(value))

    traced = run(free)
    for bits in (Bits(2, 2, 4), Bits(3, 5, 6)):
        rest = {name: tree for name, tree in free.with_bits(variables, bits).items() if name != "params"}
        found = traced(variables["params"], rest)
    del rest["bits"]
    expected = run(mixed(bits=bits))(variables["params"], rest)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), found, expected)
    assert len(traces) == 1 + 1


def test_widths_of_single_layers(images):
    network = mixed(bits=Bits(8, None, None))
    variables = started(network, images)
    names = network.layers(variables["params"])
    bits = {name: Bits(2 + index, 4, 4) for index, name in enumerate(names)}
    widths = trees.named_leaves(network.with_bits(variables, bits)["bits"])
    assert [widths[name.replace("kernel", "widths")].tolist() for name in names] == [[2 + i, 4, 4] for i in range(3)]
    # What the rule leaves in float stays float.
    fewer = network.with_bits(variables, Bits(8, 2, 2))
    apply = jax.jit(network.apply)
    np.testing.assert_array_equal(apply(fewer, images), apply(variables, images))


def test_jitted_and_not(images):
    network = QuantizedNetwork(Plain(), (Rule("kernel$", layer("lsq")),))
    variables = calibrated(network, images)
    np.testing.assert_allclose(
        network.apply(variables, images), jax.jit(network.apply)(variables, images), rtol=1e-5, atol=1e-6
    )


# --- quantizers of the parameters ------------------------------------------------------------------------------------


def test_the_optimizer_gets_the_quantizers_of_the_forward_pass(images):
    network = mixed("lsq", Bits(3, 4))
    variables = calibrated(network, images)
    params = variables["params"]
    found = network.quantizers(params)
    assert jax.tree.structure(params) == jax.tree.structure(jax.tree.map(lambda _: 0, params))
    kinds = trees.map_named(lambda name, leaf, q: q, params, found)
    conv = kinds["strided"]["kernel"]
    assert isinstance(conv, FAMILIES["lsq"].weight) and conv.signed and conv.bits == 3
    np.testing.assert_array_equal(conv.scale, params["strided"]["kernel_scale"])
    assert kinds["stem"]["kernel"] is None and kinds["strided"]["kernel_scale"] is None
    x = network.quantizers(params, "input")["strided"]["kernel"]
    assert not x.signed and x.bits == 4
    # Not differentiated: the loss must not see the scale through the optimizer's argument.
    through = jax.grad(lambda p: network.quantizers(p)["strided"]["kernel"].scale)(params)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(through))
    widths = network.with_bits(variables, Bits(2, 4))["bits"]
    assert network.quantizers(params, bits=widths)["strided"]["kernel"].bits == 2


# --- gradients -------------------------------------------------------------------------------------------------------


def test_output_gradients_of_a_float_network(images):
    network = QuantizedNetwork(Plain(), (Rule("kernel$", LayerQuant()),))
    variables = drawn(network, 0, images)
    found = network.output_gradients(variables, loss_of, images)
    conv, head = variables["params"]["conv"], variables["params"]["head"]

    def after_conv(y):
        return loss_of(nn.relu(y + conv["bias"]).reshape(len(y), -1) @ head["kernel"] + head["bias"])

    y = jax.lax.conv_general_dilated(
        images, conv["kernel"], (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    logits = network.apply(variables, images)
    np.testing.assert_allclose(found["conv/kernel"], jax.grad(after_conv)(y), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["head/kernel"], jax.grad(loss_of)(logits), rtol=1e-5, atol=1e-7)
    assert found.keys() == {"conv/kernel", "head/kernel"}


def test_gradients_of_the_intervals_are_clip_counts(images):
    """Expected from the unquantized gradients of the same backward pass."""
    network = mixed(bits=Bits(4, 4, 4))
    variables = calibrated(network, images)
    gammas = np.linspace(0.3, 0.6, 3, dtype=np.float32)
    for gamma, name in zip(gammas, network.layers(variables["params"])):
        variables["interval"][name.split("/")[0]]["gamma"] = jnp.asarray([gamma, 0, 0])
    key = jax.random.key(5)

    def loss(outputs):
        return loss_of(outputs[0])

    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"gradient": key}}

    def value(interval, variables):
        return loss(network.apply({**variables, "interval": interval}, images, **options))

    found = jax.jit(jax.grad(value))(variables["interval"], variables)
    outputs = jax.jit(lambda v: network.output_gradients(v, loss, images, **options))(variables)
    for gamma, (name, g) in zip(gammas, outputs.items()):
        g = np.abs(np.asarray(g))
        assert (g > gamma * g.max()).any()
        np.testing.assert_array_equal(found[name.split("/")[0]]["gamma"], [0, (g > gamma * g.max()).sum(), g.size])


def test_the_gradient_stream_rounds_stochastically(images):
    network = mixed(bits=Bits(4, 4, 3))
    variables = calibrated(network, images)

    def gradient(key):
        rngs = {} if key is None else {"gradient": key}

        def value(params):
            outputs = network.apply(
                {**variables, "params": params}, images, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            return loss_of(outputs[0])

        return jax.grad(value)(variables["params"])["strided"]["kernel"]

    draw = jax.jit(gradient)
    one, again, other = draw(jax.random.key(1)), draw(jax.random.key(1)), draw(jax.random.key(2))
    nearest = jax.jit(lambda: gradient(None))()
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other) and not np.array_equal(one, nearest)


# --- float weights ---------------------------------------------------------------------------------------------------


def test_weights_of_a_float_pytorch_network_load(images):
    network = resnet("lsq", Bits(8, 8))
    name, module = SMALL["cifar_a"][0], network.module
    state = torch_import.export_state_dict(name, drawn(module, 1, images))
    pretrained = torch_import.convert(name, state, jax.eval_shape(module.init, jax.random.key(0), images))
    known = trees.named_leaves(pretrained)
    loaded = trees.map_named(lambda leaf, new: jnp.asarray(known.get(leaf, new)), drawn(network, 0, images))
    loaded = jax.jit(network.calibrate)(loaded, images)
    for leaf, value in known.items():
        np.testing.assert_array_equal(trees.named_leaves(loaded)[leaf], value, err_msg=leaf)
    run = lambda net: net.apply(loaded, images, train=True, mutable=["batch_stats"])[0]  # noqa: E731
    exact, found = jax.jit(lambda: (run(module), run(network)))()
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


# --- two executions --------------------------------------------------------------------------------------------------

EXECUTED = {
    "mixed": lambda execution: mixed("lbt", Bits(4, 4, 3), execution=execution),
    "resnet": lambda execution: resnet("trs", Bits(2, 2), execution=execution),
    "deit": lambda execution: deit("lsq", Bits(4, 4, 8), input_settings={"signed": True}, execution=execution),
}


def deit(family, bits, **options):
    name, settings, _ = SMALL["deit"]
    module = zoo.build(name, num_classes=5, **settings)
    return QuantizedNetwork(module, (Rule("^head", None), Rule("kernel$", layer(family, bits, **options))))


@pytest.mark.parametrize("case", EXECUTED)
def test_integer_and_fake_execution_agree(case):
    """To float rounding, unless it moves a value over a ReLU's kink or a code's edge; so values are few here, and the
    biases of normalisations aren't 0, on which the kink would lie."""
    fake, integer = EXECUTED[case]("fake"), EXECUTED[case]("int")
    rng, size = np.random.default_rng(2), 32 if case == "deit" else 8
    images = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    shift = lambda name, x: x + name.endswith("bias") * rng.normal(0, 0.5, x.shape).astype(np.float32)  # noqa: E731
    variables = trees.map_named(shift, calibrated(fake, images))
    rest = {name: tree for name, tree in variables.items() if name not in ("params", "interval")}
    rngs = {"gradient": jax.random.key(7), "dropout": jax.random.key(3)}

    def run(network):
        def value(params, interval, images):
            own = {"interval": interval} if interval else {}
            outputs = network.apply(
                {"params": params, **own, **rest}, images, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            logits = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            return loss_of(logits), outputs

        step = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
        return step(variables["params"], variables.get("interval", {}), images)

    (one, outputs), gradients = run(fake)
    (other, expected), others = run(integer)
    np.testing.assert_allclose(other, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4), outputs, expected)
    for (name, a), b in zip(trees.named_leaves(gradients).items(), jax.tree.leaves(others), strict=True):
        assert np.isfinite(b).all(), name
        # The residual is kept in 1/254 of a step: gradients of the inputs' scales are that exact (quant/integer.py).
        rounding = 1e-2 if "/input_" in name else 1e-4
        np.testing.assert_allclose(b, a, rtol=10 * rounding, atol=rounding * np.abs(a).max() + 1e-7, err_msg=name)
        if name.endswith("kernel"):
            assert np.abs(a).max() > 0, name


def quantized(case, execution="fake"):
    name, settings, size = SMALL[case]
    module = zoo.build(name, num_classes=5, **settings)
    chosen = layer("lbt", Bits(4, 4, 4), input_settings={"signed": True}, execution=execution)
    return QuantizedNetwork(module, (Rule("kernel$", chosen),)), (2, size, size, 3)


def gradients_of(network, variables, images):
    """By name, of the parameters in training mode."""
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    rngs = {"gradient": jax.random.key(1), "dropout": jax.random.key(2)}

    def value(params):
        outputs, _ = network.apply({"params": params, **rest}, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return sum(jnp.sum(logits**2) for logits in jax.tree.leaves(outputs))

    return trees.named_leaves(jax.grad(value)(variables["params"]))


@pytest.mark.parametrize(
    ("case", "execution"), [*((case, "fake") for case in SMALL), ("mobilenet", "int"), ("autoformer", "int")]
)
def test_every_network_trains_quantized_as_it_is(case, execution):
    """All its kernels by one rule, weights, inputs and gradients; traced."""
    network, shape = quantized(case, execution)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernels = [name for name in trees.named_leaves(shapes_of(network.module, image)) if name.endswith("kernel")]
    assert set(network.check(image)) == set(kernels)
    variables = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    found = jax.eval_shape(lambda variables, images: gradients_of(network, variables, images), variables, image)
    for kernel in kernels:
        assert found[kernel].shape == trees.named_leaves(variables["params"])[kernel].shape
        assert {f"{kernel}_scale", f"{kernel.removesuffix('kernel')}input_scale"} <= found.keys()


def shapes_of(module, image):
    return jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)["params"]


@pytest.mark.parametrize("execution", ["fake", "int"])
def test_the_noise_and_the_narrow_interval_of_a_rule_reach_the_gradient(execution):
    """Other numbers are another program, the same ones the same."""
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def program(noise_bits, exponent):
        options = {"gradient": "piecewise", "noise_bits": noise_bits, "exponent": exponent, "execution": execution}
        network = QuantizedNetwork(Plain(), (Rule("kernel$", layer("lbt", Bits(4, 4, 4), **options)),))
        variables = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), image)
        text = str(jax.make_jaxpr(lambda v, x: gradients_of(network, v, x))(variables, image))
        return re.sub("0x[0-9a-f]+", "", text)

    assert program(32, 0) == program(32, 0)
    assert len({program(32, 0), program(8, 0), program(32, 2)}) == 3


@pytest.mark.parametrize("case", ["autoformer", "mobilenet"])
def test_gradients_reach_every_kernel_and_scale(case):
    network, shape = quantized(case)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def run(images):
        variables = network.calibrate(network.init(jax.random.key(0), images), images)
        return gradients_of(network, variables, images)

    for name, gradient in jax.jit(run)(images).items():
        assert np.isfinite(gradient).all(), name
        if "kernel" in name or "input_" in name:
            assert np.abs(gradient).max() > 0, name


def test_both_executions_evaluate_alike(images):
    fake, integer = mixed(bits=Bits(4, 4)), mixed(bits=Bits(4, 4), execution="int")
    variables = calibrated(fake, images)
    one, other = jax.jit(lambda: (fake.apply(variables, images), integer.apply(variables, images)))()
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_batch_norm_between_layers_is_found_by_type(images):
    """Another normalisation than BatchNorm and LayerNorm counts as none: the check errs on the safe side."""

    class Odd(nn.Module):
        normalized: bool

        @nn.compact
        def __call__(self, x, train=False):
            x = Conv(4, 3, name="conv")(x)
            x = BatchNorm(name="norm")(x, train) if self.normalized else x / jnp.std(x)
            return nn.relu(x)

    assert QuantizedNetwork(Odd(True), (Rule("conv", layer("trs")),)).check(images)
    with pytest.raises(ConfigError, match="conv/kernel has a quantizer that drops the scale"):
        QuantizedNetwork(Odd(False), (Rule("conv", layer("trs")),)).check(images)
