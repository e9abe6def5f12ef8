"""The calibration benchmark's parts on small numbers: what is printed beside its limit, what is refused."""

import re

import pytest

from jaxvision.benchmarks import calibration


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["calibration", *arguments])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    calibration.main()
    return capsys.readouterr().out


def test_metrics_are_a_part_with_a_verdict(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--parts", "metrics", "--rows", "300", "--classes", "7", "--rounds", "1")
    assert re.search(r"^metrics of 300 x 7 logits, s: 0\.\d+ \(limit at most 3: met\)$", out, re.MULTILINE)
    assert "training step" not in out


def test_every_loss_has_its_verdict(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(calibration, "SIZES", ((4, 3),))
    out = run(monkeypatch, capsys, "--parts", "losses", "--dense", "2,5,3", "--rounds", "1")
    limits = re.findall(r"^(\w+), (.*), PyTorch / jaxvision: .* \(limit at least (\d): \w+\)$", out, re.MULTILINE)
    dense = "dense (2, 5, 3)"
    small = [(name, "(4, 3)", "1") for name in ("acls", "mbls", "mndcg")]
    assert limits == [*small, ("acls", dense, "2"), ("mbls", dense, "2")]


def test_what_is_refused(monkeypatch, capsys):
    for arguments, message in (
        (("--parts", "loss"), "there are losses, step, metrics, stored"),
        (("--rows", "0"), "must be positive"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, capsys, *arguments)
        assert message in capsys.readouterr().err
