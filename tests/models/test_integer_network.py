"""Integer networks: conversion, memory, files that another program reads, and StableHLO."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.models import integer_file, integer_network, stablehlo, zoo
from jaxvision.models.integer_file import IntegerModel
from jaxvision.models.layers import Conv, Dense
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.quant.binary import RSign
from jaxvision.quant.families import FAMILIES
from jaxvision.quant.lsq import LSQ
from tests.models.networks import SMALL, assert_equal


def layer(family, bits, *, weight=None, **options):
    chosen = FAMILIES[family]
    options = {"needs_norm": chosen.needs_norm, "output_scale": chosen.output_scale, **options}
    weights = Recipe(chosen.weight, {**chosen.weight_settings, **(weight or {})})
    return LayerQuant(weights, Recipe(chosen.activation, dict(chosen.activation_settings)), bits, **options)


class Net(nn.Module):
    """Each kind of product once, inputs of both signs, all of it written down again in NumPy below."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Conv(6, 3, stride=2, padding=1, groups=3, dilation=(1, 2), name="conv")(x)
        x = nn.relu(Conv(4, 1, use_bias=False, name="point")(x))
        return Dense(3, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 7, 8, 3)).astype(np.float32)


def trained(network, images):
    """Calibrated variables, biases and statistics of normalisations away from their start."""
    variables = jax.jit(lambda x: network.calibrate(network.init(jax.random.key(0), x), x))(images)
    rng = np.random.default_rng(1)
    moved = lambda name: name.endswith("/bias") or name.startswith("batch_stats")  # noqa: E731
    shift = lambda name, x: x + moved(name) * rng.uniform(0, 0.5, x.shape).astype(np.float32)  # noqa: E731
    return trees.map_named(shift, variables)


def both(network, variables, integers, images):
    return jax.jit(lambda v, i, x: (network.apply(v, x), network.apply(i, x)))(variables, integers, images)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_outputs_from_integers(family, images):
    """Net's first input has both signs: Affine's zero point is not 0, unsigned families clip."""
    bits = Bits(1, 1) if family in ("binary", "reactnet") else Bits(4, 8 if family == "affine" else 4)
    network = QuantizedNetwork(Net(), (Rule("kernel$", layer(family, bits)),))
    variables = trained(network, images)
    integers = integer_network.convert(network, variables)
    exact, found = both(network, variables, integers, images)
    assert np.ptp(exact) > 0
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_the_same_outputs_from_a_transformer():
    name, settings, size = SMALL["deit"]
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    chosen = LayerQuant(Recipe(LSQ, {"per_channel": True}), Recipe(LSQ), Bits(4, 8))
    network = QuantizedNetwork(zoo.build(name, num_classes=5, **settings), (Rule("kernel$", chosen),))
    variables = trained(network, images)
    integers = integer_network.convert(network, variables, "int4")
    assert integers["params"]["patch_embed"]["kernel"].dtype == jnp.int4
    exact, found = both(network, variables, integers, images)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_what_becomes_of_the_variables(images):
    network = QuantizedNetwork(Net(), (Rule("head", None), Rule("kernel$", layer("ewgs", Bits(2, 3, 4)))))
    variables = trained(network, images)
    integers = integer_network.convert(network, variables)
    before, after = trees.named_leaves(variables), trees.named_leaves(integers)
    kernels = {f"params/{name}" for name in network.layers(variables["params"])}
    gone = {name for name in before if name.startswith("interval/")}
    gone |= {name.replace("kernel", part) for name in kernels for part in ("kernel_lower", "kernel_upper")}
    assert after.keys() == (before.keys() - gone) | {f"{name}_step" for name in kernels}
    for name in after.keys() & before.keys():
        if name in kernels:
            assert after[name].dtype == jnp.int8 and after[name].shape == before[name].shape
            assert set(np.unique(after[name])) <= {-3, -1, 1, 3}
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    quantizer = network.quantizers(variables["params"])["conv"]["kernel"]
    kernel, own = variables["params"]["conv"]["kernel"], integers["params"]["conv"]
    np.testing.assert_allclose(own["kernel"] * own["kernel_step"], quantizer(kernel), rtol=1e-6)


