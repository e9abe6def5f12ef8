"""Noise floors and intervals: against drawing labels from the probabilities, and against known truths."""

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.metrics import calibration_noise
from jaxvision.metrics.calibration_noise import intervals, noise_floor
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import Scaling, measure


def drawn(rows, classes, seed, sharpness=2.0):
    """Logits, their probabilities, and labels that these are true of."""
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=(rows, classes)) * sharpness).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    return logits, p, labels_from(p, generator)


def labels_from(p, generator):
    return np.minimum((p.cumsum(-1) < generator.random((len(p), 1))).sum(-1), p.shape[-1] - 1)


def test_floor_equals_drawing_labels_from_the_probabilities():
    logits, p, labels = drawn(800, 12, 0)
    floors = noise_floor(measure(Rows.of(logits, labels)), simulations=150)
    generator = np.random.default_rng(1)
    scores = [measure(Rows.of(logits, labels_from(p, generator))).values for _ in range(150)]
    for name, floor in floors.items():
        expected = np.array([each[name] for each in scores])
        tolerance = 4 * expected.std() * np.sqrt(2 / 150)
        np.testing.assert_allclose(floor.mean, expected.mean(), atol=tolerance, err_msg=name)
        # A quantile of 150 draws is less certain than a mean.
        np.testing.assert_allclose(floor.upper, np.quantile(expected, 0.95), atol=2 * tolerance, err_msg=name)
    # The specification's rule of thumb.
    top = measure(Rows.of(logits, labels)).top
    mean, weight = np.nan_to_num(top.mean_confidence()), top.count / top.total
    rough = np.sqrt(2 / (np.pi * 800)) * np.sum(np.sqrt(weight * mean * (1 - mean)))
    np.testing.assert_allclose(floors["ece"].mean, rough, rtol=0.15)


def test_a_calibrated_model_is_not_accused_and_an_overconfident_one_is():
    logits, _, labels = drawn(1500, 10, 2)
    for scale, accused in ((1.0, False), (2.0, True)):
        measured = measure(Rows.of(logits, labels), Scaling(scale))
        floors = noise_floor(measured, simulations=99)
        found = intervals(measured, floors, resamples=99)
        for name in ("ece", "adaptive_ece", "classwise_ece"):
            assert (floors[name].p_value <= 0.05) == accused
            assert (found[name].low > 0) == accused
        assert found["ece"].low < measured.values["ece"] < found["ece"].high or not accused
        assert not found.keys() & {"mce", "ace"}


def test_intervals_hold_the_truth():
    """24 sets of an over-confident model: the true errors are those of a set of 60,000."""
    logits, _, labels = drawn(60000, 8, 3)
    truth = measure(Rows.of(logits, labels), Scaling(1.5)).values
    hits = dict.fromkeys(("ece", "adaptive_ece", "classwise_ece"), 0)
    for seed in range(24):
        logits, _, labels = drawn(1000, 8, 100 + seed)
        measured = measure(Rows.of(logits, labels), Scaling(1.5))
        found = intervals(measured, noise_floor(measured, simulations=40), resamples=60, seed=seed)
        for name in hits:
            hits[name] += found[name].low <= truth[name] <= found[name].high
    # 95 % promised; 19 of 24 and fewer would happen once in a hundred times.
    assert all(count >= 20 for count in hits.values()), hits


def test_large_sets_with_neighbours_taken_together_agree(monkeypatch):
    logits, _, labels = drawn(4000, 10, 4)
    measured = measure(Rows.of(logits, labels), Scaling(1.3), classwise=False)
    exact = noise_floor(measured, simulations=150)
    exact_intervals = intervals(measured, exact, resamples=150)
    monkeypatch.setattr(calibration_noise, "_ENTRIES", 500)
    rough = noise_floor(measured, simulations=150)
    rough_intervals = intervals(measured, exact, resamples=150)
    for name in ("ece", "adaptive_ece", "rmsce"):
        np.testing.assert_allclose(rough[name].mean, exact[name].mean, rtol=0.1)
        np.testing.assert_allclose(rough[name].upper, exact[name].upper, rtol=0.15)
        width = exact_intervals[name].high - exact_intervals[name].low
        for end in ("low", "high"):
            difference = getattr(rough_intervals[name], end) - getattr(exact_intervals[name], end)
            assert abs(difference) < 0.35 * width


def test_the_seed_alone_decides():
    logits, _, labels = drawn(300, 5, 5)
    measured = measure(Rows.of(logits, labels))
    first, again, other = (noise_floor(measured, simulations=20, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert intervals(measured, first, resamples=20) == intervals(measured, first, resamples=20)


def test_tiny_sets_and_classes_that_never_occur():
    logits, _, _ = drawn(3, 6, 6)
    measured = measure(Rows.of(logits, np.array([0, 1, 0])))
    assert measured.counted.tolist() == [True, True, False, False, False, False]
    floors = noise_floor(measured, simulations=10)
    assert all(np.isfinite([floor.mean, floor.upper]).all() for floor in floors.values())
    for interval in intervals(measured, floors, resamples=10).values():
        assert 0 <= interval.low <= interval.high


def test_no_simulations_is_refused():
    logits, _, labels = drawn(20, 3, 7)
    measured = measure(Rows.of(logits, labels))
    with pytest.raises(ConfigError, match="simulations=0"):
        noise_floor(measured, simulations=0)
    with pytest.raises(ConfigError, match="resamples=0"):
        intervals(measured, {}, resamples=0)
