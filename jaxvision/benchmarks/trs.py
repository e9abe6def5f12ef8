"""TRS on ResNet-20: what scheduling the transition rate costs, and steps/s beside PyTorch.

    python -m jaxvision.benchmarks.trs [--batch 256] [--rounds 5]

Random images (the speed doesn't depend on them); every row in a process of its own, all in turns; PyTorch eager among
them where it is installed, as it is and with jaxvision's setting of the C library's memory. The overhead is measured
twice: as the difference of two whole training steps, which a busy machine blurs, and as the difference of the two
optimizers' updates alone over a step. Two rows are the steps of the method's arms, which log rates, distances and
movements of the weights, with and without the detector of oscillation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvision.benchmarks import timing, torch_resnet, training
from jaxvision.benchmarks.training import DECAY, LR, MOMENTUM, Training
from jaxvision.core import trees
from jaxvision.engine import arms
from jaxvision.engine.task import Batch
from jaxvision.methods.trs import variants
from jaxvision.methods.trs.optimizers import Recipe
from jaxvision.methods.trs.training import Trainer
from jaxvision.models.quantized import Bits, QuantizedNetwork
from jaxvision.optim import optimizers, schedules, sgdt, transition_target

BITS = Bits(2, 2)
PEERS = {"float": "PyTorch float", "W2A2 + TRS": "PyTorch W2A2 + TRS"}
ARMS = {"the arm sgdt": False, "the arm sgdt, oscillation": True}
"""Label -> whether oscillation is measured."""
OPTIMIZERS = {"W2A2, SGD": "SGD", "W2A2 + TRS": "SGDT"}
"""Label -> the latent weights' optimizer."""
OVERHEAD, EXTRA_BYTES = 0.03, 1.0


def latent(name: str) -> optax.GradientTransformation:
    """The latent weights' optimizer: "SGD", or with its transition rate scheduled, "SGDT"."""
    if name == "SGD":
        return optimizers.sgd(LR, MOMENTUM, weight_decay=DECAY)
    target = transition_target(5e-3, bits=BITS.weight, total=1000)
    return sgdt(target, initial_step_size=LR, momentum=MOMENTUM, weight_decay=DECAY)


def transform(name: str) -> Any:
    """The whole network's; scales of kernels stand still in both, so that nothing but the transform differs."""
    return training.by_group(latent(name), optimizers.sgd(LR))


def quantizers_of(network: QuantizedNetwork) -> Callable[[Any, Any], dict[str, Any]]:
    """The optimizer's extra arguments."""
    return lambda params, _: {"quantizers": network.quantizers(params)}


def update_only(network: QuantizedNetwork, params: Any, name: str) -> Callable[[], object]:
    """An optimizer's update alone, compiled."""
    optimizer, gradients = transform(name), jax.tree.map(jnp.ones_like, params)
    extra = quantizers_of(network)

    def update(state: Any, params: Any) -> Any:
        return optimizer.update(gradients, state, params, **extra(params, None))

    step, state = jax.jit(update), jax.jit(optimizer.init)(params)
    return lambda: jax.block_until_ready(step(state, params))


def arm(network: QuantizedNetwork, batch: Batch, variables: Any, *, oscillation: bool) -> Training:
    """The arm ``sgdt`` as a run trains it, its diagnostics included."""
    variant = variants.parse("sgdt", family="trs", baseline="sgd", target=5e-3, rule="momentum")
    recipe = Recipe(schedules.cosine(1.0, 1000), weight_decay=DECAY, oscillation=oscillation)
    trainer = Trainer(
        variant,
        network,
        batch["image"][:1],
        recipe,
        images=None,
        smoothing=0.0,
        accumulate=1,
        dampening=schedules.constant(0.0),
        offset=0,
        keep_variables=False,
        family_of_run="trs",
    )
    setting = {"lr": jnp.float32(LR)}
    state = jax.jit(trainer.begin)(variables, setting, jax.random.key(0))
    return Training.of(trainer.step, state.replace(extra={arms.SETTING: setting}), batch)


def extra_bytes(network: QuantizedNetwork, params: Any) -> tuple[float, float]:
    """What the transform's state adds to SGD's: bytes a latent weight in arrays, bytes a latent tensor in scalars."""
    arrays, scalars = {}, {}
    for name in ("SGD", "SGDT"):
        leaves = jax.tree.leaves(jax.eval_shape(transform(name).init, params))
        arrays[name] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim)
        scalars[name] = sum(leaf.dtype.itemsize for leaf in leaves if not leaf.ndim)
    kernels = network.layers(params)
    weights = sum(np.size(trees.named_leaves(params)[kernel]) for kernel in kernels)
    return (arrays["SGDT"] - arrays["SGD"]) / weights, (scalars["SGDT"] - scalars["SGD"]) / len(kernels)


def fitted(network: QuantizedNetwork, batch: Batch) -> Any:
    """Variables with the scales fitted to the batch."""
    fresh = jax.jit(network.init)(jax.random.key(0), batch["image"][:1])
    return jax.jit(network.calibrate)(fresh, batch["image"])


def build(label: str, size: int) -> Training:
    """One row of the table."""
    batch = training.random_batch(size)
    if label == "float":
        return training.in_float(batch)
    network = training.quantized("trs", BITS)
    variables = fitted(network, batch)
    if label in ARMS:
        return arm(network, batch, variables, oscillation=ARMS[label])
    return Training(network, transform(OPTIMIZERS[label]), batch, variables, extra_args=quantizers_of(network))


def main() -> None:
    """Prints the table."""
    options = training.options(__doc__, batch=256, rounds=5)
    print(f"ResNet-20, batch {options.batch}, {jax.devices()[0].device_kind}")
    made = training.candidates(build, ("float", *OPTIMIZERS, *ARMS), options)
    steps = {"float": torch_resnet.float_step, "W2A2 + TRS": torch_resnet.trs_step}
    made |= training.torch_peers({PEERS[label]: step for label, step in steps.items()}, options.batch)
    seconds, processor = training.measure(made, options.rounds)
    training.table(seconds, processor, made, PEERS)
    for worker in made.values():
        worker.close()

    network = training.quantized("trs", BITS)
    params = fitted(network, training.random_batch(options.batch))["params"]
    updates = {name: update_only(network, params, name) for name in ("SGD", "SGDT")}
    alone = timing.interleaved(updates, 20 * options.rounds, rest=0)
    print(f"optimizer's update alone: SGD {1e3 * alone['SGD']:.2f} ms, SGDT {1e3 * alone['SGDT']:.2f} ms")
    training.verdict(
        "overhead, two updates over a step", (alone["SGDT"] - alone["SGD"]) / seconds["W2A2, SGD"], OVERHEAD
    )
    # In one process: between processes such steps differed by 15 % in one run and by nothing in another.
    pair = {label: build(label, options.batch) for label in (*OPTIMIZERS, *ARMS)}
    whole = timing.processor_seconds(pair, 2 * options.rounds)
    over = {label: value / whole["W2A2, SGD"] - 1 for label, value in whole.items()}
    training.verdict("overhead, two whole steps by processor", over["W2A2 + TRS"], OVERHEAD)
    for label in ARMS:
        print(f"{label}: {over[label]:.3f} above W2A2, SGD by processor")
    weight, tensor = extra_bytes(network, params)
    training.verdict("extra bytes a latent weight", weight, EXTRA_BYTES)
    print(f"extra bytes a latent tensor, in scalars: {tensor:.0f}")
    training.against_peer(seconds, processor, PEERS["float"])


if __name__ == "__main__":
    main()
