"""The task: mistakes are named before anything runs, presets have their full size, the report chooses fairly."""

import json
import logging

import jax
import numpy as np
import pytest
from PIL import Image

from configs import lbt as config_file
from jaxvision.core import trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, NonFiniteError
from jaxvision.engine import arms, loop, parallel
from jaxvision.engine.options import Options
from jaxvision.engine.plan import Plan
from jaxvision.engine.progress import Progress
from jaxvision.engine.report import Results
from jaxvision.methods.lbt import control, networks, report, task
from jaxvision.models import weight_file, zoo
from jaxvision.models.quantized import Bits
from jaxvision.tools import export

SMALL = {"data__batch_size": 16, "seeds": (0,)}


def changed(preset="smoke", **changes):
    """The configuration with overrides as on the command line, as plain values."""
    config = config_file.get_config(preset)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return Config(config.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("lbtt",)}, "config.arms='lbtt' is unknown; did you mean 'lbt'"),
        ({"arms": ()}, r"config.arms=\(\) must be at least one value"),
        ({"seeds": (1, 1)}, r"config.seeds=\(1, 1\) must be at least one seed, each once"),
        ({"seeds": (0.5,)}, r"config.seeds=\(0.5,\) must be whole numbers"),
        ({"lr_grid": ("a",)}, r"config.lr_grid=\('a',\) must be numbers, such as \(0.1, 0.01\)"),
        ({"fixed_gammas": ("a",)}, r"config.fixed_gammas=\('a',\) must be numbers"),
        ({"interval__alphas": ("a",)}, r"config.interval.alphas=\('a',\) must be numbers"),
        ({"search__rate_factors": ()}, r"config.search.rate_factors=\(\) must be at least one value"),
        ({"quantization__bit_rules": (("conv2", 8),)}, r"config.quantization.bit_rules has \('conv2', 8\), which must"),
        ({"quantization__bit_rules": ("conv2", (8, 8, 8))}, "config.quantization.bit_rules has 'conv2', which must"),
        ({"gradient_bits": (4, 1)}, "config.gradient_bits has 1, but widths are whole numbers from 2 to 8"),
        ({"gradient_bits": (9,)}, "config.gradient_bits has 9"),
        ({"gradient_bits": (2,), "arms": ("piecewise",)}, "has 'piecewise', which needs 3 gradient bits"),
        ({"fixed_gammas": (1.5,)}, "config.fixed_gammas has 1.5"),
        ({"interval__alphas": (2.0,)}, "alpha=2.0 must be a fraction"),
        ({"interval__start": "quantil"}, "did you mean 'quantile'"),
        ({"lr_grid": (0.1, 0.01)}, "set config.data.validation_size"),
        ({"lr_grid": (0.0,)}, "config.lr_grid has 0.0"),
        ({"quantization__weight_bits": 9}, "weight_bits=9 must be a whole number from 1 to 8"),
        ({"quantization__weight_bits": 1}, "LBTWeight: bits=1 must be a whole number from 2 to 8"),
        ({"quantization__float_layers": ("layer9",)}, "has 'layer9', which matches no layer"),
        ({"quantization__execution": "integer"}, "did you mean 'int'"),
        ({"export": "dsg"}, "config.export='dsg' is unknown; did you mean 'dsgc'"),
        ({"export": "float", "arms": ("float", "wa")}, "config.export='float' is unknown"),
        ({"first_last": "8"}, "config.first_last='8' is not one of"),
        ({"optimizer__accumulate": 3}, "can't be cut into config.optimizer.accumulate=3"),
        ({"search__every": 0}, "config.search.every=0 must be a number above 0"),
    ],
)
def test_mistakes_are_found_before_compiling(changes, message):
    with pytest.raises(ConfigError, match=message):
        task.make(changed(**changes))


def test_the_arms_own_the_gradients():
    config = config_file.get_config("smoke")
    with config.unlocked():
        config.quantization.gradient_bits = 4
    with pytest.raises(ConfigError, match=r"config.quantization.gradient_bits is set by config.arms and"):
        task.make(Config(config))


