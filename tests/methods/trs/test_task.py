"""The configuration's road to arms: presets at full size, where a run starts, and every mistake in one sentence."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import rng, trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.engine import arms, quantized_files
from jaxvision.engine.quantization import build_network
from jaxvision.main import make_task
from jaxvision.methods.trs import optimizers, settings, training, variants, weights
from jaxvision.methods.trs import task as trs_task
from jaxvision.methods.trs.variants import parse
from jaxvision.models import weight_file, zoo
from jaxvision.optim import schedules
from jaxvision.quant.binary import BinaryActivation

CONFIGS = importlib.import_module("configs.trs")
IMAGENET = [name for name in CONFIGS.PRESETS if name.startswith("imagenet")]


def task(**changes):
    """The task of the smoke preset with some fields changed, ``__`` between the parts of a name."""
    config = CONFIGS.get_config("smoke")
    with config.unlocked():
        for name, value in changes.items():
            *blocks, last = name.split("__")
            block = config
            for part in blocks:
                block = block[part]
            block[last] = value
    made = Config(config.to_dict())
    built = make_task(made)
    made.one_of("log_every", (2,))
    return built


@pytest.mark.parametrize("preset", [*IMAGENET, "cifar100_resnet20", "cifar10_reactnet18", "cifar10_subset"])
def test_presets_train_at_full_size(preset):
    """Shapes only: the quantized network, the groups of its parameters, start and step of the exported arm."""
    config = Config(CONFIGS.get_config(preset).to_dict())
    module = zoo.build(config.model.name, num_classes=10, **config.model.settings.to_dict())
    images = np.zeros((2, *zoo.spec(config.model.name).input_size, 3), np.float32)
    image = images[:1]
    network = build_network(config.quantization, module, image)
    layers = network.check(image)
    name = config.model.name.removesuffix("_cifar")
    assert len(layers) == {"resnet18": 19, "mobilenet_v2": 51, "resnet20": 18, "reactnet18": 16}.get(name, 48)
    signed = [name for name, layer in layers.items() if layer.input.settings.get("signed")]
    assert len(signed) == {"resnet18": 0, "mobilenet_v2": 17, "resnet20": 0, "reactnet18": 0}.get(name, 48)

    variant = parse(
        config.export, family=config.quantization.family, baseline=config.baseline, target=5e-3, rule="momentum"
    )
    trainer = training.Trainer(
        variant, network, image, optimizers.Recipe(schedules.constant(1.0), oscillation=config.oscillation),
        lambda: images, 0.1, 1, schedules.constant(0.0), 0, False, "trs",
    )  # fmt: skip
    key = jax.eval_shape(lambda: jax.random.key(0))
    setting = {"lr": jnp.float32(0.1)}
    fresh = jax.eval_shape(functools.partial(module.init, train=False), key, image)
    begin = lambda variables, key: trainer.begin(variables, setting, key)  # noqa: E731
    state = jax.eval_shape(begin, fresh, key).replace(extra={arms.SETTING: setting})
    new, metrics = jax.eval_shape(trainer.step, state, {"image": images, "label": np.zeros(2, np.int32)}, key)
    assert kinds(new) == kinds(state)
    assert len([name for name in metrics if name.startswith("step_size/")]) == len(layers)
    assert ("weights/oscillating" in metrics) == (preset not in IMAGENET)
    groups = optimizers.labels(state.params, tuple(layers), freeze_scales=True)
    scales = set() if name == "reactnet18" else {"scale", "frozen"}
    assert {"latent", "float", "norm"} | scales == set(jax.tree.leaves(groups))


@functools.cache
def every_arm():
    """The stages of a run with all arms of the default configuration, by name, and the state they start from."""
    built = task(arms=CONFIGS.ARMS, export="")
    key = jax.eval_shape(lambda: rng.key(0, ""))
    state = jax.eval_shape(built.stages[0].begin, jax.eval_shape(built.init, key), key)
    return {stage.name: stage for stage in built.stages}, state, key


@pytest.mark.parametrize("name", CONFIGS.ARMS)
def test_every_arm_of_the_default_run_begins_and_steps(name):
    stages, start, key = every_arm()
    stage = stages[name]
    # Arms in between hand on the start, which is the float network's.
    start = start.replace(extra={arms.START: {"params": start.params, **start.model_state}})
    state = jax.eval_shape(stage.begin, start, key)
    new, metrics = jax.eval_shape(stage.step, state, stage.data.batch_at(0), key)
    assert kinds(new) == kinds(state)
    scheduled = name.split("_")[0] in variants.SCHEDULED
    assert ("step_size/conv2_0" in metrics) == scheduled and "rate/conv2_0" in metrics
    assert ("penalty" in metrics) == (name == "dampening")


def kinds(tree):
    """Structure, shapes and types: what a second step must find as the first one did, not to be compiled again."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def test_stages_are_the_float_network_and_the_arms():
    built = task(arms=("sgd", "adamt_1e-2"), seeds=(4, 7))
    assert [stage.name for stage in built.stages] == ["float", "sgd", "adamt_1e-2"]
    assert [list(stage.evals) for stage in built.stages] == [["validation", "test"]] * 3
    state = jax.eval_shape(built.init, jax.eval_shape(lambda: rng.key(0, "")))
    assert state.extra[arms.START]["params"]["conv1"]["kernel"].shape == (2, 3, 3, 1, 4)
    state = jax.eval_shape(built.stages[0].begin, state, jax.eval_shape(lambda: rng.key(0, "")))
    state = jax.eval_shape(built.stages[1].begin, state, jax.eval_shape(lambda: rng.key(0, "")))
    # two learning rates, two seeds
    assert state.params["conv3"]["kernel"].shape == (4, 3, 3, 4, 4)
    assert state.params["conv3"]["kernel_scale"].shape == (4,)


