"""RankMixup in the comparison: whole steps on the official numbers, the control, the ranking of mixed test images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.data.sources import ArraySource
from jaxvision.engine import arms, datasets
from jaxvision.engine.calibration_arms import Trainer
from jaxvision.engine.calibration_names import parse
from jaxvision.methods.rankmixup import report, task, training
from jaxvision.methods.rankmixup.views import Views, mix_with
from jaxvision.models.mixing import soft_targets
from jaxvision.optim import optimizers
from tests.arrays import load
from tests.engine.test_calibration_comparison import task as build
from tests.engine.test_calibration_comparison import untrained
from tests.losses.oracle import FOLDER, TinyNet, check, variables


@pytest.mark.parametrize("k", [0, 1])
def test_an_arms_steps_are_the_official_ones(k, monkeypatch):
    """Two steps of the arm itself, with the oracle's coefficients and permutations."""
    data = load(FOLDER / "rankmixup" / f"train_step_{k}.npz")
    views = data["lam"].shape[1]
    weight, margin = (float(data[name]) for name in ("weight", "margin"))
    name = f"mrl(weight={weight},margin={margin},official_broadcast=True)"
    if int(data["is_mndcg"]):
        name = f"mndcg(weight={weight},num_views={views})"

    def drawn(key, images, labels, *, num_classes, num_views, alpha, per_sample, mix):
        del key, alpha
        assert not per_sample and mix == "mixup"
        assert (num_classes, num_views) == (6, views)
        lam, perm = (jnp.asarray(data[part])[step[0]] for part in ("lam", "perm"))
        mixed, targets = mix_with(images, soft_targets(labels, 6), lam.astype(jnp.float32), perm)
        return Views(mixed, targets, labels != labels[perm], lam)

    monkeypatch.setattr(training.views, "mixed_views", drawn)
    numbers = {key: float(data[key]) for key in ("learning_rate", "momentum", "weight_decay", "clip_norm")}
    sgd = optimizers.sgd(numbers["learning_rate"], numbers["momentum"], weight_decay=numbers["weight_decay"])
    transform = optax.chain(optimizers.clip_by_global_norm(numbers["clip_norm"]), sgd)
    way = Trainer(parse(name, {}), TinyNet(), (6,), transform, optax.constant_schedule(0.1), 2, 1, 0, 8, 5)
    state = way.begin(jax.tree.map(jnp.asarray, variables(data, "init_")), {}, jax.random.key(0))
    state = state.replace(extra={arms.SETTING: {}})
    for index in range(2):
        step = [index]
        batch = {"image": data["x"][index], "label": data["labels"][index].astype(np.int32)}
        state, metrics = jax.jit(way.step)(state, batch, jax.random.key(0))
        parts = [metrics[part].compute() for part in ("loss", "ce", "penalty")]
        check(jnp.stack(parts), data[f"step{index}_loss_ce_rank"], 2e-5)
        check(metrics["grad_norm"].total, data[f"step{index}_grad_norm_before_clip"], 2e-5)
        new = {"params": state.params, **state.model_state}
        jax.tree.map(lambda got, want: check(got, want, 2e-5), new, variables(data, f"step{index}_"))


def test_view_arms_alone_are_monitored():
    assert task.monitors(parse("mixup", {})) is None
    monitor = task.monitors(parse("mndcg", {}))({})
    random = np.random.default_rng(0)
    raw, mixed = random.normal(size=(5, 4)), random.normal(size=(10, 4))
    batch = {"relevance": jnp.full((2, 5), 0.7)}
    found = jax.eval_shape(monitor, (jnp.asarray(raw), jnp.asarray(mixed)), batch)
    assert {"raw_above_mixed", "mixed_confidence", "pair_order"} <= set(found)


def test_ranking_of_test_images_and_the_control(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_IMAGES", 150)
    built = build("rankmixup", arms=("ce", "mrl(weight=(0,0.5))"))
    results = untrained(built, tmp_path)
    made = built.report(results)
    run = built.report.args[0]
    ranking = made.tables[1].rows
    assert [line[0] for line in ranking] == ["ce", "mrl(weight=0)", "mrl(weight=0.5)"]
    assert ranking[0][1:] == ranking[1][1:] == ranking[2][1:]
    assert made.notes[-1] == (
        "mrl(weight=0.5) less mrl(weight=0), seed by seed: ECE 0.0 ± 0.0, accuracy 0.0 ± 0.0 points."
    )
    assert "mixing" in {figure.name for figure in made.figures}

    mixed = report.mixtures(run)
    assert len(mixed.images) == 150 and mixed.views.images.shape == (3 * 150, 8, 8, 1)
    row = built.report.args[1](run, results, [])  # no rows: an empty table
    assert row.tables[0].rows == []
    state = arms.member_state(results.state, 0)
    variables_ = {"params": state.params, **state.model_state}
    logits = np.asarray(run.predict(variables_, mixed.images))
    np.testing.assert_allclose(report._predict(run, variables_, mixed.images), logits, atol=1e-5)


def test_curves_end_at_the_images_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_IMAGES", 150)
    built = build("rankmixup", arms=("ce",), seeds=(0,))
    results = untrained(built, tmp_path)
    run = built.report.args[0]
    state = arms.member_state(results.state, 0)
    network = dataclasses.make_dataclass("Network", ["variables"])({"params": state.params, **state.model_state})
    row = dataclasses.make_dataclass("Row", ["seeds"])((network,))
    mixed = report.mixtures(run)
    curve = report.confidence_by_lambda(run, row, mixed)[0]
    partner = np.random.default_rng(0).permutation(len(mixed.labels))
    other = mixed.labels != mixed.labels[partner]
    for index, images in ((-1, mixed.images[other]), (0, mixed.images[partner][other])):
        p = jax.nn.softmax(run.predict(network.variables, images), -1)
        assert curve[index] == pytest.approx(float(jnp.mean(jnp.max(p, -1))), rel=1e-5)


def test_images_sorted_by_class_are_sampled_and_one_class_has_no_curve(tmp_path, monkeypatch):
    """Folders are read class by class: the first images would be of one class or two."""
    random = np.random.default_rng(0)
    images = {split: random.normal(size=(60, 8, 8, 1)).astype(np.float32) for split in ("train", "test")}
    labels = {"train": np.arange(60) % 10, "test": np.arange(60) // 6}
    monkeypatch.setattr(datasets, "open_source", lambda name, path, split: ArraySource(images[split], labels[split]))
    monkeypatch.setattr(report, "MOST_IMAGES", 12)
    small = {"data__train_size": 40, "data__validation_size": 20, "data__batch_size": 8, "data__eval_batch_size": 20}
    built = build("rankmixup", arms=("ce",), seeds=(0,), data__options={}, simulations=0, **small)
    mixed = report.mixtures(built.report.args[0])
    assert len(mixed.labels) == 12 and len(set(mixed.labels.tolist())) > 4
    assert (np.diff(mixed.labels) >= 0).all()  # in the order in which they are read
    pairs = f"{len(report.different_pairs(mixed)[0])} pairs of 12 test images"
    made = built.report(untrained(built, tmp_path))
    assert pairs in next(figure for figure in made.figures if figure.name == "mixing").caption

    alike = ArraySource(images["test"], np.zeros(60, int), num_classes=10)
    object.__setattr__(built.report.args[0].data.eval, "source", alike)
    made = built.report(untrained(built, tmp_path))
    assert "mixing" not in {figure.name for figure in made.figures}
    assert any("is of two classes" in note for note in made.notes) and len(made.tables) == 3
