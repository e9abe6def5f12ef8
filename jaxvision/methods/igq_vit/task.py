"""The task ``igq_vit``: [train a float network] -> for each row: calibrate, evaluate -> tables and figures.

The only place where the configuration is read (its fields are explained in ``configs/igq_vit.py``). Stage ``train``
exists when there is no weights file; it trains one network a seed, all seeds in one program. Stage ``quantize``
takes one row of the table a step.
"""

import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import rng
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.data import EvalBatches
from jaxvision.engine import parallel, recipes, seeds, supervised
from jaxvision.engine.evaluate import Evaluator
from jaxvision.engine.task import Batch, Eval, Metrics, Stage, State, Task
from jaxvision.losses.classification import softmax_cross_entropy
from jaxvision.methods.igq_vit import allocation, comparison, judging, report, simulate
from jaxvision.methods.igq_vit.calibration import Bits, Calibration
from jaxvision.methods.igq_vit.comparison import Bench, Row, Settings
from jaxvision.methods.igq_vit.sites import Site, list_sites
from jaxvision.metrics import Mean, classification
from jaxvision.models import zoo
from jaxvision.optim import schedules
from jaxvision.quant import uniform
from jaxvision.quant.weights import WeightPolicy

FAMILIES = ("vit", "swin")
"""Families of the zoo whose taps are ``sites``."""