def test_statistics_are_estimated_again_after_each_arm_where_they_are_asked_for():
    built = task(arms=("sgd", "adamt_1e-2"), reestimate_batches=3)
    names = ["float", "sgd", "sgd_statistics", "adamt_1e-2", "adamt_1e-2_statistics"]
    assert [stage.name for stage in built.stages] == names
    assert [stage.steps for stage in built.stages][1:3] == [built.stages[3].steps, 3]
    # The trainers' offsets are where the engine puts their stages: targets and freezing count from there.
    starts = np.cumsum([0, *(stage.steps for stage in built.stages)])
    trainers = built.report.args[0].trainers
    assert [trainer.offset for trainer in trainers] == [starts[1], starts[3]]
    key = jax.eval_shape(lambda: rng.key(0, ""))
    state = jax.eval_shape(built.init, key)
    for stage in built.stages:
        state = state if stage.begin is None else jax.eval_shape(stage.begin, state, key)
        new, _ = jax.eval_shape(stage.step, state, stage.data.batch_at(0), key)
        assert kinds(new) == kinds(state)


def test_reactnet_starts_from_binary_inputs_and_trains_binary_weights():
    """One real step of the float-weight stage and one of the arm, on a network of width 2."""
    changes = {"model__settings": {"width": 2, "stage_sizes": (1, 1, 1, 1)}, "model__name": "reactnet18_cifar"}
    quantization = {"family": "reactnet", "float_layers": ("^conv1/", "/downsample_1/", "^fc/")}
    built = task(
        **changes, **{f"quantization__{name}": value for name, value in quantization.items()},
        float__quantized_inputs=True, arms=("sgdt",), export="", data__batch_size=16, grid__sgd=(0.1,),
    )  # fmt: skip
    key, batch = jax.random.key(0), built.stages[0].data.batch_at(0)
    pretraining, arm = built.stages
    state = jax.jit(pretraining.begin)(jax.jit(built.init)(key), key)
    before = state.params
    state, metrics = jax.jit(pretraining.step)(state, batch, key)
    assert np.isfinite(metrics["loss"].compute())
    move = lambda params: params["layer2_0"]["move0"]["bias"]  # noqa: E731
    assert (np.asarray(move(state.params)) != np.asarray(move(before))).any()
    block = trs_task._float_weights(Config(CONFIGS.get_config("cifar10_reactnet18").to_dict()).quantization)
    network = build_network(block, zoo.build("reactnet18_cifar", num_classes=2), np.zeros((1, 32, 32, 3), np.float32))
    layers = network.check(np.zeros((1, 32, 32, 3), np.float32)).values()
    assert {(layer.bits.weight, layer.bits.input, layer.input.kind) for layer in layers} == {
        (None, 1, BinaryActivation)
    }
    state = jax.jit(arm.begin)(state, key)
    latent = lambda params: params["layer2_0"]["binary_conv"]["kernel"]  # noqa: E731
    new, metrics = jax.jit(arm.step)(state, batch, key)
    assert (np.asarray(latent(new.params)) != np.asarray(latent(state.params))).any()
    assert np.isfinite(metrics["loss"].compute()) and "step_size/layer2_0.binary_conv_0" in metrics


