"""One arm's training on a network of two quantized layers: order of events, optimizers, devices, executions."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms
from jaxvision.engine.task import State
from jaxvision.methods.lbt import control
from jaxvision.methods.lbt.training import DISTANCE, MEMBER, Optimizers, Trainer
from jaxvision.models.layers import BatchNorm, Conv, Dense, global_avg_pool
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.optim import optimizers, schedules
from jaxvision.quant import interval
from jaxvision.quant.families import FAMILIES
from tests.devices import environment

ROOT = Path(__file__).parents[3]
IMAGE = np.zeros((1, 4, 4, 3), np.float32)
FAMILY = FAMILIES["lbt"]


class Network(nn.Module):
    """Two quantized layers between a float one and a float one."""

    @nn.compact
    def __call__(self, x, train=False):
        for name in ("first", "one", "two"):
            x = nn.relu(
                BatchNorm(name=f"{name}_norm")(Conv(6, 3, padding=1, use_bias=False, name=name)(x), train=train)
            )
        return Dense(5, name="last")(global_avg_pool(x))


def quantized(kind="uniform", execution="fake"):
    layer = LayerQuant(
        Recipe(FAMILY.weight), Recipe(FAMILY.activation), Bits(4, 4, 4), gradient=kind, execution=execution
    )
    return QuantizedNetwork(Network(), (Rule("^(one|two)/", layer),))


def batch(index=0, rows=16):
    generator = np.random.default_rng(index)
    image = generator.normal(size=(rows, *IMAGE.shape[1:])).astype(np.float32)
    return {"image": image, "label": (np.arange(rows) + index).astype(np.int32) % 5}


def trainer(how, network=None, accumulate=1):
    rule = functools.partial(optimizers.sgd, momentum=0.9, weight_decay=0.01)
    first = lambda: {name: leaf[None] for name, leaf in batch().items()}  # noqa: E731
    optimizer = Optimizers(rule, 1e-3, schedules.constant(1.0), accumulate)
    follows = frozenset({"one/kernel", "two/kernel"})
    return Trainer(network or quantized(), IMAGE, first, optimizer, how, follows, 0.1)


@functools.cache
def start():
    variables = jax.jit(Network().init)(jax.random.key(0), IMAGE)
    return {**variables, MEMBER: jnp.int32(0)}


def begin(trained, **setting):
    setting = {name: jnp.float32(value) for name, value in {"gradient_bits": 4, "lr": 0.1, **setting}.items()}
    return program(trained, "begin")(start(), setting, jax.random.key(1))


def gammas(state):
    return {name: float(gamma) for name, gamma in control.gammas(state.model_state["interval"]).items()}


@functools.cache
def program(trained, name):
    """A method of a trainer, compiled once for all tests."""
    return jax.jit(getattr(trained, name))


LBT = trainer(control.lbt((0.5,), 0.01, "quantile"))
ACCUMULATING = trainer(LBT.control, accumulate=2)
DSGC = trainer(control.dsgc(2, 10, (0.0, 1.0)))


def test_begin_starts_intervals_and_gamma_from_the_first_batch_and_takes_no_step():
    state = begin(LBT, alpha=0.5)
    before, after = trees.named_leaves(start()["params"]), trees.named_leaves(state.params)
    assert set(after) - set(before) == {f"{n}/{s}" for n in ("one", "two") for s in ("kernel_scale", "input_scale")}
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_allclose(after["one/kernel_scale"], 3 * np.std(before["one/kernel"], ddof=1), rtol=1e-5)
    assert after["two/input_scale"] != 1
    assert all(0 < gamma < 1 for gamma in gammas(state).values())
    jax.tree.map(np.testing.assert_array_equal, state.model_state["batch_stats"], start()["batch_stats"])


def test_a_batch_that_starts_no_network_is_refused_before_training():
    LBT.check(begin(LBT, alpha=0.5))
    black = dataclasses.replace(LBT, first=lambda: {n: np.zeros_like(leaf) for n, leaf in LBT.first().items()})
    with pytest.raises(ConfigError, match=r"the input of one/kernel .* config.interval.start_images"):
        black.check(begin(black, alpha=0.5))


def test_one_program_serves_all_widths_and_gamma_moves_by_beta():
    step = program(LBT, "step")
    for bits in (2, 4, 8):
        state = begin(LBT, alpha=0.5, gradient_bits=bits)
        values = gammas(state)
        assert control.gradient_widths(state.model_state["bits"])["one/kernel"] == bits
        for index in range(2):
            new, metrics = step(state, batch(index), jax.random.key(index))
            for name, gamma in gammas(new).items():
                assert abs(gamma - values[name]) == pytest.approx(0.01, rel=1e-3) or gamma == values[name]
                assert metrics[f"gamma/{name.removesuffix('/kernel')}"].compute() == pytest.approx(gamma)
            state, values = new, gammas(new)
    assert step._cache_size() == 1


def test_intervals_have_an_optimizer_of_their_own():
    """Adam's first step is its rate, whatever the gradient; at rate 0 the weights stay."""
    for rate in (0.0, 0.1):
        state = begin(LBT, alpha=0.5, lr=rate)
        new, _ = program(LBT, "step")(state, batch(), jax.random.key(0))
        for name, leaf in trees.named_leaves(state.params).items():
            change = np.abs(trees.named_leaves(new.params)[name] - leaf).max()
            if name.endswith("_scale"):
                assert change == pytest.approx(1e-3, rel=1e-2)
            else:
                assert (change > 0) == (rate > 0), name


