"""What the benchmarks of quantized training share: ResNet-20, its steps as compiled programs, and what they keep."""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from jaxvision.benchmarks import timing
from jaxvision.core import host_memory, trees
from jaxvision.engine import supervised
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
      compile_seconds: tracing and compiling.
      temporary: bytes that the program needs besides its arguments and results, as XLA plans them.
    """

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
        self._step = jax.jit(step, donate_argnums=0).lower(self.state, self._batch, self._key).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.temporary = self._step.memory_analysis().temp_size_in_bytes

    def __call__(self) -> State:
        self.state, _ = self._step(self.state, self._batch, self._key)
        return jax.block_until_ready(self.state)


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
    # On a CPU (jaxlib 0.10.2) YNN is faster than XLA's own code at sums over a batch and slower at convolutions.
    if not options.default_fusions:
        flags = "--xla_cpu_experimental_ynn_fusion_type=reduce"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    host_memory.keep_freed_memory()
    # PyTorch's threads shall not spin while they wait: where others use the machine, that halves its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return options


def measure(candidates: Mapping[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step of each candidate by the clock and of processor time (all threads), interleaved.

    :data:`IN_A_ROW` steps are timed together, as a training run does one after the other: the first after another
    program has to ask the system for its gigabyte again. Where others use the machine too, processor time is what can
    be compared.
    """
    used: dict[str, list[float]] = {name: [] for name in candidates}

    def watched(name: str, run: Callable[[], object]) -> Callable[[], None]:
        def several() -> None:
            begin = time.process_time()
            for _ in range(IN_A_ROW):
                run()
            used[name].append((time.process_time() - begin) / IN_A_ROW)

        return several

    seconds = timing.interleaved({name: watched(name, run) for name, run in candidates.items()}, rounds)
    each = {name: value / IN_A_ROW for name, value in seconds.items()}
    return each, {name: statistics.median(values[1:]) for name, values in used.items()}  # the first warms up


def table(
    seconds: Mapping[str, float], processor: Mapping[str, float], made: Mapping[str, Any], peers: Mapping[str, str]
) -> None:
    """Prints speed, the ratio to the PyTorch peer by clock and processor, planned memory, compile time of everyone."""
    for name, value in seconds.items():
        line = f"  {name:24s} {1 / value:7.3f} steps/s {processor[name]:7.2f} s of processor"
        if (peer := peers.get(name)) in seconds:
            ratios = seconds[peer] / value, processor[peer] / processor[name]
            line += f"   {ratios[0]:5.2f} x {peer} ({ratios[1]:.2f} by processor)"
        if isinstance(own := made.get(name), Training):
            line += f"   temporary {own.temporary / 2**20:7.1f} MiB   compiled in {own.compile_seconds:5.1f} s"
        print(line)


def verdict(what: str, value: float, limit: float, *, at_least: bool = False) -> None:
    """Prints a measured number beside its limit."""
    met = value >= limit if at_least else value <= limit
    print(
        f"{what}: {value:.3f} (limit {'at least' if at_least else 'at most'} {limit:g}: {'met' if met else 'MISSED'})"
    )


def peak_memory() -> str:
    """Of the whole process so far."""
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
