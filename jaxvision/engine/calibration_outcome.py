"""What became of the arms of a comparison: each network's predictions, its temperature, its calibration."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxvision.data import EvalBatches
from jaxvision.data.transforms import IGNORE
from jaxvision.engine import arms, calibration_extras, recipes
from jaxvision.engine.calibration_arms import Trainer
from jaxvision.engine.calibration_report import Assessment, assess
from jaxvision.engine.report import Figure, Results, Table
from jaxvision.engine.seeds import member
from jaxvision.metrics.calibration_rows import Block, Rows, checked
from jaxvision.metrics.calibration_scaling import Temperature, fit_temperature
from jaxvision.metrics.long_tail import Groups

HELD = 1 << 27
"""Numbers of logits that are kept in memory (512 MiB); beyond, they are predicted again whenever they are read."""


@dataclass(frozen=True)
class Measuring:
    """How calibration is measured.

    Attributes:
      num_bins: of the errors.
      simulations: of noise floors and intervals; 0: neither.
      temperature: a method of ``fit_temperature``.
      ignore: labels of pixels that are trained on but not measured, such as the background.
      save_logits: whether each arm's logits are written.
      groups: of classes whose accuracies are reported, such as head, medium and tail.
    """

    num_bins: int
    simulations: int
    temperature: str
    ignore: tuple[int, ...]
    save_logits: bool
    groups: Groups = ()


@dataclass(frozen=True)
class Run:
    """What the report needs besides the results.

    Attributes:
      title: method, network and data set.
      seeds: of the run.
      trainers, ways: the arms, in order, and as the engine ran them.
      model, data: of the run.
      measuring: see there.
      unknown: name -> out-of-distribution images; at most one.
    """

    title: str
    seeds: tuple[int, ...]
    trainers: tuple[Trainer, ...]
    ways: tuple[arms.Arm, ...]
    model: recipes.Model
    data: recipes.Data
    measuring: Measuring
    unknown: Mapping[str, EvalBatches] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Are the rows pixels?"""
        return self.trainers[0].dense

    @functools.cached_property
    def predict(self) -> Callable[[Any, Any], jax.Array]:
        """``(variables, images) -> logits``, compiled."""
        return jax.jit(self.model.module.apply)


@dataclass(frozen=True)
class Trained:
    """One network.

    Attributes:
      variables: of the network, host arrays.
      validation, test: its logits and the labels.
      temperature: fitted on the validation rows.
      before, after: the test rows measured as they are, and at that temperature.
      extras: what is reported beside calibration, by name.
      step: of its arm, after which it was chosen; None: the last.
    """

    variables: Any
    validation: Rows
    test: Rows
    temperature: Temperature
    before: Assessment
    after: Assessment
    extras: dict[str, float] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: one setting of an arm, its networks in the order of the seeds.

    Attributes:
      label: ``acls(margin=6)``.
      trainer: the arm.
      setting: values of the arm's grid.
      places: of its members in the log.
      seeds: the networks.
    """

    label: str
    trainer: Trainer
    setting: dict[str, float]
    places: tuple[int, ...]
    seeds: tuple[Trained, ...]

    def values(self, name: str, *, scaled: bool = False) -> np.ndarray:
        """A value of ``measure`` for each seed."""
        each = (network.after if scaled else network.before for network in self.seeds)
        return np.asarray([assessment.measured.values[name] for assessment in each])

    @property
    def temperatures(self) -> np.ndarray:
        """Each seed's temperature."""
        return np.asarray([network.temperature.value for network in self.seeds])


@dataclass(frozen=True)
class Added:
    """What a method puts into the report beside the shared table and figures."""

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    summary: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Addition = Callable[[Run, Results, Sequence[Row]], Added]


def rows(run: Run, results: Results) -> list[Row]:
    """All networks of a finished run, measured.

    Raises:
      DataError: the data's validation and test images are the same.
    """
    left, found = arms.kept(results.state, run.ways[-1]), []
    steps = arms.best_steps(results.state, run.ways[-1])
    for trainer, way in zip(run.trainers, run.ways):
        members = way.members(run.seeds)
        for label in dict.fromkeys(each.label for each in members):
            places = tuple(place for place, each in enumerate(members) if each.label == label)
            chosen = [int(steps[way.name][place]) - trainer.offset if steps else None for place in places]
            networks = tuple(_trained(run, member(left[way.name], p), step) for p, step in zip(places, chosen))
            first = members[places[0]]
            found.append(Row(trainer.recipe.label(first), trainer, dict(first.setting), places, networks))
    return found


def _trained(run: Run, variables: Any, step: int | None) -> Trained:
    predictions = functools.partial(_predictions, run, jax.device_put(variables))
    ignored = (IGNORE, *run.measuring.ignore) if run.dense else ()
    validation = predictions(run.data.validation, "the logits of the validation images", ignored)
    test = predictions(run.data.eval, "the logits of the test images", ignored)
    chosen = run.measuring
    temperature = fit_temperature(validation, test, method=chosen.temperature, num_bins=chosen.num_bins)
    options: dict[str, Any] = {"num_bins": chosen.num_bins, "simulations": chosen.simulations}
    before, after = assess(test, **options), assess(test, temperature.scaling, **options)
    extras = calibration_extras.of_groups(test, chosen.groups)
    if run.dense:
        everywhere = predictions(run.data.eval, test.name, (IGNORE,)) if chosen.ignore else test
        extras |= calibration_extras.of_pixels(everywhere)
    for name, data in run.unknown.items():
        extras |= calibration_extras.of_unknown(test, predictions(data, f"the logits of {name}"), temperature.scaling)
    return Trained(variables, validation, test, temperature, before, after, extras, step)


def _predictions(run: Run, variables: Any, data: EvalBatches, title: str, ignored: tuple[int, ...] = ()) -> Rows:
    """A network's logits, in memory where they fit; the labels of unknown images are 0."""
    known = data not in run.unknown.values()

    def blocks() -> Iterator[Block]:
        for index in range(data.num_batches):
            batch = data.batch_at(index)
            real = batch["mask"] > 0
            logits = np.asarray(run.predict(variables, batch["image"]))[real]
            labels = batch["label_map" if run.dense else "label"][real] if known else np.zeros(len(logits), np.int64)
            yield logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)

    outputs = run.trainers[0].outputs
    if data.num_examples * int(np.prod(outputs)) <= HELD:
        logits, labels = (np.concatenate(parts) for parts in zip(*blocks()))
        return Rows.of(logits, labels, ignore=ignored, name=title)
    return Rows(checked(blocks, outputs[-1], ignored, title), outputs[-1], title)


def arrays(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K] and labels [N] of all rows that count."""
    logits, labels = zip(*rows.blocks())
    return np.concatenate(logits), np.concatenate(labels)