def test_ewgs_estimates_its_deltas_when_they_are_due():
    """Two estimates' worth of steps, two batches each: nothing moves before, and after the second batch all does."""
    built = task(
        arms=("sgd", "ewgs"), export="", ewgs__every_epochs=0.5, ewgs__batches=2, ewgs__draws=3, grid__sgd=(1e-3,),
        how="map",
    )  # fmt: skip
    first, plain, stage = built.stages
    every = schedules.epochs_to_steps(0.5, 512 // 64)
    key, compiled = jax.random.key(0), jax.jit(stage.step)
    start = jax.jit(first.begin)(jax.jit(built.init)(key), key)
    state = jax.jit(stage.begin)(start.replace(extra={arms.START: {"params": start.params, **start.model_state}}), key)
    state = state.replace(step=jnp.int32(first.steps + plain.steps))
    seen = []
    for step in range(every + 2):
        state, metrics = compiled(state, stage.data.batch_at(step), key)
        state = state.replace(step=state.step + 1)
        deltas = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.model_state["delta"])])
        seen.append(deltas)
        np.testing.assert_allclose(metrics["weights/delta_0"].compute(), deltas.mean(), rtol=1e-5)
    assert all((each == np.float32(1e-3)).all() for each in seen[: every + 1])
    assert (seen[-1] != np.float32(1e-3)).all() and (seen[-1] >= 0).all() and np.isfinite(seen[-1]).all()
    assert "delta" not in jax.eval_shape(plain.begin, jax.eval_shape(lambda: start.replace(extra={arms.START: {
        "params": start.params, **start.model_state}})), key).model_state  # fmt: skip


def test_lsq_has_two_levels_of_weights_at_one_bit():
    built = task(arms=("lsq",), export="")
    begin = built.stages[1].begin
    key = jax.eval_shape(lambda: rng.key(0, ""))
    state = jax.eval_shape(begin, jax.eval_shape(built.stages[0].begin, jax.eval_shape(built.init, key), key), key)
    layer = state.params["conv3"]
    assert set(layer) == {"kernel", "input_scale"}


def test_a_label_is_the_first_regular_expression_that_finds_a_kernel():
    config = Config(CONFIGS.get_config("smoke").to_dict())
    module = zoo.build(config.model.name, num_classes=10, **config.model.settings.to_dict())
    image = np.zeros((1, 8, 8, 1), np.float32)
    model = weights.Model("plain_cnn", module, image)
    network = build_network(config.quantization, module, image)
    control = Config({"granularity": "label", "labels": ("3/", "v[23]/")}, "config.transition")
    labels = settings.labels(control, model)(network)["labels"]
    assert labels({"conv2": {"kernel": 0}, "conv3": {"kernel": 0}, "conv4": {"kernel": 0}}) == {
        "conv2": {"kernel": "v[23]/"}, "conv3": {"kernel": "3/"}, "conv4": {"kernel": "conv4/kernel"},
    }  # fmt: skip


