"""The ``quantization`` block: which layers it quantizes and how, and every mistake it finds."""

import jax
import jax.numpy as jnp
import pytest

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine.quantization import build_network
from jaxvision.models import zoo
from jaxvision.models.quantized import Bits
from jaxvision.quant.families import FAMILIES

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
FLOAT = ("^conv1/", "^linear/")


def build(module=None, **changes):
    block = {
        "family": "lbt", "weight_bits": 4, "input_bits": 3, "gradient_bits": 32, "gradient": "uniform",
        "noise_bits": 32, "exponent": 0,
        "execution": "fake", "output_scale": None, "float_layers": FLOAT, "signed_inputs": (), "bit_rules": (),
        **changes,
    }  # fmt: skip
    config = Config(block, "config.quantization")
    module = module or zoo.build("resnet20", num_classes=5, depth=8, width_multiplier=0.25)
    network = build_network(config, module, IMAGE)
    config.check_all_read()
    return network


def test_the_block_decides_for_every_layer():
    network = build(gradient_bits=5, gradient="per_channel", noise_bits=8, exponent=1, execution="int")
    found = network.check(IMAGE)
    assert list(found) == [
        f"layer{stage}_0/conv{conv}/kernel" for stage in (1, 2, 3) for conv in (1, 2)
    ]  # fmt: skip
    for layer in found.values():
        assert layer.bits == Bits(4, 3, 5) and layer.gradient == "per_channel" and layer.execution == "int"
        assert (layer.noise_bits, layer.exponent) == (8, 1)
        assert (layer.weight.kind, layer.input.kind) == (FAMILIES["lbt"].weight, FAMILIES["lbt"].activation)
        assert not layer.output_scale and not layer.needs_norm


def test_32_bits_are_float():
    (layer, *_) = build(weight_bits=32, input_bits=32).check(IMAGE).values()
    assert layer.bits == Bits(None, None, None)


@pytest.mark.parametrize(
    ("family", "scaled", "needed"), [("ewgs", True, True), ("trs", False, True), ("lsq", False, False)]
)
def test_what_belongs_to_the_family_comes_with_it(family, scaled, needed):
    layers = build(family=family).check(IMAGE).values()
    assert {(layer.output_scale, layer.needs_norm) for layer in layers} == {(scaled, needed)}
    (layer, *_) = layers
    assert layer.weight.settings == FAMILIES[family].weight_settings
    assert layer.input.settings == FAMILIES[family].activation_settings


VIT = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2}


def transformer(family, products):
    module = zoo.build("vit_tiny_patch16_224", num_classes=5, **VIT)
    network = build(module, family=family, float_layers=("patch_embed",), output_scale=True, products=products)
    return network.check_products(IMAGE)


def test_products_of_attention_are_quantized_where_rules_find_them():
    rules = (("blocks_0/attn/softmax_v", (8, 32)), ("blocks_0/attn/q_k", (3, 4)), ("q_k", (2, 5)))
    found = transformer("trs", rules)
    assert {name: layer.bits for name, layer in found.items()} == {
        "blocks_0/attn/q_k": Bits(4, 3), "blocks_0/attn/softmax_v": Bits(None, 8), "blocks_1/attn/q_k": Bits(5, 2)
    }  # fmt: skip
    # q, k and v have signs, probabilities haven't. TRS drops the scale, which must then be learned; LSQ doesn't.
    signs = [(layer.input.settings.get("signed"), layer.weight.settings["signed"]) for layer in found.values()]
    assert signs == [(True, True), (None, True), (True, True)]
    assert all(layer.output_scale for layer in found.values())
    assert not any(layer.output_scale for layer in transformer("lsq", rules).values())
    assert transformer("trs", ()) == {}


@pytest.mark.parametrize(
    ("products", "message"),
    [
        (("q_k", (4, 4)), r"config.quantization.products has 'q_k', which must be a regular expression and the widths"),
        ((("q_k", 4),), r"config.quantization.products has \('q_k', 4\), which must be"),
        ((("q_v", (4, 4)),), "config.quantization.products has 'q_v', which matches no layer"),
        ((("q_k", (4, 9)),), "weight_bits=9 must be a whole number from 1 to 8"),
    ],
)
def test_mistakes_in_products(products, message):
    with pytest.raises(ConfigError, match=message):
        transformer("trs", products)


def test_products_need_attention_and_signs():
    with pytest.raises(ConfigError, match="the network has no attention with such products"):
        build(products=(("q_k", (4, 4)),))
    with pytest.raises(ConfigError, match="inputs of family 'pact' are unsigned only, and q, k and v have both signs"):
        transformer("pact", (("q_k", (4, 4)),))


