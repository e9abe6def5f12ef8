"""The shared configuration blocks: what they build, and the mistakes they find before anything compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import recipes
from jaxvision.models import weight_file, zoo

SPEC = zoo.spec("resnet20")


def optimizer(name="sgd", schedule=None, **changes):
    schedule = {
        "name": "constant", "warmup_epochs": 0.0, "warmup_lr": 0.0, "end_lr": 0.0, "milestones": (), "gamma": 0.1,
        "power": 0.9, "per_epoch": False, **(schedule or {}),
    }  # fmt: skip
    block = {
        "name": name, "lr": 0.1, "momentum": 0.9, "nesterov": False, "b1": 0.9, "b2": 0.999, "eps": 1e-8,
        "weight_decay": 0.0, "no_decay": (), "clip_norm": 0.0, "accumulate": 1, "schedule": schedule, **changes,
    }  # fmt: skip
    return Config(block, "config.optimizer")


def data(source="shapes", augment=None, **changes):
    augment = {
        "crop_padding": 0, "flip": False, "scale": (0.08, 1.0), "jitter": 0.0, "rand_augment": 0.0, "erasing": 0.0,
        **(augment or {}),
    }  # fmt: skip
    block = {
        "source": source, "path": "", "options": {}, "train_split": "train", "eval_split": "test", "train_size": 0,
        "validation_size": 0, "batch_size": 4, "eval_batch_size": 4, "pipeline": "array", "size": 0, "mean": (),
        "std": (), "augment": augment, **changes,
    }  # fmt: skip
    return Config(block, "config.data")


def model(**changes):
    block = {
        "name": "resnet20", "settings": {"depth": 8, "width_multiplier": 0.25}, "dtype": "float32",
        "num_classes": None, "init_from": "", "init_keep": (), **changes,
    }  # fmt: skip
    return Config(block, "config.model")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("constant", {}, {0: 0.1, 39: 0.1}),
        ("linear", {"end_lr": 0.02}, {0: 0.1, 20: 0.06}),
        ("cosine", {"warmup_epochs": 1.0}, {5: 0.05, 10: 0.1, 25: 0.05}),
        ("cosine", {"per_epoch": True}, {0: 0.1, 9: 0.1, 10: 0.1 * (1 + np.cos(np.pi / 4)) / 2}),
        ("timm_cosine", {"end_lr": 0.02}, {20: 0.06}),
        ("multistep", {"milestones": (1.0, 2.5), "gamma": 0.5}, {9: 0.1, 10: 0.05, 24: 0.05, 25: 0.025}),
        ("polynomial", {"power": 2.0}, {20: 0.025}),
    ],
)
def test_schedules_in_epochs(name, changes, expected):
    config = optimizer(schedule={"name": name, **changes})
    built = recipes.build_optimizer(config, 40, 10)
    for step, value in expected.items():
        assert float(built.schedule(step)) == pytest.approx(value, rel=1e-5)
    config.check_all_read()


@pytest.mark.parametrize("name", recipes.OPTIMIZERS)
def test_optimizers_move_parameters(name):
    built = recipes.build_optimizer(optimizer(name, clip_norm=1.0, weight_decay=0.1, accumulate=2), 10, 5)
    params = {"w": jnp.full((3,), 2.0)}
    updates, _ = built.transform.update(jax.tree.map(jnp.ones_like, params), built.transform.init(params), params)
    assert (optax.apply_updates(params, updates)["w"] < 2.0).all() and built.accumulate == 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_rule_without_a_match_is_found_when_the_state_is_shaped(weight_decay):
    built = recipes.build_optimizer(optimizer(weight_decay=weight_decay, no_decay=("pos_embed",)), 10, 5)
    with pytest.raises(ConfigError, match="'pos_embed', which matches no parameter"):
        jax.eval_shape(built.transform.init, {"w": jnp.zeros(3)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (optimizer("sdg"), "config.optimizer.name='sdg' is unknown; did you mean 'sgd'"),
        (optimizer(lr=0.0), "config.optimizer.lr"),
        (optimizer(schedule={"name": "cosin"}), "did you mean 'cosine'"),
        (optimizer(schedule={"warmup_epochs": 1.0}), "'constant' has no warm-up"),
        (optimizer(schedule={"name": "cosine", "warmup_epochs": 5.0}), "warmup_steps is 50"),
        (optimizer(nesterov=True, momentum=0.0), "momentum is 0"),
        (optimizer(clip_norm=-1.0), "config.optimizer.clip_norm"),
        (optimizer(accumulate=0), "config.optimizer.accumulate"),
    ],
)
def test_optimizer_mistakes(config, message):
    with pytest.raises(ConfigError, match=message):
        recipes.build_optimizer(config, 40, 10)


def test_average():
    assert recipes.build_average(Config({"decay": 0.0, "warmup": True}, "config.ema")) is None
    assert float(recipes.build_average(Config({"decay": 0.9, "warmup": False}, "config.ema"))(3)) == pytest.approx(0.9)


def test_array_pipeline():
    augment = {"crop_padding": 2, "flip": True, "rand_augment": 9.0, "erasing": 0.5}
    config = data(augment=augment, size=16, options={"size": 24, "n": 12})
    built = recipes.build_data(config, 0, SPEC)
    assert built.image_shape == (16, 16, 3) and built.num_classes == 8 and built.train.steps_per_epoch == 3
    train, held_out = built.train.batch_at(0), built.eval.batch_at(0)
    assert train["image"].shape == held_out["image"].shape == (4, 16, 16, 3)
    assert train["image"].dtype == held_out["image"].dtype == np.float32
    np.testing.assert_array_equal(held_out["image"], built.eval.batch_at(0)["image"])
    assert (built.train.batch_at(3)["image"] != train["image"]).any()
    config.check_all_read()


def test_imagenet_pipeline():
    config = data(pipeline="imagenet", size=20, augment={"rand_augment": 9.0, "erasing": 0.5}, options={"n": 8})
    built = recipes.build_data(config, 0, SPEC)
    assert built.train.batch_at(0)["image"].shape == built.eval.batch_at(0)["image"].shape == (4, 20, 20, 3)
    assert built.image_shape == (20, 20, 3)
    config.check_all_read()


def test_evaluation_only_does_not_open_the_training_split():
    built = recipes.build_data(data(train_split="nowhere"), 0, SPEC, train=False)
    assert built.train is None and built.eval.num_examples == 500


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (data("digitz"), "digits"),
        (data(batch_size=99999), "batch_size=99999"),
        (data(pipeline="imagnet"), "config.data.pipeline"),
        (data("digits"), r"1 channel\(s\), but the normalisation has 3 means"),
        (data("digits", mean=(0.5,), std=(0.5,), augment={"rand_augment": 9.0}), "needs uint8 RGB"),
        (data(augment={"jitter": 0.3}), "config.data.augment.jitter=0.3"),
        (data(pipeline="imagenet", augment={"crop_padding": 4}), "config.data.augment.crop_padding=4"),
        (data("cifar10"), "path"),
    ],
)
def test_data_mistakes(config, message):
    with pytest.raises(ConfigError, match=message):
        recipes.build_data(config, 0, SPEC)


def test_splits_with_other_classes(tmp_path):
    for split, classes in (("train", 3), ("test", 2)):
        label = np.arange(6) % classes
        np.savez(tmp_path / f"{split}.npz", image=np.zeros((6, 4, 4, 3), np.uint8), label=label)
    with pytest.raises(ConfigError, match=r"'train' \(3 classes\) and 'test' \(2 classes\)"):
        recipes.build_data(data("npz", path=str(tmp_path)), 0, SPEC)


def fake_data(num_classes):
    return recipes.Data(None, None, None, num_classes, tuple(map(str, range(num_classes))), (8, 8, 3), (), ())


def random_variables(module):
    shapes = zoo.variable_shapes(module, (8, 8), 3)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.uniform(0.5, 1.0, s.shape).astype(s.dtype), shapes)


def test_init_from_and_keep(tmp_path):
    settings = {"depth": 8, "width_multiplier": 0.25}
    variables = random_variables(zoo.build("resnet20", num_classes=5, **settings))
    file = tmp_path / "weights.safetensors"
    weight_file.save_variables(file, variables, {"model": "resnet20", "num_classes": 5})
    built = recipes.build_model(model(init_from=str(file)), fake_data(5))
    same = built.load(built.init(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, same, variables)

    tuned = recipes.build_model(model(init_from=str(file), init_keep=("linear",)), fake_data(4))
    assert tuned.kept == {"params/linear/kernel", "params/linear/bias"}
    got = tuned.load(tuned.init(jax.random.key(0)))
    np.testing.assert_array_equal(got["params"]["conv1"]["kernel"], variables["params"]["conv1"]["kernel"])
    assert got["params"]["linear"]["kernel"].shape == (16, 4) and got["params"]["linear"]["kernel"].std() > 0

    with pytest.raises(Exception, match="5 classes"):
        recipes.build_model(model(init_from=str(file)), fake_data(4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model(num_classes=7), "config.model.num_classes=7, but the data have 5 classes"),
        (model(name="resnet21"), "'resnet21' is unknown"),
        (model(settings={"drop_path_rate": 0.1}), "drop_path_rate"),
        (model(dtype="float16"), "config.model.dtype='float16'"),
        (model(init_keep=("linear",)), "no init_from"),
    ],
)
def test_model_mistakes(config, message):
    with pytest.raises(ConfigError, match=message):
        recipes.build_model(config, fake_data(5))


def test_bfloat16_computes_in_half_and_keeps_float32_parameters():
    built = recipes.build_model(model(dtype="bfloat16"), fake_data(5))
    shapes = zoo.variable_shapes(built.module, (8, 8), 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    logits = jax.eval_shape(built.module.apply, shapes, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert logits.dtype == jnp.float32 and built.module.dtype == jnp.bfloat16


def test_held_out_examples_are_never_trained_on():
    built = recipes.build_data(data("digits", mean=(0.5,), std=(0.5,), train_size=100, validation_size=60), 0, SPEC)
    assert (built.train.steps_per_epoch, built.validation.num_examples) == (25, 60)
    seen = {example.tobytes() for i in range(25) for example in built.train.batch_at(i)["image"]}
    held_out = [built.validation.batch_at(i)["image"] for i in range(15)]
    assert len(seen) == 100 and not seen & {example.tobytes() for example in np.concatenate(held_out)}


def test_more_held_out_than_there_is():
    with pytest.raises(ConfigError, match=r"config.data.validation_size=1290 don't fit into the 1297 examples"):
        recipes.build_data(data("digits", mean=(0.5,), std=(0.5,), train_size=100, validation_size=1290), 0, SPEC)
