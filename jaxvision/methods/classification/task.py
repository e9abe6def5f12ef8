"""The task ``classification``: trains and evaluates a network of the zoo on a data set."""

import functools

import jax
import jax.numpy as jnp

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import recipes, supervised
from jaxvision.engine.report import Report, Results
from jaxvision.engine.task import Batch, Eval, Metrics, Stage, State, Task
from jaxvision.losses.classification import softmax_cross_entropy
from jaxvision.methods.classification import report
from jaxvision.metrics import Mean, classification
from jaxvision.models import mixing, zoo
from jaxvision.optim import schedules

STAGE = "train"


def make(config: Config) -> Task:
    """The task of a configuration; see ``configs/classification.py`` for its fields.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    epochs, every = config.positive("epochs", zero=True), config.positive("eval_every_epochs", zero=True)
    spec = zoo.spec(config.model.name)
    data = recipes.build_data(config.data, config.seed, spec, train=epochs > 0)
    model = recipes.build_model(config.model, data)
    _check_kind(config, data, model)
    steps_per_epoch = data.train.steps_per_epoch if data.train else 1
    steps = schedules.epochs_to_steps(epochs, steps_per_epoch)
    optimizer = recipes.build_optimizer(config.optimizer, steps, steps_per_epoch)
    decay = recipes.build_average(config.ema)
    loss, prepare = build_loss(config, data.num_classes)
    _check_batch(config, optimizer.accumulate)

    def init(key: jax.Array) -> State:
        return supervised.new_state(model.init(key), optimizer.transform, average=decay is not None)

    def load(state: State) -> State:
        variables = model.load({"params": state.params, **state.model_state})
        return supervised.new_state(variables, optimizer.transform, average=decay is not None)

    # Shaping the state finds what the parameters' names and shapes can tell, such as a rule without a match.
    jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    step = supervised.train_step(
        model.module,
        optimizer.transform,
        loss,
        prepare=prepare,
        accumulate=optimizer.accumulate,
        average_decay=decay,
    )
    evals = {"test": _evaluation(model, data, every * steps_per_epoch, average=False)}
    if decay is not None:
        evals["test_ema"] = _evaluation(model, data, every * steps_per_epoch, average=True)
    stage = Stage(STAGE, steps, data.train, step, evals=evals, schedules={"lr": optimizer.schedule})
    settings = ", ".join(f"{key}={value}" for key, value in config.model.settings.to_dict().items())
    title = f"{model.name}{f' ({settings})' if settings else ''} on {config.data.source}"
    return Task(
        "classification",
        init,
        (stage,),
        functools.partial(_report, title, model, data, tuple(evals)),
        load=None if model.pretrained is None else load,
        best=f"{STAGE}/{list(evals)[-1]}/accuracy",
    )


def build_loss(config: Config, num_classes: int) -> tuple[supervised.LossFn, supervised.Prepare | None]:
    """Cross-entropy with smoothing, and the mixing of the batch (None where both alphas are 0).

    Fields: label_smoothing; mix.mixup_alpha, mix.cutmix_alpha, mix.prob, mix.switch_prob.
    """
    smoothing, block = config.positive("label_smoothing", zero=True), config.mix
    names = ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob")
    options = {name: float(block.positive(name, zero=True)) for name in names}
    for where, name, value in (
        (config, "label_smoothing", smoothing),
        (block, "prob", options["prob"]),
        (block, "switch_prob", options["switch_prob"]),
    ):
        if value > 1:
            raise ConfigError(f"{where.where(name)}={value} must be between 0 and 1")
    if (options["mixup_alpha"] == 0 and options["cutmix_alpha"] == 0) or options["prob"] == 0:
        return _hard_loss(smoothing), None

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        targets = mixing.soft_targets(batch["label"], num_classes, smoothing)
        images, targets = mixing.mix(key, batch["image"], targets, **options)
        return {**batch, "image": images, "target": targets}

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        losses = softmax_cross_entropy(logits, batch["target"], reduction="none")
        return jnp.mean(losses), {"loss": Mean.of(losses)}

    return loss, prepare


def _hard_loss(smoothing: float) -> supervised.LossFn:
    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        losses = softmax_cross_entropy(logits, batch["label"], label_smoothing=smoothing, reduction="none")
        accuracy = classification.accuracy(logits, batch["label"])
        return jnp.mean(losses), {"loss": Mean.of(losses), "accuracy": accuracy}

    return loss


def _evaluation(model: recipes.Model, data: recipes.Data, every: int, *, average: bool) -> Eval:
    def update(state: State, batch: Batch) -> Metrics:
        logits = supervised.predict(model.module, state, batch["image"], average=average)
        return supervised.classification_metrics(logits, batch, top5=data.num_classes > 20)

    return Eval(data.eval, update, every)


def _check_kind(config: Config, data: recipes.Data, model: recipes.Model) -> None:
    """One label an image, on both sides."""
    if getattr(model.module, "dense", zoo.spec(model.name).dense):
        raise ConfigError(
            f"{config.model.where('name')}={model.name!r} labels pixels, but classification needs one label an image; "
            "choose a network for images, or a preset for segmentation such as configs/acls.py:shapes_segmentation"
        )
    if "label" not in data.eval.source[0]:
        raise ConfigError(
            f"{config.data.where('source')}={config.data.source!r} labels pixels, but classification needs one label "
            "an image; choose other data, or a preset for segmentation such as configs/acls.py:shapes_segmentation"
        )


def _check_batch(config: Config, accumulate: int) -> None:
    batch_size, devices = config.data.batch_size, jax.device_count()
    if batch_size % (accumulate * devices):
        raise ConfigError(
            f"config.data.batch_size={batch_size} can't be cut into config.optimizer.accumulate={accumulate} equal "
            f"parts on each of {devices} device(s); use a multiple of {accumulate * devices}"
        )


def _report(title: str, model: recipes.Model, data: recipes.Data, evals: tuple[str, ...], results: Results) -> Report:
    variables = jax.device_put(supervised.variables(results.state, average="test_ema" in evals))
    predict = functools.partial(jax.jit(model.module.apply), variables)
    return report.make(title, STAGE, evals, data, predict, results)
