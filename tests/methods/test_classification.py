"""The classification task: every preset builds, mistakes are named, training works and agrees over devices."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.engine.report import Results
from jaxvision.methods.classification import report, task
from tests.devices import environment

ROOT = Path(__file__).parents[2]
PRESETS = (
    "",
    "smoke",
    *(f"cifar{k}_resnet{depth}" for k in (10, 100) for depth in (20, 32, 44, 56)),
    "imagenet_resnet50",
    "imagenet_deit_t",
    "imagenet_deit_s",
    "imagenet_deit_b",
)
FULL_STEPS = ("cifar10_resnet20", "imagenet_resnet50", "imagenet_deit_t")


@pytest.fixture
def get_config(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("configs.classification").get_config


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Data sets of a few images in the layout of the real ones."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.savez(root / f"{split}.npz", image=np.zeros((8, 32, 32, 3), np.uint8), label=np.arange(8))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def resolve(config, **overrides):
    """What ``main`` hands to ``make``: overrides as on the command line, plain values."""
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    read = Config(config.to_dict())
    for name in ("seed", "parallel", "log_every", "save_every", "keep_last", "keep_best", "tensorboard", "method"):
        getattr(read, name)  # The engine's.
    return read


def run(made, steps):
    """The state and the metric sums of the last step after some steps of the first stage."""
    stage = made.stages[0]
    state = jax.jit(made.init)(jax.random.key(0))
    step, metrics = jax.jit(stage.step), None
    for index in range(steps):
        state, metrics = step(state, stage.data.batch_at(index), jax.random.key(index))
        state = state.replace(step=state.step + 1)
    assert step._cache_size() == 1
    return state, metrics


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_their_networks_at_full_size(preset, get_config, tiny_data):
    config = get_config(preset)
    if config.data.source not in ("digits",):
        config.data.path = str(tiny_data)
        config.data.batch_size = config.data.eval_batch_size = 4
    read = resolve(config)
    made = task.make(read)
    read.check_all_read()
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(made.init, key)
    stage = made.stages[0]
    if preset in FULL_STEPS:
        new, metrics = jax.eval_shape(stage.step, state, stage.data.batch_at(0), key)
        assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics
    # The published sizes for 1,000 classes, less the 998 that the tiny data lack.
    published = {"imagenet_deit_t": 5717416 - 998 * 193, "imagenet_resnet50": 25557032 - 998 * 2049}
    if preset in published:
        assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == published[preset]


def test_learning_rates_follow_the_batch(get_config):
    config = get_config("imagenet_deit_s")
    assert config.optimizer.lr == pytest.approx(1e-3)
    config.data.batch_size = 512
    assert config.optimizer.lr == pytest.approx(5e-4)
    config.optimizer.lr = 2e-4
    assert config.optimizer.lr == pytest.approx(2e-4)


def test_unknown_preset_is_named(get_config):
    with pytest.raises(ConfigError, match=r"preset='resnet' is unknown; .*cifar10_resnet20"):
        get_config("resnet")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer__name": "sdg"}, "did you mean 'sgd'"),
        ({"data__batch_size": 5000}, "batch_size=5000 is larger"),
        ({"optimizer__no_decay": ("bias", "pos_embed")}, "'pos_embed', which matches no parameter"),
        ({"model__num_classes": 7}, "num_classes=7, but the data have 10"),
        ({"optimizer__accumulate": 3}, "accumulate=3"),
        ({"label_smoothing": 1.5}, "config.label_smoothing=1.5"),
        ({"mix__switch_prob": 2.0}, "config.mix.switch_prob=2.0"),
        ({"mix__mixup_alpha": -1.0}, "config.mix.mixup_alpha=-1.0"),
        ({"ema__decay": 1.0}, "decay is 1.0"),
        ({"epochs": -1.0}, "config.epochs=-1.0"),
        ({"model__name": "resnet21"}, "'resnet21' is unknown"),
        ({"optimizer__schedule__warmup_epochs": 9.0}, "warmup_steps"),
        ({"model__name": "plain_cnn_dense", "model__settings": {}}, "model.name='plain_cnn_dense' labels pixels, but"),
        ({"data__source": "scenes", "data__mean": (), "data__std": ()}, "data.source='scenes' labels pixels, but"),
    ],
)
def test_mistakes_are_found_before_compiling(overrides, message, get_config):
    with pytest.raises(ConfigError, match=message):
        task.make(resolve(get_config("smoke"), **overrides))


def test_missing_weights_are_named(get_config):
    with pytest.raises(DataError, match=r"nowhere\.safetensors"):
        task.make(resolve(get_config("smoke"), model__init_from="nowhere.safetensors"))


def test_training_learns_and_repeats(get_config):
    overrides = {
        "data__batch_size": 216,
        "mix__mixup_alpha": 0.0,
        "mix__cutmix_alpha": 0.0,
        "epochs": 3.0,
        "optimizer__lr": 0.1,
    }
    made = task.make(resolve(get_config("smoke"), **overrides, optimizer__schedule__name="constant"))
    start, first = run(made, 1)
    state, last = run(made, 18)
    assert last["loss"].compute() < 0.9 * first["loss"].compute()
    again, _ = run(made, 1)
    jax.tree.map(np.testing.assert_array_equal, again, start)
    stage = made.stages[0]
    assert set(stage.evals) == {"test", "test_ema"} and made.best == "train/test_ema/accuracy"
    sums = {}
    for name, evaluation in stage.evals.items():
        update = jax.jit(evaluation.update)
        for index in range(evaluation.data.num_batches):
            found = update(state, evaluation.data.batch_at(index))
            sums[name] = found if not index else jax.tree.map(np.add, sums[name], found)
        assert sums[name]["accuracy"].count == 500
    assert sums["test"]["nll"].total != sums["test_ema"]["nll"].total


def test_evaluation_only(get_config, tiny_data):
    config = get_config("smoke")
    made = task.make(resolve(config, epochs=0.0, data__train_split="nowhere"))
    assert made.steps == 0 and made.stages[0].evals["test"].data.num_examples == 500


def test_report_has_table_and_figures(get_config, tmp_path):
    made = task.make(resolve(get_config("smoke"), ema__decay=0.0))
    state = jax.device_get(jax.jit(made.init)(jax.random.key(0)))
    rows = [
        {"step": 1, "stage": "train", "kind": "train", "loss": 2.0},
        {"step": 1, "stage": "train", "kind": "eval", "eval": "test", "accuracy": 0.25, "nll": 2.5},
        {"step": 2, "stage": "train", "kind": "eval", "eval": "test", "accuracy": 0.5, "nll": 1.25},
    ]
    made_report = made.report(Results(state, rows, [], tmp_path))
    assert made_report.tables[0].rows == [["trained", "50.00 %", "1.2500", "500"]]
    assert made_report.summary == {"test/accuracy": 0.5, "test/nll": 1.25}
    assert [figure.name for figure in made_report.figures] == ["curves", "confusion", "examples"]
    for figure in made_report.figures:
        figure.draw(tmp_path / f"{figure.name}.png")
        assert np.asarray(Image.open(tmp_path / f"{figure.name}.png")).std() > 0


def test_confusion_counts_each_example_once():
    label = np.arange(5) % 3
    batches = [
        {"image": label[:3], "label": label[:3], "mask": np.ones(3)},
        {"image": np.array([0, 1, 0]), "label": np.array([0, 1, 0]), "mask": np.array([1, 1, 0])},
    ]
    data = SimpleNamespace(num_classes=3, eval=SimpleNamespace(num_batches=2, batch_at=batches.__getitem__))
    counts = report.confusion(data, lambda image: np.eye(3)[(image + 1) % 3])
    np.testing.assert_array_equal(counts, [[0, 2, 0], [0, 0, 2], [1, 0, 0]])


DEVICES = """
import sys
import jax, numpy as np
from jaxvision.core.config import Config
from jaxvision.engine import parallel
from jaxvision.engine.plan import Plan, training_step, zero_sums
from jaxvision.engine.options import Options
from jaxvision.methods.classification import task
sys.path.insert(0, ".")
from configs.classification import get_config

