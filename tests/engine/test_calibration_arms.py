"""Arms in training: every loss steps, mixed passes and CRL's memory hold, pixels without a label don't count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms, supervised
from jaxvision.engine.calibration_arms import MONITOR, Trainer, trained
from jaxvision.engine.calibration_names import parse
from jaxvision.engine.calibration_passes import HISTORY
from jaxvision.losses import registry
from jaxvision.losses.calibration import cross_entropy
from jaxvision.losses.correctness_ranking import CorrectnessHistory, crl
from jaxvision.metrics import Mean
from jaxvision.models.mixing import blend, draw_pairs
from jaxvision.models.plain_cnn import PlainCNN

K, N = 4, 8
NETWORK = PlainCNN(K, features=(3,), strides=(2,), dilations=(1,))
DENSE = PlainCNN(K, features=(3,), strides=(1,), dilations=(1,), dense=True)
CONFIGURED = {name: spec.defaults("digits") for name, spec in registry.LOSSES.items()}


def batch(dense=False):
    random = np.random.default_rng(0)
    images = random.normal(size=(N, 4, 4, 1)).astype(np.float32)
    rows = {"image": images, "label": random.integers(0, K, N).astype(np.int32), "index": np.arange(N)[::-1].copy()}
    if dense:
        rows["label_map"] = random.integers(0, K, (N, 4, 4)).astype(np.uint8)
        rows["label_map"][:, 0] = 255
    return rows


def trainer(name, *, dense=False, monitor=None, **changes):
    outputs = (4, 4, K) if dense else (K,)
    values = {"steps": 4, "per_epoch": 2, "offset": 0, "train_size": N, "num_bins": 5, "monitor": monitor, **changes}
    module, schedule = DENSE if dense else NETWORK, optax.constant_schedule(0.1)
    return Trainer(parse(name, CONFIGURED), module, outputs, optax.sgd(0.1), schedule, **values)


class NoBatches:
    batch_size = N


@functools.cache
def initial(module):
    return jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))


def begin(way, setting=None):
    variables = initial(way.module)
    state = way.begin(variables, {}, jax.random.key(0))
    return state.replace(extra={**state.extra, arms.SETTING: setting or {}})


_forward = jax.jit(lambda variables, images: NETWORK.apply(variables, images, train=True, mutable=["batch_stats"])[0])


def train_logits(state, images):
    return _forward(supervised.variables(state), images)


VIEWS = ("mndcg(num_views=2,per_sample=True)", "mndcg(num_views=2,layer=features)", "mrl(mix=cutmix)")


@pytest.mark.parametrize("name", [*registry.LOSSES, "acls(margin=(1,2))", *VIEWS])
def test_every_loss_steps_for_several_members(name):
    way = trainer(name)
    way.try_loss(batch())
    stage = arms.stage(way.arm(), (0, 1), [NoBatches()] * 2, {"test": object()}, how="vmap")
    image, key = np.zeros((1, 4, 4, 1), np.float32), jax.random.key(0)

    def run(rows):
        state = arms.start_state(lambda key: NETWORK.init(key, image), (0, 1), key)
        state = stage.begin(state, key)
        new, metrics = stage.step(state, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], 1), rows), key)
        evaluated = stage.evals["test"].update(new, {**rows, "mask": jnp.ones(N)})
        return state, new, metrics, evaluated

    state, new, metrics, evaluated = jax.eval_shape(run, batch())
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, new)
    assert {"loss", "ce", "penalty", "grad_norm"} == set(metrics)
    members = 4 if "(1,2)" in name else 2
    assert {f"{metric}_{i}" for metric in ("accuracy", "nll", "confidence", "ece") for i in range(members)} == set(
        evaluated
    )


def test_mixup_sees_mixed_images_alone():
    way, rows = trainer("mixup"), batch()
    state = begin(way)
    prepared = jax.jit(way.passes.prepare)(rows, jax.random.key(3))
    pairs = jax.jit(lambda key: draw_pairs(key, N, 0.2))(jax.random.key(3))
    np.testing.assert_array_equal(prepared["partner_label"], rows["label"][np.asarray(pairs.permutation)])
    mixed = blend(rows["image"], rows["image"][np.asarray(pairs.permutation)], pairs.lam)
    np.testing.assert_allclose(prepared["image"], mixed, rtol=1e-6)
    logits = train_logits(state, mixed)
    own, other = (cross_entropy(logits, label).total for label in (rows["label"], prepared["partner_label"]))
    found = way.loss({})(logits, prepared)[0]
    np.testing.assert_allclose(found, pairs.lam * own + (1 - pairs.lam) * other, rtol=1e-5)
    assert way.passes.raw is None


def test_regmixup_passes_both_halves_at_once():
    way, rows = trainer("regmixup(alpha=1.0,reduction=sum)"), batch()
    prepared = jax.jit(way.passes.prepare)(rows, jax.random.key(3))
    assert prepared["image"].shape == (2 * N, 4, 4, 1)
    np.testing.assert_array_equal(prepared["image"][:N], rows["image"])
    logits = jax.random.normal(jax.random.key(1), (2 * N, K))
    lam = float(prepared["lam"])
    mixed = [cross_entropy(logits[N:], label).total for label in (rows["label"], prepared["partner_label"])]
    expected = cross_entropy(logits[:N], rows["label"]).total + lam * mixed[0] + (1 - lam) * mixed[1]
    np.testing.assert_allclose(way.loss({})(logits, prepared)[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(way.passes.raw(logits), logits[:N])


def test_regmixup_counts_raw_pixels_whose_partners_have_no_label():
    """The raw term's pixels are the image's own, the mixed one's those that both images label."""
    way, rows = trainer("regmixup(alpha=1.0,reduction=sum)", dense=True), batch(dense=True)
    rows["label_map"][1, 2:] = 255
    prepared = jax.jit(way.passes.prepare)(way.targets(rows), jax.random.key(3))
    permutation = np.asarray(jax.jit(lambda key: draw_pairs(key, N, 1.0))(jax.random.key(3)).permutation)
    own = rows["label_map"] != 255
    both = own & own[permutation]
    assert own.sum() > both.sum()
    logits = np.asarray(jax.random.normal(jax.random.key(1), (2 * N, 4, 4, K)))
    lam, labels = float(prepared["lam"]), rows["label_map"].astype(np.int32)
    mixed = [cross_entropy(logits[N:], y, where=both).total for y in (labels, labels[permutation])]
    expected = cross_entropy(logits[:N], labels, where=own).total + lam * mixed[0] + (1 - lam) * mixed[1]
    np.testing.assert_allclose(way.loss({})(logits, prepared)[0], expected, rtol=1e-5)


