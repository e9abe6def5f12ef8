"""A task with everything that makes resuming hard: shuffling, augmentation, dropout, batch norm, momentum, stages.

Also a program, so that tests can kill it:

    python -m tests.engine.tiny WORKDIR [--steps N] [--parallel jit|pmap] [--sleep SECONDS] [--poison STEP]
"""

import argparse
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvision.core import devices, rng
from jaxvision.core.errors import JaxvisionError
from jaxvision.engine import loop, parallel
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.options import Options
from jaxvision.engine.progress import Progress
from jaxvision.engine.report import Report, Table
from jaxvision.engine.task import Eval, Stage, State, Task
from jaxvision.metrics import Mean
from jaxvision.models import layers


class StopAt(Interrupt):
    """Asks to stop when the loop has asked so many times."""

    def __init__(self, boundary):
        super().__init__()
        self.left = boundary

    def requested(self, synchronize):
        self.left -= 1
        return self.left == 0


class Net(nn.Module):
    """Two dense layers with batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = layers.Dense(16)(x)
        x = layers.BatchNorm()(x, train=train)
        x = layers.Dropout(0.3)(jax.nn.relu(x), train)
        return layers.Dense(3)(x)


class Data:
    """Shuffled, augmented batches of a linearly separable problem."""

    def __init__(self, batch_size=16, rows=96, sleep=0.0):
        self.batch_size, self.rows, self.sleep = batch_size, rows, sleep
        generator = rng.generator(0, "tiny data")
        self.x = generator.normal(size=(rows, 8)).astype(np.float32)
        self.y = np.argmax(self.x[:, :3], 1).astype(np.int32)

    def batch_at(self, step, shard_index=0, shard_count=1):
        time.sleep(self.sleep)
        per_epoch = self.rows // self.batch_size
        order = rng.generator(1, "tiny order", step // per_epoch).permutation(self.rows)
        index = order[(step % per_epoch) * self.batch_size :][: self.batch_size]
        noise = rng.generator(1, "tiny noise", step).normal(size=(self.batch_size, 8)).astype(np.float32)
        size = self.batch_size // shard_count
        part = slice(shard_index * size, (shard_index + 1) * size)
        return {"x": (self.x[index] + 0.1 * noise)[part], "label": self.y[index][part]}


class Test(Data):
    """The same rows in order, padded to whole batches."""

    @property
    def num_batches(self):
        return -(-self.rows // self.batch_size)

    def batch_at(self, index, shard_index=0, shard_count=1):
        rows = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        real = rows < self.rows
        rows = np.where(real, rows, 0)
        size = self.batch_size // shard_count
        part = slice(shard_index * size, (shard_index + 1) * size)
        return {"x": self.x[rows][part], "label": self.y[rows][part], "mask": real.astype(np.float32)[part]}


def make(steps=30, *, sleep=0.0, poison=-1, poison_eval=-1, test_batch=40) -> Task:
    """Two stages: training, then, after ``begin`` dropped the optimizer, a Python-step fold that counts.

    ``poison``: the step whose loss is NaN; ``poison_eval``: the step whose evaluation is.
    """
    net, optimizer = Net(), optax.sgd(0.05, momentum=0.9)

    def init(key):
        variables = net.init(key, jnp.zeros((1, 8)), train=False)
        params = variables.pop("params")
        return State(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), {})

    def step(state, batch, key):
        def loss_of(params):
            logits, new = net.apply(
                {"params": params, **state.model_state},
                batch["x"],
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return jnp.where(state.step + 1 == poison, jnp.nan, 1.0) * loss, new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(devices.mean_over_devices(grads), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, model_state=new, opt_state=opt_state), {"loss": Mean.of(loss)}

    def evaluate(state, batch):
        logits = net.apply({"params": state.params, **state.model_state}, batch["x"], train=False)
        return {
            "accuracy": Mean.of(jnp.argmax(logits, -1) == batch["label"], batch["mask"]),
            "rows": Mean(jnp.where(state.step == poison_eval, jnp.nan, batch["mask"].sum()), jnp.ones(())),
            "nothing": Mean(jnp.zeros(()), jnp.zeros(())),
        }

    def begin(state, key):
        return state.replace(opt_state={}, extra={"noise": jax.random.normal(key, (2,)), "count": jnp.zeros(())})

    def count(state, batch, key):
        extra = {"noise": state.extra["noise"] + jax.random.normal(key, (2,)), "count": state.extra["count"] + 1}
        counted = Mean.of(jnp.where(state.step + 1 == poison, jnp.inf, extra["count"]))
        return state.replace(extra=extra), {"count": counted, "seconds": Mean.of(0.5)}

    def report(results):
        accuracy = results.last("train", "test", "accuracy")
        table = Table("Accuracy", ("set", "accuracy"), [("test", f"{accuracy:.3f}")])
        return Report("tiny", (table,), summary={"accuracy": accuracy})

    data = Data(sleep=sleep)
    test = Eval(Test(batch_size=test_batch), evaluate, every=10)
    stages = (
        Stage("train", steps, data, step, evals={"test": test}, schedules={"lr": lambda local: 0.05}),
        Stage("count", 4, Data(sleep=sleep), count, begin=begin, compiled=False, label="number {}".format),
    )
    return Task("tiny", init, stages, report, best="train/test/accuracy")


def run(directory: Path, task: Task, options: Options):
    """Runs in this process."""
    directory.mkdir(parents=True, exist_ok=True)
    return loop.run(task, options, directory, parallel.create(options.parallel), Progress(False))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--parallel", default="jit")
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--poison", type=int, default=-1)
    parser.add_argument("--save_every", type=int, default=5)
    flags = parser.parse_args()
    options = Options(parallel=flags.parallel, log_every=4, save_every=flags.save_every, tensorboard=False)
    try:
        run(flags.workdir, make(flags.steps, sleep=flags.sleep, poison=flags.poison), options)
    except JaxvisionError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
