"""What the benchmarks of quantized training share: ResNet-20, its steps as compiled programs, and what they keep."""

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from jaxvision.benchmarks import timing, torch_resnet
from jaxvision.benchmarks.worker import Worker
from jaxvision.core import host_memory, trees
from jaxvision.engine import parallel, supervised
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.losses.classification import softmax_cross_entropy
from jaxvision.metrics import Mean
from jaxvision.models import zoo
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.optim import optimizers
from jaxvision.quant.families import FAMILIES

CLASSES, MOMENTUM, DECAY = 100, 0.9, 1e-4
LR = 0.01
IN_A_ROW = 4


def module() -> Any:
    """ResNet-20 for CIFAR-100 as TRS and LBT train it: shortcuts without parameters, a normalisation at the end."""
    return zoo.build("resnet20", num_classes=CLASSES, final_norm=True)


def quantized(family: str, bits: Bits, execution: str = "fake") -> QuantizedNetwork:
    """Its quantized form; the first and the last layer stay float."""
    chosen = FAMILIES[family]
    layer = LayerQuant(
        Recipe(chosen.weight, dict(chosen.weight_settings)),
        Recipe(chosen.activation, dict(chosen.activation_settings)),
        bits,
        needs_norm=chosen.needs_norm,
        execution=execution,
    )
    return QuantizedNetwork(module(), (Rule("^conv1/|^linear/", None), Rule("kernel$", layer)))


def random_batch(size: int) -> Batch:
    """Images [size, 32, 32, 3] and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((size, 32, 32, 3)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, CLASSES, size).astype(np.int32)}


def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """Cross-entropy."""
    value = jnp.mean(softmax_cross_entropy(logits, batch["label"]))
    return value, {"loss": Mean.of(value)}


def by_group(latent: optax.GradientTransformation, scales: optax.GradientTransformation) -> Any:
    """An optimizer of its own for latent weights and for the quantizers' fields; SGD with momentum for the rest."""

    def labels(params: Any) -> Any:
        names = trees.named_leaves(params)

        def label(name: str) -> str:
            scope, _, leaf = name.rpartition("/")
            if leaf == "kernel" and f"{scope}/kernel_scale" in names:
                return "latent"
            return "scales" if leaf in ("kernel_scale", "input_scale") else "float"

        return trees.map_named(lambda name, _: label(name), params)

    rest = optimizers.sgd(LR, MOMENTUM, weight_decay=DECAY)
    groups = {"latent": latent, "scales": scales, "float": rest}
    return optax.partition(groups, labels, mask_compatible_extra_args=True)


class Training:
    """A compiled training step that goes on from where it was: ``training()`` does one and waits for it.

    Attributes:
      facts: "temporary", the bytes that the program needs besides its arguments and results, as XLA plans them, and
        "compile_seconds", tracing included.
      compiler_options: those of the training steps of a run.
    """

    compiler_options: ClassVar[Callable[[], dict[str, str]]] = staticmethod(parallel.training_options)

    def __init__(self, network: Any, transform: Any, batch: Batch, variables: Any, **options: Any):
        """``variables`` of the network; ``options`` of :func:`supervised.train_step`."""
        step = supervised.train_step(network, transform, loss, **options)
        self._prepare(step, supervised.new_state(variables, transform, average=False), batch)

    @classmethod
    def of(cls, step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]], state: State, batch: Batch) -> Any:
        """Of any step, from ``state`` on."""
        made = cls.__new__(cls)
        made._prepare(step, state, batch)
        return made

    def _prepare(self, step: Callable[..., Any], state: State, batch: Batch) -> None:
        self.state = jax.tree.map(jnp.array, state)  # Its own: the step gives its arguments away.
        self._batch, self._key = jax.device_put(batch), jax.random.key(0)
        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self._batch, self._key)
        self._step = lowered.compile(self.compiler_options())
        seconds, temporary = time.perf_counter() - begin, self._step.memory_analysis().temp_size_in_bytes
        self.facts = {"temporary": temporary, "compile_seconds": seconds}

    def __call__(self) -> State:
        self.state, _ = self._step(self.state, self._batch, self._key)
        return jax.block_until_ready(self.state)


def in_float(batch: Batch) -> Training:
    """The float network's, with momentum and weight decay."""
    network = module()
    start = jax.jit(network.init)(jax.random.key(0), batch["image"][:1])
    return Training(network, optimizers.sgd(LR, MOMENTUM, weight_decay=DECAY), batch, start)


