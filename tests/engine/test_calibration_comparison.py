"""The configuration's road to the comparison, its report, pixels, and every mistake in one sentence."""

import importlib
import json

import jax
import numpy as np
import pytest

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data.sources import ArraySource
from jaxvision.engine import arms, calibration_outcome, datasets
from jaxvision.engine.options import Options
from jaxvision.engine.report import Results
from jaxvision.main import make_task
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import measure
from jaxvision.models import weight_file
from tests.arrays import load
from tests.engine import tiny

CONFIGS = importlib.import_module("configs.acls")


def task(name="acls", **changes):
    """The task of a smoke preset with some fields changed, ``__`` between the parts of a name."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    with config.unlocked():
        config.simulations = 5
        for key, value in changes.items():
            *blocks, last = key.split("__")
            block = config
            for part in blocks:
                block = block[part]
            block[last] = value
    made = Config(config.to_dict())
    built = make_task(made)
    for engine in ("log_every", "save_every", "keep_last", "keep_best", "parallel", "tensorboard"):
        getattr(made, engine)
    made.check_all_read()
    return built


def untrained(built, tmp_path):
    """Results as if every arm had been trained for no steps."""
    key = jax.random.key(0)
    state = jax.jit(built.init)(key)
    if built.load is not None:
        state = built.load(state)
    for stage in built.stages:
        state = jax.jit(stage.begin)(state, key)
    return Results(jax.device_get(state), [], [], tmp_path)


def test_the_report_has_what_tool_and_reader_need(tmp_path):
    built = task(arms=("ce", "acls(margin=(0.1,9))", "mbls(margin=2)"))
    assert [stage.name for stage in built.stages] == ["ce", "acls(margin=(0.1,9))", "mbls(margin=2)"]
    report = built.report(untrained(built, tmp_path))
    labels = ["ce", "acls(margin=0.1)", "acls(margin=9)", "mbls(margin=2)"]
    assert [row[0] for row in report.tables[0].rows] == labels
    assert len(report.tables[0].columns) == len(report.tables[0].rows[0]) == 8
    # Without a step all arms of a seed are the same network.
    assert len({row[1:] for row in report.tables[0].rows}) == 1
    other = report.tables[-1]
    assert [row[0] for row in other.rows] == labels and {len(row) for row in other.rows} == {len(other.columns)}
    assert {"sweep_acls_margin_0.1_9", "reliability", "reliability_scaled", "confidence"} <= {
        figure.name for figure in report.figures
    }
    numbers = json.loads(report.files["calibration.json"])
    assert list(numbers) == labels and [each["seed"] for each in numbers["ce"]] == [0, 1]
    report.files["logits_ce.npz"](tmp_path / "logits.npz")
    saved = load(tmp_path / "logits.npz")
    assert len(saved["labels"]) == 1157 and len(saved["val_labels"]) == 128
    values = measure(Rows.of(saved["logits"], saved["labels"])).values
    before, after = (numbers["ce"][0][when]["metrics"] for when in ("before", "after"))
    assert values["ece"] == pytest.approx(before["ece"]["value"]) and before["ece"]["low"] <= before["ece"]["high"]
    assert before["accuracy"] == after["accuracy"] and before["nll"]["value"] > after["nll"]["value"]
    assert report.summary["ce/ece"] == pytest.approx(
        np.mean([n["before"]["metrics"]["ece"]["value"] for n in numbers["ce"]])
    )
    for title, when, name, scale in (
        ("classwise ECE %", "before", "classwise_ece", 100),
        ("classwise ECE at T %", "after", "classwise_ece", 100),
        ("adaptive ECE at T %", "after", "adaptive_ece", 100),
        ("Brier", "before", "brier", 1),
    ):
        shown = other.rows[0][other.columns.index(title)].split(" ± ")[0]
        mean = scale * np.mean([n[when]["metrics"][name]["value"] for n in numbers["ce"]])
        assert float(shown) == pytest.approx(mean, abs=0.051 if "adaptive" in title else 0.00051)
    assert report.notes[0] == "Smallest NLL of the validation images before scaling: ce."


def test_the_networks_of_the_best_validation_accuracy_are_reported(tmp_path):
    """Those of the log's largest accuracies, each seed's own, in the second arm too."""
    changes = {"arms": ("ce", "mbls"), "choose": "best_validation", "eval_every_epochs": 0.125, "optimizer__lr": 0.3}
    built = task(**changes)
    results = tiny.run(tmp_path, built, Options(log_every=7, save_every=100, tensorboard=False))
    report = built.report(results)
    assert "networks of the best validation accuracy (epochs 0." in report.tables[0].caption
    numbers = json.loads(report.files["calibration.json"])
    found = calibration_outcome.rows(built.report.args[0], results)
    for row, offset in zip(found, (0, 7)):
        for seed, network in enumerate(row.seeds):
            steps, accuracies = results.curve(row.label, f"accuracy_{seed}", "validation")
            assert [step - offset for step in steps] == list(range(1, 8))
            logits, labels = calibration_outcome.arrays(network.validation)
            assert (logits.argmax(-1) == labels).mean() == pytest.approx(max(accuracies))
            assert numbers[row.label][seed]["step"] == network.step == 1 + int(np.argmax(accuracies))
    assert {row["eval"] for row in results.rows if row["kind"] == "eval"} == {"validation"}
    assert any(network.step < 7 for row in found for network in row.seeds)


class Pixels(ArraySource):
    """Left half class 1, right half class 0, the upper edge without label; brighter to the left."""

    def __init__(self, split, label_map=True):
        random = np.random.default_rng(len(split))
        label = np.zeros((12, 6, 6), np.uint8)
        label[:, :, :3] = 1
        image = (0.3 * random.normal(size=(12, 6, 6, 1)) + label[..., None]).astype(np.float32)
        label[:, 0] = 255
        extra = {"label_map": label} if label_map else None
        super().__init__(image, np.arange(12) % 2, num_classes=2, extra=extra, name="pixels")


PIXELS = {
    "data__options": {}, "data__train_size": 8, "data__validation_size": 4, "data__batch_size": 8,
    "data__eval_batch_size": 8, "model__name": "plain_cnn_dense",
    "model__settings": {"features": (3,), "strides": (1,), "dilations": (1,), "dense": True},
}  # fmt: skip


def test_pixels_are_measured_without_those_that_dont_count(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "open_source", lambda name, path, split: Pixels(split))
    values, ious = {}, []
    for ignored, held in (((), True), ((), False), ((0,), True)):
        if not held:
            monkeypatch.setattr(calibration_outcome, "HELD", 0)
        built = task(arms=("acls(margin=0.1)",), ignore_labels=ignored, seeds=(0,), simulations=0, **PIXELS)
        report = built.report(untrained(built, tmp_path))
        assert report.tables[0].caption.startswith(f"{180 if ignored else 360} test pixels, 15 bins")
        assert len(report.tables[0].columns) == 7
        assert report.tables[1].columns == ("loss", "mIoU %", "mean Dice %", "mean accuracy %")
        ious.append(report.summary["acls(margin=0.1)/mean_iou"])
        values[ignored, held] = report.summary
        monkeypatch.undo()
        monkeypatch.setattr(datasets, "open_source", lambda name, path, split: Pixels(split))
    assert values[(), True] == pytest.approx(values[(), False])
    assert values[(), True] != values[(0,), True]
    assert ious == pytest.approx([ious[0]] * 3)  # mIoU looks at the background all the same


def test_beside_calibration(tmp_path):
    """Groups of classes, and other images told from these: noise where the test images are digits without."""
    ood = {"source": "digits", "path": "", "split": "test", "options": {"noise": 1.0}}
    built = task(arms=("ce",), long_tail_groups=True, ood=ood, data__options={"num_train": 640, "noise": 0.0})
    report = built.report(untrained(built, tmp_path))
    assert report.tables[1].columns[:4] == ("loss", "head %", "medium %", "tail %")
    numbers = json.loads(report.files["calibration.json"])["ce"][0]
    report.files["logits_ce.npz"](tmp_path / "logits.npz")
    saved = load(tmp_path / "logits.npz")
    right = saved["logits"].argmax(-1) == saved["labels"]
    head = np.mean([right[saved["labels"] == label].mean() for label in range(3)])
    assert numbers["head"] == pytest.approx(head)
    assert 0 <= numbers["auroc_entropy"] <= 1 and numbers["auroc_confidence"] != numbers["auroc_entropy"]
    assert report.summary["ce/tail"] > 0 and "digits" in report.tables[1].caption


def test_pretrained_weights_start_every_seed(tmp_path):
    built = task(seeds=(3, 5))
    variables = jax.tree.map(
        lambda leaf: np.full(leaf.shape[1:], 0.25, leaf.dtype),
        jax.eval_shape(built.init, jax.eval_shape(lambda: jax.random.key(0))).extra[arms.START],
    )
    path = tmp_path / "weights.safetensors"
    weight_file.save_variables(path, variables, {"model": "plain_cnn", "num_classes": 10})
    loaded = task(seeds=(3, 5), model__init_from=str(path), model__init_keep=("fc",))
    start = loaded.load(jax.jit(loaded.init)(jax.random.key(0))).extra[arms.START]
    assert np.all(np.asarray(start["params"]["conv1"]["kernel"]) == 0.25)
    kernels = np.asarray(start["params"]["fc"]["kernel"])
    assert not np.any(kernels == 0.25) and np.any(kernels[0] != kernels[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, r"config.seeds=\(1, 1\) must be at least one seed, each once"),
        ({"arms": ()}, r"config.arms=\(\) must be at least one arm, each once"),
        ({"arms": ("ce", " ce ")}, "must be at least one arm, each once"),
        ({"arms": ("cee",)}, "loss='cee' is unknown; did you mean 'ce'"),
        ({"losses__acls__margin": -1.0, "arms": ("acls",)}, r"margin=-1.0 must be at least 0"),
        ({"data__validation_size": 0}, "validation_size is 0, but each loss's temperature is fitted on a validation"),
        (
            {"data__validation_size": 0, "choose": "best_validation"},
            "validation_size is 0, but each loss's network is chosen and its temperature fitted on a validation",
        ),
        ({"choose": "best_validation"}, "choose='best_validation' takes .*eval_every_epochs=0.0 evaluates at the end"),
        ({"choose": "best"}, "config.choose='best' is not one of 'last', 'best_validation'"),
        ({"data__validation_size": 1}, "there are 1 validation and 1157 test images .*at least 2 of each"),
        ({"epochs": 0.0}, "config.epochs=0.0 must be a number above 0"),
        ({"num_bins": 0}, "config.num_bins=0 must be a number above 0"),
        ({"temperature": "newton"}, "config.temperature='newton' is not one of 'exact', 'grid_nll', 'grid_ece'"),
        ({"ignore_labels": (0,)}, r"config.ignore_labels=\(0,\) is for networks that label pixels"),
        ({"optimizer__accumulate": 2}, "config.optimizer.accumulate=2 must be 1"),
        ({"how": "pmap"}, "config.how='pmap' is not one of"),
        ({"model__settings": {"dense": True}}, "the network labels pixels, but the data have no 'label_map'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_sentence_before_anything_compiles(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        task(**changes)
    assert "\n" not in str(error.value)


def test_crl_remembers_the_examples_of_its_batches():
    built = task(arms=("crl",), seeds=(0,))
    stage, key = built.stages[0], jax.random.key(0)
    state, batch = jax.jit(stage.begin)(jax.jit(built.init)(key), key), stage.data.batch_at(0)
    new, _ = jax.jit(stage.step)(state, batch, key)
    before, after = (each.extra["history"].correct_count[0] for each in (state, new))
    seen = np.zeros(512, bool)
    seen[batch["index"][:, 0]] = True
    assert seen.sum() == 64 and before.shape == (512,) and not before.any()
    assert 0 < after[seen].sum() < 64 and not after[~seen].any()


@pytest.mark.parametrize(("where", "label"), [("train", 3), ("train", -1), ("test", 2), ("test", -1)])
def test_labels_beyond_the_classes_in_any_split(monkeypatch, where, label):
    """Also where they stand in one image alone."""

    def source(name, path, split):
        made = Pixels(split)
        if split == where:
            maps = made._leaves["label_map"].astype(np.int16)
            maps[-1, -1, -1] = label
            made._leaves["label_map"] = maps
        return made

    monkeypatch.setattr(datasets, "open_source", source)
    which = "training|validation" if where == "train" else "test"
    message = rf"label {label} of the ({which}) images is none of the data's 2 classes \(0 to 1\)"
    with pytest.raises(DataError, match=message):
        task(arms=("ce",), **PIXELS)


def test_networks_and_data_of_pixels_belong_together(monkeypatch):
    monkeypatch.setattr(datasets, "open_source", lambda name, path, split: Pixels(split))
    settings = {"features": (3,), "strides": (2,), "dilations": (1,), "dense": True}
    with pytest.raises(ConfigError, match=r"the network labels \(3, 3\) pixels, but the label maps have \(6, 6\)"):
        task(arms=("ce",), **{**PIXELS, "model__settings": settings})
    ood = {"source": "digits", "path": "", "split": "test", "options": {}}
    with pytest.raises(ConfigError, match=r"config.ood.source='digits' is for networks that label images"):
        task(arms=("ce",), ood=ood, **PIXELS)
    scenes = {"data__source": "scenes", "data__options": {"n": 32, "size": 16}, "data__mean": (), "data__std": ()}
    monkeypatch.undo()
    small = {"data__train_size": 16, "data__validation_size": 16, "data__batch_size": 8, "data__eval_batch_size": 8}
    with pytest.raises(ConfigError, match=r"the network labels images, but the data have no 'label'; set config.model"):
        task(arms=("ce",), **scenes, **small)


def test_a_temperature_is_not_fitted_on_what_is_reported(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="eval_split='train' is the training split too"):
        task(arms=("ce",), data__eval_split="train")
    # Two names of the same images: what is held out of the one is in the other.
    same = ArraySource(np.random.default_rng(0).normal(size=(12, 8, 8, 1)).astype(np.float32), np.arange(12) % 10)
    monkeypatch.setattr(datasets, "open_source", lambda name, path, split: same)
    small = {"data__train_size": 8, "data__validation_size": 2, "data__batch_size": 8, "data__eval_batch_size": 8}
    built = task(arms=("ce",), seeds=(0,), data__options={}, **small)
    with pytest.raises(DataError, match="100% of the rows of the logits of the validation images are among"):
        built.report(untrained(built, tmp_path))
