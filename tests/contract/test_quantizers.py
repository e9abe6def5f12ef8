"""What every quantizer promises. A new one is added to ``CASES`` or ``TRAINED`` and inherits all tests.

A case of ``CASES`` (post-training) is made for an activation ``x`` (B, N, C), or (B, H, N, N) for attention, and is
called as ``q(x, batch_size)``. One of ``TRAINED`` is fitted to a kernel or an activation (..., C).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit.groups import InstanceGroupQuantizer, calibrate_bounds, channel_range, row_range
from jaxvision.quant import log
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer
from jaxvision.quant.affine import Affine
from jaxvision.quant.binary import BinaryActivation, BinaryWeight, RSign
from jaxvision.quant.dorefa import DoReFaActivation, DoReFaWeight
from jaxvision.quant.ewgs import EWGSActivation, EWGSWeight
from jaxvision.quant.families import FAMILIES
from jaxvision.quant.lbt import LBTActivation, LBTWeight
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.pact import PACT
from jaxvision.quant.trs import TRSActivation, TRSWeight

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
      exact: compiled and uncompiled agree to the bit; otherwise to 1e-6 (logarithms).
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
    "twin_softmax": Case(lambda x: log.TwinSoftmaxQuantizer(jnp.float32(2.0**-3), _int(BITS)), attention=True),
    "twin_gelu": Case(lambda x: log.TwinGeluQuantizer(jnp.float32(0.7), jnp.float32(0.3), _int(BITS))),
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


# --- trained quantizers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A class with its settings, and what it declares.

    Attributes:
      codes: the smallest and the largest code of a width.
      passes: where ``x`` gets a gradient, of (quantizer, x).
      back: maps x_hat to an input that has the same codes; the identity where x_hat has the scale of x.
      widths: the smallest and the largest.
      relu: its input is never negative.
    """

    kind: type
    codes: Callable[[int], tuple[int, int]]
    passes: Callable[[Any, np.ndarray], np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)
    back: Callable[[Any, np.ndarray], np.ndarray] = lambda q, x_hat: x_hat
    widths: tuple[int, int] = (1, 8)
    relu: bool = False


def _signed(bits: int) -> tuple[int, int]:
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _symmetric(bits: int) -> tuple[int, int]:
    return -max(1, 2 ** (bits - 1) - 1), max(1, 2 ** (bits - 1) - 1)


def _odd(bits: int) -> tuple[int, int]:
    return 1 - 2**bits, 2**bits - 1


def _unsigned(bits: int) -> tuple[int, int]:
    return 0, 2**bits - 1


def _trs_passes(codes: Callable[[int], tuple[int, int]], full: int) -> Callable[[Any, np.ndarray], np.ndarray]:
    """``full``: the scale stands for 2^(b - full) codes, and for one at one bit."""

    def passes(q: Any, x: np.ndarray) -> np.ndarray:
        low, high = codes(q.bits)
        v = x / (q.scale + 1e-6) * (1 if q.bits == 1 else 2 ** (q.bits - full))
        return (v >= low) & (v <= high)

    return passes


def _lsq_passes(q: Any, x: np.ndarray) -> np.ndarray:
    low, high = q.code_range()
    return (x / q.scale >= low) & (x / q.scale <= high)


def _affine_passes(q: Any, x: np.ndarray) -> np.ndarray:
    low, high = (_symmetric if q.symmetric else _unsigned)(q.bits)
    free = np.round(x / q.scale) + q.zero()
    return (free >= low) & (free <= high)


