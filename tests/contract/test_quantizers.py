"""What every activation quantizer promises. A new one is added to ``CASES`` and inherits all tests.

A case is made for an activation ``x`` (B, N, C), or (B, H, N, N) for attention, and is called as ``q(x, batch_size)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.methods.igq_vit.groups import InstanceGroupQuantizer, calibrate_bounds, channel_range, row_range
from jaxvision.quant import log
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer

BITS = 4
BATCH = 3


@dataclass(frozen=True)
class Case:
    """``make(x)`` gives the quantizer. The flags say which of the promises it makes.

    Attributes:
      attention: its input is softmax attention.
      levels: at most 2^bits values for one unit that shares a scale; ``unit`` cuts x into such units.
      idempotent: quantizing twice is quantizing once. Dynamic intervals don't all survive their own rounding.
      channelwise: channels (or rows) don't influence each other.
      masked_zero: what is too small for the last code becomes 0, one value more than there are codes (as officially).
      exact: compiled and uncompiled agree to the bit; otherwise to 1e-6 (logarithms, divisions by broadcast values).
    """

    make: Callable[[jax.Array], Any]
    attention: bool = False
    unit: str = "tensor"
    idempotent: bool = True
    channelwise: bool = True
    masked_zero: bool = False
    exact: bool = True


def _igq(x: jax.Array) -> InstanceGroupQuantizer:
    bounds, _ = calibrate_bounds(channel_range(x).reshape(-1, 2), 4)
    return InstanceGroupQuantizer.create(bounds, BITS)


def _igq_rows(x: jax.Array, per_head: bool = False) -> InstanceGroupQuantizer:
    ranges = row_range(x)
    heads = jnp.moveaxis(ranges, 1, 0).reshape(x.shape[1] if per_head else 1, -1, 2)
    return InstanceGroupQuantizer.create(jnp.stack([calibrate_bounds(h, 4)[0] for h in heads]), BITS, axis="rows")


def _int(value: int) -> jax.Array:
    return jnp.int32(value)


CASES = {
    "affine_tensor": Case(lambda x: AffineQuantizer.from_interval(x.min() * 0.8, x.max() * 0.8, BITS)),
    "affine_channel": Case(lambda x: AffineQuantizer.from_interval(x.min((0, 1)), x.max((0, 1)), BITS), unit="channel"),
    "dynamic_tensor": Case(lambda x: DynamicGroupQuantizer.create(BITS, 1), unit="image", channelwise=False),
    "dynamic_groups": Case(lambda x: DynamicGroupQuantizer.create(BITS, 2), unit="channel", channelwise=False),
    "dynamic_channel": Case(lambda x: DynamicGroupQuantizer.create(BITS), unit="channel"),
    "dynamic_row": Case(lambda x: DynamicGroupQuantizer.create(BITS, axis="rows"), attention=True, unit="row"),
    "igq_channels": Case(_igq, unit="channel", idempotent=False),
    "igq_rows": Case(_igq_rows, attention=True, unit="row", idempotent=False),
    "igq_rows_per_head": Case(lambda x: _igq_rows(x, True), attention=True, unit="row", idempotent=False),
    "log2": Case(lambda x: log.Log2Quantizer(_int(BITS)), attention=True, masked_zero=True, exact=False),
    "log_sqrt2": Case(
        lambda x: log.LogSqrt2Quantizer(jnp.float32(0.9), _int(BITS)), attention=True, masked_zero=True, exact=False
    ),
    "twin_softmax": Case(
        lambda x: log.TwinSoftmaxQuantizer(jnp.float32(2.0**-3), _int(BITS)), attention=True, exact=False
    ),
    "twin_gelu": Case(lambda x: log.TwinGeluQuantizer(jnp.float32(0.7), jnp.float32(0.3), _int(BITS)), exact=False),
}

every = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, 8, 6)) * rng.lognormal(size=(BATCH, 1, 6)) + 0.3 * rng.normal(size=6)
    logits = 2 * rng.normal(size=(BATCH, 2, 6, 6))
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return {False: jnp.asarray(x, jnp.float32), True: jnp.asarray(attention, jnp.float32)}


@pytest.fixture(scope="module")
def made(inputs):
    """By name: the quantizer, its input, its output (jitted)."""
    run = jax.jit(lambda q, x: q(x, BATCH))
    found = {}
    for name, case in CASES.items():
        x = inputs[case.attention]
        quantizer = case.make(x)
        found[name] = quantizer, x, run(quantizer, x)
    return found


def units(case: Case, x: jax.Array) -> np.ndarray:
    """x as (units, elements), one row for each set of elements that shares a scale."""
    x = np.asarray(x)
    if case.unit == "row":
        return x.reshape(-1, x.shape[-1])
    if case.unit == "channel":
        return np.moveaxis(x, -1, 1).reshape(x.shape[0] * x.shape[-1], -1)
    return x.reshape(x.shape[0] if case.unit == "image" else 1, -1)


@every
def test_shape_type_and_finiteness(made, name):
    _, x, x_hat = made[name]
    assert x_hat.shape == x.shape and x_hat.dtype == x.dtype
    assert np.isfinite(x_hat).all()


@every
def test_it_quantizes_to_few_values_near_the_input(made, name):
    quantizer, x, x_hat = made[name]
    for row in units(CASES[name], x_hat):
        assert len(np.unique(row)) <= 2 ** int(quantizer.bits) + CASES[name].masked_zero
    assert not np.array_equal(x, x_hat)
    assert np.square(x - x_hat).sum() < 0.25 * np.square(x).sum()


@every
def test_values_keep_their_order(made, name):
    _, x, x_hat = made[name]
    case = CASES[name]
    for before, after in zip(units(case, x), units(case, x_hat)):
        assert (np.diff(after[np.argsort(before, kind="stable")]) >= -1e-6).all()


@every
def test_idempotent(made, name):
    quantizer, _, x_hat = made[name]
    again = np.asarray(quantizer(x_hat, BATCH))
    if CASES[name].idempotent:
        np.testing.assert_allclose(again, x_hat, rtol=1e-5, atol=1e-6)
    else:  # a channel may move to another group, but no further than rounding did the first time
        assert np.square(again - x_hat).sum() <= 4 * np.square(x_hat - made[name][1]).sum()


@every
def test_jit_equals_eager(made, name):
    quantizer, x, x_hat = made[name]
    np.testing.assert_allclose(quantizer(x, BATCH), x_hat, rtol=0 if CASES[name].exact else 1e-6)


@every
def test_an_image_does_not_depend_on_its_batch(made, name):
    quantizer, x, x_hat = made[name]
    one = jax.jit(lambda q, x: q(x, 1))
    for i in range(BATCH):
        np.testing.assert_allclose(one(quantizer, x[i : i + 1])[0], x_hat[i], rtol=1e-6)


@every
def test_vmap_over_images_equals_the_batch(made, name):
    quantizer, x, x_hat = made[name]
    mapped = jax.jit(jax.vmap(lambda q, image: q(image[None], 1)[0], in_axes=(None, 0)))(quantizer, x)
    np.testing.assert_allclose(mapped, x_hat, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.channelwise])
def test_a_unit_alone_gives_what_it_gives_among_others(made, name):
    """vmap over channels (attention: over heads) equals the quantizer of all."""
    quantizer, x, x_hat = made[name]
    axis = 1 if CASES[name].attention else 2
    own = name in ("affine_channel", "igq_rows_per_head")
    # A quantizer with parameters for each channel (each head) is mapped along with them.
    q_axes = jax.tree.map(lambda leaf: 0 if own and jnp.ndim(leaf) else None, quantizer)

    def alone(q, unit):
        q = jax.tree.map(lambda leaf, a: leaf if a is None or leaf.ndim == 0 else leaf[None], q, q_axes,
                         is_leaf=lambda leaf: leaf is None)  # fmt: skip
        return jnp.squeeze(q(jnp.expand_dims(unit, axis), BATCH), axis)

    mapped = jax.jit(jax.vmap(alone, in_axes=(q_axes, axis), out_axes=axis))(quantizer, x)
    np.testing.assert_allclose(mapped, x_hat, rtol=1e-6)


@every
def test_new_parameters_compile_nothing(made, name):
    quantizer, x, _ = made[name]
    traces = []

    @jax.jit
    def run(q, x):
        traces.append(1)
        return q(x, BATCH)

    first = run(quantizer, x)
    fewer = jax.tree.map(lambda leaf: leaf, quantizer).replace(bits=jnp.int32(2))
    assert not np.array_equal(run(fewer, x), first)
    assert len(traces) == 1


@every
def test_bfloat16_activations(made, name):
    quantizer, x, x_hat = made[name]
    low = quantizer(x.astype(jnp.bfloat16), BATCH)
    assert low.dtype == jnp.bfloat16
    close = np.isclose(np.asarray(low, np.float32), x_hat, rtol=0.05, atol=0.02 * float(jnp.abs(x).max()))
    assert close.mean() > 0.8
