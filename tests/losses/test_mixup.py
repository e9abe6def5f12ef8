"""mixup and RegMixup on the official codes' values and gradients."""

import jax
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.losses.mixup import mixup, regmixup
from tests.arrays import load
from tests.losses.oracle import FOLDER, check


@pytest.mark.parametrize("k", range(2))
def test_official_values_and_gradients(k):
    data = load(FOLDER / "calibration_metrics" / f"regmixup_{k}.npz")
    partner = data["labels"][data["perm"]]
    arrays = {"partner_labels": partner, "lam": float(data["lam"])}

    def total(raw, mixed):
        loss = regmixup(raw, data["labels"], mixed_logits=mixed, **arrays)
        return loss.total, loss

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, loss), gradients = run(data["raw_logits"], data["mix_logits"])
    check(np.stack(loss), [data["regmixup_mean_over_2B"], data["raw_ce"], data["mixup_ce"]])
    check(gradients[0], data["grad_raw"])
    check(gradients[1], data["grad_mix"])
    check(mixup(data["mix_logits"], data["labels"], **arrays).total, data["mixup_ce"])
    summed = regmixup(
        data["raw_logits"], data["labels"], mixed_logits=data["mix_logits"], eta=0.5, reduction="sum", **arrays
    )
    check(summed.total, data["raw_ce"] + 0.5 * data["mixup_ce"])


def test_masked_rows():
    rng = np.random.default_rng(0)
    logits, mixed = rng.normal(size=(2, 6, 3)).astype(np.float32)
    labels, partner = rng.integers(0, 3, (2, 6)).astype(np.int32)
    where = np.asarray([1, 1, 0, 1, 0, 1], bool)
    kept = regmixup(logits[where], labels[where], mixed_logits=mixed[where], partner_labels=partner[where], lam=0.3)
    logits[2], mixed[4], partner[2] = np.nan, np.inf, 255
    masked = regmixup(logits, labels, mixed_logits=mixed, partner_labels=partner, lam=0.3, where=where)
    check(np.stack(masked), np.stack(kept))
    alone = regmixup(
        logits,
        labels,
        mixed_logits=mixed,
        partner_labels=partner,
        lam=0.3,
        where=where,
        mixed_where=where & ~where[::-1],
    )
    check(alone.ce, kept.ce)
    assert alone.extra != kept.extra


def test_wrong_settings():
    logits, labels = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
    arrays = {"partner_labels": labels, "lam": 0.5}
    with pytest.raises(ConfigError, match="reduction='mean' is unknown; did you mean 'mean2n'"):
        regmixup(logits, labels, mixed_logits=logits, reduction="mean", **arrays)
    with pytest.raises(ConfigError, match=r"raw images have shape \(4, 3\), of mixed images \(3, 3\)"):
        regmixup(logits, labels, mixed_logits=logits[1:], **arrays)
    with pytest.raises(ConfigError, match=r"lam=1\.5 must be between 0 and 1"):
        mixup(logits, labels, partner_labels=labels, lam=1.5)
