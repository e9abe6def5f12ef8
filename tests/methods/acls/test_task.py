"""What ACLS adds to the comparison: its activity in training and the table of logits."""

import jax
import numpy as np
import pytest

from jaxvision.engine.calibration_arms import MONITOR
from jaxvision.engine.calibration_names import parse
from jaxvision.methods.acls import figures, report, task
from jaxvision.methods.acls.acls import acls_metrics
from jaxvision.metrics.calibration_rows import Rows
from tests.arrays import load
from tests.engine.test_calibration_comparison import task as build
from tests.engine.test_calibration_comparison import untrained


def test_acls_arms_alone_are_monitored_at_their_own_margin():
    assert task.monitors(parse("mbls", {})) is None
    hyper = {"margin": 0.5, "reference": "min", "alpha": 0.1}
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    where = np.arange(6) < 5
    found = jax.jit(task.monitors(parse("acls", {}))(hyper))(logits, {"where": where})
    expected = jax.jit(lambda z: acls_metrics(z, margin=0.5, reference="min", where=where))(logits)
    assert {name: float(each.compute()) for name, each in found.items()} == pytest.approx(
        {name: float(each.compute()) for name, each in expected.items()}
    )


def test_the_table_of_logits(tmp_path):
    built = build(arms=("ce", "acls(margin=0.25)"), seeds=(0,))
    results = untrained(built, tmp_path)
    made = built.report(results)
    lines = made.tables[1].rows
    assert [line[0] for line in lines] == ["ce", "acls(margin=0.25)"] and [line[1] for line in lines] == ["-", "0.25"]
    assert lines[0][2:] == lines[1][2:]  # the same untrained network, at the same margin
    made.files["logits_ce.npz"](tmp_path / "logits.npz")
    logits = load(tmp_path / "logits.npz")["logits"]
    assert made.summary["ce/top_logit"] == pytest.approx(logits.max(-1).mean(), rel=1e-5)
    assert lines[0][5] == f"{100 * (logits.max(-1) > 0.25).mean():.1f}"
    assert {"smoothing", "logits"} <= {figure.name for figure in made.figures}
    assert "activity" not in {figure.name for figure in made.figures}  # nothing was logged

    rows = [
        {"step": 2, "stage": "acls(margin=0.25)", "kind": "train", f"{MONITOR}/{name}_0": 0.5}
        for name in ("top_active", "rest_active")
    ]
    logged = built.report(type(results)(results.state, rows, [], tmp_path))
    assert "activity" in {figure.name for figure in logged.figures}


def test_without_a_margin_there_is_nothing_to_add(tmp_path):
    built = build(arms=("ce",), seeds=(0,))
    assert [table.title for table in built.report(untrained(built, tmp_path)).tables][1:] == ["Other errors"]


def blocks_of_any_size(sizes, classes=4):
    """Rows as a dense network's come: as many a block as have a label."""
    random = np.random.default_rng(0)
    made = [(random.normal(size=(n, classes)).astype(np.float32), random.integers(0, classes, n)) for n in sizes]
    return Rows(lambda: iter(made), classes), np.concatenate([logits for logits, _ in made])


def test_means_of_logits_are_one_program_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(report, "PIECE", 4 * 16)
    rows, logits = blocks_of_any_size((5, 16, 0, 40, 7))
    found = report.logit_means(rows, 0.7, "min")
    compiled = report.piece_sums._cache_size()
    expected = acls_metrics(logits, margin=1.1, reference="min")
    assert report.logit_means(rows, 1.1, "min") == pytest.approx(
        {name: float(each.compute()) for name, each in expected.items()}, rel=1e-5
    )
    assert found["top_active"] > 0 and report.piece_sums._cache_size() == compiled


def test_the_drawn_logits_are_a_sample_of_all_blocks(monkeypatch):
    rows, logits = blocks_of_any_size((5, 16, 40, 7))
    np.testing.assert_array_equal(figures.sampled(rows, len(logits)), logits)
    monkeypatch.setattr(figures, "MOST_NUMBERS", 4 * 20)
    np.testing.assert_array_equal(figures.sampled(rows, len(logits)), logits[::4])
