"""The calibration losses on the official codes' values and gradients, masked, dense, extreme and wrong input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.losses import calibration, focal, pairwise, penalties, registry
from tests.arrays import load
from tests.losses.oracle import FOLDER, check, compiled, value_and_gradient

CASES = {
    "cross_entropy": (calibration.cross_entropy, {}),
    "label_smoothing": (calibration.label_smoothing, {"epsilon": "epsilon"}),
    "focal_gamma1": (focal.focal, {"gamma": "gamma"}),
    "focal_gamma3": (focal.focal, {"gamma": "gamma"}),
    "flsd53": (focal.flsd, {"gamma": "gamma_high_p"}),
    "mmce": (pairwise.mmce, {"weight": "weight", "width": "kernel_width"}),
    "mmce_weighted": (pairwise.mmce_weighted, {"weight": "weight", "width": "kernel_width"}),
    "mmce_weighted_all_correct": (pairwise.mmce_weighted, {"weight": "weight"}),
    "mmce_weighted_all_wrong": (pairwise.mmce_weighted, {"weight": "weight"}),
    "mdca": (penalties.mdca, {"beta": "beta"}),
    "dca": (penalties.dca, {"beta": "beta"}),
    "brier": (calibration.brier, {}),
    "entropy_penalty": (penalties.entropy_penalty, {"alpha": "alpha"}),
    "l1_penalty": (penalties.l1_penalty, {"alpha": "alpha"}),
    "mbls": (penalties.mbls, {"margin": "margin", "alpha": "alpha"}),
    "cpc": (pairwise.cpc, {"lambda_bdc": "lambda_bdc", "lambda_bec": "lambda_bec"}),
}
FILES = {
    path.stem.removeprefix("loss_"): name
    for name in CASES
    for path in sorted((FOLDER / "calibration_metrics").glob(f"loss_{name}_[0-9].npz"))
}
PLAIN = {name: spec.bind("digits") for name, spec in registry.LOSSES.items() if spec.needs == "logits"}


RUN = compiled(PLAIN)


def example(rows=12, classes=5, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows).astype(np.int32)
    return (rng.normal(size=(rows, classes)) * scale).astype(np.float32), labels


def every(logits, labels, where=None):
    """name -> (loss, gradient) of all losses, through dense input [3, 4, K] with a mask, gradients as rows."""
    where = np.ones(12, bool) if where is None else where
    dense = logits.reshape(3, 4, -1), labels.reshape(3, 4), {"where": where.reshape(3, 4)}
    results = RUN(dict.fromkeys(PLAIN, dense))
    return {name: (loss, gradient.reshape(12, -1)) for name, (loss, gradient) in results.items()}


@pytest.mark.parametrize("k", range(3))
def test_official_values_and_gradients(k):
    functions, inputs, official = {}, {}, {}
    for case in [case for case in FILES if case.endswith(f"_{k}")]:
        data = load(FOLDER / "calibration_metrics" / f"loss_{case}.npz")
        function, keys = CASES[FILES[case]]
        functions[case] = functools.partial(function, **{ours: float(data[theirs]) for ours, theirs in keys.items()})
        inputs[case], official[case] = (data["logits"], data["labels"], {}), data
    assert len(functions) >= 13
    for case, (loss, gradient) in compiled(functions)(inputs).items():
        value = official[case]["value"]
        check(loss.total, value[0], err_msg=case)
        check(gradient, official[case]["grad"], err_msg=case)
        if len(value) > 1:
            check(loss.ce, value[1], err_msg=case)
        if len(value) == 3:
            check(loss.extra, value[2], err_msg=case)


def test_the_parts_of_cpc():
    data = load(FOLDER / "calibration_metrics" / "loss_cpc_0.npz")
    for part, value in zip((pairwise.binary_discrimination, pairwise.binary_exclusion), data["value"][2:], strict=True):
        check(jax.jit(part)(data["logits"], data["labels"]), value)


def test_every_loss_has_an_oracle():
    with_oracle = {name.rsplit("_gamma")[0] for name in CASES}
    assert with_oracle >= {{"ce": "cross_entropy", "flsd52": "flsd53"}.get(name, name) for name in PLAIN} - {"acls"}
    assert set(FILES.values()) == set(CASES)


@pytest.mark.parametrize("k", range(4))
def test_mbls_of_acls(k):
    data = load(FOLDER / "acls" / f"mbls_loss_{k}.npz")
    hyper = {"margin": float(data["margin"]), "alpha": float(data["alpha"])}
    loss, gradient = value_and_gradient(penalties.mbls, data["logits"], data["labels"], **hyper)
    check(np.stack(loss), [data["loss"], data["ce"], data["reg"]])
    check(gradient, data["grad"])


@pytest.mark.parametrize("k", range(2))
def test_label_smoothing_of_acls(k):
    data = load(FOLDER / "acls" / f"label_smoothing_{k}.npz")
    loss, gradient = value_and_gradient(
        calibration.label_smoothing, data["logits"], data["labels"], epsilon=float(data["epsilon"])
    )
    check(loss.total, data["loss"])
    check(gradient, data["grad"])


def test_double_softmax_of_the_rankmixup_repository_is_another_loss():
    data = load(FOLDER / "calibration_metrics" / "loss_mdca_rankmixup_repo_double_softmax_0.npz")
    ours = penalties.mdca(data["logits"], data["labels"])
    check(ours.extra, data["value"][2])
    assert abs(float(ours.ce) - data["value"][1]) > 0.1


def test_mdca_and_dca_on_focal_loss():
    logits, labels = example()
    base = focal.focal(logits, labels, gamma=2.0)
    for function in (penalties.mdca, penalties.dca):
        loss = function(logits, labels, base="focal", gamma=2.0, beta=0.5)
        check(loss.total, base.total + 0.5 * loss.extra)


def test_masked_dense_rows_are_as_if_absent():
    logits, labels = example()
    where = np.ones(12, bool)
    where[[0, 5, 11]] = False
    spoilt, wrong = logits.copy(), labels.copy()
    spoilt[0], spoilt[5, 1], wrong[11] = np.nan, np.inf, 255
    wrong[0] = -1
    masked = every(spoilt, wrong, where)
    for name, (loss, gradient) in RUN(dict.fromkeys(PLAIN, (logits[where], labels[where], {}))).items():
        check(np.stack(masked[name][0]), np.stack(loss), err_msg=name)
        check(masked[name][1][where], gradient, err_msg=name)
        assert not masked[name][1][~where].any(), name


def test_no_valid_row():
    logits, labels = example()
    for name, (loss, gradient) in every(logits * np.nan, labels + 99, np.zeros(12, bool)).items():
        assert [float(part) for part in loss] == [0, 0, 0], name
        assert not gradient.any(), name


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits(scale):
    """All logits equal, and confidences of exactly 1."""
    for name, (loss, gradient) in every(*example(scale=scale)).items():
        assert np.isfinite(np.stack(loss)).all() and np.isfinite(gradient).all(), name


def test_float32_inside():
    logits, labels = example(scale=6.0)
    half = jnp.asarray(logits, jnp.bfloat16)
    given = every(half, labels)
    for name, (expected, _) in every(half.astype(jnp.float32), labels).items():
        check(np.stack(given[name][0]), np.stack(expected), err_msg=name)
        assert all(part.dtype == jnp.float32 and part.shape == () for part in given[name][0]), name


def test_gradients_are_the_slopes_in_float64():
    """Of all but ACLS, which stops a gradient."""
    with jax.enable_x64(True):
        logits, labels = example()
        logits = logits.astype(np.float64)
        step = np.random.default_rng(1).normal(size=logits.shape) * 1e-6
        ends = [every(logits + sign * step, labels) for sign in (1, -1)]
        for name, (loss, gradient) in every(logits, labels).items():
            assert all(part.dtype == np.float64 for part in loss), name
            change = float(ends[0][name][0].total - ends[1][name][0].total) / 2
            if name != "acls":
                np.testing.assert_allclose(change, np.sum(gradient * step), rtol=1e-4, err_msg=name)


def test_label_out_of_range():
    logits, labels = example()
    labels[3] = 5
    for loss in PLAIN.values():
        with pytest.raises(DataError, match=r"label 5 is outside 0\.\.4 \(1 of 12 labels are\)"):
            loss(logits, labels)
    for wrong in (5, -1):
        labels[3] = wrong
        assert all(np.isnan(loss).all() for loss, _ in every(logits, labels).values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(value):
    logits, labels = example()
    logits[3, 1] = value
    assert all(np.isnan(loss.total) for loss, _ in every(logits, labels).values())


def test_ties_send_the_gradient_to_the_first_maximum():
    logits = np.asarray([[1.0, 7.0, 7.0, -3.0]], np.float32)
    penalty = lambda z: penalties.mbls(z, np.asarray([0]), margin=6.0).extra  # noqa: E731
    np.testing.assert_allclose(jax.grad(penalty)(jnp.asarray(logits)), [[0, 0.25, 0, -0.25]])


def test_hinge_has_slope_zero_at_its_kink():
    logits = np.asarray([[1.0, 7.0]], np.float32)
    penalty = lambda z: penalties.mbls(z, np.asarray([0]), margin=6.0).extra  # noqa: E731
    assert not jax.grad(penalty)(jnp.asarray(logits)).any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 2.5])
def test_focal_gradient_in_closed_form(gamma):
    logits, labels = example()
    logits[0] = 0
    logits[0, labels[0]] = 200  # p = 1 exactly
    _, gradient = value_and_gradient(focal.focal, logits, labels, gamma=gamma)
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    s = p[np.arange(12), labels][:, None]
    rest = np.maximum(1 - s, 1e-300)
    slope = (gamma * rest ** (gamma - 1) * np.log(s) if gamma else 0) - rest**gamma / s
    expected = slope * s * (np.eye(5)[labels] - p) / 12
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_flsd_changes_its_gamma_at_one_half_and_one_fifth():
    p = np.asarray([0.1, 0.19, 0.21, 0.49, 0.51, 0.9])
    logits = np.log(np.stack([p, 1 - p], -1)).astype(np.float32)
    labels = np.zeros(6, np.int32)
    for gamma in (3.0, 2.0):
        losses = [float(focal.flsd(logits[i : i + 1], labels[:1], gamma=gamma).total) for i in range(6)]
        np.testing.assert_allclose(losses, -((1 - p) ** [5, 5, 3, 3, gamma, gamma]) * np.log(p), rtol=1e-4)


def test_cpc_in_chunks_equals_cpc_at_once(monkeypatch):
    logits, labels = example(13)
    where = jnp.arange(13) != 4
    whole = value_and_gradient(pairwise.cpc, logits, labels, where=where)
    monkeypatch.setattr(pairwise, "_CHUNK_PAIRS", 3 * 25)
    chunked = value_and_gradient(pairwise.cpc, logits, labels, where=where)
    check(np.stack(chunked[0]), np.stack(whole[0]))
    check(chunked[1], whole[1])


def test_cpc_bounds_its_memory():
    """2048 rows of 200 classes have 82 million pairs; the program may hold a few chunks of them."""
    logits, labels = jnp.zeros((2048, 200)), jnp.zeros(2048, jnp.int32)
    compiled = jax.jit(jax.grad(lambda z: pairwise.cpc(z, labels).total)).lower(logits).compile()
    everything = 4 * 2048 * 200**2
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * pairwise._CHUNK_PAIRS < everything / 2


def test_mmce_weighted_where_its_root_is_of_a_negative_number():
    """Right and wrong rows of the same confidence: E is 0 but for the 1e-5 in its denominators."""
    logits = np.tile(np.log(np.asarray([[0.5, 0.5 - 1e-7]], np.float32)), (40, 1))
    labels = np.asarray([0] * 20 + [1] * 20, np.int32)
    loss, gradient = value_and_gradient(pairwise.mmce_weighted, logits, labels)
    assert np.isfinite(loss.total) and np.isfinite(gradient).all()


def test_smoothing_that_a_loss_implies():
    logits, labels = example()
    f = calibration.implied_smoothing(calibration.label_smoothing, logits, labels, epsilon=0.2)
    np.testing.assert_allclose(f, 0.2 * np.eye(5)[labels] - 0.04, atol=2e-6)
    np.testing.assert_allclose(calibration.implied_smoothing(calibration.cross_entropy, logits, labels), 0, atol=1e-6)


def test_mean_over_pmapped_devices_is_the_mean_over_the_batch():
    from jaxvision.core import devices

    logits, labels = example(8)
    where = jnp.arange(8) % 3 != 0
    shards = [jnp.asarray(each).reshape(2, 4, *each.shape[1:]) for each in (logits, labels, where)]

    def step(z, y, valid):
        with devices.device_axis("d"):
            value, gradient = jax.value_and_grad(lambda z: penalties.mbls(z, y, margin=2.0, where=valid).total)(z)
            return devices.mean_over_devices(value), gradient

    value, gradient = jax.jit(jax.vmap(step, axis_name="d"))(*shards)
    loss, expected = value_and_gradient(penalties.mbls, logits, labels, margin=2.0, where=where)
    check(value[0], loss.total)
    check(gradient.reshape(8, 5) / 2, expected)


@pytest.mark.parametrize(
    ("function", "classes", "hyper", "message"),
    [
        (calibration.cross_entropy, 1, {}, "logits have 1 classes.*needs 2"),
        (penalties.mbls, 1, {}, "logits have 1 classes.*needs 2"),
        (pairwise.cpc, 2, {}, "at least 3 classes, but logits have 2; set lambda_bec to 0"),
        (calibration.label_smoothing, 5, {"epsilon": 1.5}, r"epsilon=1\.5 must be between 0 and 1"),
        (focal.focal, 5, {"gamma": -1}, "gamma=-1 must be at least 0"),
        (penalties.mbls, 5, {"margin": float("nan")}, "margin=nan must be at least 0"),
        (penalties.mdca, 5, {"base": "foca"}, "base='foca' is unknown; did you mean 'focal'"),
        (pairwise.mmce, 5, {"width": 0}, "width=0 must be above 0"),
    ],
)
def test_wrong_settings(function, classes, hyper, message):
    logits, labels = example(6, classes)
    with pytest.raises(ConfigError, match=message):
        function(logits, labels, **hyper)


def test_cpc_of_two_classes_without_exclusion():
    logits, labels = example(6, 2)
    assert np.isfinite(pairwise.cpc(logits, labels, lambda_bec=0).total)


def test_wrong_shapes():
    logits, labels = example()
    with pytest.raises(ConfigError, match=r"labels have shape \(11,\), but logits of shape \(12, 5\)"):
        calibration.cross_entropy(logits, labels[1:])
    with pytest.raises(ConfigError, match=r"where has shape \(3,\)"):
        calibration.cross_entropy(logits, labels, where=jnp.ones(3))
    with pytest.raises(ConfigError, match="labels are float32"):
        calibration.cross_entropy(logits, labels.astype(np.float32))
    with pytest.raises(ConfigError, match="all pairs of 40000 rows"):
        pairwise.mmce(np.zeros((40000, 2), np.float32), np.zeros(40000, np.int32))
