"""LBT on ResNet-20: fake and integer execution, the interval controller, what the backward pass keeps.

    python -m jaxvision.benchmarks.lbt [--batch 128] [--rounds 5]

Random images (the speed doesn't depend on them), everything in one run on one machine, PyTorch eager beside it where it
is installed. On a CPU without 8-bit units integers are slower than floats; what they save is memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def main() -> None:
    """Prints the tables."""
    options = training.options(__doc__, batch=128, rounds=5)
    batch = training.random_batch(options.batch)
    print(f"ResNet-20, batch {options.batch}, {jax.devices()[0].device_kind}")
    module, fake = training.module(), training.quantized("lbt", BITS)
    forms = {"W4A4": training.quantized("lbt", Bits(4, 4)), "4/4/4 fake": fake}
    forms["4/4/4 int"] = training.quantized("lbt", BITS, "int")
    start = jax.jit(module.init)(jax.random.key(0), batch["image"][:1])
    fresh = jax.jit(fake.init)(jax.random.key(0), batch["image"][:1])
    fitted = jax.jit(fake.calibrate)(fresh, batch["image"])
    fitted["interval"] = trees.map_named(lambda _, leaf: leaf.at[0].set(0.7), fitted["interval"])
    made: dict[str, Any] = {"float": Training(module, optimizers.sgd(LR, MOMENTUM, weight_decay=DECAY), batch, start)}
    for label, network in forms.items():
        own = {name: tree for name, tree in fitted.items() if name != "interval" or label != "W4A4"}
        control = {} if label == "W4A4" else {"interval": controller}
        made[label] = Training(network, transform(), batch, own, controllers=control)
    made["4/4/4 fake, gamma fixed"] = Training(fake, transform(), batch, fitted)
    if torch_resnet.available():
        images = np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2))
        labels = batch["label"].astype(np.int64)
        for peer, step in (("PyTorch float", torch_resnet.float_step), ("PyTorch 4/4/4", torch_resnet.lbt_step)):
            made[peer] = functools.partial(step(), images, labels)
    seconds, processor = training.measure(made, options.rounds)
    training.table(seconds, processor, made, PEERS)

    pair = {name: made[name] for name in ("4/4/4 fake", "4/4/4 fake, gamma fixed")}
    alone = timing.processor_seconds(pair, 3 * options.rounds)
    overhead = alone["4/4/4 fake"] / alone["4/4/4 fake, gamma fixed"] - 1
    training.verdict("controller's overhead, two whole steps by processor", overhead, OVERHEAD)
    if (peer := PEERS["float"]) in seconds:
        for what, times in (("", seconds), (" by processor", processor)):
            ratio = times[peer] / times["float"]
            training.verdict(f"float, jaxvision over PyTorch eager{what}", ratio, 1, at_least=True)
    sizes = {name: layer_residuals(name, options.batch) / 2**20 for name in ("fake", "int")}
    print(f"residuals of a layer: fake {sizes['fake']:.2f} MiB, int {sizes['int']:.2f} MiB")
    training.verdict("residuals of a layer, int over fake", sizes["int"] / sizes["fake"], RESIDUALS)
    found = {
        name: network_residuals(network, options.batch) / 2**20 for name, network in {"float": module, **forms}.items()
    }
    print("residuals of the network: " + ", ".join(f"{name} {size:.1f} MiB" for name, size in found.items()))
    training.verdict("residuals of the network, int over fake", found["4/4/4 int"] / found["4/4/4 fake"], RESIDUALS)
    print(training.peak_memory())


if __name__ == "__main__":
    main()
