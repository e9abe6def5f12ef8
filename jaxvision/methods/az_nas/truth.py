"""The truth that a run makes for itself: some candidates and what the rankings picked, trained side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine import recipes
from jaxvision.engine.report import Results
from jaxvision.engine.task import Batch, Eval, Metrics, Stage, State
from jaxvision.methods.az_nas.ground_truth import Training
from jaxvision.methods.az_nas.outcome import Outcome, Ranking, Truth
from jaxvision.methods.az_nas.search import POPULATION
from jaxvision.methods.az_nas.spaces.catalog import Entry
from jaxvision.methods.az_nas.supernet_init import Skeleton
from jaxvision.models import zoo
from jaxvision.optim import schedules

STAGE = "truth"
PICKS = "picks"
"""``State.extra`` of the candidates that the rankings picked, int32 [P]."""
LEAST = 2


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The training of the first ``count`` candidates and then of one pick for each of ``picks``.

    Attributes:
      training: budget and networks.
      data: images.
      source: name of the data.
      count: candidates, which a random search drew: the sample.
      picks: rankings whose best candidate of all is trained too.
    """

    training: Training
    data: recipes.Data
    source: str
    count: int
    picks: tuple[Ranking, ...]

    def stage(self) -> Stage:
        """The stage ``truth``; its state has the members in place of nothing, and the population as before."""

        def begin(state: State, key: jax.Array) -> State:
            population = state.extra[POPULATION]
            members = jnp.concatenate([population[: self.count], population[state.extra[PICKS]]])
            fresh = self.training.init_members(key, members)
            return fresh.replace(step=state.step, extra={**state.extra, **fresh.extra})

        def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
            del key  # nothing random in a step but the batch
            return self.training.train_step(state, batch)

        test = Eval(self.data.eval, self.training.evaluate)
        rate = {"lr": self.training.learning_rate()}
        return Stage(
            STAGE, self.training.steps, self.data.train, step, begin=begin, evals={"test": test}, schedules=rate
        )

    def pick(self, outcome: Outcome) -> np.ndarray:
        """The best candidate by each of ``picks``, int32 [P]."""
        return np.asarray([np.argmax(each.of(outcome.scores)) for each in self.picks], np.int32)

    def truth(self, results: Results) -> Truth:
        """The accuracies of a finished run, in percent."""
        members = self.count + len(self.picks)
        accuracy = 100 * np.asarray([results.last(STAGE, "test", f"accuracy_{i}") for i in range(members)])
        picked = {each.name: float(value) for each, value in zip(self.picks, accuracy[self.count :])}
        what = f"the {members} trained"
        return Truth(self.source, np.arange(self.count), accuracy[: self.count], float(accuracy.max()), what, picked)

    def __str__(self) -> str:
        skeleton, steps = self.training.skeleton, self.training.steps
        return (
            f"Truth: the first {self.count} candidates and {len(self.picks)} picks, trained on {self.source} for "
            f"{steps} steps with {skeleton.width} channels and {skeleton.cells} cell(s) a stage; accuracy on "
            f"{self.data.eval.num_examples} test images. A small stand-in for the benchmark."
        )


def build(config: Config, entry: Entry, candidates: int, rankings: Sequence[Ranking]) -> GroundTruth | None:
    """The truth of a ``ground_truth`` block with the images of ``data``; None where there is no block or no count, or
    where a ``benchmark_table`` takes its place.

    Fields: benchmark_table; of the block count, picks (names of rankings), epochs, width, cells, lr, momentum,
    weight_decay, how.

    Raises:
      ConfigError, DataError: a value that can't work.
    """
    block = config.get("ground_truth")
    if block is None:
        return None
    if entry.network is None:
        raise ConfigError(f"config.ground_truth trains NAS-Bench-201's networks, not those of {entry.name!r}")
    data = recipes.build_data(config.data, config.seed, zoo.spec("nas_bench_201"))
    steps = schedules.epochs_to_steps(block.positive("epochs"), data.train.steps_per_epoch)
    skeleton = Skeleton(block.positive("width"), block.positive("cells"), data.num_classes, data.image_shape[-1])
    rates = {name: float(block.positive(name, zero=True)) for name in ("lr", "momentum", "weight_decay")}
    training = Training(skeleton, steps, **rates, how=block.one_of("how", ("map", "vmap")))
    count, wanted = block.positive("count", zero=True), block.picks
    if config.benchmark_table or not count:
        return None
    picks = _named(block.where("picks"), wanted, rankings)
    if not LEAST <= count <= candidates:
        raise ConfigError(
            f"config.ground_truth.count={count} must be from {LEAST} to the {candidates:,} candidates, or 0 for none"
        )
    return GroundTruth(training, data, config.data.source, count, picks)


def _named(key: str, names: Sequence[str], rankings: Sequence[Ranking]) -> tuple[Ranking, ...]:
    known: Mapping[str, Ranking] = {each.name: each for each in rankings}
    for name in names:
        if name not in known:
            raise unknown(key, name, known)
    return tuple(known[name] for name in names)