def test_targets_scale_with_the_bits_of_each_layer():
    config = CONFIGS.get_config("smoke")
    with config.unlocked():
        config.transition.scale_with_bits = True
        config.arms, config.export = ("sgdt_1e-2",), ""
        config.quantization.weight_bits = 4
        config.quantization.bit_rules = (("conv3", (1, 1, 32)),)
    built = make_task(Config(config.to_dict()))
    assert built.stages[1].schedules["target"](0) == pytest.approx(0.02)
    keys = jax.random.key(0)
    state = jax.eval_shape(built.init, keys)
    state = jax.eval_shape(built.stages[1].begin, jax.eval_shape(built.stages[0].begin, state, keys), keys)
    assert state.params["conv3"]["kernel_scale"].shape == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ewgs__every_epochs": 0.25},
            "config.ewgs.every_epochs=0.25 is 2 steps, fewer than the config.ewgs.batches=3",
        ),
        ({"reestimate_batches": -1}, "config.reestimate_batches=-1 must be a number of at least 0"),
        ({"seeds": (1, 1)}, r"config.seeds=\(1, 1\) must be at least one seed, each once"),
        ({"grid__sgd": ("a",)}, r"config.grid.sgd=\('a',\) must be numbers"),
        ({"arms": ()}, r"config.arms=\(\) must be at least one arm"),
        ({"arms": ("float",)}, "must be at least one arm, each once"),
        ({"arms": ("sgdd",), "export": ""}, "did you mean 'sgd'"),
        ({"export": "adamt"}, r"config.export='adamt' is unknown; did you mean 'adamt_1e-2'"),
        ({"quantization__weight_bits": 9}, "weight_bits=9 must be a whole number from 1 to 8"),
        ({"quantization__weight_bits": 0}, "weight_bits=0 must be a whole number from 1 to 8"),
        ({"quantization__weight_bits": 32}, "has 'adamt_1e-2', but no weights are quantized"),
        ({"quantization__float_layers": ("^conv9/",)}, r"float_layers has '\^conv9/', which matches no layer"),
        ({"quantization__bit_rules": (("fc", (2, 2, 32)),)}, "bit_rules has 'fc', which matches no layer"),
        (
            {"quantization__float_layers": ("^conv1/",)},
            "fc/kernel has a quantizer that drops the scale, but no norm",
        ),
        ({"quantization__family": "trz"}, "config.quantization.family='trz' is unknown"),
        (
            {"arms": ("lsq_freezing",), "export": ""},
            r"freezing needs quantizers with one scale \(trs, or lsq from 2 bits",
        ),
        ({"grid__sgd": ()}, r"config.grid.sgd=\(\) must be at least one learning rate"),
        ({"grid__adam": (0.0,)}, r"config.grid.adam=\(0.0,\) must be at least one learning rate above 0"),
        ({"data__validation_size": 0}, "validation_size is 0, so that there is nothing to choose one on"),
        ({"float__epochs": 0.0}, "quantized training starts from a trained float network"),
        ({"calibration_images": 513}, "config.calibration_images=513 is more than the 512 of the training split"),
        (
            {"transition__target": 2.0, "arms": ("sgdt",), "export": ""},
            "config.transition.target, .*'sgdt'.*a rate is the",
        ),
        ({"transition__rule": "momentun"}, "config.transition.rule='momentun' is unknown; did you mean 'momentum'"),
        ({"transition__granularity": "layer"}, "config.transition.granularity='layer' is not one of"),
        (
            {"transition__granularity": "label"},
            r"config.transition.labels=\(\), but config.transition.granularity='label'",
        ),
        ({"transition__labels": ("conv",)}, r"labels=\('conv',\), but config.transition.granularity='tensor'"),
        (
            {"transition__granularity": "label", "transition__labels": ("conv9",)},
            "config.transition.labels has 'conv9', which matches no layer",
        ),
        ({"transition__momentum": 1.0}, "config.transition.momentum=1.0 must be below 1"),
        ({"transition__initial_rate": 1.5}, "config.transition.initial_rate=1.5 must be at most 1"),
        ({"transition__eta": 0.0}, "config.transition.eta=0.0 must be a number above 0"),
        (
            {"transition__max_step_size": 0.015},
            r"config.grid.sgd=\(0.01, 0.02\) has 0.02, .*'sgdt'.*max_step_size=0.015",
        ),
        ({"transition__min_step_size": 0.015}, r"config.grid.sgd=\(0.01, 0.02\) has 0.01, .*min_step_size=0.015"),
        (
            {"transition__min_step_size": 0.2, "transition__max_step_size": 0.1},
            "config.transition.min_step_size=0.2 is above config.transition.max_step_size=0.1",
        ),
        ({"optimizer__b1": 1.0}, "config.optimizer.b1=1.0 must be below 1"),
        ({"freezing__start": 5.0}, "config.freezing.start=5.0 must be below 1"),
        ({"freezing__momentum": 1.0}, "config.freezing.momentum=1.0 must be below 1"),
        ({"optimizer__accumulate": 3}, "batch_size=64 can't be cut into config.optimizer.accumulate=3 equal parts"),
        ({"float__optimizer__accumulate": 3}, "can't be cut into config.float.optimizer.accumulate=3 equal parts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_sentence_before_anything_compiles(changes, message):
    if any(name.startswith("transition__") for name in changes):
        changes = {"arms": ("sgdt",), "export": "", **changes}
    with pytest.raises(ConfigError, match=message) as error:
        task(**changes)
    assert "\n" not in str(error.value)


# --- where a run starts ----------------------------------------------------------------------------------------------


def quantized_file(path, *, family="trs", bits=(1, 1), value=0.5):
    """A file as a run leaves it, all weights and scales ``value``."""
    config = Config(CONFIGS.get_config("smoke").to_dict())
    values = {**config.quantization.to_dict(), "family": family, "weight_bits": bits[0], "input_bits": bits[1]}
    module = zoo.build(config.model.name, num_classes=10, **config.model.settings.to_dict())
    image = np.zeros((1, 8, 8, 1), np.float32)
    network = build_network(Config(values), module, image)
    shapes = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), shapes)
    model = weights.Model(config.model.name, module, image)
    weight_file.save_variables(path, variables, quantized_files.metadata(model, family, network))
    return str(path)


