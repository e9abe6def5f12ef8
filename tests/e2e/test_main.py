"""The command as a person types it: help, presets, overrides, mistakes, exit codes."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxvision import main
from tests.devices import environment

ROOT = Path(__file__).parents[2]


def jaxvision(*arguments, timeout=280, **variables):
    """Runs ``python -m jaxvision.main``; gives the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "jaxvision.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env={**os.environ, **variables},
    )


def test_help_answers_at_once():
    begin = time.monotonic()
    done = jaxvision("--help")
    assert "--workdir" in done.stdout + done.stderr
    assert time.monotonic() - begin < 5  # about a second on an idle machine


def test_print_config_shows_presets_and_typed_overrides():
    done = jaxvision("--config=configs/classification.py:smoke", "--config.seed=7", "--print_config")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config=FILE is needed"),
        (("--config=configs/nowhere.py",), "nowhere.py"),
        (("--config=configs/classification.py:smoke", "--config.optimizer.lrr=1"), "lrr"),
        (("--config=configs/classification.py:smoke", "--config.seed=x"), "seed"),
        (("--config=configs/classification.py:smokee",), "did you mean 'smoke'?"),
        (("--config=configs/classification.py:smoke", "--config.method=igq_vitt"), "did you mean 'igq_vit'?"),
        (("--config=configs/classification.py:smoke", "--config.parallel=gpu"), "config.parallel='gpu' is not one of"),
        (("--config=configs/classification.py:smoke", "stray"), "'stray' is not a flag"),
        (("--config=configs/classification.py:smoke", "--wrkdir=x"), "wrkdir"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_64(arguments, message):
    done = jaxvision(*arguments)
    assert done.returncode == 64, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_field_that_nobody_reads_is_an_error(tmp_path):
    config = tmp_path / "typo.py"
    config.write_text(
        "from configs import classification\n"
        "def get_config(arg=''):\n"
        "    config = classification.get_config('smoke')\n"
        "    config.unlock()\n"
        "    config.optimizer.learning_rats = 3\n"
        "    return config\n"
    )
    done = jaxvision(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 64
    assert "config.optimizer.learning_rats is set but nothing in this task reads it" in done.stderr


STOPPED = """
import dataclasses, os, signal, sys
from jaxvision import main
make = main.make_task
stop = lambda results: os.kill(os.getpid(), signal.SIGTERM)
main.make_task = lambda config: dataclasses.replace(make(config), report=stop)
sys.exit(main.main())
"""


def test_a_run_finishes_reports_and_says_so_again(tmp_path):
    """Also after a signal came while it made the report."""
    flags = ("--config=configs/classification.py:smoke", f"--workdir={tmp_path}", "--config.tensorboard=True")
    dry = jaxvision(*flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "stage train" in dry.stdout
    assert not (tmp_path / "config.json").exists()
    stopped = subprocess.run([sys.executable, "-c", STOPPED, *flags], capture_output=True, text=True, cwd=ROOT)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by SIGTERM while it made the report" in stopped.stderr
    first = jaxvision(*flags)
    assert first.returncode == 0, first.stderr
    for name in ("config.json", "run.json", "metrics.jsonl", "report.md", "results.json"):
        assert (tmp_path / name).exists(), name
    assert list((tmp_path / "figures").glob("*.png"))
    assert list(tmp_path.glob("events.out.tfevents*"))
    assert "Warning" not in first.stderr
    again = jaxvision(*flags)
    assert again.returncode == 0
    assert "This run is finished" in again.stdout
    other = jaxvision(*flags, "--config.seed=5")
    assert other.returncode == 64
    assert "config.seed=0, now it is 5" in other.stderr


def test_a_refused_configuration_leaves_its_directory_free(tmp_path):
    flags = ("--config=configs/trs.py:smoke", "--config.transition.momentum=1.0", f"--workdir={tmp_path}")
    done = jaxvision(*flags)
    assert done.returncode == 64, done.stderr
    assert "config.transition.momentum=1.0 must be below 1" in done.stderr
    assert not (tmp_path / "config.json").exists()


def test_a_file_that_may_not_be_touched_is_exit_74(monkeypatch, capsys):
    def refused(arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "run/timing.jsonl")

    monkeypatch.setattr(main, "parse", refused)
    assert main.main(["main"]) == 74
    assert "Permission denied (run/timing.jsonl); give this user the permission, and" in capsys.readouterr().err


def test_an_unwritable_workdir_is_exit_74(tmp_path):
    (tmp_path / "file").write_text("")
    done = jaxvision("--config=configs/classification.py:smoke", f"--workdir={tmp_path / 'file' / 'run'}")
    assert done.returncode == 74
    assert "can't be written" in done.stderr


def test_a_sweep_is_one_command_and_one_table(tmp_path):
    command = [sys.executable, "launch/sweep.py", "--config=configs/classification.py:smoke", "--seeds=0,1"]
    command += [f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(1))
    assert done.returncode == 0, done.stderr
    assert " ± " in done.stdout
    assert (tmp_path / "sweep.md").exists()


@pytest.fixture
def sweep(monkeypatch):
    """``launch/sweep.py``, whose runs end as told without being run: name of the directory -> exit code, default 0."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.codes, module.ran = {}, []

    def run(command, **options):
        directory = Path(next(word for word in command if word.startswith("--workdir=")).partition("=")[2])
        module.ran.append(directory.name)
        code = module.codes.get(directory.name, 0)
        if not code:
            directory.mkdir(parents=True)
            values = dict(word.removeprefix("--config.").split("=") for word in command if word.startswith("--config."))
            (directory / "config.json").write_text(json.dumps(values))
            (directory / "results.json").write_text(json.dumps({"summary": {"top1": 0.5}}))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def test_a_failed_run_of_a_sweep_is_a_row_and_the_others_go_on(sweep, tmp_path, capsys):
    flags = ["--config=x.py", f"--workdir={tmp_path}", "--seeds=0,1", "--vary", "lr=1,9"]
    sweep.codes = {"lr=9,seed=0": 70, "lr=9,seed=1": 74}
    assert sweep.main(flags) == 70
    assert len(sweep.ran) == 4
    text = (tmp_path / "sweep.md").read_text()
    assert "| lr=9,seed=0 | failed: exit code 70 | - |" in text and "0.5 ± 0" in text
    assert text.strip() in capsys.readouterr().out


def test_a_signal_ends_a_sweep_and_no_table_is_made_of_nothing(sweep, tmp_path):
    flags = ["--config=x.py", f"--workdir={tmp_path}", "--seeds=0,1"]
    sweep.codes = {"seed=0": 70, "seed=1": 70}
    assert sweep.main(flags) == 70
    assert not (tmp_path / "sweep.md").exists()
    sweep.codes, sweep.ran = {"seed=0": 75}, []
    assert sweep.main(flags) == 75
    assert sweep.ran == ["seed=0"]


@pytest.mark.parametrize("mistake", ("--seeds=a", "--seeds=", "--vary=lr", "--nothing"))
def test_mistakes_of_a_sweep_exit_64(sweep, mistake, tmp_path, capsys):
    assert sweep.main(["--config=x.py", f"--workdir={tmp_path}", mistake]) == 64
    assert mistake.split("=")[0] in capsys.readouterr().err
    assert not sweep.ran


@pytest.mark.parametrize(
    ("flags", "rounding"),
    [
        (("--config=configs/classification.py:smoke", "--config.tensorboard=False"), {"rel": 1e-3, "abs": 1e-5}),
        # Its steps are Python functions. Near ties a rounded code may flip. Slow: 40 s of processor time.
        pytest.param(
            ("--config=configs/igq_vit.py:smoke", "--config.methods=('igq_alloc8',)"),
            {"rel": 0.01, "abs": 0.02},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_over_loopback_train_the_same_run(flags, rounding, tmp_path):
    """Two hosts of one device each (launch/local.sh) give the metrics of one host with two devices, to rounding."""
    done = subprocess.run(
        ["bash", "launch/local.sh", *flags, f"--workdir={tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["starts"][0]["processes"] == 2
    one = jaxvision(*flags, f"--workdir={tmp_path / 'one'}", **environment(2))
    assert one.returncode == 0, one.stderr

    def rows(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert len(rows("one")) == len(rows("two"))
    for left, right in zip(rows("one"), rows("two")):
        numbers = {key: value for key, value in left.items() if isinstance(value, float)}
        assert left.keys() == right.keys()
        assert {key: right[key] for key in numbers} == pytest.approx(numbers, **rounding)
