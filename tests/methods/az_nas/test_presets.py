"""Presets and the README's commands: all make a task, and searches of every space start and can be described."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import az_nas
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import parallel, plan
from jaxvision.engine.options import Options
from jaxvision.main import make_task
from jaxvision.methods.az_nas import autoformer_program, table
from jaxvision.models import nas_bench_201

ROOT = Path(__file__).parents[3]


def commands():
    """The overrides of each of the README's commands that this configuration has."""
    text = (ROOT / "jaxvision/methods/az_nas/README.md").read_text()
    found = re.findall(r"^    (?:python -m jaxvision\.main|\.\.\.) (.*?)(?: {4}.*)?$", text, re.MULTILINE)
    lines = [[word for word in shlex.split(line) if word.startswith("--config")] for line in found]
    lines = [words if words[0].startswith("--config=") else ["--config=configs/az_nas.py", *words] for words in lines]
    return [words for words in lines if words[0].startswith("--config=configs/az_nas.py")]


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "nb201.npz"
    columns = {f"{name}_test": np.arange(15625) // 2 for name in table.DATASETS}
    np.savez(path, arch_ops=nas_bench_201.all_architectures(), params=table.parameters(), **columns)
    return path


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_readme_makes_a_task(words, accuracies, monkeypatch):
    preset, values = words[0].partition(".py")[2].removeprefix(":"), flags.FlagValues()
    arguments = ["test", *(word.replace("nb201.npz", str(accuracies)) for word in words[1:])]
    monkeypatch.setattr(sys, "argv", arguments)
    config_flags.DEFINE_config_dict("config", az_nas.get_config(preset), flag_values=values)
    values(arguments)
    config = Config(values.config)
    Options.read(config)
    make_task(config)
    config.check_all_read()


def test_the_readme_has_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("preset", [*az_nas.MBV2, *az_nas.AUTOFORMER])
@pytest.mark.parametrize("method", ["random", "evolution"])
def test_a_search_for_imagenet_starts_within_its_budget_and_allocates_nothing(preset, method, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a description must not make weights")

    monkeypatch.setattr(autoformer_program, "init", refuse)
    values = az_nas.get_config(preset).to_dict()
    values["search"] |= {"method": method, "count": 20, "population": 12}
    config = Config(values)
    options = Options.read(config)
    task = make_task(config)
    config.check_all_read()
    assert "stage search: 2 steps" in plan.describe(task, options, parallel.create("jit"))


@pytest.mark.parametrize(
    ("preset", "changes", "says"),
    [
        ("mbv2_450m", {"scoring": {"resolution": 100}}, "resolution=100 must be a multiple of 32"),
        ("autoformer_t", {"scoring": {"resolution": 100}}, "resolution=100 must be a multiple of the patch size, 16"),
        (
            "autoformer_t",
            {"budget": {"max_layers": 11}, "search": {"tries": 50}},
            "max_layers=11 in 50 tries .*layers from 12 to 14",
        ),
        ("", {"budget": {"max_layers": 3}}, "max_layers=3: the space 'nas_bench_201' counts no layers; use 0"),
        ("", {"baselines": {"names": ("zicoo",)}}, "config.baselines.names='zicoo' is unknown; did you mean 'zico'"),
        ("smoke", {"ground_truth": {"picks": ("zen",)}}, "config.ground_truth.picks='zen' is unknown"),
        ("smoke", {"space": {"options": {"init": "normla"}}}, "init='normla' is unknown; did you mean 'normal'"),
    ],
)
def test_mistakes_are_named(preset, changes, says):
    values = az_nas.get_config(preset).to_dict()
    for block, change in changes.items():
        values[block] |= change
    with pytest.raises(ConfigError, match=says):
        make_task(Config(values))


def test_a_table_replaces_the_runs_own_truth_and_its_picks(accuracies):
    """A search by one proxy makes no ranking "az_nas" to pick by."""
    values = az_nas.get_config("smoke").to_dict()
    values["search"] |= {"rank_by": ("trainability",)}
    with pytest.raises(ConfigError, match=r"picks='az_nas' is unknown"):
        make_task(Config(values))
    config = Config(values | {"benchmark_table": str(accuracies)})
    assert [stage.name for stage in make_task(config).stages] == ["search"]