config = get_config("smoke")
config.data.batch_size = 32
options = Options(tensorboard=False)
found = {}
for name in ("jit", "pmap", "single"):
    made = task.make(Config(config.to_dict()))
    if name == "single":
        mode = parallel.JitParallel()
        mode.place = lambda batch: batch
        mode.compile = lambda function, donate=(): jax.jit(function)
        mode.replicate = lambda tree: jax.device_get(tree)
    else:
        mode = parallel.create(name)
        assert mode.num_devices == 8
    state = mode.replicate(jax.jit(made.init)(jax.random.key(0)))
    plan, stage = Plan(made, options, mode), made.stages[0]
    sums = mode.replicate(zero_sums(plan.sums[0]))
    step = mode.compile(training_step(stage, 0, 0))
    for index in range(2):
        state, sums = step(state, sums, mode.place(stage.data.batch_at(index)))
    found[name] = jax.device_get((mode.single(state), mode.single(sums)))
for name in ("jit", "pmap"):
    assert jax.tree.structure(found[name]) == jax.tree.structure(found["single"])
    for a, b in zip(jax.tree.leaves(found[name][0]), jax.tree.leaves(found["single"][0])):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    for metric, mean in found[name][1]["metrics"].items():
        np.testing.assert_allclose(mean.compute(), found["single"][1]["metrics"][metric].compute(), rtol=1e-4)
    assert found[name][1]["metrics"]["loss"].count == 64
print("same")
"""


def test_8_devices_agree_with_one():
    """Synchronised batch statistics, mixing, accumulation, clipping, AdamW and average: jit and pmap."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment(8), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"
