"""What became of the arms: their settings' accuracies, and the setting that validation chose for each."""

import dataclasses
from dataclasses import dataclass

from jaxvision.engine import arms, recipes, reestimation
from jaxvision.engine.arms import Outcome
from jaxvision.engine.report import Results
from jaxvision.methods.trs import diagnostics
from jaxvision.methods.trs.training import METRIC, Trainer

JUDGED = "test"


@dataclass(frozen=True)
class Run:
    """What the report needs besides the results.

    Attributes:
      title: network and data set.
      seeds: of the run.
      trainers, ways: the arms, in order, and as the engine ran them.
      pretrained_here: whether there was a stage "float".
      export: the arm whose network is written, "": none.
      model, data: of the run.
      reestimated: batches that the statistics are averaged over before an arm is judged; 0: the running ones are kept.
    """

    title: str
    seeds: tuple[int, ...]
    trainers: tuple[Trainer, ...]
    ways: tuple[arms.Arm, ...]
    pretrained_here: bool
    export: str
    model: recipes.Model
    data: recipes.Data
    reestimated: int = 0

    @property
    def choosing(self) -> str:
        """The evaluation that rates are chosen on; without one there is one rate, and nothing to choose."""
        return JUDGED if self.data.validation is None else "validation"

    def by_optimizer(self) -> dict[str, list[int]]:
        """The indices of the arms of each optimizer."""
        groups: dict[str, list[int]] = {}
        for index, trainer in enumerate(self.trainers):
            groups.setdefault(trainer.variant.optimizer, []).append(index)
        return groups


@dataclass(frozen=True)
class Chosen:
    """An arm's outcomes and the one that validation chose.

    Attributes:
      settings: one outcome a learning rate.
      best: the chosen one.
      index: its position among the rates.
      member: the place of its first seed among the arm's members, as the log numbers them.
    """

    settings: tuple[Outcome, ...]
    best: Outcome
    index: int
    member: int

    def members(self, run: Run) -> range:
        """The places of all its seeds."""
        return range(self.member, self.member + len(run.seeds))


def choose(run: Run, results: Results) -> list[Chosen]:
    """For each arm the rate that is best on validation, judged on the test images."""
    found = []
    for way in run.ways:
        judged = dataclasses.replace(way, name=reestimation.judged(way.name, run.reestimated))
        settings = arms.outcomes(results, judged, run.seeds, METRIC, choose=run.choosing, judge=JUDGED)
        best = arms.best(settings)
        index = settings.index(best)
        found.append(Chosen(settings, best, index, index * len(run.seeds)))
    return found


def layers(run: Run, index: int) -> tuple[str, ...]:
    """The names of an arm's quantized layers, as the log writes them."""
    return tuple(diagnostics.layer_name(name) for name in run.trainers[index].latent)