def _dorefa_passes(q: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray((q.bits == 1) | (jnp.abs(jnp.tanh(x)) < 1))


def _dorefa_back(q: Any, x_hat: np.ndarray) -> np.ndarray:
    return x_hat if q.bits == 1 else np.arctanh(0.9 * x_hat)


def _unscaled(q: Any, x_hat: np.ndarray) -> np.ndarray:
    return x_hat * (q.scale + 1e-6)


def _within(q: Any, x: np.ndarray) -> np.ndarray:
    return (x >= q.lower) & (x <= q.upper)


TRAINED = {
    "trs_weight": Trained(TRSWeight, _signed, _trs_passes(_signed, 1), back=_unscaled),
    "trs_weight_symmetric": Trained(
        TRSWeight, _symmetric, _trs_passes(_symmetric, 1), {"symmetric": True}, back=_unscaled
    ),
    "trs_activation": Trained(TRSActivation, _unsigned, _trs_passes(_unsigned, 0), back=_unscaled, relu=True),
    "trs_activation_signed": Trained(TRSActivation, _signed, _trs_passes(_signed, 1), {"signed": True}, back=_unscaled),
    "lbt_weight": Trained(LBTWeight, _symmetric, lambda q, x: np.abs(x) <= q.scale, widths=(2, 8)),
    "lbt_activation": Trained(LBTActivation, _unsigned, lambda q, x: x <= q.scale, relu=True),
    "lbt_activation_signed": Trained(
        LBTActivation, _symmetric, lambda q, x: np.abs(x) <= q.scale, {"signed": True}, widths=(2, 8)
    ),
    "lsq": Trained(LSQ, _signed, _lsq_passes),
    "lsq_channel": Trained(LSQ, _signed, _lsq_passes, {"per_channel": True}),
    "lsq_activation": Trained(LSQ, _unsigned, _lsq_passes, {"signed": False}, relu=True),
    "ewgs_weight": Trained(EWGSWeight, _odd, _within, back=lambda q, y: q.lower + (q.upper - q.lower) * (y + 1) / 2),
    "ewgs_activation": Trained(
        EWGSActivation, _unsigned, _within, back=lambda q, y: q.lower + (q.upper - q.lower) * y, relu=True
    ),
    "dorefa_weight": Trained(DoReFaWeight, _odd, _dorefa_passes, back=_dorefa_back),
    "dorefa_activation": Trained(DoReFaActivation, _unsigned, lambda q, x: x <= 1, relu=True),
    "pact": Trained(PACT, _unsigned, lambda q, x: x < q.alpha, relu=True),
    "affine_tensor": Trained(Affine, _unsigned, _affine_passes, widths=(1, 16)),
    "affine_symmetric_channel": Trained(
        Affine, _symmetric, _affine_passes, {"symmetric": True, "per_channel": True}, widths=(2, 16)
    ),
    "binary_weight": Trained(BinaryWeight, _odd, lambda q, x: np.abs(x) <= 1, widths=(1, 1)),
    "binary_weight_reactnet": Trained(
        BinaryWeight, _odd, lambda q, x: np.abs(x) <= 1, {"scaled_gradient": False}, widths=(1, 1)
    ),
    "binary_activation": Trained(BinaryActivation, _odd, lambda q, x: np.abs(x) < 1, widths=(1, 1)),
    "rsign": Trained(RSign, _odd, lambda q, x: np.abs(x) < 1, widths=(1, 1)),
}

trained = pytest.mark.parametrize("name", list(TRAINED))


def fitted(case: Trained, bits: int) -> tuple[Any, jax.Array]:
    """The quantizer of a tensor and, for it to clip, four times that tensor."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 6)), jnp.float32)
    x = jnp.abs(x) if case.relu else x
    return case.kind.fit(x, bits, **case.settings), 4 * x


def everything(q: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    x_hat, back = jax.vjp(q, x)
    return q.codes(x), x_hat, q.step(x), jnp.asarray(q.zero()), *back(jnp.ones_like(x))


def test_every_family_has_passed():
    kinds = {case.kind for case in TRAINED.values()}
    assert {kind for family in FAMILIES.values() for kind in (family.weight, family.activation)} <= kinds


@trained
def test_codes_of_every_width(name):
    """Range, step and zero, order, idempotence; a traced width and a compiled program change no bit."""
    case, traces = TRAINED[name], []

    @jax.jit
    def traced(q, x):
        traces.append(1)
        return everything(q, x)

    for bits in range(case.widths[0], min(8, case.widths[1]) + 1):
        q, x = fitted(case, bits)
        codes, x_hat = np.asarray(q.codes(x)), np.asarray(q(x))
        found = traced(q.replace(bits=jnp.int32(bits)), x)
        np.testing.assert_array_equal(found[0], codes)
        np.testing.assert_array_equal(found[1], x_hat)
        assert codes.dtype == np.int32 and x_hat.dtype == x.dtype and x_hat.shape == x.shape
        low, high = case.codes(bits)
        assert low <= codes.min() < codes.max() <= high
        np.testing.assert_allclose(x_hat, q.step(x) * (codes - q.zero()), rtol=1e-6)
        for before, after in zip(np.asarray(x).reshape(-1, 6).T, codes.reshape(-1, 6).T):
            assert (np.diff(after[np.argsort(before)]) >= 0).all()
        np.testing.assert_array_equal(q.codes(case.back(q, x_hat)), codes)
    assert len(traces) == 1


@trained
@pytest.mark.parametrize("width", [0, 1], ids=["narrowest", "4"])
def test_the_gradient_is_the_declared_one(name, width):
    """Which elements get one; and it is the same whether the width is static or traced."""
    case = TRAINED[name]
    bits = min(4, case.widths[1]) if width else case.widths[0]
    q, x = fitted(case, bits)
    dx = jax.jit(lambda x: everything(q, x)[-1])(x)
    np.testing.assert_array_equal(dx != 0, case.passes(q, np.asarray(x)))
    if not width:
        traced = jax.jit(everything)(q.replace(bits=jnp.int32(bits)), x)[-1]
        np.testing.assert_allclose(traced, dx, rtol=1e-6)


@trained
def test_bfloat16_is_quantized_in_float32(name):
    q, x = fitted(TRAINED[name], TRAINED[name].widths[0])
    low = x.astype(jnp.bfloat16)
    assert q(low).dtype == jnp.bfloat16
    np.testing.assert_array_equal(q(low), q(low.astype(jnp.float32)).astype(jnp.bfloat16))
    np.testing.assert_array_equal(q.codes(low), q.codes(low.astype(jnp.float32)))


@trained
def test_impossible_widths_and_scales_are_named(name):
    case = TRAINED[name]
    q, x = fitted(case, case.widths[0])
    for bits in (case.widths[0] - 1, case.widths[1] + 1, case.widths[1] + 0.5):
        with pytest.raises(ConfigError, match=rf"{case.kind.__name__}: bits={bits}"):
            case.kind.fit(x, bits, **case.settings)
        for call in (q.replace(bits=bits), q.replace(bits=bits).codes):
            with pytest.raises(ConfigError, match=rf"{case.kind.__name__}: bits={bits}"):
                call(x)
    scales = set(case.kind.LEARNED) - {"shift", "zero_point"}
    if not scales:
        return
    empty = q.replace(**{scale: 0 * getattr(q, scale) for scale in scales})
    with pytest.raises(ConfigError, match=rf"{case.kind.__name__}.*(must be finite and not 0|must lie below)"):
        empty(x)
    if case.kind is not Affine:  # whose scale, calibrated and not trained, has its floor in ``fit``
        assert np.isfinite(jax.jit(everything)(empty, x)[-1]).all()
