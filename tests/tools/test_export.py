"""Exporting the quantized network of a finished run."""

import json

import jax
import numpy as np
import pytest

from jaxvision.core.config import Config
from jaxvision.engine import quantized_files
from jaxvision.engine.quantization import build_network
from jaxvision.methods.igq_vit import export as igq_vit_file
from jaxvision.models import integer_file, stablehlo, weight_file, zoo
from jaxvision.tools import export

SETTINGS = {"depth": 8, "width_multiplier": 0.25}
QUANTIZATION = {
    "family": "trs", "weight_bits": 2, "input_bits": 2, "gradient_bits": 32, "gradient": "uniform",
    "noise_bits": 32, "exponent": 0,
    "execution": "fake", "output_scale": None, "float_layers": ["^conv1/", "^linear/"], "signed_inputs": [],
    "bit_rules": [],
}  # fmt: skip
DATA = {
    "source": "shapes", "path": "", "options": {}, "train_split": "train", "eval_split": "test", "train_size": 0,
    "validation_size": 0, "batch_size": 4, "eval_batch_size": 4, "pipeline": "array", "size": 0, "mean": [], "std": [],
    "augment": {"crop_padding": 0, "flip": False, "scale": [0.08, 1.0], "jitter": 0.0, "rand_augment": 0.0,
                "erasing": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run that trained LSQ as one of its arms, and the network and variables it left."""
    directory = tmp_path_factory.mktemp("run")
    config = {
        "method": "trs", "seed": 0, "quantization": QUANTIZATION, "data": DATA,
        "model": {"name": "resnet20", "settings": SETTINGS, "dtype": "float32"},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    module = zoo.build("resnet20", num_classes=5, **SETTINGS)
    network = build_network(Config({**QUANTIZATION, "family": "lsq"}, "q"), module, images[:1])
    variables = jax.jit(lambda x: network.calibrate(network.init(jax.random.key(0), x), x))(images)
    bits = json.dumps(quantized_files.widths(network, images[:1]))
    facts = {"model": "resnet20", "num_classes": 5, "family": "lsq", "bits": bits}
    weight_file.save_variables(directory / "quantized.safetensors", variables, facts)
    return directory, network, variables, images


def test_the_files_give_the_trained_networks_outputs(run, tmp_path, capsys):
    directory, network, variables, images = run
    arguments = ["--workdir", str(directory), "--to", str(tmp_path / "out"), "--image", "8", "8", "3"]
    assert export.main([*arguments, "--storage", "int4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"resnet20 of {directory}: 6 integer layers") and "quantized kernels" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "network.safetensors", "network.json", "program.mlirbc", "program.mlirbc.json",
    }  # fmt: skip
    expected = jax.jit(network.apply)(variables, images)
    found = stablehlo.load(tmp_path / "out" / "program").call(images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    model = integer_file.load(tmp_path / "out" / "network")
    np.testing.assert_allclose(jax.jit(network.apply)(model.variables, images), expected, rtol=1e-4, atol=1e-5)
    assert model.model["model"] == "resnet20" and model.model["image"] == [8, 8, 3]
    kernel = model.variables["params"]["layer1_0"]["conv1"]["kernel"]
    assert str(kernel.dtype) == "int4" and len(model.layers) == 6


def test_the_image_is_that_of_the_runs_data(run):
    directory, network, _, _ = run
    found, _, shape, _ = export.load(directory)
    assert shape == (32, 32, 3)
    assert found.rules == network.rules


def test_mistakes_end_in_one_sentence(run, tmp_path, capsys):
    directory, *_ = run

    def complaint(workdir, *more):
        assert export.main(["--workdir", str(workdir), "--to", str(tmp_path / "out"), *more]) == 64
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "config.json does not exist; --workdir must be the directory of a run" in complaint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "a finished run of trs or lbt writes it where config.export names an arm" in complaint(tmp_path)
    assert "storage='int3' is unknown" in complaint(directory, "--storage", "int3", "--image", "8", "8", "3")
    assert "--image=(8, 0, 3) must be three whole numbers" in complaint(directory, "--image", "8", "0", "3")
    igq = igq_vit_file.QuantizedModel({"params": {}}, {}, {}, {"model": "deit_tiny_patch16_224", "num_classes": 5})
    igq_vit_file.save(tmp_path / "quantized", igq)
    assert "is of igq_vit and holds integers already" in complaint(tmp_path)
    assert not (tmp_path / "out").exists()
