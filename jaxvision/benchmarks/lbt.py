"""LBT on ResNet-20: fake and integer execution, the interval controller, what the backward pass keeps.

    python -m jaxvision.benchmarks.lbt [--batch 128] [--rounds 5]

Random images (the speed doesn't depend on them); every row in a process of its own, all in turns; PyTorch eager among
them where it is installed, as it is and with jaxvision's setting of the C library's memory. On a CPU without 8-bit
units integers are slower than floats; what they save is memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.benchmarks import timing, torch_resnet, training
from jaxvision.benchmarks.training import DECAY, LR, MOMENTUM, Training
from jaxvision.core import trees
from jaxvision.models.layers import Conv
from jaxvision.models.quantized import Bits, QuantizedNetwork, Rule
from jaxvision.optim import optimizers
from jaxvision.quant import interval

BITS = Bits(4, 4, 4)
ALPHA = 1e-3
PEERS = {"float": "PyTorch float", "4/4/4 fake": "PyTorch 4/4/4", "4/4/4 int": "PyTorch 4/4/4"}
FORMS = {
    "W4A4": (Bits(4, 4), "fake"),
    "4/4/4 fake": (BITS, "fake"),
    "4/4/4 int": (BITS, "int"),
    "4/4/4 fake, gamma fixed": (BITS, "fake"),
}
"""Label -> bits and execution."""
OVERHEAD, RESIDUALS = 0.02, 0.35


def transform() -> Any:
    """SGD, and Adam for the intervals of weights and inputs."""
    sgd = optimizers.sgd(LR, MOMENTUM, weight_decay=DECAY)
    return training.by_group(sgd, optimizers.adam(1e-5))


def controller(values: Any, cotangent: Any) -> Any:
    """gamma of every layer from the clip counts of the step."""

    def one(value: jax.Array, counts: jax.Array) -> jax.Array:
        gamma = interval.update_interval(value[0], counts[1], counts[2], BITS.gradient, alpha=ALPHA)
        return jnp.stack([gamma, jnp.zeros_like(gamma), jnp.zeros_like(gamma)])

    return jax.tree.map(one, values, cotangent)


def layer_residuals(execution: str, batch: int) -> int:
    """What a 3x3 convolution of 32 channels keeps, its input included."""
    rule = training.quantized("lbt", BITS, execution).rules[-1]
    network = QuantizedNetwork(Conv(32, 3, padding=1, use_bias=False), (Rule("kernel$", rule.layer),))
    x = jnp.zeros((batch, 16, 16, 32), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    return training.residual_bytes(network.apply, variables, x)


def network_residuals(network: Any, batch: int) -> int:
    """What a whole training step's forward pass keeps."""
    x = jnp.zeros((batch, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)

    def forward(variables: Any, x: jax.Array) -> jax.Array:
        return network.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    return training.residual_bytes(forward, variables, x)


def quantized(label: str) -> QuantizedNetwork:
    """The network of a row of the table."""
    return training.quantized("lbt", *FORMS[label])


def build(label: str, size: int) -> Training:
    """A row of the table."""
    batch = training.random_batch(size)
    if label == "float":
        return training.in_float(batch)
    network = quantized("4/4/4 fake")
    fresh = jax.jit(network.init)(jax.random.key(0), batch["image"][:1])
    fitted = jax.jit(network.calibrate)(fresh, batch["image"])
    fitted["interval"] = trees.map_named(lambda _, leaf: leaf.at[0].set(0.7), fitted["interval"])
    if label == "W4A4":
        del fitted["interval"]
    controllers = {"interval": controller} if label in ("4/4/4 fake", "4/4/4 int") else {}
    return Training(quantized(label), transform(), batch, fitted, controllers=controllers)


def main() -> None:
    """Prints the tables."""
    options = training.options(__doc__, batch=128, rounds=5)
    print(f"ResNet-20, batch {options.batch}, {jax.devices()[0].device_kind}")
    made = training.candidates(build, ("float", *FORMS), options)
    steps = {"PyTorch float": torch_resnet.float_step, "PyTorch 4/4/4": torch_resnet.lbt_step}
    made |= training.torch_peers(steps, options.batch)
    seconds, processor = training.measure(made, options.rounds)
    training.table(seconds, processor, made, PEERS)
    for worker in made.values():
        worker.close()

    pair = {label: build(label, options.batch) for label in ("4/4/4 fake", "4/4/4 fake, gamma fixed")}
    alone = timing.processor_seconds(pair, 3 * options.rounds)
    overhead = alone["4/4/4 fake"] / alone["4/4/4 fake, gamma fixed"] - 1
    training.verdict("controller's overhead, two whole steps by processor", overhead, OVERHEAD)
    training.against_peer(seconds, processor, PEERS["float"])
    sizes = {name: layer_residuals(name, options.batch) / 2**20 for name in ("fake", "int")}
    print(f"residuals of a layer: fake {sizes['fake']:.2f} MiB, int {sizes['int']:.2f} MiB")
    training.verdict("residuals of a layer, int over fake", sizes["int"] / sizes["fake"], RESIDUALS)
    networks = {"float": training.module(), **{label: quantized(label) for label in FORMS if "fixed" not in label}}
    found = {label: network_residuals(network, options.batch) / 2**20 for label, network in networks.items()}
    print("residuals of the network: " + ", ".join(f"{label} {size:.1f} MiB" for label, size in found.items()))
    training.verdict("residuals of the network, int over fake", found["4/4/4 int"] / found["4/4/4 fake"], RESIDUALS)


if __name__ == "__main__":
    main()
