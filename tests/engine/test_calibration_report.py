"""Calibration in the engine: the metric in an evaluation on one and eight devices, the table, the figures."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxvision.engine import calibration_figures, calibration_report, report
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import Scaling, measure
from tests.devices import environment

PROGRAM = """
import json
import jax, numpy as np
from jaxvision.engine import evaluate, parallel
from jaxvision.metrics.calibration_sums import TopError
from tests.devices import environment

generator = np.random.default_rng(0)
logits = (generator.normal(size=(50, 5)) * 3).astype(np.float32)
labels = generator.integers(0, 5, 50).astype(np.int32)

class Data:
    num_batches = 4
    def batch_at(self, i, shard_index=0, shard_count=1):
        rows = np.arange(16 * i, 16 * i + 16)
        mask = (rows < 50).astype(np.float32)
        return {"logits": logits[rows % 50], "label": labels[rows % 50], "mask": mask}

def update(context, batch):
    return {"ece": TopError.of(batch["logits"] * context, batch["label"], batch["mask"])}

out = {}
for mode in ("jit", "pmap"):
    devices = parallel.create(mode)
    merged = evaluate.Evaluator(update, devices)(devices.replicate(np.float32(1)), Data())
    out[mode] = evaluate.compute(merged)
print(json.dumps([jax.device_count(), out]))
"""


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_on_devices_equals_the_host(devices):
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, results = json.loads(done.stdout.splitlines()[-1])
    assert count == devices
    generator = np.random.default_rng(0)
    logits = (generator.normal(size=(50, 5)) * 3).astype(np.float32)
    expected = measure(Rows.of(logits, generator.integers(0, 5, 50))).values
    for values in results.values():
        assert values == {"ece": pytest.approx(expected["ece"], rel=2e-6)}


@pytest.fixture(scope="module")
def sets():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(300, 4)) * 2
    rows = Rows.of(logits, generator.integers(0, 4, 300))
    return {
        "as given": calibration_report.assess(rows, simulations=20),
        "T = 2": calibration_report.assess(rows, Scaling(0.5), simulations=20),
    }


def test_table_has_each_metric_with_interval_and_floor(sets):
    table = calibration_report.table(sets)
    assert table.columns == ("metric", "as given", "calibrated would score", "T = 2", "calibrated would score")
    cells = {row[0]: row[1:] for row in table.rows}
    ece = sets["as given"].measured.values["ece"]
    assert cells["ECE (%)"][0].startswith(f"{100 * ece:.2f} [")
    assert "(< " in cells["ECE (%)"][1]
    assert cells["accuracy (%)"][1] == ""
    assert "top-5 accuracy (%)" not in cells
    plain = calibration_report.assess(Rows.of(np.eye(4), np.arange(4)), simulations=0)
    assert calibration_report.table({"x": plain}).columns == ("metric", "x")


def test_of_a_large_set_not_every_row_is_kept():
    logits = np.random.default_rng(0).normal(size=(70_000, 2)).astype(np.float32)
    kept = calibration_report.assess(Rows.of(logits, np.arange(70_000) % 2), simulations=0).measured.ranked
    assert len(kept.count) <= calibration_report.MOST_KEPT < 70_000 == kept.count.sum()


def test_json_holds_everything_and_no_nan(sets):
    made = calibration_report.as_json(sets["as given"])
    json.dumps(made, allow_nan=False)
    assert made["rows"] == 300
    assert made["metrics"]["ece"].keys() == {"value", "low", "high", "floor_mean", "floor_95", "p_value"}
    assert sum(made["reliability"]["count"]) == 300
    assert None in made["reliability"]["accuracy"]


def test_figures_are_drawn(sets, tmp_path):
    bins = {name: each.measured.top for name, each in sets.items()}
    series = {"acls": {6.0: [3.0, 4.0], 10.0: [2.0, 2.5]}, "mbls": {6.0: [5.0]}}
    figures = [
        report.Figure("reliability", lambda path: calibration_figures.reliability(bins, path)),
        report.Figure(
            "many", lambda path: calibration_figures.reliability({str(i): bins["T = 2"] for i in range(5)}, path)
        ),
        report.Figure("confidence", lambda path: calibration_figures.histogram(bins, path)),
        report.Figure(
            "margin",
            lambda path: calibration_figures.margin_sweep(series, path, references={"ce": [6.0, 7.0]}, floor=1.0),
        ),
    ]
    report.write(report.Report("t", (calibration_report.table(sets),), tuple(figures)), tmp_path)
    for figure in figures:
        image = np.asarray(Image.open(tmp_path / "figures" / f"{figure.name}.png").convert("RGB"))
        assert image.min() < 100 and len(np.unique(image.reshape(-1, 3), axis=0)) > 20