def test_too_few_elements_are_told_with_their_number_in_one_line(caplog):
    with caplog.at_level(logging.WARNING, "jaxvision"):
        task.make(changed(**SMALL, interval__alphas=(1e-3,), gradient_bits=(4,), arms=("lbt",)))
    (record,) = caplog.records
    assert "\n" not in record.message
    # 16 images of 4 x 4 pixels and 4 channels, a thousandth of them, over 15.
    assert record.message.startswith("conv2: the gradient has 1024 elements") and "0.068" in record.message
    assert record.message.endswith("in 2 of 2 combinations of layer, alpha and width")
    caplog.clear()
    task.make(changed(interval__alphas=(0.5,), arms=("lbt",)))
    assert not caplog.records


def test_a_constant_kernel_of_a_weights_file_is_named(tmp_path):
    """Its interval would be 0."""
    model = config_file.get_config("smoke").model
    module = zoo.build(model.name, num_classes=10, **model.settings)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    path = tmp_path / "weights.safetensors"

    def make():
        weight_file.save_variables(path, variables, {"model": model.name, "num_classes": 10})
        return task.make(changed(**SMALL, model__init_from=str(path), arms=("lbt",)))

    made = make()
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    start = made.load(empty).extra[arms.START]
    kernel = trees.named_leaves(variables)["params/conv2/kernel"]
    np.testing.assert_array_equal(start["params"]["conv2"]["kernel"], np.asarray(kernel)[None])
    variables["params"]["conv3"]["kernel"] *= 0
    with pytest.raises(ConfigError, match=r"all values of conv3/kernel are equal, .* scale 0"):
        make()
    # Batch norm without a scale, then ReLU: the next layer has no input to fit an interval to.
    variables["params"]["conv3"]["kernel"] += np.float32(0.1) * np.arange(4, dtype=np.float32)
    variables["params"]["bn2"] = jax.tree.map(lambda leaf: 0 * leaf, variables["params"]["bn2"])
    options = Options.read(changed())
    with pytest.raises(ConfigError, match=r"the input of conv3/kernel can't be quantized: LBTActivation.scale=0 must"):
        loop.run(make(), options, tmp_path / "run", parallel.create("jit"), Progress(False))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("how", ("vmap", "call"))
def test_infinite_gradients_stop_the_run_and_names_the_leaf(how, tmp_path):
    config = changed(arms=("lbt",), optimizer__lr=1e30, how=how)
    options = Options.read(config)
    with pytest.raises(NonFiniteError, match=r"the metric .* is not finite; first bad leaf of the state: params/"):
        loop.run(task.make(config), options, tmp_path, parallel.create("jit"), Progress(False))


# --- layers ----------------------------------------------------------------------------------------------------------


def built(arms_=("wa", "lbt", "piecewise"), **changes):
    config = changed(**changes)
    spec = zoo.spec(config.model.name)
    data = task.recipes.build_data(config.data, 0, spec)
    model = task.recipes.build_model(config.model, data)
    controls = {"wa": None, "lbt": control.lbt((1e-3,), 1e-3, "one"), "piecewise": control.piecewise()}
    controls = {name: controls[name] for name in arms_}
    return networks.build(config.quantization, controls, 4, config.first_last, model)


def test_each_arm_has_its_gradient_quantizer_and_first_and_last_layer_are_float():
    found = built()
    names = {"conv2/kernel", "conv3/kernel"}
    for name, gradient in (("wa", None), ("lbt", 4), ("piecewise", 4)):
        assert set(found[name].layers) == names
        assert {layer.bits.gradient for layer in found[name].layers.values()} == {gradient}
    assert found["wa"].follows == frozenset() and found["lbt"].follows == names
    assert next(iter(found["piecewise"].layers.values())).gradient == "piecewise"


def test_first_and_last_layer_in_8_bits_keep_their_own_widths():
    rules = (("conv2", (4, 4, 4)),)
    found = built(("lbt",), first_last="8bit", quantization__bit_rules=rules)["lbt"]
    widths = {name: (b.weight, b.input, b.gradient) for name, b in ((n, x.bits) for n, x in found.layers.items())}
    assert widths["conv1/kernel"] == (8, None, 8) and widths["fc/kernel"] == (8, 8, 8)
    assert found.follows == {"conv3/kernel"}


def test_the_first_layer_in_8_bits_stays_in_float_arithmetic_under_integer_execution():
    """Its input is float, so it has no integer product."""
    found = built(("lbt",), first_last="8bit", quantization__execution="int")["lbt"].layers
    executions = {name: layer.execution for name, layer in found.items()}
    assert executions == {"conv1/kernel": "fake", "conv2/kernel": "int", "conv3/kernel": "int", "fc/kernel": "int"}