def test_int4_where_the_codes_fit(images):
    rules = (Rule("conv", layer("lsq", Bits(4, 4))), Rule("point", layer("lsq", Bits(5, 4))), Rule("head", None))
    network = QuantizedNetwork(Net(), rules)
    variables = trained(network, images)
    own = variables["params"]["point"]
    own["kernel_scale"] = np.abs(own["kernel"]).max() / 15  # its largest code is 15 or -15
    integers = integer_network.convert(network, variables, "int4")
    kinds = {name: leaf.dtype for name, leaf in trees.named_leaves(integers["params"]).items() if "kernel" in name}
    assert (kinds["conv/kernel"], kinds["point/kernel"], kinds["head/kernel"]) == (jnp.int4, jnp.int8, jnp.float32)


def test_widths_as_data_count(images):
    network = QuantizedNetwork(Net(), (Rule("kernel$", layer("lbt", Bits(8, 8))),))
    variables = network.with_bits(trained(network, images), Bits(3, 2))
    integers = integer_network.convert(network, variables)
    assert int(np.abs(integers["params"]["conv"]["kernel"]).max()) <= 3
    exact, found = both(network, variables, integers, images)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    assert integer_network.describe(network, integers, images)["head/kernel"].input.thresholds.shape == (3,)


def test_memory_counts_half_a_byte_for_int4(images):
    network = QuantizedNetwork(Net(), (Rule("conv|point", layer("lbt", Bits(4, 4))), Rule("head", None)))
    variables = trained(network, images)
    elements = {"conv": 3 * 3 * 1 * 6, "point": 6 * 4, "head": 4 * 3 * 4 * 3}
    rest = 4 * (elements["head"] + 6 + 3 + 2)  # biases and the inputs' scales
    for storage, bytes_each in (("int8", 1), ("int4", 0.5)):
        found = integer_network.memory(variables, integer_network.convert(network, variables, storage))
        assert found.float_kernels == 4 * (54 + 24)
        assert found.kernels == bytes_each * (54 + 24) + 2 * 4
        assert found.rest == rest
        assert found.ratio == (found.kernels + rest) / (found.float_kernels + rest)
    assert str(found).endswith("quantized kernels 0.00 MiB -> 0.00 MiB (0.151)")


@pytest.mark.parametrize(
    ("make", "storage", "message"),
    [
        (lambda: layer("lbt", Bits(4, 4)), "int2", "storage='int2' is unknown; .*int4, int8"),
        (lambda: layer("lbt", Bits(None, 4)), "int8", "no layer of this network has quantized weights"),
        (
            lambda: layer("ewgs", Bits(8, 8)),
            "int8",
            "/kernel: the codes of EWGSWeight go from -[0-9]+ to [0-9]+, which int8 doesn't hold",
        ),
    ],
)
def test_what_can_not_be_converted(make, storage, message, images):
    network = QuantizedNetwork(Net(), (Rule("kernel$", make()),))
    with pytest.raises(ConfigError, match=message):
        integer_network.convert(network, trained(network, images), storage)


def test_conversion_is_done_once(images):
    network = QuantizedNetwork(Net(), (Rule("kernel$", layer("dorefa", Bits(4, 4))),))
    integers = integer_network.convert(network, trained(network, images))
    with pytest.raises(ConfigError, match="conv/kernel holds codes already"):
        integer_network.convert(network, integers)


# --- tables ----------------------------------------------------------------------------------------------------------