def residual_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of everything that ``jax.vjp`` keeps of ``function`` for its backward pass, each array once.

    The first argument (parameters, which are there anyway) doesn't count; activations among the others do.
    """

    def kept(*arguments: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(function, *arguments)[1])

    jaxpr = jax.make_jaxpr(kept)(*arguments).jaxpr
    own = set(jaxpr.invars[: len(jax.tree.leaves(arguments[0]))])
    found = {var for var in jaxpr.outvars if isinstance(var, core.Var)} - own
    return sum(var.aval.size * var.aval.dtype.itemsize for var in found if hasattr(var.aval.dtype, "itemsize"))


def options(description: str | None, **defaults: int) -> argparse.Namespace:
    """The command line: ``--batch``, ``--rounds``; before JAX's backend starts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--default_fusions", action="store_true", help="XLA's own choice of YNN fusions")
    options = parser.parse_args()
    if options.default_fusions:
        Training.compiler_options = staticmethod(dict)
    host_memory.keep_freed_memory()
    return options


KEPT = ", memory kept"
"""Behind the name of a peer that keeps freed memory, as jaxvision does (see :mod:`host_memory`)."""


def candidates(build: Callable[[str, int], Training], labels: Iterable[str], options: Any) -> dict[str, Worker]:
    """``build(label, batch size)`` of every label, in a process of its own each; ``options`` of :func:`options`."""
    given = options.batch, options.default_fusions
    return {label: Worker(_candidate, build, label, *given, keep_memory=True) for label in labels}


def _candidate(build: Callable[[str, int], Training], label: str, batch: int, default_fusions: bool) -> Training:
    if default_fusions:
        Training.compiler_options = staticmethod(dict)
    return build(label, batch)


def torch_peers(makes: Mapping[str, Callable[[], torch_resnet.TrainStep]], batch: int) -> dict[str, Worker]:
    """PyTorch's training steps, in a process of its own each, as installed and with memory :data:`KEPT`; or nothing."""
    if not torch_resnet.available():
        return {}
    return {
        f"{name}{KEPT * keep_memory}": Worker(_torch_candidate, make, batch, keep_memory=keep_memory)
        for name, make in makes.items()
        for keep_memory in (False, True)
    }


def _torch_candidate(make: Callable[[], torch_resnet.TrainStep], size: int) -> Callable[[], float]:
    batch = random_batch(size)
    images, labels = np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)), batch["label"].astype(np.int64)
    return functools.partial(make(), images, labels)


def measure(workers: Mapping[str, Worker], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step of each by the clock and of processor time (all threads), interleaved.

    :data:`IN_A_ROW` steps are timed together, as a training run does one after the other. Where others use the machine
    too, processor time is what can be compared.
    """
    used: dict[str, list[float]] = {name: [] for name in workers}

    def watched(name: str, run: Worker) -> Callable[[], None]:
        def several() -> None:
            begin = run.processor
            for _ in range(IN_A_ROW):
                run()
            used[name].append((run.processor - begin) / IN_A_ROW)

        return several

    seconds = timing.interleaved({name: watched(name, run) for name, run in workers.items()}, rounds)
    each = {name: value / IN_A_ROW for name, value in seconds.items()}
    return each, {name: statistics.median(values[1:]) for name, values in used.items()}  # the first warms up


def table(
    seconds: Mapping[str, float], processor: Mapping[str, float], made: Mapping[str, Worker], peers: Mapping[str, str]
) -> None:
    """Prints speed, the ratio to the PyTorch peer by clock and processor, planned memory, compile time of everyone."""
    for name, value in seconds.items():
        line = f"  {name:24s} {1 / value:7.3f} steps/s {processor[name]:7.2f} s of processor"
        if (peer := peers.get(name)) in seconds:
            ratios = seconds[peer] / value, processor[peer] / processor[name]
            line += f"   {ratios[0]:5.2f} x {peer} ({ratios[1]:.2f} by processor)"
        if facts := made[name].facts:
            line += f"   temporary {facts['temporary'] / 2**20:7.1f} MiB"
            line += f"   compiled in {facts['compile_seconds']:5.1f} s"
        print(line)


def against_peer(seconds: Mapping[str, float], processor: Mapping[str, float], peer: str) -> None:
    """Prints the float step's ratio to ``peer``, as installed and with memory kept, by clock and by processor."""
    for memory in ("", KEPT):
        if peer + memory in seconds:
            by_processor = processor[peer + memory] / processor["float"]
            what = f"float, jaxvision over {peer}{memory} ({by_processor:.2f} by processor)"
            verdict(what, seconds[peer + memory] / seconds["float"], 1, at_least=True)


def verdict(what: str, value: float, limit: float, *, at_least: bool = False) -> None:
    """Prints a measured number beside its limit."""
    met = value >= limit if at_least else value <= limit
    print(
        f"{what}: {value:.3f} (limit {'at least' if at_least else 'at most'} {limit:g}: {'met' if met else 'MISSED'})"
    )


def peak_memory() -> str:
    """Of the whole process so far."""
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