def test_an_output_scale_can_be_added_and_left_out():
    assert all(layer.output_scale for layer in build(family="trs", output_scale=True).check(IMAGE).values())
    assert not any(layer.output_scale for layer in build(family="ewgs", output_scale=False).check(IMAGE).values())
    with_head = build(family="trs", float_layers=(), output_scale=True).check(IMAGE)
    assert "linear/kernel" in with_head


def test_bit_rules_and_signed_inputs_go_by_the_first_match():
    rules = (("layer1_0/conv1", (8, 8, 32)), ("layer1", (2, 2, 4)), ("conv2/kernel$", (6, 32, 32)))
    found = build(bit_rules=rules, signed_inputs=("layer2",)).check(IMAGE)
    bits = {name.removesuffix("/kernel"): layer.bits for name, layer in found.items()}
    assert bits == {
        "layer1_0/conv1": Bits(8, 8), "layer1_0/conv2": Bits(2, 2, 4), "layer2_0/conv1": Bits(4, 3),
        "layer2_0/conv2": Bits(6), "layer3_0/conv1": Bits(4, 3), "layer3_0/conv2": Bits(6),
    }  # fmt: skip
    signed = [name for name, layer in found.items() if layer.input.settings.get("signed")]
    assert signed == ["layer2_0/conv1/kernel", "layer2_0/conv2/kernel"]
    # Asymmetric quantizers take negative inputs as they are.
    asymmetric = build(family="affine", signed_inputs=("layer2",)).check(IMAGE)
    assert not any("signed" in layer.input.settings for layer in asymmetric.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "lbd"}, r"quantization.family='lbd' is unknown; did you mean 'lbt'"),
        ({"weight_bits": 9}, "weight_bits=9 must be a whole number from 1"),
        ({"input_bits": 0}, "input_bits=0 must be a whole number from 1"),
        ({"input_bits": 2.5}, "input_bits=2.5 must be a whole number"),
        ({"gradient_bits": 1}, "gradient_bits=1 must be a whole number from 2 to"),
        ({"noise_bits": 16}, "noise_bits=16 must be 8 or 32"),
        ({"execution": "integer"}, "execution='integer' is unknown; did you mean 'int'"),
        ({"execution": "int", "input_bits": 32}, "execution='int' needs weight_bits and input_bits"),
        ({"float_layers": ("^conv1/", "layer7")}, r"quantization.float_layers has 'layer7', which matches no"),
        ({"float_layers": ("conv(",)}, r"quantization.float_layers has 'conv\(', which is not a regular"),
        ({"signed_inputs": ("^conv1/",)}, r"quantization.signed_inputs has '\^conv1/', which matches no"),
        ({"signed_inputs": ("conv(",)}, r"quantization.signed_inputs has 'conv\(', which is not a regular"),
        ({"bit_rules": (("conv9", (2, 2, 32)),)}, "quantization.bit_rules has 'conv9', which matches no"),
        ({"bit_rules": (("conv(", (2, 2, 32)),)}, r"quantization.bit_rules has 'conv\(', which is not a regular"),
        ({"bit_rules": (("conv2", (2, 2)),)}, r"quantization.bit_rules has \('conv2', \(2, 2\)\), which must be a reg"),
        ({"bit_rules": (("conv2", 8),)}, r"has \('conv2', 8\), which must be .* three widths"),
        ({"bit_rules": ("conv2", (8, 8, 8))}, r"has 'conv2', which must be .* with a comma at the end"),
        ({"bit_rules": (("layer", (8, 8, 32)), ("layer3", (2, 2, 32)))},
         "quantization.bit_rules has 'layer3', which decides nothing: 'layer' before it takes all its layers"),
        ({"float_layers": (1,)}, r"quantization.float_layers=\(1,\) must be strings"),
        ({"bit_rules": (("conv2", (2, 11, 32)),)}, "input_bits=11 must be a whole number from 1"),
        ({"family": "pact", "signed_inputs": ("layer2",)}, "signed_inputs=.*, but inputs of family"),
        ({"family": "trs", "float_layers": ("^conv1/",)}, "linear/kernel has a quantizer that drops the scale"),
    ],
)  # fmt: skip
def test_mistakes(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"weight_bits": "4"}, {"weight_bits": True}, {"gradient": "uniformly", "gradient_bits": 4},
     {"family": "binary", "weight_bits": 2, "input_bits": 2}, {"weight_bits": 1, "input_bits": 1},
     {"gradient_bits": 17}, {"gradient": "piecewise", "gradient_bits": 2}],
)  # fmt: skip
def test_mistakes_are_found_before_anything_compiles(changes):
    """Whatever the quantizers themselves refuse, tracing the network once shows."""
    with pytest.raises(ConfigError):
        build(**changes)