TABLED = {
    **{name: lambda x, f=f, b=b: f.activation.fit(x, b, **f.activation_settings)
       for name, f in FAMILIES.items() for b in [1 if name in ("binary", "reactnet") else 3]},
    "one_bit": lambda x: FAMILIES["trs"].activation.fit(x, 1),
    "signed": lambda x: FAMILIES["lbt"].activation.fit(x, 8, signed=True),
    "per_channel": lambda x: LSQ.fit(x, 4, per_channel=True),
    "rsign": lambda x: RSign(shift=jnp.float32([-0.4, 0.1, 0.3, 2.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLED)
def test_a_table_gives_the_quantizers_codes_for_every_input(name):
    """Also next to the thresholds, where one bit of the input decides."""
    x = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    quantizer = TABLED[name](x)
    table = integer_network.tabulate(quantizer)
    edges = table.thresholds.reshape(-1, 4 if table.thresholds.ndim == 2 else 1) * np.ones((1, 4), np.float32)
    edges = edges.astype(np.float32)
    x = np.concatenate([x, 100 * x, edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf), 0 * x[:1]])
    found = table.lowest + (x[..., None] >= np.moveaxis(table.thresholds, 0, -1)).sum(-1)
    np.testing.assert_array_equal(found, jax.jit(lambda q, x: q.codes(x))(quantizer, x))
    np.testing.assert_allclose(table.step * (found - table.zero), quantizer(x), rtol=1e-6, atol=1e-6)


# --- files -----------------------------------------------------------------------------------------------------------


def saved(network, images, path, storage="int4"):
    integers = integer_network.convert(network, trained(network, images), storage)
    layers = integer_network.describe(network, integers, jax.ShapeDtypeStruct(images.shape, jnp.float32))
    integer_file.save(path, IntegerModel(integers, layers, {"name": "net", "num_classes": 3}))
    return integers


def convolve(x, kernel, stride, padding, dilation, groups):
    """A convolution of integers in plain NumPy, loop by loop."""
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    x = np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    kh, kw, _, features = kernel.shape
    height, width = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[1:3], dilation, (kh, kw), stride))
    y = np.zeros((len(x), height, width, features), np.int64)
    for group in range(groups):
        inputs, outputs = (slice(group * n // groups, (group + 1) * n // groups) for n in (x.shape[-1], features))
        for i in range(kh):
            for j in range(kw):
                part = x[:, i * dh : i * dh + height * sh : sh, j * dw : j * dw + width * sw : sw, inputs]
                y[..., outputs] += part[:, :height, :width] @ kernel[i, j, :, outputs]
    return y


def another_program(path, images):
    """Runs Net from its two files, by what the documentation of ``integer_file`` says and with NumPy alone."""
    arrays = safetensors.numpy.load_file(f"{path}.safetensors")
    described = json.loads(path.with_name(f"{path.name}.json").read_text())

    def product(entry, x):
        name = entry["kernel"]
        kernel = arrays[f"variables/params/{name}"]
        if entry["storage"] == "int4":
            halves = np.stack([kernel & 15, kernel >> 4], 1).reshape(-1)[: np.prod(entry["shape"])].astype(np.int64)
            kernel = np.where(halves > 7, halves - 16, halves).reshape(entry["shape"])
        scope, table = (
            name.removesuffix("kernel"),
            {k: arrays[f"inputs/{name}/{k}"] for k in ("thresholds", "step", "zero")},
        )
        codes = entry["input"]["lowest"] + (x[..., None] >= table["thresholds"]).sum(-1)
        codes = codes - table["zero"].astype(np.int64)
        kernel = kernel.astype(np.int64)
        if entry["product"] == "dense":
            sums = codes @ kernel
        else:
            sums = convolve(codes, kernel, *(entry[key] for key in ("stride", "padding", "dilation", "groups")))
        y = sums * (table["step"] * arrays[f"variables/params/{name}_step"])
        y = y * np.abs(arrays.get(f"variables/params/{scope}output_scale", np.float32(1)))
        return (y + arrays.get(f"variables/params/{scope}bias", np.float32(0))).astype(np.float32)

    conv, point, head = described["layers"]
    x = np.maximum(product(point, product(conv, images)), 0)
    return product(head, x.reshape(len(x), -1))


@pytest.mark.parametrize(("family", "bits"), [("affine", Bits(4, 8)), ("ewgs", Bits(3, 4)), ("trs", Bits(2, 2))])
def test_another_program_reads_the_files(family, bits, images, tmp_path):
    network = QuantizedNetwork(Net(), (Rule("kernel$", layer(family, bits)),))
    integers = saved(network, images, tmp_path / "net")
    expected = jax.jit(network.apply)(integers, images)
    np.testing.assert_allclose(another_program(tmp_path / "net", images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_files_come_back_bit_for_bit(storage, images, tmp_path):
    rules = (Rule("conv", layer("lsq", Bits(3, 4))), Rule("point", layer("lsq", Bits(3, None))), Rule("head", None))
    network = QuantizedNetwork(Net(), rules)
    integers = saved(network, images, tmp_path / "sub" / "net", storage)
    model = integer_file.load(tmp_path / "sub" / "net")
    assert_equal(jax.device_get(integers), jax.device_get(model.variables))
    assert model.model == {"name": "net", "num_classes": 3}
    expected = integer_network.describe(network, integers, images)
    assert list(model.layers) == list(expected) == ["conv/kernel", "point/kernel"]
    assert model.layers["point/kernel"] == expected["point/kernel"] and expected["point/kernel"].input is None
    one, other = model.layers["conv/kernel"], expected["conv/kernel"]
    assert (one.shape, one.geometry) == (other.shape, other.geometry)
    assert (one.input.lowest, one.input.kind, one.input.bits) == (0, "LSQ", 4)
    np.testing.assert_array_equal(one.input.thresholds, other.input.thresholds)
    run = jax.jit(network.apply)
    np.testing.assert_array_equal(run(model.variables, images), run(integers, images))


def test_packing_int4():
    codes = np.arange(-8, 7, dtype=np.int8).reshape(3, 5)
    packed = integer_file.pack_int4(codes)
    assert packed.dtype == np.uint8 and packed.tolist()[:2] == [0x98, 0xBA] and len(packed) == 8
    np.testing.assert_array_equal(integer_file.unpack_int4(packed, (3, 5)), codes)


def test_files_that_are_not_ours(images, tmp_path):
    path = tmp_path / "net"
    with pytest.raises(
        DataError, match=r"net\.json does not exist; an integer network is a \.json and a \.safetensors"
    ):
        integer_file.load(path)
    saved(QuantizedNetwork(Net(), (Rule("kernel$", layer("lbt", Bits(4, 4))),)), images, path)
    described, stored = tmp_path / "net.json", tmp_path / "net.safetensors"
    text, data = described.read_text(), stored.read_bytes()

    stored.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(DataError, match="damaged or belongs to another model"):
        integer_file.load(path)
    stored.write_bytes(data)
    described.write_text(text[:-9])
    with pytest.raises(DataError, match="is not valid JSON"):
        integer_file.load(path)
    described.write_text(text.replace('"version": 2', '"version": 3'))
    with pytest.raises(DataError, match=r"no integer network of format .* version 2, but 'jaxvision"):
        integer_file.load(path)

    arrays, metadata = safetensors.numpy.load(data), json.loads(text)
    with pytest.raises(DataError, match="has an array 'inputs/other/step' that its JSON file doesn't mention"):
        integer_file.from_flat({**arrays, "inputs/other/step": np.zeros(())}, metadata)
    del arrays["inputs/conv/kernel/step"]
    with pytest.raises(DataError, match="has no array 'inputs/conv/kernel/step', which its JSON file announces"):
        integer_file.from_flat(arrays, metadata)


# --- StableHLO -------------------------------------------------------------------------------------------------------


def test_a_program_is_saved_and_runs_again_with_any_batch(images, tmp_path):
    network = QuantizedNetwork(Net(), (Rule("kernel$", layer("lsq", Bits(3, 4))),))
    integers = integer_network.convert(network, trained(network, images), "int4")
    stablehlo.save(tmp_path / "net", stablehlo.trace(lambda x: network.apply(integers, x), images.shape[1:]))
    program = stablehlo.load(tmp_path / "net")
    assert program.platforms == ("cpu", "cuda", "tpu")
    expected = jax.jit(network.apply)(integers, images)
    for batch in (2, 1):
        np.testing.assert_allclose(program.call(images[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)
    described = json.loads((tmp_path / "net.mlirbc.json").read_text())
    assert described["input"] == {"shape": ["batch", 7, 8, 3], "dtype": "float32"}
    assert described["output"] == {"shape": ["batch", 3], "dtype": "float32"}
    text = program.mlir_module()
    assert "stablehlo.dot_general" in text and "xi8>" in text
    with pytest.raises(ValueError, match="shape"):
        program.call(images[:, :4])


def test_a_program_of_one_batch_size(images, tmp_path):
    network = QuantizedNetwork(Net(), (Rule("kernel$", layer("affine", Bits(4, 8))),))
    integers = integer_network.convert(network, trained(network, images))
    function = lambda x: network.apply(integers, x)  # noqa: E731
    stablehlo.save(tmp_path / "net", stablehlo.trace(function, images.shape[1:], batch=2, platforms=("cpu",)))
    program = stablehlo.load(tmp_path / "net")
    np.testing.assert_allclose(program.call(images), jax.jit(function)(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="shape"):
        program.call(images[:1])


def test_programs_that_are_not_ours(images, tmp_path):
    with pytest.raises(DataError, match=r"net\.mlirbc\.json does not exist; a StableHLO program is a"):
        stablehlo.load(tmp_path / "net")
    stablehlo.save(tmp_path / "net", stablehlo.trace(lambda x: x.sum((1, 2)), (2, 2, 3), platforms=("cpu",)))
    described = tmp_path / "net.mlirbc.json"
    text = described.read_text()
    described.write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(DataError, match=r"no program of format .* version 1, but 'jaxvision"):
        stablehlo.load(tmp_path / "net")
    described.write_text(text)
    with open(tmp_path / "net.mlirbc", "ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match="damaged or belongs to another model"):
        stablehlo.load(tmp_path / "net")
