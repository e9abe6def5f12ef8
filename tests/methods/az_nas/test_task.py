"""The task: a search of a space whose scores are known, run by the engine; and what it refuses."""

import csv
import importlib
import re

import numpy as np
import pytest

from configs import az_nas, common
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, Preempted
from jaxvision.engine import loop, parallel, report
from jaxvision.engine.options import Options
from jaxvision.engine.progress import Progress
from jaxvision.main import make_task
from jaxvision.methods.az_nas import proposals
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.methods.az_nas.spaces.autoformer import AutoFormer, Choices
from jaxvision.methods.az_nas.spaces.mbv2 import MBV2
from tests.engine.tiny import StopAt
from tests.methods.az_nas.digit_space import DigitSpace

SPACE = DigitSpace()
ENTRY = catalog.Entry(
    "digits",
    SPACE,
    "smoke",
    initial=np.asarray([1, 1, 1, 1], np.int32),
    size=10_000,
    at=lambda index: SPACE.from_string(f"{index:04}"),
    number=lambda architecture: int(SPACE.to_string(architecture)),
)


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    monkeypatch.setitem(catalog.SPACES, "digits", lambda config, seed: (config.options.to_dict(), ENTRY)[1])


def settings(**changes):
    """The plain values of a small search; ``changes`` are nested dicts."""
    config = az_nas.base("digits", count=30, resolution=8, batch_size=2, tensorboard=False, seed=5)
    config.search.chunk = 8
    config.report.resamples = 10
    values = config.to_dict()
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    return Config(values)


def run(config, directory):
    task, options = make_task(config), Options.read(config)
    config.check_all_read()
    directory.mkdir(exist_ok=True)
    return task, loop.run(task, options, directory, parallel.create("jit"), Progress(False))


EVOLUTION = {"method": "evolution", "population": 14}


@pytest.mark.parametrize("search", [{}, EVOLUTION, {**EVOLUTION, "rank_by": ("complexity",)}])
def test_a_search_that_is_stopped_ends_with_the_same_result(search, tmp_path, monkeypatch):
    _, whole = run(settings(search=search), tmp_path / "whole")
    monkeypatch.setattr(loop, "Interrupt", lambda: StopAt(2))
    for _ in range(2):
        with pytest.raises(Preempted):
            run(settings(search=search), tmp_path / "parts")
    monkeypatch.undo()
    monkeypatch.setitem(catalog.SPACES, "digits", lambda config, seed: (config.options.to_dict(), ENTRY)[1])
    _, parts = run(settings(search=search), tmp_path / "parts")
    assert parts.rows == whole.rows
    for name in ("population", "scores"):
        np.testing.assert_array_equal(parts.state.extra[name], whole.state.extra[name])


@pytest.mark.parametrize("name", ["mbv2", "autoformer_t"])
def test_a_stopped_search_of_a_real_space_ends_with_the_same_result(name, tmp_path, monkeypatch):
    """Small structures and images; evolution takes parents from the second candidate on."""
    choices = Choices(16, (8,), (1, 2), (2.0, 2.5), (1, 2))
    # Convolutions alone: few shapes to compile.
    start = "SuperConvK3BNRELU(3,8,2,1)SuperConvK3BNRELU(8,8,1,1)SuperConvK1BNRELU(8,8,1,1)"
    space = MBV2(start=start) if name == "mbv2" else AutoFormer("t", choices, patch_size=4)
    initial = space.initial if name == "mbv2" else None
    entry = catalog.Entry(name, space, "smoke", initial=initial)
    monkeypatch.setattr(proposals, "WARM_UP", 1)
    monkeypatch.setitem(catalog.SPACES, "digits", lambda config, seed: (config.options.to_dict(), entry)[1])
    changes = {"search": {"method": "evolution", "population": 2, "count": 4, "chunk": 1}}
    _, whole = run(settings(**changes), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Interrupt", lambda: StopAt(2))
        with pytest.raises(Preempted):
            run(settings(**changes), tmp_path / "parts")
    _, parts = run(settings(**changes), tmp_path / "parts")
    assert len({each.tobytes() for each in np.asarray(whole.state.extra["population"])}) > 1
    assert np.any(np.asarray(whole.state.extra["scores"]))
    for key in ("population", "scores"):
        np.testing.assert_array_equal(parts.state.extra[key], whole.state.extra[key])


def test_what_was_found_is_a_configuration_that_trains(tmp_path, monkeypatch):
    task, results = run(settings(), tmp_path / "run")
    made = task.report(results)
    report.write(made, tmp_path / "run")
    spec = importlib.util.spec_from_file_location("found", tmp_path / "run" / "found.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The smoke preset trains another network: its settings are not taken over. The same network's other settings stay.
    assert module.get_config().model.settings.to_dict() == {"depth": 14}
    same = common.model("resnet20", settings={"depth": 8, "width_multiplier": 0.25})
    with monkeypatch.context() as patch:
        patch.setattr(common, "tiny_cnn", lambda: same)
        assert module.get_config().model.settings.to_dict() == {"depth": 14, "width_multiplier": 0.25}
    assert module.get_config().is_locked
    other = module.get_config("cifar10_resnet32")
    assert other.data.source == "cifar10" and other.model.settings.to_dict() == {"depth": 14}
    make_task(Config(module.get_config()))
    rows = list(csv.DictReader((tmp_path / "run" / "candidates.csv").read_text().splitlines()))
    assert len(rows) == 30 and rows[0]["architecture"] in module.__doc__
    assert rows[0]["architecture"] == dict(made.tables[0].rows)["architecture"]
    assert re.search(
        r"Candidates without a value: progressivity \d, trainability \d", (tmp_path / "run/report.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search": {"method": "evolution", "population": 8}}, "population=8 must be at least 12"),
        ({"search": {"method": "evolution", "population": 31}}, "population=31 is more than config.search.count=30"),
        ({"search": {"rank_by": ("zen",)}}, "config.search.rank_by='zen' is unknown"),
        ({"search": {"method": "sample", "count": 31, "sample_of": 30}}, "need count <= sample_of <= 10,000"),
        ({"search": {"method": "all"}}, "count=30, but all architectures are 10,000"),
        ({"search": {"count": 0}}, "config.search.count must be above 0"),
        ({"scoring": {"together": 4}, "search": EVOLUTION}, "config.search.method='evolution' each candidate depends"),
        ({"budget": {"max_layers": 3}}, "no architecture within config.budget.max_layers=3 in"),
        ({"search": {"once_per_function": True}}, "can't tell equal functions"),
        ({"scoring": {"together": 4}}, "scores one architecture at a time"),
        ({"budget": {"max_flops": 3, "min_params": 40}}, "no architecture within config.budget.max_flops=3 and"),
        ({"search": {"method": "sample"}, "budget": {"max_flops": 3}}, "unset config.budget.max_flops=3"),
        ({"benchmark_table": "x.npz"}, "has no such table"),
        ({"space": {"name": "digit"}}, "config.space.name='digit' is unknown; did you mean 'digits'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changes, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        make_task(settings(**changes))


def test_samples_and_whole_spaces_are_as_numpy_draws_them(tmp_path):
    _, results = run(settings(search={"method": "sample", "count": 7, "sample_of": 9, "sample_seed": 1}), tmp_path)
    drawn = np.random.default_rng(1).choice(10_000, 9, replace=False)[:7]
    assert [ENTRY.number(each) for each in results.state.extra["population"]] == drawn.tolist()
