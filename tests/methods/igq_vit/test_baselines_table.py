"""All methods of the comparison on one tiny transformer, and what they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import simulate
from jaxvision.methods.igq_vit.baselines import METHODS, fqvit, ptq4vit, static
from jaxvision.methods.igq_vit.calibration import Bits, Calibration, common_quantizers, common_variables
from jaxvision.models.vit import ViT
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer
from jaxvision.quant.log import Log2Quantizer, LogSqrt2Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer
from jaxvision.quant.weights import WeightPolicy

# mlp_ratio=1: layers of one shape share what has to be compiled.
MODULE = ViT(num_classes=5, patch_size=4, width=16, depth=1, num_heads=2, mlp_ratio=1.0)
ROW_METHODS = {"repq_rows", "consecutive8", "peg8", "kmeans8", "vsquant8", "dynamic_tensor"}


@pytest.fixture(scope="module")
def context():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 16, 16, 3)).astype(np.float32)
    shapes = jax.eval_shape(MODULE.init, jax.random.key(0), images[:1])

    def leaf(name, like):
        fan_in = np.prod(like.shape[:-1]) if name.endswith("kernel") else 10
        return (rng.normal(size=like.shape) / np.sqrt(fan_in) + name.endswith("scale")).astype(np.float32)

    variables = trees.map_named(leaf, shapes)
    return Calibration.create(MODULE.apply, variables, images, weight_policy=WeightPolicy(method="minmax"))


def softmax_rows(bits):
    return {"blocks.0.attn.softmax": DynamicGroupQuantizer.create(bits, axis="rows")}


def built(context, name, width):
    return METHODS[name](context, Bits(width, width), softmax_quantizers=softmax_rows(width))


def logits(context, variables, quantizers):
    """Op by op: the methods share most operations, and a program of its own for each would take minutes to compile."""
    tap = simulate.QuantizedTap(quantizers, simulate.switches(quantizers), len(context.images))
    found = context.apply_fn(variables, context.images, tap=tap)
    tap.check_all_seen()
    return np.asarray(found)


@pytest.fixture(scope="module")
def float_logits(context):
    return logits(context, context.variables, {})


@pytest.mark.parametrize("name", METHODS)
def test_method_builds_and_more_bits_are_better(context, float_logits, name):
    errors = []
    for width in (4, 8):
        network = built(context, name, width)
        assert set(network.quantizers) >= {site.name for site in context.sites}
        got = logits(context, network.variables, network.quantizers)
        assert np.isfinite(got).all()
        errors.append(np.mean((got - float_logits) ** 2) / np.mean(float_logits**2))
    assert 0 < errors[1] < 0.3 * errors[0] and errors[1] < 0.05
    # The kernels really are rounded: few values in each output channel.
    kernel = np.asarray(network.variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"])
    assert np.any(kernel != np.asarray(context.variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]))


@pytest.mark.parametrize("name", METHODS)
def test_changing_the_bits_compiles_nothing_anew(context, name):
    """Networks of one method at two widths are pytrees of one structure, shapes and types."""
    four, three = (
        jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), built(context, name, width))
        for width in (4, 3)
    )
    assert four == three


@pytest.mark.parametrize("name", sorted(ROW_METHODS))
def test_methods_without_a_softmax_quantizer_say_so(context, name):
    with pytest.raises(ConfigError, match=r"softmax_quantizers with one for 'blocks.0.attn.softmax'"):
        METHODS[name](context, Bits())


def test_each_method_has_the_quantizers_of_its_paper(context):
    kinds = {
        "minmax": (AffineQuantizer, AffineQuantizer),
        "fqvit": (Log2Quantizer, AffineQuantizer),
        "repq": (LogSqrt2Quantizer, AffineQuantizer),
        "ptq4vit": (TwinSoftmaxQuantizer, TwinGeluQuantizer),
        "upper": (DynamicGroupQuantizer, DynamicGroupQuantizer),
    }
    for name, (softmax, fc2) in kinds.items():
        quantizers = built(context, name, 4).quantizers
        assert isinstance(quantizers["blocks.0.attn.softmax"], softmax), name
        assert isinstance(quantizers["blocks.0.mlp.fc2"], fc2), name
        assert int(quantizers["patch_embed.proj"].bits) == 8, name
    assert built(context, "upper_static", 4).quantizers["blocks.0.attn.qkv"].scale.shape == (16,)
    assert built(context, "repq", 4).quantizers["blocks.0.attn.qkv"].scale.shape == ()
    assert built(context, "ptq4vit", 4).quantizers["blocks.0.attn.k"].scale.shape == (2, 1, 1)
    norms = set(built(context, "fqvit", 4).quantizers) - {site.name for site in context.sites}
    assert norms == {"blocks.0.norm1", "blocks.0.norm2", "norm"}
    plain = fqvit.fqvit(context, Bits(), power_of_two=False)
    assert set(plain.quantizers) == {site.name for site in context.sites}


def test_shared_work_is_done_once_and_shared_policy_is_shared(context):
    bits = Bits(4, 4)
    assert common_variables(context, bits) is common_variables(context, Bits(4, 3))
    peg, upper = built(context, "peg8", 4), built(context, "upper", 4)
    for name in ("patch_embed.proj", "blocks.0.attn.q", "blocks.0.attn.v", "head"):
        assert peg.quantizers[name] is upper.quantizers[name] is common_quantizers(context, bits)[name]
    assert peg.variables is upper.variables


def test_observers_see_batches(context):
    halves = Calibration(
        context.apply_fn, context.variables, context.sites, context.images, context.activations, observer_batch=3
    )
    assert [len(batch) for batch in halves.batches("blocks.0.attn.qkv")] == [3, 3, 3, 3, 3, 1]
    name = "blocks.0.mlp.fc2"
    minmax, ema = (static.observed_quantizer(halves, name, static.OBSERVERS[o], 4) for o in ("minmax", "ema"))
    assert float(ema.scale) != float(minmax.scale)
    whole = static.observed_quantizer(context, name, static.OBSERVERS["ema"], 4)
    assert float(whole.scale) == float(minmax.scale)


def test_weight_policy_is_the_callers(context):
    policy = WeightPolicy(method="minmax")
    other = Calibration(context.apply_fn, context.variables, context.sites, context.images, {}, weight_policy=policy)
    kernel = np.asarray(common_variables(other, Bits(2, 4))["params"]["head"]["kernel"])
    assert all(len(np.unique(column)) <= 4 for column in kernel.T)


def test_bits_and_images_are_checked(context):
    with pytest.raises(ConfigError, match=r"bits\.activation=0"):
        Bits(4, 0)
    with pytest.raises(ConfigError, match="calibration needs images"):
        Calibration.create(context.apply_fn, context.variables, np.zeros((16, 16, 3)))


def summed_bias_gradients(context, target):
    def loss(params):
        found = MODULE.apply({"params": params}, context.images)
        return -jnp.sum(target * jax.nn.log_softmax(found))

    return jax.jit(jax.grad(loss))(context.variables["params"])


def test_output_gradients_sum_to_those_of_the_biases(context, float_logits):
    target = np.eye(5, dtype=np.float32)[float_logits.argmax(-1)]
    found = ptq4vit.output_gradients(context)
    biases = trees.named_leaves(summed_bias_gradients(context, target))
    for site in context.sites:
        if site.weight:
            expected = biases[site.weight.replace("kernel", "bias")]
            np.testing.assert_allclose(found[site.name].sum(0), expected, rtol=2e-3, atol=2e-4, err_msg=site.name)


def test_gradients_of_both_attention_products(context, float_logits):
    """dL/dq = d^-0.5 (dL/dlogits) k, and dL/dv = A^T dL/d(A v)."""
    target = np.eye(5, dtype=np.float32)[float_logits.argmax(-1)]
    found = ptq4vit.output_gradients(context)
    names = ("blocks.0.attn.q", "blocks.0.attn.v")
    exact = ptq4vit.tap_gradients(context.apply_fn, context.variables, context.images, target, names)
    k, a = (context.activations[f"blocks.0.attn.{part}"] for part in ("k", "softmax"))
    q_gradient = found["blocks.0.attn.q"] @ k * k.shape[-1] ** -0.5
    np.testing.assert_allclose(q_gradient, exact[names[0]], rtol=1e-3, atol=1e-4)
    v_gradient = np.swapaxes(a, -1, -2) @ found["blocks.0.attn.softmax"]
    np.testing.assert_allclose(v_gradient, exact[names[1]], rtol=1e-3, atol=1e-4)


def test_the_official_gradient_is_rounding_noise(context):
    own, official = (ptq4vit.output_gradients(context, kind)["head"] for kind in ptq4vit.GRADIENTS)
    assert np.abs(official).max() < 1e-5 < 1e-3 < np.abs(own).max()
    with pytest.raises(ConfigError, match="gradient='mse'"):
        ptq4vit.output_gradients(context, "mse")


def test_a_network_without_output_taps_is_named():
    with pytest.raises(ConfigError, match=r"output of layer 'blocks.0.mlp.fc2'"):
        ptq4vit.output_tap("blocks.0.mlp.fc2", ["blocks.0.mlp.fc2", "head.out"])
    assert ptq4vit.output_tap("patch_embed.proj", ["patch_embed.norm", "patch_embed.out"]) == "patch_embed.norm"
    assert ptq4vit.output_tap("layers.1.downsample.reduction", ["layers.1.downsample.out"]).endswith("downsample.out")


def test_patches_are_in_the_order_of_the_kernel():
    images = np.random.default_rng(3).normal(size=(2, 4, 6, 3)).astype(np.float32)
    kernel = np.random.default_rng(4).normal(size=(2, 3, 3, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        images, kernel, (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(-1, 5)
    got = ptq4vit.patches(images, 2, 3) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