@dataclass(frozen=True)
class RowData:
    """The "batches" of stage ``quantize``: which row a step takes."""

    count: int
    batch_size: int = 1

    def batch_at(self, step: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        """``row`` int [1], the row's place in the table; every host gets the same."""
        del shard_index, shard_count
        return {"row": np.asarray([step])}


def make(config: Config) -> Task:
    """The task of a configuration.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    members = tuple(config.seeds)
    if not members or len(set(members)) != len(members):
        raise ConfigError(f"config.seeds={members} must be at least one seed, each once")
    spec = zoo.spec(config.model.name)
    data = recipes.build_data(config.data, config.seed, spec)
    model = recipes.build_model(config.model, data)
    epochs = config.train.positive("epochs", zero=True)
    trained = model.pretrained is None
    steps = schedules.epochs_to_steps(epochs, data.train.steps_per_epoch) if trained else 0
    _check_weights(config, trained, steps)
    optimizer = recipes.build_optimizer(config.train.optimizer, steps, data.train.steps_per_epoch)
    comparer = Comparer.read(config, members, model, data, stacked=trained)

    def fresh(key: jax.Array) -> State:
        return supervised.new_state(model.init(key), optimizer.transform, average=False)

    def init(key: jax.Array) -> State:
        if trained:
            return seeds.init_seeds(fresh, members)(key)
        variables = model.init(key)
        return State(jnp.zeros((), jnp.int32), variables["params"])

    stages = [] if not trained else [_training(model, data, config, members, optimizer, steps)]
    quantize = Stage(
        "quantize",
        len(comparer.rows),
        RowData(len(comparer.rows)),
        comparer.step,
        begin=lambda state, key: state.replace(opt_state={}),
        compiled=False,
        label=comparer.label,
    )
    load = None if trained else lambda state: state.replace(params=model.load({"params": state.params})["params"])
    return Task("igq_vit", init, (*stages, quantize), functools.partial(report.make, comparer), load)


def _check_weights(config: Config, trained: bool, steps: int) -> None:
    """Raises ConfigError where a network with random weights would be quantized and nobody said so."""
    asked = config.train.one_of("random_weights", (True, False))
    if asked and (steps or not trained):
        other = f"config.train.epochs={config.train.epochs}" if trained else "config.model.init_from"
        raise ConfigError(f"config.train.random_weights=True contradicts {other}; set only one of them")
    if trained and not steps and not asked:
        raise ConfigError(
            f"config.train.epochs={config.train.epochs} trains nothing and config.model.init_from='' names no weights; "
            "give one of them, or say config.train.random_weights=True to quantize a random network"
        )


def _training(
    model: recipes.Model, data: recipes.Data, config: Config, members: Sequence[int], optimizer: Any, steps: int
) -> Stage:
    """Plain supervised training of one network a seed; each sees its own order of the same examples."""

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        losses = softmax_cross_entropy(logits, batch["label"], reduction="none")
        return jnp.mean(losses), {"loss": Mean.of(losses)}

    step = supervised.train_step(model.module, optimizer.transform, loss, accumulate=optimizer.accumulate)

    def evaluate(state: State, batch: Batch) -> Metrics:
        def one(params: Any) -> Metrics:
            logits = model.module.apply({"params": params}, batch["image"])
            return {"accuracy": classification.accuracy(logits, batch["label"], batch["mask"])}

        each = jax.lax.map(one, state.params)
        return {f"accuracy_{i}": seeds.member(each["accuracy"], i) for i in range(len(members))}

    batches = seeds.SeedBatches([data.train.with_seed(seed) for seed in members])
    return Stage(
        "train",
        steps,
        batches,
        seeds.step_seeds(step, members),
        evals={"test": Eval(data.eval, evaluate)},
        schedules={"lr": optimizer.schedule},
    )


@dataclass(frozen=True, eq=False)
class Comparer:
    """Everything stage ``quantize`` needs; its steps depend on the parameters and the row alone.

    Attributes:
      rows: the table.
      settings: of IGQ.
      members: the seeds; without training they only draw the calibration images.
      stacked: whether parameters have a leading seed axis.
      sites: of the network.
      seed: of the run; draws the images of the SQNR, the same for all rows.
    """

    rows: tuple[Row, ...]
    settings: Settings
    members: tuple[int, ...]
    stacked: bool
    model: recipes.Model
    data: recipes.Data
    sites: tuple[Site, ...]
    seed: int
    policy: WeightPolicy
    epsilon: float | None
    image_bits: int
    calibration_images: int
    sqnr_images: int
    observer_batch: int
    head_groups: int
    export: tuple[str, str]
    devices: Any

    @classmethod
    def read(
        cls, config: Config, members: tuple[int, ...], model: recipes.Model, data: recipes.Data, *, stacked: bool
    ) -> "Comparer":
        """The fields methods, bits, image_bits, head_groups, calibration, weights, igq, export, parallel."""
        igq = config.igq
        settings = Settings(
            max_groups=igq.positive("max_groups"),
            iters=igq.positive("iters", zero=True),
            m_step=igq.one_of("m_step", ("mean", "envelope")),
            per_head=igq.one_of("per_head", (True, False)),
            instance=igq.one_of("instance", ("image", "window")),
            clip_zero_point=igq.one_of("clip_zero_point", (True, False)),
            candidates=tuple(igq.candidates),
            context=igq.one_of("context", allocation.CONTEXTS),
            sequential=igq.one_of("sequential", (True, False)),
            fp_bits=igq.positive("fp_bits"),
        )
        methods, bits = _names(config, "methods"), _names(config, "bits")
        image_bits = uniform.check_bits(config.image_bits, "config.image_bits")
        for method in methods:
            comparison.check_method(method, settings)
        for text in bits:
            widths = comparison.parse_bits(text, image_bits)
            for method in methods:
                comparison.check_widths(method, text, widths)
        weights, calibration = config.weights, config.calibration
        epsilon = weights.epsilon
        policy = WeightPolicy(method=weights.method, granularity=weights.granularity, epsilon=epsilon or 0.0)
        count = calibration.positive("images")
        if count > data.train_examples.num_examples:
            raise ConfigError(
                f"config.calibration.images={count} is more than the {data.train_examples.num_examples} of "
                "the training split"
            )
        export = (config.export.method, config.export.bits)
        if export[0] and not (comparison.IGQ.fullmatch(export[0]) and export[0] in methods and export[1] in bits):
            raise ConfigError(
                f"config.export={export} must name an IGQ method in config.methods and one of config.bits"
            )
        return cls(
            rows=comparison.rows(len(members), bits, methods),
            settings=settings,
            members=members,
            stacked=stacked,
            model=model,
            data=data,
            sites=_sites(model, data),
            seed=config.seed,
            policy=policy,
            epsilon=epsilon,
            image_bits=image_bits,
            calibration_images=count,
            sqnr_images=calibration.positive("sqnr_images", zero=True),
            observer_batch=calibration.positive("observer_batch"),
            head_groups=config.positive("head_groups", zero=True),
            export=export,
            devices=parallel.create(config.parallel),
        )

    def label(self, index: int) -> str:
        """A row in the progress bar; a place after the last one is the last."""
        row = self.rows[min(index, len(self.rows) - 1)]
        return f"{row.method} {row.bits} seed {self.members[row.member]}"

    def variables(self, state: State, member: int) -> dict[str, Any]:
        """The float network of one seed."""
        return {"params": seeds.member(state.params, member) if self.stacked else state.params}

    def bench(self, state: State, member: int) -> Bench:
        """The float network on its calibration images; made once a seed."""
        if member not in self._benches:
            self._benches.clear()
            self._references.clear()
            context = Calibration.create(
                self.model.module.apply,
                self.variables(state, member),
                self.calibration(member)["image"],
                sites=self.sites,
                weight_policy=self.policy,
                observer_batch=self.observer_batch,
                head_groups=self.head_groups,
            )
            self._benches[member] = Bench(context, self.settings)
            predict = functools.partial(simulate.float_forward, self.model.module.apply, context.variables)
            self._references[member] = judging.WithReference(self.data.eval, predict)
        return self._benches[member]

    def drawn(self, member: int) -> np.ndarray:
        """Numbers of the training images that a seed calibrates on, int [images], ascending."""
        draw = rng.generator(self.members[member], "calibration")
        return np.sort(draw.choice(self.data.train_examples.num_examples, self.calibration_images, replace=False))

    def calibration(self, member: int) -> Batch:
        """The training images :meth:`drawn`, under evaluation preprocessing, without augmentation."""
        return self.data.train_examples.subset(self.drawn(member), batch_size=self.calibration_images).batch_at(0)

    def prepared(self, state: State, row: Row) -> tuple[Bench, Bits]:
        """The bench and the widths of a row; its weight percentile chosen on the calibration images if none is set."""
        bench, bits = self.bench(state, row.member), comparison.parse_bits(row.bits, self.image_bits)
        if self.policy.method == "percentile" and self.epsilon is None:
            context = bench.context
            chosen = context.once(("epsilon", bits.weight), lambda: comparison.choose_epsilon(context, bits))
            bench = Bench(chosen, self.settings)
        return bench, bits

    def build(self, state: State, row: Row) -> comparison.Built:
        """The quantized network of a row."""
        bench, bits = self.prepared(state, row)
        return bench.build(row.method, bits)

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Calibrates and judges one row; everything it finds goes to the log, the state stays as it is."""
        del key
        index = int(batch["row"][0])
        row, ready = self.rows[index], self._ahead.pop(index, None)
        built, seconds = self._timed_build(state, row) if ready is None else ready.result()
        following = self.rows[index + 1] if index + 1 < len(self.rows) else None
        if self._overlap and following is not None and following.member == row.member:
            self._ahead[index + 1] = self._pool.submit(self._timed_build, state, following)
        begin = time.monotonic()
        judged, noise = self._evaluate(self.devices.replicate(built.network), row.member)
        seconds["seconds/evaluate"] = time.monotonic() - begin
        numbers = {**judged, **noise, **{name: judging.Exact.of(value) for name, value in built.bops.items()}}
        if built.groups is not None:
            numbers |= {f"groups/{site}": judging.Exact.of(count) for site, count in built.groups.items()}
        return state, {**numbers, **{name: Mean.of(value) for name, value in seconds.items()}}

    def _timed_build(self, state: State, row: Row) -> tuple[comparison.Built, dict[str, float]]:
        """A row's network, and the seconds it took; collecting the calibration values is the first row's of a seed."""
        begin = time.monotonic()
        self.bench(state, row.member)
        collected = time.monotonic()
        built = self.build(state, row)
        return built, {
            "seconds/collect": collected - begin,
            "seconds/calibrate": time.monotonic() - collected,
        }

    def _evaluate(self, network: Any, member: int) -> tuple[Metrics, Metrics]:
        """Accuracy and divergence on all evaluation images, and the SQNR on some; at once where that is safe."""
        jobs = [functools.partial(self._judge, network, self._references[member])]
        if self.sqnr_images:
            jobs.append(functools.partial(self._sqnr, network, self._sqnr_data))
        started = [self._pool.submit(job) for job in jobs] if self._overlap else None
        results = [job() for job in jobs] if started is None else [future.result() for future in started]
        judged, noise = jax.block_until_ready((*results, {})[:2])
        return judged, noise

    @property
    def _overlap(self) -> bool:
        """On one device, rows are built while others are evaluated: each of the two leaves a machine half idle.

        Programs over several devices must be started in one order on all of them, so there nothing overlaps.
        """
        return self.devices.num_devices == 1

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(3, "rows")

    @functools.cached_property
    def _ahead(self) -> dict[int, Future]:
        return {}

    @functools.cached_property
    def _benches(self) -> dict[int, Bench]:
        return {}

    @functools.cached_property
    def _references(self) -> dict[int, judging.WithReference]:
        return {}

    @functools.cached_property
    def _judge(self) -> Evaluator:
        return Evaluator(judging.judge(self.model.module.apply), self.devices)

    @functools.cached_property
    def _sqnr(self) -> Evaluator:
        return Evaluator(judging.sqnr(self.model.module.apply), self.devices)

    @functools.cached_property
    def _sqnr_data(self) -> EvalBatches:
        """Random evaluation images: the first ones of a folder would be of one or two classes."""
        total = self.data.eval.num_examples
        count = min(self.sqnr_images, total)
        index = np.sort(rng.generator(self.seed, "sqnr").choice(total, count, replace=False))
        return self.data.eval.subset(index, batch_size=min(count, self.data.eval.batch_size))


def _names(config: Config, key: str) -> tuple[str, ...]:
    """A field with at least one name, each once."""
    names = config.get(key)
    if not isinstance(names, tuple) or not names or len(set(names)) != len(names):
        raise ConfigError(f"{config.where(key)}={names!r} must be a tuple of at least one name, each once")
    return names


def _sites(model: recipes.Model, data: recipes.Data) -> tuple[Site, ...]:
    """The network's sites, found without computing anything."""
    if zoo.spec(model.name).family not in FAMILIES:
        raise ConfigError(
            f"config.model.name='{model.name}' is no vision transformer with named sites; use one of the families "
            f"{', '.join(FAMILIES)}"
        )
    shapes = zoo.variable_shapes(model.module, data.image_shape[:2], data.image_shape[2])
    return list_sites(model.module.apply, shapes, data.image_shape)
