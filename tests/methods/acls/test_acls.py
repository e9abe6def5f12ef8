"""ACLS on the official code: values and gradients, float64 reference, paper form, dense input, whole steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.engine import supervised
from jaxvision.losses.calibration import cross_entropy, implied_smoothing
from jaxvision.methods.acls.acls import acls_logit_gradient, acls_loss, acls_metrics, smoothing_function
from jaxvision.optim import optimizers
from tests.arrays import load
from tests.losses.oracle import FOLDER, TinyNet, check, compiled, variables

KEYS = ("margin", "lambda_top", "lambda_rest", "alpha")
CASES = {f"acls_loss_{k}": load(FOLDER / "acls" / f"acls_loss_{k}.npz") for k in range(7)}
HYPER = {name: {key: float(data[key]) for key in KEYS} for name, data in CASES.items()}


@functools.cache
def results(dtype=np.float32, **more):
    functions = {name: functools.partial(acls_loss, **HYPER[name], **more) for name in CASES}
    inputs = {name: (data["logits"].astype(dtype), data["labels"], {}) for name, data in CASES.items()}
    return compiled(functions)(inputs)


def example(rows=9, classes=6, scale=8.0):
    rng = np.random.default_rng(3)
    return (rng.normal(size=(rows, classes)) * scale).astype(np.float32), rng.integers(0, classes, rows).astype(
        np.int32
    )


def test_official_values_and_gradients():
    for name, (loss, gradient) in results().items():
        data = CASES[name]
        check(np.stack(loss), [data["loss"], data["ce"], data["reg"]], err_msg=name)
        check(gradient, data["grad"], err_msg=name)


def test_float64_reference_and_closed_form():
    def closed_form(cases):
        return {
            name: (acls_logit_gradient(z, y, **HYPER[name]), smoothing_function(z, **HYPER[name]) / len(z))
            for name, (z, y) in cases.items()
        }

    with jax.enable_x64(True):
        cases = {name: (data["logits"].astype(np.float64), data["labels"]) for name, data in CASES.items()}
        closed = jax.jit(closed_form)(cases)
        for name, (loss, gradient) in results(np.float64).items():
            data, (whole, penalty) = CASES[name], closed[name]
            check(np.stack(loss), [data["loss_f64"], data["ce_f64"], data["reg_f64"]], 1e-10, name)
            check(gradient, data["grad_f64"], 1e-10, name)
            check(whole, data["grad_f64"], 1e-10, name)
            if data["grad_reg_f64"].any():
                check(penalty, data["grad_reg_f64"], 1e-10, name)
            else:
                assert not penalty.any() and loss.extra == 0


def test_form_of_the_paper():
    with jax.enable_x64(True):
        for name, (loss, _) in results(np.float64, reference="min").items():
            data = CASES[name]
            check(np.stack([loss.total, loss.extra]), [data["paper_loss_f64"], data["paper_reg_f64"]], 1e-10, name)


def test_paper_gradient_differs_by_the_minimum_alone():
    """The oracle holds the minimum constant; here the top's gradient comes back, negative, at the smallest logit."""
    data, hyper = CASES["acls_loss_0"], HYPER["acls_loss_0"]
    with jax.enable_x64(True):
        _, gradient = results(np.float64, reference="min")["acls_loss_0"]
        difference = gradient - data["paper_grad_f64_top_minus_min_stopgrad"]
        z = data["logits"].astype(np.float64)
        excess = np.maximum(z.max(-1) - z.min(-1) - hyper["margin"], 0)
        expected = np.zeros_like(z)
        weight = 2 * hyper["alpha"] * hyper["lambda_top"] / len(z)
        expected[np.arange(len(z)), z.argmin(-1)] = -weight * excess
        np.testing.assert_allclose(difference, expected, atol=1e-12)
        assert (excess > 0).any()


def test_dense_with_ignored_pixels():
    cases = {k: load(FOLDER / "acls" / f"acls_dense_{k}.npz") for k in range(2)}
    hyper = {k: {key: float(data[key]) for key in KEYS} for k, data in cases.items()}
    where = {k: data["labels"] != data["ignore_label"] for k, data in cases.items()}
    inputs = {k: (data["logits"], data["labels"], {"where": where[k]}) for k, data in cases.items()}
    for k, (loss, gradient) in compiled({k: functools.partial(acls_loss, **hyper[k]) for k in cases})(inputs).items():
        data = cases[k]
        check(np.stack(loss), [data["loss"], data["ce"], data["reg"]])
        check(gradient, data["grad"])
        assert not gradient[~where[k]].any()
        closed = jax.jit(functools.partial(acls_logit_gradient, **hyper[k]))
        check(closed(data["logits"], data["labels"], where=where[k]), data["grad"])
    assert not where[1].all()


def test_penalises_the_predicted_class_and_not_the_label():
    logits, labels = np.asarray([[12.0, 15.0, 0.0]], np.float32), np.asarray([0], np.int32)
    f = jax.jit(smoothing_function)(logits)
    np.testing.assert_allclose(f, [[0, 0.2 * 5, -0.02 / 2 * 5]], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(functools.partial(implied_smoothing, acls_loss))(logits, labels), f, atol=1e-6)


def test_inside_the_margin_it_is_cross_entropy():
    losses = {"acls": acls_loss, "ce": cross_entropy}
    found = compiled(losses)(dict.fromkeys(losses, (*example(scale=1.0), {})))
    assert found["acls"][0].extra == 0
    np.testing.assert_array_equal(found["acls"][1], found["ce"][1])