def test_a_learned_output_scale_is_trained_as_the_intervals_are():
    family = FAMILIES["ewgs"]
    layer = LayerQuant(Recipe(family.weight), Recipe(family.activation), Bits(4, 4, 4), output_scale=True)
    trained = trainer(LBT.control, QuantizedNetwork(Network(), (Rule("^(one|two)/", layer),)))
    params = {"one": {"kernel": jnp.ones(2), "output_scale": jnp.ones(())}}
    state = State(jnp.int32(0), params, extra={arms.SETTING: {"lr": jnp.float32(0)}})
    transform = trained.transform(state)
    updates, _ = transform.update(params, transform.init(params), params)
    assert float(updates["one"]["output_scale"]) == pytest.approx(-1e-3, rel=1e-3)
    np.testing.assert_array_equal(updates["one"]["kernel"], 0)


def test_searches_happen_when_they_are_due_on_the_batch_of_that_step():
    state = begin(DSGC, rate_factor=0)
    step, found = program(DSGC, "step"), [gammas(state)]
    for index in range(3):
        if index == 2:
            variables = {"params": state.params, **state.model_state}
            gradients = program(DSGC, "gradients")(variables, batch(2), jax.random.key(9))
        state, _ = step(state.replace(step=jnp.int32(index)), batch(index), jax.random.key(index))
        found.append(gammas(state))
    assert found[0] == found[1] == found[2]
    # The last layer's gradient passes no other quantizer, so it doesn't depend on the noise.
    gamma, distance = interval.least(
        interval.cosine_distance, gradients["two/kernel"], 4, np.linspace(0.05, 1, 10, dtype=np.float32)
    )
    assert found[3]["two/kernel"] == pytest.approx(float(gamma))
    assert state.extra[DISTANCE]["two/kernel"] == pytest.approx(float(distance), rel=1e-3)


@pytest.mark.parametrize(
    ("how", "kind", "gamma"), [(control.fixed((0.6,)), "uniform", 0.6), (control.piecewise(), "piecewise", 1.0)]
)
def test_constant_gammas_stay_while_the_weights_move(how, kind, gamma):
    trained = trainer(how, quantized(kind))
    state = begin(trained, gamma=0.6)
    new, metrics = jax.jit(trained.step)(state, batch(), jax.random.key(0))
    assert gammas(state) == gammas(new) == pytest.approx({"one/kernel": gamma, "two/kernel": gamma})
    assert not np.array_equal(new.params["two"]["kernel"], state.params["two"]["kernel"])
    assert set(metrics) == {"loss", "grad_norm"}  # gamma is logged only where it moves


def test_the_whole_error_is_least_at_the_start():
    state = begin(trainer(control.whole_error(2, 10)))
    gradients = program(DSGC, "gradients")({"params": state.params, **state.model_state}, batch(), jax.random.key(1))
    gamma, _ = interval.least(
        interval.squared_error, gradients["two/kernel"], 4, np.linspace(0.05, 1, 10, dtype=np.float32)
    )
    assert gammas(state)["two/kernel"] == pytest.approx(float(gamma))


