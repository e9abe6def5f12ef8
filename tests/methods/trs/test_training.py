"""Twenty steps of a small network beside the official code's."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms
from jaxvision.methods.trs.optimizers import Recipe
from jaxvision.methods.trs.training import Trainer
from jaxvision.methods.trs.variants import parse
from jaxvision.models import zoo
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Rule
from jaxvision.models.quantized import Recipe as Quantizer
from jaxvision.optim import schedules, transition_metrics
from jaxvision.quant.families import FAMILIES
from tests.arrays import load

ORACLES = sorted((Path(__file__).parents[2] / "oracles" / "trs").glob("train_*.npz"))
LAYERS = ("conv2", "conv3")
PARAMS = {
    "conv1/kernel": "c0_weight", "bn1/scale": "b0_weight", "bn1/bias": "b0_bias",
    "conv2/kernel": "q1_weight", "bn2/scale": "b1_weight", "bn2/bias": "b1_bias",
    "conv3/kernel": "q2_weight", "bn3/scale": "b2_weight", "bn3/bias": "b2_bias",
    "fc/kernel": "fc_weight", "fc/bias": "fc_bias",
}  # fmt: skip


def here(weight):
    """PyTorch's order of a kernel's axes in ours."""
    return weight.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[weight.ndim])


def official(oracle):
    """The trainer of an oracle's settings and the float variables that it starts from."""
    family, bits = FAMILIES["trs"], int(oracle["bits"])
    layer = LayerQuant(Quantizer(family.weight), Quantizer(family.activation), Bits(bits, bits), needs_norm=True)
    module = zoo.build("plain_cnn", num_classes=5, features=(6, 8, 8), strides=(1, 1, 2), dilations=(1, 1, 1))
    network = QuantizedNetwork(module.clone(dtype=jnp.float64), (Rule("^conv[23]/", layer),))
    epochs, per_epoch = int(oracle["epochs"]), int(oracle["steps_per_epoch"])
    recipe = Recipe(
        schedules.staircase(schedules.cosine(1.0, epochs * per_epoch), per_epoch),
        weight_decay=float(oracle["weight_decay"]),
        scale_lr=float(oracle["scale_lr"]),
        rate_momentum=float(oracle["momentum_rate"]),
    )
    name = ("adam" if oracle["is_adam"] else "sgd") + ("" if oracle["plain_optimizer"] else "t")
    variant = parse(name, family="trs", baseline="sgd", target=float(oracle["initial_target"]), rule="momentum")
    images = oracle["X"].transpose(0, 1, 3, 4, 2)
    params = trees.nested({ours: here(oracle[f"init_{theirs}"]) for ours, theirs in PARAMS.items()})
    statistics = {f"bn{i}": {"mean": np.zeros(width), "var": np.ones(width)} for i, width in enumerate((6, 8, 8), 1)}
    trainer = Trainer(
        variant, network, images[0], recipe, lambda: images[0], 0.0, 1, lambda count: 0.0, 0, False, "trs"
    )
    return trainer, {"params": params, "batch_stats": statistics}, images


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_twenty_steps_of_the_official_code(path):
    with jax.enable_x64(True):
        oracle = load(path)
        trainer, variables, images = official(oracle)
        setting = {"lr": jnp.asarray(oracle["lr"])}

        def whole(variables, images, labels):
            key = jax.random.key(0)
            state = trainer.begin(variables, setting, key).replace(extra={arms.SETTING: setting})

            def step(state, batch):
                state, metrics = trainer.step(state, batch, key)
                seen = transition_metrics(state.opt_state)
                control = {
                    name: jnp.stack([seen[f"{name}/{layer}/kernel"] for layer in LAYERS])
                    for name in ("target", "rate", "running_rate", "step_size")
                }
                input_scale = jnp.stack([state.params[layer]["input_scale"] for layer in LAYERS])
                moved = jnp.stack([metrics[f"rate/{layer}"].compute() for layer in LAYERS])
                seen = {**control, "act_scale": input_scale, "loss": metrics["loss"].compute(), "moved": moved}
                return state.replace(step=state.step + 1), seen

            return state, *jax.lax.scan(step, state, {"image": images, "label": labels})

        program = jax.jit(whole)
        begun, state, seen = jax.device_get(program(variables, jnp.asarray(images), jnp.asarray(oracle["labels"])))

    # The network's normalisations and loss are in float32, the rest is in float64.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    fitted = [begun.params[layer][f"{role}_scale"] for role in ("kernel", "input") for layer in LAYERS]
    close(fitted, oracle["scales_after_first_forward"])
    for name in ("loss", "running_rate", "step_size", "act_scale"):
        close(seen[name], oracle[name], err_msg=name)
    close(seen["target"], np.stack([oracle["target_rate_or_lr"]] * len(LAYERS), 1))
    # The official code compares the first step's codes with zeros. Ours logs what a step moved, the controller's rate
    # is what the step before moved.
    close(seen["rate"], np.concatenate([np.zeros((1, len(LAYERS))), oracle["rate"][1:]]))
    close(seen["moved"][:-1], oracle["rate"][1:])
    assert seen["moved"].any()
    last, statistics = trees.named_leaves(state.params), trees.named_leaves(state.model_state["batch_stats"])
    for ours, theirs in PARAMS.items():
        close(last[ours], here(oracle[f"final_{theirs}"]), err_msg=ours)
    for ours, value in statistics.items():
        norm, name = ours.split("/")
        close(value, oracle[f"final_b{int(norm[-1]) - 1}_running_{name}"], err_msg=ours)
    for layer in LAYERS:  # Under TRS the kernels' scales stand still.
        assert state.params[layer]["kernel_scale"] == begun.params[layer]["kernel_scale"]


def test_a_batch_that_starts_no_network_is_refused_before_training():
    oracle = load(ORACLES[0])
    trainer, variables, images = official(oracle)
    black = dataclasses.replace(trainer, images=lambda: np.zeros_like(images[0]))
    setting = {"lr": jnp.float32(oracle["lr"])}
    with jax.enable_x64(True):
        begin = lambda each: jax.jit(each.begin)(variables, setting, jax.random.key(0))  # noqa: E731
        trainer.check(begin(trainer))
        with pytest.raises(ConfigError, match=r"starts no network: the input of conv2/kernel .* and config.data"):
            black.check(begin(black))
