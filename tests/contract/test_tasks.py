"""What every task promises. A new method adds its configuration's smoke preset to SMOKE and is done.

Run on the smoke presets: init is traceable, a step is compiled once, a run that is stopped at any boundary and
continued ends bit for bit as the uninterrupted one, one and eight devices agree, evaluations leave the state alone.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxvision.core import rng, trees
from jaxvision.core.config import Config
from jaxvision.core.errors import Preempted
from jaxvision.engine import loop, parallel
from jaxvision.engine.evaluate import Evaluator
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.options import Options
from jaxvision.engine.plan import Plan
from jaxvision.engine.progress import Progress
from jaxvision.main import make_task
from tests.devices import environment
from tests.engine.tiny import StopAt

SMOKE = ("acls", "az_nas", "classification", "igq_vit", "lbt", "rankmixup", "trs")
SMALL = ("rate/", "running_rate/", "step_size/")
ROOT = Path(__file__).parents[2]


def build(name):
    """The task of a smoke preset and the engine's options, saving often."""
    values = importlib.import_module(f"configs.{name}").get_config("smoke").to_dict()
    config = Config({**values, "save_every": 4, "tensorboard": False})
    options = Options.read(config)
    task = make_task(config)
    config.check_all_read()
    return task, options


def run(name, directory):
    task, options = build(name)
    directory.mkdir(exist_ok=True)
    return loop.run(task, options, directory, parallel.create(options.parallel), Progress(False))


@dataclasses.dataclass
class Watched:
    """An uninterrupted run, and what was seen on its way."""

    result: Any
    compiled: list
    evaluations: int


def watched_run(name, directory):
    """Counts the compiled programs, and fails where an evaluation changes the state."""
    seen = Watched(None, [], 0)
    compile, evaluate = parallel.JitParallel.compile, Evaluator.__call__

    def counted(self, function, donate=(), **options):
        seen.compiled.append(compile(self, function, donate, **options))
        return seen.compiled[-1]

    def compared(self, state, data):
        before = jax.device_get(state)
        sums = evaluate(self, state, data)
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
        seen.evaluations += 1
        return sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.JitParallel, "compile", counted)
        patch.setattr(Evaluator, "__call__", compared)
        seen.result = run(name, directory)
    return seen


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The uninterrupted run of each smoke preset, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = watched_run(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def finished(watched):
    """The results of those runs."""
    return lambda name: watched(name).result


@pytest.mark.parametrize("name", SMOKE)
def test_init_is_traceable_and_deterministic(name):
    task, options = build(name)
    key = rng.key(options.seed, "init")
    shapes = jax.eval_shape(task.init, key)
    devices = parallel.create("jit")
    state, again = devices.initialize(task.init, key), devices.initialize(task.init, key)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert not any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", SMOKE)
def test_a_run_finishes_and_its_report_has_tables_and_figures(name, finished, tmp_path):
    task, _ = build(name)
    report = task.report(finished(name))
    assert report.tables
    assert report.figures
    assert report.summary
    for figure in report.figures:
        figure.draw(tmp_path / f"{figure.name}.png")
        assert (tmp_path / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SMOKE)
def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(name, finished, tmp_path, monkeypatch):
    whole = finished(name)
    stops = 0
    for boundary in (1, 2):
        monkeypatch.setattr(loop, "Interrupt", lambda boundary=boundary: StopAt(boundary))
        try:
            run(name, tmp_path)
        except Preempted:
            stops += 1
    monkeypatch.setattr(loop, "Interrupt", Interrupt)
    result = run(name, tmp_path)
    assert stops == 2
    assert whole.rows == result.rows
    left, right = trees.named_leaves(whole.state), trees.named_leaves(result.state)
    assert list(left) == list(right)
    for leaf in left:
        np.testing.assert_array_equal(np.asarray(left[leaf]), np.asarray(right[leaf]), err_msg=leaf)


@pytest.mark.parametrize("name", SMOKE)
def test_each_program_is_compiled_once_and_evaluations_leave_the_state_alone(name, watched):
    seen, (task, options) = watched(name), build(name)
    plan = Plan(task, options, parallel.create("jit"))
    steps = sum(1 for stage in task.stages if stage.compiled and stage.steps)
    evals = [evaluation for stage in task.stages for evaluation in stage.evals.values()]
    expected = steps + len({evaluation.update for evaluation in evals})
    sizes = sorted(function._cache_size() for function in seen.compiled)
    assert sizes[:expected] == [1] * expected
    assert seen.evaluations >= len(evals)
    assert len(plan.states) == len(task.stages) + 1


EIGHT = """
import json, sys, tempfile
from pathlib import Path
import jax
from tests import conftest  # noqa: F401
from tests.contract import test_tasks as contract
assert jax.device_count() == 8
with tempfile.TemporaryDirectory() as folder:
    result = contract.run(sys.argv[1], Path(folder))
print(json.dumps(result.rows))
"""


@pytest.mark.parametrize("name", SMOKE)
def test_one_and_eight_devices_agree(name, finished):
    """Losses and metrics to 1 %: sums are taken in another order, and near ties a rounded code may flip.

    What is small by its nature (rates of transitions, step sizes) has a finer absolute bound than accuracies.
    """
    command = [sys.executable, "-c", EIGHT, name]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    one = finished(name).rows
    assert [row["step"] for row in rows] == [row["step"] for row in one]
    for left, right in zip(one, rows):
        counted = {key: value for key, value in left.items() if isinstance(value, float)}
        numbers = {key: value for key, value in counted.items() if not key.startswith("groups/")}
        small = {key: numbers.pop(key) for key in list(numbers) if key.startswith(SMALL)}
        assert {key: right[key] for key in numbers} == pytest.approx(numbers, rel=0.01, abs=0.02)
        assert {key: right[key] for key in small} == pytest.approx(small, rel=0.01, abs=1e-4)