def test_a_rule_for_a_layer_that_first_last_decides_about_is_an_error():
    with pytest.raises(ConfigError, match=r"has 'conv1', which decides nothing: '\^conv1/kernel\$' before it"):
        built(("lbt",), first_last="8bit", quantization__bit_rules=(("conv1", (4, 4, 4)),))


# --- presets at full size --------------------------------------------------------------------------------------------

QUANTIZED = {
    "cifar100_resnet20": 18,
    "cifar10_resnet20": 18,
    "cifar10_subset": 18,
    "imagenet_resnet18": 19,
    "imagenet_resnet34": 35,
    "imagenet_resnet50": 52,
    "imagenet_mobilenet_v2": 34,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets of a few images in the layout of the real ones."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        np.savez(root / f"{split}.npz", image=np.zeros((24, 32, 32, 3), np.uint8), label=np.arange(24) % 10)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 30)).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize("preset", QUANTIZED)
def test_presets_build_at_full_size(preset, folder):
    """Every network is shaped with its rules, nothing is computed."""
    found = built(("lbt",), preset=preset, data__path=str(folder), data__batch_size=2, data__validation_size=0)["lbt"]
    assert len(found.layers) == QUANTIZED[preset]
    assert found.follows == set(found.layers)
    assert not any(name.startswith(("fc/", "linear/", "classifier", "conv1/", "features_0")) for name in found.layers)


@pytest.mark.parametrize("preset", ["cifar100_resnet20", "imagenet_mobilenet_v2"])
def test_presets_plan_their_whole_run(preset, folder):
    """The state after every stage: the start from the first batch, the step, the optimizer, the controller."""
    changes = {"data__path": str(folder), "data__batch_size": 2}
    state = Plan(task.make(changed(preset, **changes)), Options(), parallel.create("jit")).states[-1]
    layers = [control.kernel_of(name) for name in trees.named_leaves(state.model_state["interval"])]
    assert len(layers) == QUANTIZED[preset]
    shapes = trees.named_leaves(state.params)
    if preset == "imagenet_mobilenet_v2":  # depthwise convolutions are left out
        assert all(shapes[name].shape[-4:-2] == (1, 1) for name in layers)
    assert "bn2/scale" in shapes or preset != "cifar100_resnet20"


def test_bottlenecks_are_read_with_signs(folder):
    """In MobileNetV2: every expansion and the last 1x1 convolution; projections read the output of a ReLU6."""
    changes = {"data__path": str(folder), "data__batch_size": 2}
    found = built(("lbt",), preset="imagenet_mobilenet_v2", **changes)["lbt"].layers
    signed = {name for name, layer in found.items() if layer.input.settings.get("signed")}
    assert signed == {*(f"features_{index}/conv_0_0/kernel" for index in range(2, 18)), "features_18_0/kernel"}


# --- report ----------------------------------------------------------------------------------------------------------


def rows(made, seeds, losses):
    """What the engine would have logged: ``losses[stage]`` by member; higher accuracy with lower loss."""
    found, layers = [], ("layer1_0/conv1", "layer1_0/conv2")
    for offset, stage in enumerate(made.stages):
        for step in (3, 6):
            row = {f"loss_{i}": loss * 9 / step for i, loss in enumerate(losses[stage.name])}
            row |= {f"gamma/{layer}_{i}": 0.9 for layer in layers for i in range(len(losses[stage.name]))}
            found.append({"step": 6 * offset + step, "stage": stage.name, "kind": "train", **row})
        for name in stage.evals:
            row = {"step": 6 * offset + 6, "stage": stage.name, "kind": "eval", "eval": name}
            if name == report.PROBE:
                for index in range(len(losses[stage.name])):
                    for layer in layers:
                        row |= {f"{kind}/{layer}_{index}": 0.1 for kind in ("gamma", "ratio", "error", "large_error")}
            else:
                lift = 0.1 if name == "validation" else 0.0
                row |= {f"accuracy_{i}": 0.9 - loss / 10 + lift for i, loss in enumerate(losses[stage.name])}
            found.append(row)
    return found


def test_the_report_takes_each_entry_at_the_rate_that_held_out_images_choose(tmp_path):
    made = task.make(changed(arms=("wa", "lbt"), gradient_bits=(4, 2), lr_grid=(0.1, 0.01), data__validation_size=100))
    # Members: width, alpha, rate, seed. At 4 bits the second rate is better, at 2 bits the first.
    losses = {"wa": [3, 3, 1, 1], "lbt": [5, 5, 2, 4, 1, 1, 7, 7]}
    found = made.report(Results(None, rows(made, 2, losses), [], tmp_path))
    table, gradients = found.tables
    assert table.columns == (
        "arm",
        *("float G: accuracy %", "loss", "rate"),
        *("4-bit G: accuracy %", "loss", "rate"),
        *("2-bit G: accuracy %", "loss", "rate"),
    )
    assert list(map(list, table.rows)) == [
        ["W, A only", "80.0 ± 0.0", "1.500 ± 0.000", "0.01", *["-"] * 6],
        ["LBT alpha 0.2", "-", "-", "-", "60.0 ± 14.1", "4.500 ± 2.121", "0.01", "80.0 ± 0.0", "1.500 ± 0.000", "0.1"],
    ]
    assert "500 test images" in table.caption and "100 held-out images" in table.caption
    assert [row[0] for row in gradients.rows] == ["4-bit, LBT alpha 0.2", "2-bit, LBT alpha 0.2"]
    assert gradients.rows[0][4:] == ("13333", "0.1000", "0.100")
    assert found.summary["LBT alpha 0.2/G4/accuracy"] == pytest.approx(0.6)
    assert [figure.name for figure in found.figures] == ["loss", "errors", "accuracy", "gamma"]
    for figure in found.figures:
        figure.draw(tmp_path / f"{figure.name}.png")
        assert np.asarray(Image.open(tmp_path / f"{figure.name}.png")).std() > 0


def test_the_report_judges_re_estimated_statistics_and_tells_the_running_ones(tmp_path):
    made = task.make(changed(arms=("wa", "lbt"), gradient_bits=(4,), reestimate_batches=2))
    names = ["wa", "wa_statistics", "lbt", "lbt_statistics"]
    assert [(stage.name, stage.steps) for stage in made.stages] == [(name, 2 if "_" in name else 6) for name in names]
    losses = {"wa": [3, 3], "wa_statistics": [1, 1], "lbt": [5, 5], "lbt_statistics": [2, 2]}
    found = made.report(Results(None, rows(made, 2, losses), [], tmp_path))
    # Accuracy after the estimation, loss of the training before it.
    assert [row[1:5] for row in map(list, found.tables[0].rows)] == [
        ["80.0 ± 0.0", "4.500 ± 0.000", "-", "-"], ["-", "-", "70.0 ± 0.0", "7.500 ± 0.000"]
    ]  # fmt: skip
    assert "averaged over 2 training batches" in found.notes[1]
    assert "W, A only 60.0 ± 0.0, LBT alpha 0.2 at 4 bits 40.0 ± 0.0" in found.notes[1]


def test_an_exported_arm_is_written_and_read_back(tmp_path):
    """Without gamma and the widths of gradients, though another arm runs after it."""
    config = changed(**SMALL, arms=("lbt", "wa"), gradient_bits=(4,), export="lbt")
    made = task.make(config)
    shapes = Plan(made, Options(), parallel.create("jit")).states[-1]
    state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    found = made.report(Results(state, rows(made, 1, {"lbt": [1], "wa": [1]}), [], tmp_path))
    for name, write in found.files.items():
        write(tmp_path / name)
    assert (tmp_path / "integers.json").is_file()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    network, variables, shape, facts = export.load(tmp_path)
    assert (facts["model"], facts["family"], shape) == ("plain_cnn", "lbt", (8, 8, 1))
    layers = network.check(jax.ShapeDtypeStruct((1, *shape), np.float32))
    assert {name: layer.bits for name, layer in layers.items()} == dict.fromkeys(
        ("conv2/kernel", "conv3/kernel"), Bits(4, 4)
    )
    assert set(variables) == {"params", "batch_stats"}
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(variables))


def test_a_report_of_float_arms_alone(tmp_path):
    made = task.make(changed(arms=("float", "wa")))
    found = made.report(Results(None, rows(made, 2, {"float": [1, 1], "wa": [2, 2]}), [], tmp_path))
    assert len(found.tables) == 1 and [figure.name for figure in found.figures] == ["loss"]
