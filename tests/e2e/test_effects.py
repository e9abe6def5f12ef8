"""Demonstrations of effect, minutes each; run with ``pytest -m slow``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_instance_aware_groups_beat_as_many_static_ones_at_3_bits(tmp_path):
    """Section 10.3 of the specification: a lower KL than static K-means in every seed, a third less in the mean.

    On networks trained half as long again as by default, where the effect is larger.
    """
    flags = ["--config=configs/igq_vit.py", f"--workdir={tmp_path}", "--config.bits=('W4A3',)"]
    flags += ["--config.methods=('kmeans8','igq8','upper')", "--config.export.method="]
    flags += ["--config.train.epochs=18.0", "--config.train.optimizer.schedule.warmup_epochs=1.8"]
    subprocess.run([sys.executable, "-m", "jaxvision.main", *flags], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kl = [row["kl"] for row in rows if row["stage"] == "quantize"]
    static, ours, bound = kl[0::3], kl[1::3], kl[2::3]
    assert all(b < a for a, b in zip(static, ours))
    assert sum(ours) < 0.75 * sum(static)
    assert sum(bound) < sum(ours)
