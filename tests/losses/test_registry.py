"""Losses by name: published numbers for each data set, a function of one's own, and what can go wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.losses import registry
from jaxvision.losses.calibration import CalibrationLoss, cross_entropy, label_smoothing
from jaxvision.losses.correctness_ranking import CorrectnessHistory

LOGITS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
LABELS = np.asarray([0, 1, 2, 0], np.int32)


def own(logits, labels, *, where=None, strength=2.0):
    """A researcher's loss that returns one number."""
    return strength * cross_entropy(logits, labels, where=where).total


def older(logits, labels, where=None, strength=2.0):
    """The same without a star in the signature."""
    return own(logits, labels, where=where, strength=strength)


def without_where(logits, labels, *, strength=2.0):
    return own(logits, labels, strength=strength)


def of_one_argument(logits, *, where=None):
    return logits


def returns_rows(logits, labels, *, where=None):
    return jnp.zeros(len(labels))


@pytest.mark.parametrize("name", registry.LOSSES)
def test_every_entry_names_a_function_that_takes_its_settings(name):
    spec = registry.resolve(name)
    hyper, mixing = spec.settings()
    accepted = registry._keywords(spec.function)
    assert set(hyper) <= accepted and "where" in accepted
    assert bool(mixing) == (spec.needs in ("mixup", "raw_and_mixup", "views"))
    for data in spec.by_data:
        ours, mixed = spec.settings(data)
        assert set(ours) == set(hyper) and set(mixed) == set(mixing) and (ours, mixed) != (hyper, mixing)


def test_published_numbers():
    settings = {
        name: [registry.resolve(name).settings(data) for data in ("cifar10", "tiny_imagenet")]
        for name in registry.LOSSES
    }
    assert [hyper["margin"] for hyper, _ in settings["acls"]] == [6, 10]
    assert [hyper["margin"] for hyper, _ in settings["mbls"]] == [6, 10]
    assert [(hyper["margin"], mixing["alpha"]) for hyper, mixing in settings["mrl"]] == [(2, 2), (1, 1)]
    of_batches = {"num_views": 3, "per_sample": False, "mix": "mixup", "layer": "input"}
    assert [mixing for _, mixing in settings["mndcg"]] == [{"alpha": alpha, **of_batches} for alpha in (2, 1)]
    assert [registry.resolve("regmixup").settings(data)[1]["alpha"] for data in ("cifar10", "cifar100")] == [20, 10]


def test_overrides_come_last():
    spec = registry.resolve("mrl")
    assert spec.settings("tiny_imagenet", margin=3.0, alpha=0.5)[0]["margin"] == 3
    assert spec.settings("tiny_imagenet", margin=3.0, alpha=0.5)[1]["alpha"] == 0.5
    loss = registry.resolve("label_smoothing").bind("cifar10", epsilon=0.2)
    np.testing.assert_array_equal(loss(LOGITS, LABELS), label_smoothing(LOGITS, LABELS, epsilon=0.2))


def test_losses_that_need_more_arrays():
    arrays = {"partner_labels": LABELS[::-1], "lam": 0.3}
    keep, history = LABELS[None] != LABELS[::-1], CorrectnessHistory.create(4)
    mixed = LOGITS[::-1]
    assert registry.resolve("mixup").bind("cifar10")(mixed, LABELS, **arrays).total > 0
    assert registry.resolve("regmixup").bind("cifar10")(LOGITS, LABELS, mixed_logits=mixed, **arrays).total > 0
    assert registry.resolve("mrl").bind("cifar10")(LOGITS, mixed, LABELS, keep).extra > 0
    assert registry.resolve("mndcg").bind("cifar10")(LOGITS, mixed, LABELS, 0.9 * keep + 0.1).aux.ndcg.shape == (4,)
    crl = registry.resolve("crl").bind("cifar10")
    assert crl(LOGITS, LABELS, history=history, sample_index=np.arange(4)).extra == 0


@pytest.mark.parametrize("name", ["own", "older"])
def test_own_function(name):
    loss = registry.resolve(f"{__name__}:{name}").bind(strength=3.0)
    where = jnp.asarray([1, 0, 1, 1])
    result = loss(LOGITS, LABELS, where=where)
    ce = cross_entropy(LOGITS, LABELS, where=where).total
    assert isinstance(result, CalibrationLoss)
    np.testing.assert_allclose(result, [3 * ce, ce, 2 * ce], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlbs", "loss='mlbs' is unknown; did you mean 'mbls'.*package.module:function"),
        ("no_such_package.losses:mine", "No module named 'no_such_package'"),
        (":mine", "must be written as package.module:function"),
        (".losses:mine", "must be written as package.module:function"),
        ("jaxvision.losses.focal:", "must be written as package.module:function"),
        ("jaxvision.losses.focal:focl", "='focl' is unknown; did you mean 'focal'"),
        ("math:log", r"must have the signature \(logits, labels, \*, where=None"),
        (f"{__name__}:without_where", r"must have the signature \(logits, labels, \*, where=None"),
        (f"{__name__}:of_one_argument", r"must have the signature \(logits, labels, \*, where=None"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ConfigError, match=message):
        registry.resolve(name)


def test_wrong_settings():
    with pytest.raises(ConfigError, match="'margn' is unknown; did you mean 'margin'") as caught:
        registry.resolve("acls").settings("cifar10", margn=3)
    assert "where" not in str(caught.value)
    with pytest.raises(ConfigError, match="must return a CalibrationLoss or one number"):
        registry.resolve(f"{__name__}:returns_rows").bind()(LOGITS, LABELS)
