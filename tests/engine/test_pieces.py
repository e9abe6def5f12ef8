"""The small parts of the engine: row logs, prefetching, run information, reports, padding, signals."""

import json
import os
import signal
import threading

import numpy as np
import pytest

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, Preempted, StorageError
from jaxvision.engine import parallel, report, runinfo
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.metric_log import RowLog
from jaxvision.engine.options import Options, defaults
from jaxvision.engine.prefetch import prefetch


def test_row_log_goes_back_to_the_rows_a_checkpoint_knew(tmp_path):
    log = RowLog(tmp_path / "rows.jsonl")
    log.resume(0)
    for step in range(5):
        log.append({"step": step, "loss": 0.1 * step})
    log.close()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    again = RowLog(tmp_path / "rows.jsonl")
    assert [row["step"] for row in again.rows()] == [0, 1, 2, 3, 4]
    again.resume(3)
    again.append({"step": 3, "loss": float("nan")})
    again.close()
    assert again.rows()[-1] == {"step": 3, "loss": None}
    assert again.count == 4


def test_row_log_refuses_a_file_shorter_than_its_checkpoint(tmp_path):
    with pytest.raises(StorageError, match=r"has 0 whole rows but the checkpoint was taken after 2"):
        RowLog(tmp_path / "rows.jsonl").resume(2)


def test_prefetch_keeps_order_and_runs_ahead():
    ahead, release = threading.Event(), threading.Event()

    def batch_at(step):
        if step == 1:
            ahead.set()
            release.wait(5)
        return step

    batches = prefetch(batch_at, 0, 5)
    assert next(batches) == 0
    assert ahead.wait(5), "batch 1 should be under way before it is asked for"
    release.set()
    assert list(batches) == [1, 2, 3, 4]


def test_prefetch_raises_where_the_bad_batch_is_asked_for():
    batches = prefetch(lambda step: 1 // (2 - step), 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


@pytest.mark.parametrize(
    "evidence", ("checkpoints.saved", "checkpoints/LEDGER.json", "checkpoints/5/x", "results.json")
)
def test_another_configuration_in_the_directory_is_refused_once_something_is_saved(tmp_path, evidence):
    first, second = ({"a": {"lr": rate}, "seed": (0, 1)} for rate in (0.1, 0.2))
    runinfo.record(tmp_path, second, {"command": ["failed at once"]})
    runinfo.check(tmp_path, first)
    for _ in range(2):
        runinfo.record(tmp_path, first, {"command": []})
    assert json.loads((tmp_path / "run.json").read_text())["starts"] == [{"command": []}] * 2
    (tmp_path / evidence).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / evidence).write_text("{}")
    runinfo.check(tmp_path, first)
    with pytest.raises(ConfigError, match=r"config\.a\.lr=0\.1, now it is 0\.2"):
        runinfo.check(tmp_path, second)


def test_a_workdir_that_cant_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"--workdir=.*file/run can't be written"):
        runinfo.prepare(tmp_path / "file" / "run")


def test_report_becomes_markdown_and_the_done_marker_comes_last(tmp_path):
    drawn = []
    figure = report.Figure("curve", lambda path: drawn.append(path) or path.write_bytes(b"png"), "what it shows")
    table = report.Table("Results", ("method", "top-1"), [("ours|x", "97.1")], "caption")
    made = report.Report("Title", (table,), (figure,), {"top1": 97.1}, ("a note",), {"groups.json": "{}"})
    report.write(made, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| ours\\|x | 97.1 |" in text
    assert "![curve](figures/curve.png)" in text
    assert json.loads((tmp_path / "results.json").read_text())["summary"] == {"top1": 97.1}
    assert drawn == [tmp_path / "figures" / "curve.png"]
    report.show(made, tmp_path)


def test_padding_repeats_a_row_and_masks_it():
    batch = {"x": np.arange(6.0).reshape(3, 2), "mask": np.ones(3, np.float32)}
    padded = parallel.pad_rows(batch, 4)
    np.testing.assert_array_equal(padded["mask"], [1, 1, 1, 0])
    np.testing.assert_array_equal(padded["x"][3], padded["x"][0])
    assert parallel.pad_rows(padded, 2) is padded


def test_a_signal_is_remembered_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested(False)
        assert interrupt.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_ends_work_that_can_be_repeated_at_once():
    """Also one that came before that work began."""
    with Interrupt() as interrupt:
        with pytest.raises(Preempted, match=r"^stopped by SIGTERM in the report$"), interrupt.at_once("in the report"):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal was missed")
        with pytest.raises(Preempted), interrupt.at_once("in the report"):
            pytest.fail("the signal was forgotten")


def test_options_are_checked():
    assert Options.read(Config(defaults())) == Options()
    with pytest.raises(ConfigError, match=r"config\.parallel='tpu' is not one of"):
        Options.read(Config({**defaults(), "parallel": "tpu"}))
    with pytest.raises(ConfigError, match=r"config\.log_every=0 must be a number above 0"):
        Options.read(Config({**defaults(), "log_every": 0}))
