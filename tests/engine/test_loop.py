"""The loop: order at a step boundary, resuming bit for bit, devices, compiles, bad numbers."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, NonFiniteError, Preempted, StorageError
from jaxvision.engine import loop, parallel
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.metric_log import RowLog
from jaxvision.engine.options import Options
from jaxvision.engine.plan import Plan, describe
from jaxvision.engine.progress import Progress
from tests.devices import environment
from tests.engine import tiny

OPTIONS = Options(log_every=4, save_every=5, tensorboard=False)


def same(left, right):
    """Equal bit for bit, leaf by leaf."""
    left, right = trees.named_leaves(left), trees.named_leaves(right)
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that every other one is compared with."""
    directory = tmp_path_factory.mktemp("whole")
    return tiny.run(directory, tiny.make(), OPTIONS)


def test_rows_come_at_their_steps_and_evaluation_counts_every_row_once(whole):
    train = [row["step"] for row in whole.rows if row["stage"] == "train" and row["kind"] == "train"]
    assert train == [4, 8, 12, 16, 20, 24, 28, 30]
    steps, rows = whole.curve("train", "rows", "test")
    assert steps == [10, 20, 30]
    assert rows == [96.0 / 3] * 3  # 96 rows in 3 batches of 40, the last one padded by 24
    assert whole.last("train", "test", "accuracy") > 0.8
    assert [row["count"] for row in whole.rows if row["stage"] == "count"] == [1, 2, 3, 4]
    assert not any("seconds" in row for row in whole.rows)
    assert [row["seconds"] for row in whole.timings if row["stage"] == "count"] == [0.5] * 4
    assert int(whole.state.step) == 34


def test_training_learns(whole):
    losses = whole.curve("train", "loss")[1]
    assert losses[-1] < 0.7 * losses[0]


def test_vanished_checkpoints_are_refused_not_started_over(tmp_path, monkeypatch):
    """From the first saved step on."""
    monkeypatch.setattr(loop, "Interrupt", lambda: tiny.StopAt(1))
    with pytest.raises(Preempted):
        tiny.run(tmp_path, tiny.make(), OPTIONS)
    shutil.rmtree(tmp_path / "checkpoints")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"has saved checkpoints, but .*/checkpoints holds none any more"):
            tiny.run(tmp_path, tiny.make(), OPTIONS)


@pytest.mark.parametrize("boundaries", [(1, 3, 9), (10, 12), (30, 1, 1)])
def test_stopped_and_continued_equals_uninterrupted(whole, tmp_path, boundaries, monkeypatch):
    """Stops at odd places, also between log steps, at evaluations and at the stage boundary."""
    for boundary in boundaries:
        monkeypatch.setattr(loop, "Interrupt", lambda boundary=boundary: tiny.StopAt(boundary))
        with pytest.raises(Preempted, match="the same command continues") as caught:
            tiny.run(tmp_path, tiny.make(), OPTIONS)
        assert caught.value.exit_code == 75
    monkeypatch.setattr(loop, "Interrupt", Interrupt)
    result = tiny.run(tmp_path, tiny.make(), OPTIONS)
    same(whole.state, result.state)
    assert whole.rows == result.rows


def test_a_signal_during_an_evaluation_saves_and_the_next_start_evaluates(whole, tmp_path, monkeypatch):
    """Stops between batches of an evaluation, of the one that is owed, and of the one at the end of the stage."""
    task = dataclasses.replace(tiny.make(), best="")
    for asked, step in ((11, 10), (2, 10), (27, 30)):
        monkeypatch.setattr(loop, "Interrupt", lambda asked=asked: tiny.StopAt(asked))
        with pytest.raises(Preempted, match=f"at step {step} of 34"):
            tiny.run(tmp_path, task, OPTIONS)
        rows = RowLog(tmp_path / "metrics.jsonl").rows()
        assert [row["step"] for row in rows if row["kind"] == "eval"] == list(range(10, step, 10))
    monkeypatch.setattr(loop, "Interrupt", Interrupt)
    result = tiny.run(tmp_path, task, OPTIONS)
    same(whole.state, result.state)
    assert whole.rows == result.rows


def program(directory, *extra):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return [sys.executable, "-W", "error", "-m", "tests.engine.tiny", str(directory), *extra], environment


def test_kill_9_at_random_moments_ends_bit_for_bit_the_same(tmp_path):
    """A process that is killed over and over, wherever it is, still ends where the uninterrupted one ends."""
    extra = ("--steps", "60", "--sleep", "0.02", "--save_every", "3")
    command, environment = program(tmp_path / "killed", *extra)
    moments, kills = random.Random(7), 0
    (tmp_path / "killed").mkdir()
    rows = tmp_path / "killed" / "metrics.jsonl"
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, began = rows.stat().st_size if rows.exists() else 0, time.monotonic()
        # Wait until this process has written something of its own, then kill it at a random moment.
        while process.poll() is None and (not rows.exists() or rows.stat().st_size <= before):
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.25))
        if process.poll() is None:
            kills += 1
        process.kill()
        process.wait()
    assert kills >= 2
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, environment = program(tmp_path / "fresh", *extra)
    assert subprocess.run(fresh, env=environment).returncode == 0
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "fresh" / "metrics.jsonl").read_bytes()
    options = Options(log_every=4, save_every=3, tensorboard=False)
    killed = tiny.run(tmp_path / "killed", tiny.make(60), options)
    uninterrupted = tiny.run(tmp_path / "fresh", tiny.make(60), options)
    same(killed.state, uninterrupted.state)