def test_crl_remembers_what_was_right():
    """Two steps of two epochs: counts go to the rows' numbers, the clock starts with the arm."""
    way, rows = trainer("crl", per_epoch=1, offset=5), batch()
    state = begin(way)
    step = jax.jit(way.step)
    counts = np.zeros(N, np.int64)
    for index in range(2):
        history = CorrectnessHistory(jnp.asarray(counts, jnp.int32), jnp.asarray(max(index, 1), jnp.int32))
        logits = train_logits(state, rows["image"])
        expected = crl(logits, rows["label"], history=history, sample_index=rows["index"])
        counts[rows["index"]] += np.asarray(logits).argmax(-1) == rows["label"]
        state, metrics = step(state.replace(step=jnp.int32(5 + index)), rows, jax.random.key(index))
        np.testing.assert_allclose(metrics["loss"].compute(), expected.total, rtol=1e-5)
        np.testing.assert_array_equal(state.extra[HISTORY].correct_count, counts)
    assert 0 < counts.sum() < 2 * N


def test_pixels_without_a_label_dont_count():
    way, rows = trainer("acls(margin=0.1)", dense=True), batch(dense=True)
    way.try_loss(rows)
    state = begin(way)
    logits = jax.random.normal(jax.random.key(0), (N, 4, 4, K))
    wild = logits.at[:, 0].set(jnp.nan)
    loss = way.loss({})
    np.testing.assert_allclose(loss(wild, way.targets(rows))[0], loss(logits, way.targets(rows))[0], rtol=1e-6)
    metrics = jax.jit(way.evaluate)(state, {**rows, "mask": np.asarray([1.0] * 6 + [0.0] * 2, np.float32)})
    assert metrics["accuracy"].count == metrics["ece"].top.total == 6 * 12


def test_members_settings_reach_loss_and_monitor():
    def monitor(hyper):
        return lambda outputs, batch: {"margin": Mean.of(hyper["margin"]), "rows": Mean.of(outputs.shape[0])}

    way = trainer("acls(margin=(1.0,2.0))", monitor=monitor)
    logits = 5.0 * jax.random.normal(jax.random.key(0), (N, K))
    low, high = (way.loss({"margin": value})(logits, batch()) for value in (1.0, 2.0))
    assert low[0] > high[0]
    assert low[1][f"{MONITOR}/margin"].compute() == 1
    assert way.arm().grid == {"margin": (1.0, 2.0)} and way.arm().separate == (MONITOR,)


def test_each_arm_knows_where_its_steps_begin():
    common = {
        "module": NETWORK, "outputs": (K,), "transform": optax.sgd(0.1), "schedule": optax.constant_schedule(0.1),
        "steps": 4, "per_epoch": 2, "train_size": N, "num_bins": 5,
    }  # fmt: skip
    ways = trained(tuple(parse(name, CONFIGURED) for name in ("ce", "mbls")), lambda recipe: None, **common)
    assert [way.offset for way in ways] == [0, 4]


def branches(logits, labels, *, where=None, power=1.0):
    total = cross_entropy(logits, labels, where=where).total
    return total**2 if power > 1 else total


@pytest.mark.parametrize(
    ("name", "dense", "left_out", "message"),
    [
        ("crl", False, "index", "needs the number of each training example, but the batches have no 'index'"),
        ("mrl(num_views=3)", False, "", "MRL compares an image with one mixture, but there are 3 views"),
        ("acls(margin=(-1,2))", False, "", "margin=-1 must be at least 0"),
        ("mndcg(num_views=2.5)", False, "", "num_views=2.5 must be a whole number of at least 1"),
        ("mrl(layer=feature)", False, "", "layer='feature' is unknown; did you mean 'features'"),
        ("mndcg(layer=features,mix=cutmix)", False, "", "layer='features' with mix='cutmix' would cut boxes"),
        ("mndcg", True, "", "which is for images, but these are pixels' labels"),
        (f"{__name__}:branches(power=(1.0,2.0))", False, "", "power decide.* what the loss computes.*one arm for each"),
    ],
)
def test_what_a_loss_says_against_its_batch_comes_before_anything_compiles(name, dense, left_out, message):
    rows = {key: value for key, value in batch(dense).items() if key != left_out}
    with pytest.raises(ConfigError, match=message):
        trainer(name, dense=dense).try_loss(rows)


def test_one_class_is_refused():
    way = functools.partial(Trainer, parse("acls", CONFIGURED), NETWORK, (1,), optax.sgd(0.1), None)
    with pytest.raises(ConfigError, match="logits have 1 classes"):
        way(1, 1, 0, N, 5).try_loss(batch())
