"""The table and the figures at the end of a classification run."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxvision.engine.recipes import Data
from jaxvision.engine.report import Figure, Report, Results, Table

WEIGHTS = {"test": "trained", "test_ema": "moving average"}
MAX_CLASSES = 20
"""A confusion matrix of more classes can't be read; examples are drawn instead."""


def make(
    title: str,
    stage: str,
    evals: tuple[str, ...],
    data: Data,
    predict: Callable[[np.ndarray], np.ndarray],
    results: Results,
) -> Report:
    """The report.

    Args:
      title: network and data set.
      stage: name of the stage.
      evals: names of its evaluations; the last one's weights are those that ``predict`` uses.
      data: the data.
      predict: float32 [B, H, W, C] -> logits [B, K].
      results: of the engine.
    """
    names = {"accuracy": "accuracy", "top5": "top-5", "nll": "NLL"}
    names = {key: text for key, text in names.items() if key != "top5" or data.num_classes > MAX_CLASSES}
    rows, summary = [], {}
    for evaluation in evals:
        values = {key: results.last(stage, evaluation, key) for key in names}
        cells = [f"{value:.4f}" if key == "nll" else f"{100 * value:.2f} %" for key, value in values.items()]
        rows.append([WEIGHTS[evaluation], *cells, str(data.eval.num_examples)])
        summary |= {f"{evaluation}/{key}": value for key, value in values.items()}
    columns = ("weights", *names.values(), "examples")
    table = Table("Evaluation", columns, rows, "NLL: mean negative log-likelihood, nats")
    figures = []
    if results.curve(stage, "loss")[0]:
        figures.append(Figure("curves", functools.partial(draw_curves, results, stage, evals), "Loss and accuracy."))
    if data.num_classes <= MAX_CLASSES:
        draw = functools.partial(draw_confusion, confusion(data, predict), data.class_names)
        figures.append(Figure("confusion", draw, f"Counts, weights: {WEIGHTS[evals[-1]]}."))
    draw = functools.partial(draw_examples, data, predict)
    figures.append(Figure("examples", draw, "Green: right. Red: wrong, with predicted / true class."))
    return Report(f"Classification: {title}", (table,), tuple(figures), summary)


def confusion(data: Data, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """How often class i (row) was predicted as class j (column) in the evaluation data: int64 [K, K]."""
    counts = np.zeros((data.num_classes, data.num_classes), np.int64)
    for index in range(data.eval.num_batches):
        batch = data.eval.batch_at(index)
        predicted = np.argmax(np.asarray(predict(batch["image"])), -1)
        real = batch["mask"] > 0
        np.add.at(counts, (batch["label"][real], predicted[real]), 1)
    return counts


def draw_curves(results: Results, stage: str, evals: tuple[str, ...], path: Path) -> None:
    """Training loss beside evaluation NLL, and the accuracies, over the steps."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    left.plot(*results.curve(stage, "loss"), label="training", color="0.6")
    if results.curve(stage, "accuracy")[0]:
        right.plot(*results.curve(stage, "accuracy"), label="training", color="0.6")
    for evaluation in evals:
        label = f"test, {WEIGHTS[evaluation]} weights"
        left.plot(*results.curve(stage, "nll", evaluation), marker=".", label=label)
        right.plot(*results.curve(stage, "accuracy", evaluation), marker=".", label=label)
    for axes, label in ((left, "loss, NLL (nats)"), (right, "accuracy")):
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    canvas.savefig(path, dpi=120)


def draw_confusion(counts: np.ndarray, class_names: tuple[str, ...], path: Path) -> None:
    """The confusion matrix, int64 [K, K], coloured by the share of the row."""
    from matplotlib.figure import Figure as Canvas

    size = len(class_names)
    canvas = Canvas(figsize=(2.5 + 0.45 * size, 2 + 0.45 * size), layout="constrained")
    axes = canvas.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts):
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(size), class_names, rotation=45, ha="right")
    axes.set_yticks(range(size), class_names)
    axes.set(xlabel="predicted", ylabel="true")
    canvas.savefig(path, dpi=120)


def draw_examples(data: Data, predict: Callable[[np.ndarray], np.ndarray], path: Path) -> None:
    """The first evaluation images with a green (right) or red (wrong) border."""
    from matplotlib.figure import Figure as Canvas

    batch = data.eval.batch_at(0)
    predicted = np.argmax(np.asarray(predict(batch["image"])), -1)
    count = int(min(24, batch["mask"].sum()))
    canvas = Canvas(figsize=(12, 1.9 * -(-count // 8)), layout="constrained")
    for axes in canvas.subplots(-(-count // 8), 8, squeeze=False).flat:
        axes.axis("off")
    for index, axes in enumerate(canvas.axes[:count]):
        image = np.clip(batch["image"][index] * np.asarray(data.std) + np.asarray(data.mean), 0, 1)
        axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
        right = predicted[index] == batch["label"][index]
        names = [data.class_names[label] for label in (predicted[index], batch["label"][index])]
        axes.set_title(names[0] if right else " / ".join(names), fontsize=8, color="green" if right else "red")
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="green" if right else "red", linewidth=2)
    canvas.savefig(path, dpi=120)