def test_smoothing_is_linear_in_the_excess_continuous_and_not_zero_sum():
    z = np.zeros((5, 4), np.float32)
    z[:, 1], z[:, 2:] = [9.9, 10.0, 11, 12, 13], 5
    f, from_minimum = jax.jit(lambda z: (smoothing_function(z), smoothing_function(z, reference="min", terms="top")))(z)
    np.testing.assert_allclose(f[:, 1], 0.2 * np.asarray([0, 0, 1, 2, 3]), rtol=1e-5)
    np.testing.assert_allclose(f[:, 0], -0.02 / 3 * np.asarray([0, 0, 1, 2, 3]), rtol=1e-5)
    assert not f[:, 2:].any() and (f[2:].sum(-1) > 0.1).all()
    np.testing.assert_allclose(from_minimum.sum(-1), 0, atol=1e-6)


ABLATIONS = list(itertools.product(("squared", "linear"), ("zero", "min"), ("both", "top", "rest")))


def test_ablations_in_closed_form():
    logits, labels = example()
    hyper = {case: dict(zip(("form", "reference", "terms"), case, strict=True), margin=4.0) for case in ABLATIONS}
    losses = {str(case): functools.partial(acls_loss, **hyper[case]) for case in ABLATIONS}
    found = compiled(losses)(dict.fromkeys(losses, (logits, labels, {})))
    closed = jax.jit(lambda z, y: {str(case): acls_logit_gradient(z, y, **hyper[case]) for case in ABLATIONS})
    for name, gradient in closed(logits, labels).items():
        check(found[name][1], gradient, err_msg=name)
        assert found[name][0].extra > 0.1, name
    z = logits.astype(np.float64)
    for form, reference in itertools.product(("squared", "linear"), ("zero", "min")):
        both, top, rest = (found[str((form, reference, terms))][0].extra for terms in ("both", "top", "rest"))
        check(both, top + rest)
        power, base = 2 if form == "squared" else 1, z.min(-1) if reference == "min" else 0
        check(top, np.mean(np.maximum(z.max(-1) - base - 4, 0) ** power))
        gaps = np.maximum(z.max(-1, keepdims=True) - z - 4, 0) ** power
        check(rest, 0.1 * gaps.sum(-1).mean() / 5)


def test_adding_a_constant_changes_only_the_released_form():
    logits, labels = example()
    for reference, same in (("zero", False), ("min", True)):
        run = jax.jit(functools.partial(acls_loss, reference=reference))
        pair = [float(run(z, labels).extra) for z in (logits, logits - 3)]
        assert np.isclose(*pair, rtol=1e-4) == same


def test_metrics():
    logits = np.asarray([[11.0, 0, 2], [3, 1, 2], [np.nan, 0, 0]], np.float32)
    where = jnp.asarray([1, 1, 0])
    found = {name: float(mean.compute()) for name, mean in acls_metrics(logits, where=where).items()}
    expected = {"top_active": 0.5, "rest_active": 0.25, "top_logit": 7, "mean_logit": (13 / 3 + 2) / 2}
    assert found == pytest.approx({**expected, "logit_range": 6.5}, rel=1e-6)


@pytest.mark.parametrize(
    ("hyper", "classes", "message"),
    [
        ({}, 1, "logits have 1 classes"),
        ({"reference": "max"}, 3, "reference='max' is unknown.*min, zero"),
        ({"form": "square"}, 3, "form='square' is unknown; did you mean 'squared'"),
        ({"terms": "none"}, 3, "terms='none' is unknown"),
        ({"margin": -1.0}, 3, "margin=-1\\.0 must be at least 0"),
    ],
)
def test_wrong_settings(hyper, classes, message):
    with pytest.raises(ConfigError, match=message):
        acls_loss(np.zeros((2, classes), np.float32), np.zeros(2, np.int32), **hyper)


@pytest.mark.parametrize("k", range(2))
def test_two_training_steps(k):
    data = load(FOLDER / "acls" / f"train_step_{k}.npz")
    hyper = {key: float(data[key]) for key in KEYS}
    sgd = optimizers.sgd(
        float(data["learning_rate"]), float(data["momentum"]), weight_decay=float(data["weight_decay"])
    )
    transform = optax.chain(optimizers.clip_by_global_norm(float(data["clip_norm"])), sgd)

    def loss(outputs, batch):
        parts = acls_loss(outputs, batch["label"], **hyper)
        return parts.total, {"parts": jnp.stack(parts), "logits": outputs}

    state = supervised.new_state(jax.tree.map(jnp.asarray, variables(data, "init_")), transform, average=False)
    step = jax.jit(supervised.train_step(TinyNet(), transform, loss))
    for s in range(2):
        state, metrics = step(state, {"image": data["x"][s], "label": data["labels"][s]}, jax.random.key(0))
        check(metrics["logits"], data[f"step{s}_logits"], 2e-5)
        check(metrics["parts"], data[f"step{s}_loss_ce_reg"], 2e-5)
        check(metrics["grad_norm"].total, data[f"step{s}_grad_norm_before_clip"], 2e-5)
        new = {"params": state.params, **state.model_state}
        jax.tree.map(lambda got, want: check(got, want, 2e-5), new, variables(data, f"step{s}_"))
    check(TinyNet().apply(new, data["x"][0]), data["eval_logits_after"], 5e-5)