def test_a_quantized_file_goes_on_where_it_ended(tmp_path):
    path = quantized_file(tmp_path / "quantized.safetensors")
    built = task(model__init_from=path, seeds=(0, 1), arms=("sgd",), export="")
    assert [stage.name for stage in built.stages] == ["sgd"]
    key = jax.random.key(0)
    state = built.load(jax.jit(built.init)(key))
    begun = jax.jit(built.stages[0].begin)(state, key)
    assert all(np.all(np.asarray(leaf) == 0.5) for leaf in jax.tree.leaves(begun.params))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ({"bits": (2, 2)}, {}, "conv2/kernel has W2A2, but the arm 'sgd' asks for W1A1; start from float"),
        ({"bits": (1, 2)}, {}, "has W1A2, but the arm 'sgd' asks for W1A1"),
        ({"family": "ewgs"}, {}, "quantizers of the family 'ewgs', but the arm 'sgd' has 'trs'"),
        ({}, {"model__name": "plain_cnn_dense"}, "holds a plain_cnn, not a plain_cnn_dense"),
        ({}, {"model__init_keep": ("fc",)}, "config.model.init_keep is for float weights"),
    ],
)
def test_a_file_of_another_bit_width_is_refused(tmp_path, file, changes, message):
    path = quantized_file(tmp_path / "quantized.safetensors", **file)
    with pytest.raises(ConfigError, match=message):
        task(model__init_from=path, arms=("sgd",), export="", **changes)


def test_a_file_of_another_size_is_refused(tmp_path):
    path = quantized_file(tmp_path / "quantized.safetensors")
    with pytest.raises(DataError, match="does not fit"):
        task(model__init_from=path, arms=("sgd",), export="", model__settings__features=(4, 4, 8))


def test_a_scale_that_would_start_at_zero_is_refused(tmp_path):
    """A dead layer in the float network's file: all its weights are 0."""
    model = CONFIGS.get_config("smoke").model
    module = zoo.build(model.name, num_classes=10, **model.settings)
    random = np.random.default_rng(0)
    variables = trees.map_named(
        lambda name, leaf: (
            np.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype) ** 2
            if "conv3" not in name
            else np.zeros(leaf.shape, leaf.dtype)
        ),
        zoo.variable_shapes(module, (8, 8), 1),
    )
    path = tmp_path / "float.safetensors"
    weight_file.save_variables(path, variables, {"model": model.name, "num_classes": 10})
    built = task(model__init_from=str(path), arms=("sgd",), export="", calibration_images=16)
    with pytest.raises(ConfigError, match=r"conv3/kernel_scale of the arm 'sgd' starts at 0, as what it is"):
        built.load(jax.jit(built.init)(jax.random.key(0)))


def test_merging_keeps_what_only_the_fresh_variables_have():
    merged = training.merge({"a": {"kernel": 1, "kernel_scale": 2}, "b": 3}, {"a": {"kernel": 9}, "b": 8, "c": 7})
    assert merged == {"a": {"kernel": 9, "kernel_scale": 2}, "b": 8}


def test_loss_of_smoothed_labels():
    logits, batch = jnp.asarray([[2.0, 0.0]]), {"label": jnp.asarray([0])}
    value, metrics = training.loss_fn(0.1)(logits, batch)
    log = jax.nn.log_softmax(logits)[0]
    np.testing.assert_allclose(value, -(0.95 * log[0] + 0.05 * log[1]), rtol=1e-6)
    assert metrics["accuracy"].compute() == 1