def test_dsgcs_factor_slows_the_quantized_kernels_only():
    step, changes = program(DSGC, "step"), []
    for used in (0, 1):
        state = begin(DSGC, rate_factor=used, gradient_bits=2)
        new, _ = step(state, batch(), jax.random.key(0))
        changes.append(trees.named_leaves(jax.tree.map(jnp.subtract, new.params, state.params)))
    distances = state.extra[DISTANCE]
    for name in changes[0]:
        factor = float(interval.dsgc_rate_factor(distances[name])) if name in distances else 1.0
        np.testing.assert_allclose(changes[1][name], factor * changes[0][name], rtol=1e-4, atol=1e-8)
    assert all(distance > 0 for distance in distances.values())


def test_accumulated_batches_clip_as_often_as_their_parts():
    """Statistics are means over micro-batches, so that the ratio is that of all of them."""
    state = begin(LBT, alpha=0.5)
    for gamma, sign in ((1.0, -1), (0.1, 1)):
        fixed = control.with_gammas(state.model_state["interval"], dict.fromkeys(gammas(state), jnp.float32(gamma)))
        state = state.replace(model_state={**state.model_state, "interval": fixed})
        new, _ = program(ACCUMULATING, "step")(state, batch(), jax.random.key(0))
        values = gammas(new)
        assert values == pytest.approx(dict.fromkeys(values, gamma + 0.01 * sign))


def test_integers_and_floats_agree():
    state = begin(LBT, alpha=0.5)
    expected, loss = program(LBT, "step")(state, batch(), jax.random.key(0))
    integer = trainer(LBT.control, quantized(execution="int"))
    new, metrics = jax.jit(integer.step)(state, batch(), jax.random.key(0))
    assert metrics["loss"].compute() == pytest.approx(float(loss["loss"].compute()), rel=1e-5)
    assert gammas(new) == pytest.approx(gammas(expected))
    for name, leaf in trees.named_leaves(new.params).items():
        np.testing.assert_allclose(leaf, trees.named_leaves(expected.params)[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_probe_measures_without_changing_anything():
    state = begin(LBT, alpha=0.5)
    found = jax.jit(LBT.probe)(state, {**batch(), "mask": np.ones(16, np.float32)})
    values = {name: float(metric.compute()) for name, metric in found.items()}
    assert {name.split("/")[0] for name in values} == {"gamma", "ratio", "error", "large_error"}
    assert values["gamma/one"] == pytest.approx(gammas(state)["one/kernel"])
    assert 0 < values["error/two"] < values["large_error/two"] < 1
    piecewise = trainer(control.piecewise(), quantized("piecewise"))
    other = jax.jit(piecewise.probe)(begin(piecewise), batch())
    # Min-max: the largest gradients err by half a step at most.
    assert float(other["ratio/two"].compute()) == 0 and float(other["large_error/two"].compute()) < 0.2


def test_arms_with_float_gradients_have_no_gamma():
    layer = dataclasses.replace(quantized().rules[0].layer, bits=Bits(4, 4))
    trained = trainer(None, QuantizedNetwork(Network(), (Rule("^(one|two)/", layer),)))
    state = begin(trained)
    assert set(state.model_state) == {"batch_stats"}
    new, metrics = jax.jit(trained.step)(state, batch(), jax.random.key(0))
    assert set(metrics) == {"loss", "grad_norm"}
    plain = trainer(None, Network())
    assert trees.named_leaves(begin(plain).params).keys() == trees.named_leaves(start()["params"]).keys()
    assert new.extra[arms.SETTING]["lr"] == jnp.float32(0.1)


DEVICES = """
import json, sys
import jax, numpy as np
from jaxvision.engine import parallel
from tests.methods.lbt import test_training as here

found = []
for name in sys.argv[1:]:
    mode = parallel.create(name)
    trained = here.trainer(here.control.lbt((0.5,), 0.08, "one"))
    state = mode.replicate(jax.device_get(here.begin(trained, alpha=0.5)))
    step = mode.compile(lambda state, batch: trained.step(state, batch, jax.random.key(0))[0])
    for index in range(6):
        state = step(state, mode.place(here.batch(index)))
    found.append(here.gammas(mode.single(state)))
print(json.dumps([jax.device_count(), found]))
"""


def test_eight_devices_have_the_gamma_of_one():
    counts, found = [], []
    for devices, modes in ((1, ["jit"]), (8, ["jit", "pmap"])):
        command = [sys.executable, "-c", DEVICES, *modes]
        done = subprocess.run(command, env=environment(devices), cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        count, values = json.loads(done.stdout.splitlines()[-1])
        counts.append(count)
        found += values
    assert counts == [1, 8]
    # Down to the target, then to and fro: steps so long that no single element decides on their direction.
    assert all(0.4 < gamma < 0.8 for gamma in found[0].values())
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)