def test_sigterm_saves_and_exits_75(tmp_path):
    command, environment = program(tmp_path, "--steps", "5000", "--sleep", "0.01", "--save_every", "100000")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "metrics.jsonl"
    while process.poll() is None and (not rows.exists() or not rows.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM at step" in errors
    assert any((tmp_path / "checkpoints").iterdir())


def test_a_bad_loss_names_the_step_and_the_leaf_and_keeps_the_good_checkpoint(tmp_path):
    task = tiny.make(poison=18)
    with pytest.raises(NonFiniteError, match=r"step 18 .*: the metric loss is not finite; first bad leaf"):
        tiny.run(tmp_path, task, OPTIONS)
    # Without the poison the run goes on from what was saved before it.
    result = tiny.run(tmp_path, tiny.make(), OPTIONS)
    assert int(result.state.step) == 34


def test_a_bad_metric_of_a_python_step_or_an_evaluation_stops_the_run_too(tmp_path):
    """At once, and though the state is finite; the mean of nothing is no reason to stop."""
    with pytest.raises(NonFiniteError, match=r"step 20 \(stage 'train'\): the metric rows of the evaluation 'test' is"):
        tiny.run(tmp_path, tiny.make(poison_eval=20), OPTIONS)
    with pytest.raises(NonFiniteError, match=r"step 32 \(stage 'count'\): the metric count is not finite; the state"):
        tiny.run(tmp_path, tiny.make(poison=32), OPTIONS)
    rows = RowLog(tmp_path / "metrics.jsonl").rows()
    assert (rows[-1]["step"], rows[-1]["count"]) == (31, 1)
    assert [row["nothing"] for row in rows if row["kind"] == "eval"] == [None] * 3


def test_a_bad_state_is_never_saved(tmp_path):
    task = tiny.make(poison=5)  # the state is bad at step 5, where a save is due before the next row
    with pytest.raises(NonFiniteError, match=r"first bad leaf of the state: params/"):
        tiny.run(tmp_path, task, Options(log_every=1000, save_every=5, tensorboard=False))


def test_nothing_is_compiled_after_step_two(tmp_path, monkeypatch):
    sizes = []
    original = parallel.JitParallel.compile

    def compile(self, function, donate=(), **options):
        compiled = original(self, function, donate, **options)
        sizes.append(compiled)
        return compiled

    monkeypatch.setattr(parallel.JitParallel, "compile", compile)
    tiny.run(tmp_path, tiny.make(), OPTIONS)
    assert [compiled._cache_size() for compiled in sizes] == [1, 1]  # the step, the evaluation with its last batch


def test_batches_that_cant_be_split_are_refused(monkeypatch):
    devices = parallel.create("jit")
    devices.num_devices = 5
    with pytest.raises(ConfigError, match="the batch size 16 can't be split over 5 devices; use a multiple of 5"):
        Plan(tiny.make(), OPTIONS, devices)


def test_dry_run_describes_every_stage():
    text = describe(tiny.make(), OPTIONS, parallel.create("jit"))
    assert "stage train: 30 steps" in text
    assert "from 'number 0' to 'number 3'" in text
    assert "eval test: 3 batches" in text


def test_a_stage_of_no_steps_only_evaluates(tmp_path):
    task = tiny.make(steps=0)
    result = tiny.run(tmp_path, task, OPTIONS)
    assert result.curve("train", "accuracy", "test")[0] == [0]
    assert int(result.state.step) == 4
    again = tiny.run(tmp_path, task, OPTIONS)
    assert again.rows == result.rows


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    with Progress() as progress:
        progress.stage("train", 0, 10)
        progress.advance(1)
        progress.advance(10, metrics={"loss": 0.5})
    assert "train 10/10" in capsys.readouterr().err


DEVICES = """
import json, sys, tempfile
from pathlib import Path
import jax, numpy as np
from jaxvision.core import trees
from jaxvision.engine.options import Options
from tests.engine import tiny
out = {}
for mode in ("jit", "pmap"):
    with tempfile.TemporaryDirectory() as folder:
        options = Options(parallel=mode, log_every=4, save_every=5, tensorboard=False)
        result = tiny.run(Path(folder), tiny.make(), options)
    out[mode] = {name: np.asarray(leaf).tolist() for name, leaf in trees.named_leaves(result.state).items()}
    out[mode]["accuracy"] = result.curve("train", "accuracy", "test")[1]
print(json.dumps([jax.device_count(), out]))
"""


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_one_and_eight_devices_agree(whole, mode, eight_devices):
    """To 2e-5 relative in the parameters: sums over devices are taken in another order. Evaluation: exactly."""
    count, results = eight_devices
    assert count == 8
    assert results[mode]["accuracy"] == whole.curve("train", "accuracy", "test")[1]
    for name, leaf in trees.named_leaves(whole.state).items():
        np.testing.assert_allclose(results[mode][name], np.asarray(leaf), rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def eight_devices():
    done = subprocess.run([sys.executable, "-c", DEVICES], env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pmap_on_one_device_equals_jit(whole, tmp_path):
    assert jax.device_count() == 1
    result = tiny.run(tmp_path, tiny.make(), Options(parallel="pmap", log_every=4, save_every=5, tensorboard=False))
    for name, leaf in trees.named_leaves(whole.state).items():
        other = trees.named_leaves(result.state)[name]
        np.testing.assert_allclose(np.asarray(other), np.asarray(leaf), rtol=1e-6, atol=1e-7, err_msg=name)
