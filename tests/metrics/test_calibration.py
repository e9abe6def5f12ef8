"""Calibration errors against the official numbers and the float64 references, and in every split of the rows."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.metrics import calibration, calibration_ood
from jaxvision.metrics.calibration import Bins, Ranked
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import Scaling, batch_averages, measure
from jaxvision.metrics.calibration_sums import ExactBins, TopError
from tests import arrays

ORACLES = Path(__file__).parents[1] / "oracles" / "calibration_metrics"
OFFICIAL = {
    "ece": "official_ece",
    "adaptive_ece": "official_aece",
    "classwise_ece": "official_cece",
    "overconfidence": "official_oe",
    "underconfidence": "official_ue",
    "nll": "official_nll",
    "brier": "official_brier",
    "accuracy": "official_acc",
    "mce": "official_mce",
    "ace": "official_ace_nonempty",
    "rmsce": "official_rms",
    "top5_accuracy": "official_acc5",
}


bin_up = jax.jit(ExactBins.of, static_argnums=3)


def load(pattern):
    return [pytest.param(arrays.load(path), id=path.stem) for path in sorted(ORACLES.glob(pattern))]


@pytest.mark.parametrize("case", load("metrics_*.npz"))
def test_official_values_from_logits(case):
    bins = int(case["num_bins"])
    values = measure(Rows.of(case["logits"], case["labels"]), num_bins=bins).values
    for name, key in OFFICIAL.items():
        if key not in case:
            continue
        if name == "top5_accuracy" and case["probs"].min() == 0:
            continue  # the official one ranks probabilities, of which many are 0 here; this one ranks logits
        np.testing.assert_allclose(values[name], case[key], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("case", load("metrics_*.npz"))
def test_reference_values_from_probabilities(case):
    rows = Rows.of(case["probs"].astype(np.float64), case["labels"])
    bins = int(case["num_bins"])
    observed = measure(rows, num_bins=bins, probabilities=True)
    every = measure(rows, num_bins=bins, probabilities=True, all_classes=True)
    references = {name: key.replace("official", "ref") for name, key in OFFICIAL.items()}
    references["classwise_ece"] = "ref_cece_observed"
    for name, key in references.items():
        if key in case:
            np.testing.assert_allclose(observed.values[name], case[key], rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(every.values["classwise_ece"], case["ref_cece_all"], rtol=1e-9)
    np.testing.assert_allclose(calibration.ece(every.classes.bins()), case["ref_cece_per_class"], rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(calibration.fixed_edges(bins), case["ref_edges"])
    full = case["ref_bin_count"] > 0
    np.testing.assert_array_equal(every.top.count, case["ref_bin_count"])
    np.testing.assert_allclose(every.top.mean_confidence()[full], case["ref_bin_conf"][full], rtol=1e-9)
    np.testing.assert_allclose(every.top.accuracy()[full], case["ref_bin_acc"][full], rtol=1e-9)
    np.testing.assert_allclose(every.ranked.adaptive_edges(bins), case["ref_adaptive_edges"], rtol=1e-12)
    np.testing.assert_array_equal(every.adaptive.count, case["ref_adaptive_count"])


@pytest.mark.parametrize("case", load("metrics_*.npz"))
def test_float64_logits_are_measured_in_float64(case):
    rows = Rows.of(case["logits"].astype(np.float64), case["labels"])
    values = measure(rows, num_bins=int(case["num_bins"]), all_classes=True).values
    for name, key in (("ece", "ece"), ("mce", "mce"), ("adaptive_ece", "aece"), ("classwise_ece", "cece_all")):
        np.testing.assert_allclose(values[name], case[f"full_f64_{key}"], rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(values["nll"], case["nll_f64"], rtol=1e-12)


@pytest.mark.parametrize("case", load("segmentation_*.npz"))
def test_segmentation_pooled_and_batch_by_batch(case):
    labels, ignore = case["labels"], (255, 0)
    pooled = Rows.of(case["logits"].astype(np.float64), labels, ignore=ignore)
    values = measure(pooled).values
    for name, key in (("ece", "ece"), ("adaptive_ece", "aece"), ("classwise_ece", "cece_observed")):
        np.testing.assert_allclose(values[name], case[f"pooled_{key}_f64"], rtol=1e-7, err_msg=name)
    batches = [Rows.of(*pair, ignore=ignore) for pair in zip(case["logits"], labels)]
    averages = batch_averages(batches)
    for name, key in (("nll", "nll"), ("ece", "ece"), ("adaptive_ece", "aece"), ("classwise_ece", "cece")):
        np.testing.assert_allclose(averages[name], case[f"per_batch_mean_{key}"], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", load("ood_auroc_*.npz"))
def test_auroc(case):
    known, unknown = (
        calibration_ood.scores(Rows.of(p, np.zeros(len(p), int)), probabilities=True)
        for p in (case["in_probs"], case["out_probs"])
    )
    for name, value in calibration_ood.ood_auroc(known, unknown).items():
        np.testing.assert_allclose(value, case[name], rtol=1e-9, err_msg=name)


def test_auroc_counts_ties_half_and_needs_both_sides():
    assert calibration_ood.auroc(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 0.75
    with pytest.raises(DataError, match="at least one finite positive score"):
        calibration_ood.auroc(np.zeros(2), np.zeros(0))


def test_the_least_confident_row_counts_only_on_request():
    ranked = Ranked.of(np.array([0.9, 0.5, 0.7, 0.6]), np.array([1, 0, 1, 0]))
    edges = ranked.adaptive_edges(2)
    assert ranked.bins(edges).count.sum() == 3
    assert ranked.bins(edges, include_lowest=True).count.tolist() == [3, 1]
    np.testing.assert_allclose(edges, [0.5, 0.7, 0.9])


def test_grouping_neighbours_keeps_every_bin():
    generator = np.random.default_rng(0)
    confidence = generator.beta(4, 2, 5000)
    ranked = Ranked.of(confidence, generator.random(5000) < confidence)
    edges = calibration.fixed_edges()
    # Cut where the bins end, as the simulations do.
    grouped = ranked.grouped(200, ranked.positions(edges))
    assert len(grouped.count) < 230
    for exact, rough in zip(jax.tree.leaves(ranked.bins(edges)), jax.tree.leaves(grouped.bins(edges))):
        np.testing.assert_allclose(exact, rough, rtol=1e-12)
    np.testing.assert_allclose(ranked.adaptive_edges()[1:-1], grouped.adaptive_edges()[1:-1], atol=0.01)


def test_empty_bins_and_no_rows():
    bins = Bins(np.array([0.0, 2]), np.array([0.0, 1.8]), np.array([0.0, 1]), np.float64(2))
    assert np.isnan(bins.accuracy()[0])
    np.testing.assert_allclose([calibration.ece(bins), calibration.ace(bins), calibration.mce(bins)], 0.4)
    nothing = jax.jit(lambda: ExactBins.of(*jnp.zeros((3, 4)), 5).bins())()
    assert nothing.total == 0
    assert all(np.isnan(calibration.ERRORS[name](nothing)) for name in ("ece", "rmsce", "overconfidence"))
    with pytest.raises(ConfigError, match="num_bins=0"):
        calibration.fixed_edges(0)


# --- the host's blocks -----------------------------------------------------------------------------------------------


def example(rows=600, classes=7, seed=0):
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=(rows, classes)) * 3).astype(np.float32)
    return logits, generator.integers(0, classes, rows)


def test_blocks_of_any_size_give_the_same_numbers():
    logits, labels = example()

    def blocks(step):
        return lambda: ((logits[i : i + step], labels[i : i + step]) for i in range(0, len(labels), step))

    whole = measure(Rows.of(logits, labels)).values
    for step in (1, 37, 600):
        values = measure(Rows(blocks(step), 7)).values
        for name, value in whole.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-6, err_msg=name)


def test_dense_half_precision_and_ignored_rows():
    logits, labels = example()
    logits = logits.astype(np.float16)
    dense = np.where(np.arange(600) % 5 == 0, 255, labels).reshape(3, 10, 20)
    values = measure(Rows.of(logits.reshape(3, 10, 20, 7), dense, ignore=(255,))).values
    kept = np.arange(600) % 5 != 0
    expected = measure(Rows.of(logits[kept].astype(np.float32), labels[kept])).values
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6, err_msg=name)


def test_scaling_changes_no_prediction():
    logits, labels = example()
    before, after = (measure(Rows.of(logits, labels), Scaling(scale)).values for scale in (1.0, 0.3))
    assert before["accuracy"] == after["accuracy"] and before["top5_accuracy"] == after["top5_accuracy"]
    assert after["ece"] != before["ece"]


def test_ties_go_to_the_lower_class():
    logits = np.zeros((4, 6), np.float32)
    values = measure(Rows.of(logits, np.array([0, 1, 4, 5]))).values
    assert values["accuracy"] == 0.25
    assert values["top5_accuracy"] == 0.75


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 4)), np.array([0, 4, 1]), "label 4 of row 1 is none of the 4 classes"),
        (np.zeros((3, 4)), np.array([0, -1, 1]), "label -1 of row 1"),
        (np.array([[0.0, 1], [np.nan, 0]]), np.array([0, 1]), "row 1 of the logits holds nan"),
        (np.array([[0.0, np.inf], [0, 0]]), np.array([0, 1]), "row 0 of the logits holds inf"),
        (np.zeros((3, 1)), np.zeros(3, int), "have 1 class on their last axis"),
        (np.zeros((1, 3)), np.zeros(1, int), "hold 1 rows that count, but calibration needs at least 2"),
        (np.zeros((0, 3)), np.zeros(0, int), "hold 0 rows that count"),
        (np.zeros((3, 4)), np.zeros(2, int), r"\(3, 4\), which does not fit labels of shape \(2,\)"),
        (np.zeros((2, 5, 3, 3)), np.zeros((2, 3, 3), int), "the class axis must be the last one"),
        (np.zeros(3), np.zeros(3, int), r"must be \(rows, classes\)"),
        (np.zeros((3, 4)), np.zeros(3), "must be integers"),
        (np.zeros((3, 4), int), np.zeros(3, int), "are these predicted classes"),
        (np.zeros((3, 4), "V2"), np.zeros(3, int), "raw bytes .2 a number.: npz and npy files lose .*bfloat16"),
        (np.zeros((3, 4), complex), np.zeros(3, int), "are complex128, but must be real floating point"),
        (np.zeros((3, 4), [("z", "f4")]), np.zeros(3, int), "must be real floating point"),
        (np.zeros((3, 4), ml_dtypes.int4), np.zeros(3, int), "are int4, but must be real"),
        (np.zeros((3, 4)), np.zeros(3, "m8[s]"), "must be integers"),
    ],
)
def test_bad_rows_are_one_sentence(logits, labels, message):
    with pytest.raises(DataError, match=message):
        measure(Rows.of(logits, labels))


def test_what_is_no_probability_is_refused():
    logits, labels = example(20)
    with pytest.raises(DataError, match="holds no probabilities"):
        measure(Rows.of(logits, labels), probabilities=True)
    with pytest.raises(ConfigError, match="scale their logarithms"):
        measure(Rows.of(logits, labels), Scaling(0.5), probabilities=True)


# --- the engine's metric objects -------------------------------------------------------------------------------------


def test_integer_sums_are_exact_in_any_order_and_beyond_float32():
    generator = np.random.default_rng(1)
    confidence = generator.random(4000).astype(np.float32)
    correct = generator.random(4000) < 0.5
    order = generator.permutation(4000)
    every = np.ones(4000, bool)
    whole = bin_up(confidence, correct, every, 15)
    parts = [bin_up(confidence[rows], correct[rows], every[rows], 15) for rows in np.split(order, 4)]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    # Digits may carry over at different moments; what they mean is the same, and float64 holds it exactly.
    whole, merged = (jax.tree.map(np.asarray, each).bins() for each in (whole, merged))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(merged)):
        np.testing.assert_array_equal(a, b)
    expected = np.histogram(confidence, calibration.fixed_edges(15), weights=confidence.astype(np.float64))[0]
    np.testing.assert_allclose(whole.confidence, expected, rtol=1e-7)
    # 0.3 added to a large float32 sum rounds to 0.5: a naive sum is wrong by half.
    many = jax.tree.map(
        lambda leaf: np.asarray(leaf) * 20000, bin_up(np.full(1000, 0.3), every[:1000], every[:1000], 1)
    )
    np.testing.assert_allclose(many.bins().confidence, [0.3 * 2e7], rtol=1e-7)


def test_more_rows_than_one_chunk_are_carried(monkeypatch):
    from jaxvision.metrics import calibration_sums

    confidence = np.linspace(0.01, 1, 1000, dtype=np.float32)
    every = np.ones(1000, bool)
    whole = jax.tree.map(np.asarray, bin_up(confidence, every, every, 4)).bins()
    monkeypatch.setattr(calibration_sums, "_CHUNK", 300)
    cut = jax.jit(lambda *rows: ExactBins.of(*rows, 4))(confidence, every, every)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(jax.tree.map(np.asarray, cut).bins())):
        np.testing.assert_array_equal(a, b)


def test_the_error_alone_is_that_of_all_rows():
    random = np.random.default_rng(0)
    logits, labels = 3 * random.normal(size=(20, 4)).astype(np.float32), random.integers(0, 4, 20)
    logits[16:] = np.nan  # padding
    of = jax.jit(TopError.of)
    parts = [of(logits[part], labels[part], np.arange(20)[part] < 16) for part in (slice(12), slice(12, 20))]
    merged = parts[0].merge(parts[1])
    np.testing.assert_allclose(merged.compute(), measure(Rows.of(logits[:16], labels[:16])).values["ece"], rtol=1e-5)
    assert merged.top.total == 16
