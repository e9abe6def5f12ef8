"""RankMixup's losses on the official code and its float64 reference: values, gradients, order, masks, wrong input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.rankmixup.rankmixup import mndcg_loss, mrl_loss, ranking_metrics
from tests.arrays import load
from tests.losses.oracle import FOLDER, check

MRL = [load(FOLDER / "rankmixup" / f"mrl_{k}.npz") for k in range(4)]
MNDCG = [load(FOLDER / "rankmixup" / f"mndcg_{k}.npz") for k in range(5)]


def differentiate(function, cases):
    """[(the loss, gradients with respect to raw and mixed logits)] of [(raw, mixed, arrays, settings)], one program."""

    def one(raw, mixed, labels, by_view, where, hyper):
        def total(raw, mixed):
            loss = function(raw, mixed, labels, by_view, where=where, **hyper)
            return loss.total, loss

        (_, loss), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(raw, mixed)
        return loss, gradients

    arrays, settings = [case[:-1] for case in cases], [case[-1] for case in cases]
    run = jax.jit(lambda arrays: [one(*each, hyper) for each, hyper in zip(arrays, settings, strict=True)])
    return jax.device_get(run(arrays))


def run_mrl(cases, dtype=np.float32, where=None, **hyper):
    def case(data):
        settings = {"weight": float(data["weight"]), "margin": float(data["margin"]), **hyper}
        raw, mixed = data["raw_logits"].astype(dtype), data["mix_logits"].astype(dtype)
        return raw, mixed, data["labels"], data["keep_mask"], where, settings

    return differentiate(mrl_loss, [case(data) for data in cases])


def run_mndcg(cases, dtype=np.float32, where=None, **hyper):
    def case(data):
        raw, mixed = data["raw_logits"].astype(dtype), data["mix_logits"].astype(dtype)
        settings = {"weight": float(data["weight"]), **hyper}
        return raw, mixed, data["labels"], data["relevance"].T.astype(dtype), where, settings

    return differentiate(mndcg_loss, [case(data) for data in cases])


def test_mrl_as_released():
    for data, (loss, gradients) in zip(MRL, run_mrl(MRL, official_broadcast=True), strict=True):
        check(np.stack(loss), data["official_loss_ce_rank"])
        check(gradients[0], data["official_grad_raw"])
        check(gradients[1], data["official_grad_mix"])


@pytest.mark.parametrize("space", ["logit", "prob"])
def test_mrl_as_intended(space):
    prefix, margin = ("", "margin") if space == "logit" else ("prob_", "prob_margin")
    with jax.enable_x64(True):
        results = run_mrl([{**data, "margin": data[margin]} for data in MRL], np.float64, space=space)
    for data, (loss, gradients) in zip(MRL, results, strict=True):
        check(np.stack(loss), data[f"{prefix}per_sample_loss_ce_rank_f64"], 1e-10)
        check(gradients[0], data[f"{prefix}per_sample_grad_raw_f64"], 1e-10)
        check(gradients[1], data[f"{prefix}per_sample_grad_mix_f64"], 1e-10)


def test_mrl_gradient_in_closed_form():
    data = MRL[2]
    _, gradients = run_mrl([data])[0]
    raw, mixed = data["raw_logits"], data["mix_logits"]
    active = data["keep_mask"] & (mixed.max(-1) - raw.max(-1) + data["margin"] > 0)
    expected = np.eye(raw.shape[1])[mixed.argmax(-1)] * active[:, None] * float(data["weight"]) / len(raw)
    check(gradients[1], expected)
    assert 0 < active.sum() < len(active)


def test_released_mask_lets_pairs_of_one_class_through():
    data = MRL[2]
    same = ~data["keep_mask"]
    intended, released = (run_mrl([data], official_broadcast=flag)[0][1][1] for flag in (False, True))
    assert not intended[same].any() and released[same].any()


def test_mrl_over_several_views():
    data = MRL[0]
    raw, mixed, labels, keep = (data[key] for key in ("raw_logits", "mix_logits", "labels", "keep_mask"))
    views, keeps = np.stack([mixed, mixed[::-1]]), np.stack([keep, ~keep])
    with pytest.raises(ConfigError, match="MRL compares an image with one mixture, but there are 2 views"):
        mrl_loss(raw, views, labels, keeps)
    hinge = np.maximum(views.max(-1) - raw.max(-1) + 2, 0) * keeps
    averaged = jax.jit(functools.partial(mrl_loss, average_views=True))
    for mixed in (views, views.reshape(-1, raw.shape[1])):
        check(averaged(raw, mixed, labels, keeps).extra, hinge.mean())


def test_mndcg():
    for data, (loss, gradients) in zip(MNDCG, run_mndcg(MNDCG), strict=True):
        check(np.stack(loss[:3]), data["official_loss_ce_rank"])
        check(loss.aux.ndcg, data["official_ndcg"])
        check(gradients[0], data["official_grad_raw"])
        check(gradients[1], data["official_grad_mix"])
        np.testing.assert_array_equal(loss.aux.order, data["rank_order"])


def test_mndcg_in_float64():
    with jax.enable_x64(True):
        results = run_mndcg(MNDCG, np.float64)
    for data, (loss, gradients) in zip(MNDCG, results, strict=True):
        check(np.stack(loss[:3]), data["loss_ce_rank_f64"], 1e-10)
        for name in ("ndcg", "dcg", "idcg"):
            check(getattr(loss.aux, name), data[f"{name}_f64"], 1e-10)
        check(gradients[0], data["grad_raw_f64"], 1e-10)
        check(gradients[1], data["grad_mix_f64"], 1e-10)


def test_mndcg_pushes_all_confidences_of_an_image_the_same_way():
    """Up where DCG < IDCG, down elsewhere; there is no gradient through the relevance."""
    data = MNDCG[2]
    loss, gradients = run_mndcg([data], weight=1e4)[0]  # cross-entropy is negligible beside it
    count, classes = data["raw_logits"].shape
    rises = np.asarray(loss.aux.dcg) < np.asarray(loss.aux.idcg)
    logits = np.concatenate([data["raw_logits"], data["mix_logits"]]).reshape(-1, count, classes)
    slopes = np.concatenate([gradients[0], gradients[1]]).reshape(-1, count, classes)
    of_top = np.take_along_axis(slopes, logits.argmax(-1)[..., None], -1)[..., 0]
    sure = np.abs(of_top) > 1e-3 * np.abs(of_top).max()
    assert rises.any() and not rises.all() and sure.any(0).all()
    assert (np.sign(of_top) == np.where(rises, -1, 1))[sure].all()
    relevance = jnp.asarray(data["relevance"].T)
    run = lambda r: mndcg_loss(data["raw_logits"], data["mix_logits"], data["labels"], r).total  # noqa: E731
    assert not jax.jit(jax.grad(run))(relevance).any()


def test_masked_rows_are_as_if_absent():
    where = np.ones(16, bool)
    where[[0, 3, 15]] = False
    mrl, mndcg = MRL[0], MNDCG[0]
    for run, data, views in ((run_mrl, mrl, 1), (run_mndcg, mndcg, 3)):
        kept = dict(data)
        for key in ("raw_logits", "labels", "keep_mask", "relevance"):
            if key in data:
                kept[key] = data[key][where]
        kept["mix_logits"] = data["mix_logits"].reshape(views, 16, -1)[:, where].reshape(views * 13, -1)
        spoilt = {key: np.array(value) for key, value in data.items()}
        spoilt["raw_logits"][0], spoilt["labels"][3] = np.nan, 255
        spoilt["mix_logits"].reshape(views, 16, -1)[:, 15] = np.inf
        (loss, gradients), (expected, wanted) = run([spoilt], where=where)[0], run([kept])[0]
        check(np.stack(loss[:3]), np.stack(expected[:3]))
        check(gradients[0][where], wanted[0])
        gradient = np.asarray(gradients[1]).reshape(views, 16, -1)
        check(gradient[:, where], np.asarray(wanted[1]).reshape(views, 13, -1))
        assert not gradient[:, ~where].any() and not gradients[0][~where].any()
        loss, gradients = run([spoilt], where=np.zeros(16, bool))[0]
        assert float(loss.total) == 0 and not gradients[0].any() and not gradients[1].any()


def test_broadcast_with_masked_rows():
    where = np.arange(16) % 3 != 0
    data = MRL[2]
    loss, _ = run_mrl([data], official_broadcast=True, where=where[: len(data["labels"])])[0]
    valid = where[: len(data["labels"])]
    hinge = np.maximum(data["mix_logits"].max(-1) - data["raw_logits"].max(-1) + data["margin"], 0)[valid]
    check(loss.extra, data["keep_mask"][valid].mean() * hinge.mean())


def test_ranking_metrics():
    """Two classes, so that a confidence c is a logit log(c / (1 - c))."""
    conf = np.asarray([[0.9, 0.6], [0.7, 0.8], [0.8, 0.7], [0.95, 0.55]])  # raw, then three views, of two images
    logits = np.stack([np.log(conf / (1 - conf)), np.zeros_like(conf)], -1).astype(np.float32)
    relevance = np.asarray([[0.7, 0.7], [0.6, 0.6], [1.0, 0.6]], np.float32)
    run = jax.jit(ranking_metrics)
    found = run(logits[0], logits[1:], relevance)
    found = {name: float(mean.compute()) for name, mean in found.items()}
    gap = (conf[1:] - relevance).mean()
    # Image 0: .7 > .6 but .7 < .8, twice .95 is the highest; image 1: .8 > .7, .8 > .55, and a tie that isn't counted.
    expected = {
        "raw_above_mixed": 3 / 6,
        "pair_order": 4 / 5,
        "mixed_confidence": conf[1:].mean(),
        "confidence_gap": gap,
    }
    assert found == pytest.approx({**expected, "reciprocal": 0.0}, abs=1e-6)
    one = run(logits[0], logits[1], relevance[0], where=jnp.asarray([1, 0]))
    assert float(one["raw_above_mixed"].compute()) == 1 and "pair_order" not in one


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda z, y: mrl_loss(z, z[:3], y, y == 0),
            r"mixed logits have shape \(3, 5\), but raw ones of shape \(4, 5\)",
        ),
        (lambda z, y: mrl_loss(z, z, y, (y == 0)[:3]), r"keep has shape \(3,\), but the mixed logits need \(1, 4\)"),
        (lambda z, y: mndcg_loss(z, np.stack([z, z]), y, np.ones((4, 2))), r"relevance has shape \(4, 2\)"),
        (lambda z, y: mrl_loss(z, z, y, y == 0, space="logits"), "space='logits' is unknown; did you mean 'logit'"),
        (lambda z, y: mndcg_loss(z, z, y, np.ones(4), weight=-1), "weight=-1 must be at least 0"),
    ],
)
def test_wrong_input(run, message):
    with pytest.raises(ConfigError, match=message):
        run(np.zeros((4, 5), np.float32), np.zeros(4, np.int32))
