"""Temperature scaling against the official grid and a float64 optimum; vector scaling; what is refused."""

from pathlib import Path

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.metrics.calibration_overlap import refuse_overlap
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scaling import fit_temperature, fit_vector, grid, grid_scores
from jaxvision.metrics.calibration_scan import Scaling, measure
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "calibration_metrics"
CASES = [pytest.param(load(path), id=path.stem) for path in sorted(ORACLES.glob("temperature_*.npz"))]


@pytest.mark.parametrize("case", CASES)
def test_exact_temperature(case):
    rows = Rows.of(case["logits"], case["labels"])
    fitted = fit_temperature(rows)
    # The reference's own optimum is good to 2e-8.
    np.testing.assert_allclose(fitted.value, case["exact_T_by_nll_f64"], rtol=1e-7)
    np.testing.assert_allclose(fitted.nll_before, case["nll_at_1_f64"], rtol=1e-12)
    np.testing.assert_allclose(fitted.nll_after, case["nll_at_exact_T_f64"], rtol=1e-12)
    assert not fitted.at_bound
    exact = Rows.of(case["logits"].astype(np.float64), case["labels"])
    np.testing.assert_allclose(measure(exact, fitted.scaling).values["ece"], case["ece_at_exact_T_f64"], rtol=1e-6)
    before, after = (measure(rows, scaling).values["accuracy"] for scaling in (Scaling(), fitted.scaling))
    assert before == after


@pytest.mark.parametrize("case", CASES)
def test_the_papers_grid(case):
    rows = Rows.of(case["logits"], case["labels"])
    np.testing.assert_array_equal(grid(), case["grid"])
    eces, nlls = grid_scores(rows)
    np.testing.assert_allclose(eces, case["grid_ece"], rtol=1e-5)
    np.testing.assert_allclose(nlls, case["grid_nll"], rtol=1e-5)
    assert fit_temperature(rows, method="grid_ece").value == case["official_T_by_ece"]
    assert fit_temperature(rows, method="grid_nll").value == case["official_T_by_nll"]


@pytest.mark.parametrize(("sign", "bound"), [(1, 0.02), (-1, 100.0)])
def test_separable_and_hopeless_rows_end_at_the_bounds(sign, bound):
    logits = sign * np.array([[5.0, 0, 0], [0, 5, 0], [0, 0, 4]])
    fitted = fit_temperature(Rows.of(logits, np.arange(3)))
    assert fitted.at_bound and fitted.value == pytest.approx(bound)
    assert np.isfinite(fitted.nll_after)


def test_an_optimum_beyond_the_grid_is_found_exactly():
    case = load(ORACLES / "temperature_0.npz")
    sharp = Rows.of(case["logits"] * np.float32(6), case["labels"])
    np.testing.assert_allclose(fit_temperature(sharp).value, 6 * case["exact_T_by_nll_f64"], rtol=1e-5)
    coarse = fit_temperature(sharp, method="grid_nll")
    assert coarse.at_bound and coarse.value == grid()[-1]


def test_equal_logits_keep_the_temperature():
    assert fit_temperature(Rows.of(np.zeros((4, 3)), np.array([0, 1, 2, 0]))).value == 1


def test_vector_scaling_finds_a_factor_and_offset_a_class():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 2
    p = np.exp(logits * [0.5, 1.0, 1.5] + [0.3, 0.0, -0.3])
    p /= p.sum(-1, keepdims=True)
    labels = (p.cumsum(-1) < generator.random((4000, 1))).sum(-1)
    rows = Rows.of(logits, labels)
    fitted = fit_vector(rows)
    np.testing.assert_allclose(fitted.scale, [0.5, 1.0, 1.5], atol=0.15)
    np.testing.assert_allclose(fitted.bias - fitted.bias.mean(), [0.3, 0.0, -0.3], atol=0.15)
    best = fit_temperature(rows)
    assert measure(rows, fitted).values["nll"] < best.nll_after < best.nll_before


def test_what_is_refused():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(30, 3)), generator.integers(0, 3, 30)
    test = Rows.of(logits, labels)
    for fit in (fit_temperature, fit_vector):
        with pytest.raises(DataError, match="100% of the rows of val are among the rows that would be reported on"):
            fit(Rows.of(logits.copy(), labels, name="val"), test)
        with pytest.raises(DataError, match="hold 1 rows that count"):
            fit(Rows.of(logits[:1], labels[:1]))
    with pytest.raises(ConfigError, match="grid_nll"):
        fit_temperature(test, method="lbfgs")


@pytest.mark.parametrize(("new", "most"), [(0, 1 << 20), (90, 1 << 20), (110, 1 << 20), (0, 64), (200, 64)])
def test_validation_rows_are_found_among_the_reported_ones(monkeypatch, new, most):
    """In any order, of a part of the file, in another precision, from a sample of the fingerprints."""
    monkeypatch.setattr("jaxvision.metrics.calibration_overlap.MOST", most)
    monkeypatch.setattr("jaxvision.metrics.calibration_rows.BLOCK", 100)
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(600, 5)).astype(np.float32), np.zeros(600, int)
    rows = generator.permutation(600)[:200]
    fitted = logits[rows].astype(np.float64)
    fitted[:new] = generator.normal(size=(new, 5))
    validation, test = Rows.of(generator.permutation(fitted), labels[:200], name="val"), Rows.of(logits, labels)
    if new > 100:
        refuse_overlap(validation, test)
        return
    with pytest.raises(DataError, match=rf"{(200 - new) / 2:.0f}% of the rows of val are among"):
        refuse_overlap(validation, test)


def test_rows_that_repeat_by_chance_are_no_leak():
    """Coarse logits, and a network that gives the same for every input; only the very same set is refused."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(-3, 4, (2, 500, 2)).astype(np.float32)
    validation, test = (Rows.of(z, np.zeros(500, int), name="val") for z in coarse)
    refuse_overlap(validation, test)
    with pytest.raises(DataError, match="100% of the rows of val"):
        refuse_overlap(Rows.of(coarse[1][::-1], np.zeros(500, int), name="val"), test)
    constant = [Rows.of(np.full((n, 2), value), np.zeros(n, int)) for n, value in ((9, 0.0), (30, -0.0), (30, 0.0))]
    for validation in constant[:2]:
        refuse_overlap(validation, constant[2])
