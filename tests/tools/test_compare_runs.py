"""Comparing finished runs: one row a configuration, mean and spread over seeds."""

import json

import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.tools import compare_runs


def finished(directory, seed, lr, accuracy):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"seed": seed, "optimizer": {"lr": lr}}))
    (directory / "results.json").write_text(json.dumps({"title": "t", "summary": {"accuracy": accuracy}}))
    return directory


def test_rows_are_configurations_and_cells_are_means_over_seeds(tmp_path, capsys):
    runs = [
        finished(tmp_path / "a0", 0, 0.1, 0.90),
        finished(tmp_path / "a1", 1, 0.1, 0.94),
        finished(tmp_path / "b0", 0, 0.2, 0.80),
    ]
    assert compare_runs.main([*map(str, runs), "--to", str(tmp_path / "table.md")]) == 0
    text = capsys.readouterr().out
    assert "| optimizer.lr=0.1 | 2 | 0.92 ± 0.028 |" in text
    assert "| optimizer.lr=0.2 | 1 | 0.8 |" in text
    assert (tmp_path / "table.md").read_text().strip() == text.strip()


def test_an_unfinished_run_is_named(tmp_path, capsys):
    assert compare_runs.main([str(tmp_path)]) == 64
    assert f"{tmp_path} holds no finished run" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["lr", "lr="])
def test_sweep_refuses_settings_without_values(text):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "launch" / "sweep.py"
    spec = importlib.util.spec_from_file_location("sweep", path)
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    with pytest.raises(ConfigError, match="must read NAME=VALUE"):
        sweep.combinations([text])
    assert sweep.combinations(["a=1,2", "b=(1,2);(3,)"]) == [
        {"a": a, "b": b} for a in ("1", "2") for b in ("(1,2)", "(3,)")
    ]
