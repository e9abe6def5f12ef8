"""What RankMixup adds to the report: how each network ranks mixtures of test images."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.engine.arms import spread
from jaxvision.engine.calibration_outcome import Added, Row, Run
from jaxvision.engine.report import Figure, Results, Table
from jaxvision.methods.rankmixup.rankmixup import ranking_metrics
from jaxvision.methods.rankmixup.views import mixed_views

MOST_IMAGES = 2000
MOST_NUMBERS = 1 << 25
VIEWS, ALPHA = 3, 2.0
"""Of the mixtures that networks are judged on, the same for all."""
LAMBDAS = np.linspace(0, 1, 11)
COLUMNS = ("loss", "raw above mixed %", "pairs in order %", "confidence of mixtures %", "minus max(λ, 1 - λ)")


def added(run: Run, results: Results, rows: Sequence[Row]) -> Added:
    """The table and the figure; nothing where the rows are pixels."""
    del results
    from jaxvision.methods.rankmixup import figures

    if run.dense:
        return Added()
    mixed = mixtures(run)
    lines, summary = [], {}
    for row in rows:
        numbers = _ranking(run, row, mixed)
        lines.append(_line(row, numbers))
        summary |= {f"{row.label}/{name}": float(values.mean()) for name, values in numbers.items()}
    caption = (
        f"{len(mixed.labels):,} test images, {VIEWS} mixtures of each with λ ~ Beta({ALPHA:g}, {ALPHA:g}), the same "
        "for all. Raw above mixed: mixtures that are less confident than their image. Pairs in order: of an image's "
        "mixtures, the one with the larger max(λ, 1 - λ) is the more confident."
    )
    table = Table("Ranking of mixed test images", COLUMNS, lines, caption)
    pairs = len(different_pairs(mixed)[0])
    if not pairs:
        note = f"None of {len(mixed.labels):,} pairs of test images is of two classes: no confidences over λ are drawn."
        return Added((table,), (), summary, (*controls(rows), note))
    curves = {row.label: confidence_by_lambda(run, row, mixed) for row in rows}
    drawn = functools.partial(figures.confidence_by_lambda, LAMBDAS, curves)
    caption = (
        f"Mean confidence on mixtures of two images of different classes, {pairs:,} pairs of {len(mixed.labels):,} "
        "test images; deviation over the seeds."
    )
    return Added((table,), (Figure("mixing", drawn, caption),), summary, controls(rows))


def controls(rows: Sequence[Row]) -> tuple[str, ...]:
    """What a ranking loss changed against weight 0: the same images, views, passes and statistics without it."""
    notes = []
    for row in (row for row in rows if row.setting.get("weight")):
        wanted = {**row.setting, "weight": 0.0}
        control = next((other for other in rows if other.trainer is row.trainer and other.setting == wanted), None)
        if control is not None:
            change = {name: 100 * (row.values(name) - control.values(name)) for name in ("ece", "accuracy")}
            ece, accuracy = (spread(change[name]) for name in ("ece", "accuracy"))
            notes.append(f"{row.label} less {control.label}, seed by seed: ECE {ece}, accuracy {accuracy} points.")
    return tuple(notes)


@dataclass(frozen=True)
class Mixtures:
    """Test images and what they are mixed with.

    Attributes:
      images: float32 [N, H, W, C], as the network sees them.
      labels: int32 [N].
      views: of the images; see there.
    """

    images: np.ndarray
    labels: np.ndarray
    views: Any


def mixtures(run: Run) -> Mixtures:
    """Test images, the same for every run, in the order of the set, and their views, drawn with a fixed key.

    A sample: folders are read class by class, so that the first images would be of a few classes.
    """
    data = run.data.eval
    most = max(2, min(MOST_IMAGES, MOST_NUMBERS // int(np.prod(run.data.image_shape))))
    chosen = np.sort(np.random.RandomState(0).permutation(data.num_examples)[:most])
    data = data.subset(chosen, data.batch_size)
    images, labels = [], []
    for index in range(data.num_batches):
        batch = data.batch_at(index)
        real = batch["mask"] > 0
        images.append(batch["image"][real])
        labels.append(batch["label"][real])
    images, labels = np.concatenate(images), np.concatenate(labels)
    classes = run.trainers[0].outputs[-1]
    drawn = mixed_views(jax.random.key(0), images, labels, num_classes=classes, num_views=VIEWS, alpha=ALPHA)
    return Mixtures(images, labels, drawn)


def _predict(run: Run, variables: Any, images: np.ndarray) -> np.ndarray:
    """Logits, in batches of the evaluation's size, so that nothing is compiled anew."""
    size = run.data.eval.batch_size
    padded = np.concatenate([images, np.repeat(images[:1], -len(images) % size, 0)])
    parts = [np.asarray(run.predict(variables, padded[start : start + size])) for start in range(0, len(padded), size)]
    return np.concatenate(parts)[: len(images)]


def _ranking(run: Run, row: Row, mixed: Mixtures) -> dict[str, np.ndarray]:
    """:func:`ranking_metrics` of each network, float64 [S] each."""
    each = []
    for network in row.seeds:
        variables = jax.device_put(network.variables)
        raw, views = (_predict(run, variables, images) for images in (mixed.images, np.asarray(mixed.views.images)))
        found = ranking_metrics(jnp.asarray(raw), jnp.asarray(views), mixed.views.relevance)
        each.append({name: float(value.compute()) for name, value in found.items()})
    return {name: np.asarray([values[name] for values in each]) for name in each[0]}


def _line(row: Row, numbers: dict[str, np.ndarray]) -> tuple[str, ...]:
    cells = (spread(numbers[name], scale=100) for name in ("raw_above_mixed", "pair_order", "mixed_confidence"))
    return (row.label, *cells, spread(100 * numbers["confidence_gap"]))


def different_pairs(mixed: Mixtures) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of images and of their partners, those of one class left out: int [n] each."""
    partner = np.random.default_rng(0).permutation(len(mixed.labels))
    own = np.flatnonzero(mixed.labels != mixed.labels[partner])
    return own, partner[own]


def confidence_by_lambda(run: Run, row: Row, mixed: Mixtures) -> np.ndarray:
    """Mean confidence on ``lam x + (1 - lam) x_partner`` over :func:`different_pairs`: [S, 11], over ``LAMBDAS``."""
    own, partner = (mixed.images[each] for each in different_pairs(mixed))
    curves = []
    for network in row.seeds:
        variables = jax.device_put(network.variables)
        logits = (_predict(run, variables, (lam * own + (1 - lam) * partner).astype(np.float32)) for lam in LAMBDAS)
        curves.append([float(jnp.mean(jnp.max(jax.nn.softmax(z, -1), -1))) for z in logits])
    return np.asarray(curves)
