"""Integer products, the packed input, and a whole layer in integers against its simulation and the oracles."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import gradient, integer
from jaxvision.quant.affine import Affine
from jaxvision.quant.families import FAMILIES
from jaxvision.quant.integer_products import INT32_MAX
from jaxvision.quant.lbt import LBTActivation, LBTWeight
from jaxvision.quant.lsq import LSQ
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "lbt"
GEMM = sorted(ORACLES.glob("integer_gemm_*.npz"))
LAYER = sorted(ORACLES.glob("layer_*.npz"))
STATE = np.float32([0.6, 0.0, 0.0])
# stride, padding, dilation, groups, kernel size, image size, channels in and out
SHAPES = {
    "plain": (1, 1, 1, 1, (3, 3), (6, 5), 4, 6),
    "strided": (2, 1, 1, 1, (3, 3), (7, 6), 4, 6),
    "pixels_unused": ((3, 2), (0, 2), 1, 1, (2, 3), (9, 8), 3, 5),
    "dilated": (1, 2, 2, 1, (3, 3), (7, 7), 4, 4),
    "pointwise": (1, 0, 1, 1, (1, 1), (4, 4), 8, 6),
    "pointwise_strided": (2, 0, 1, 1, (1, 1), (5, 5), 8, 6),
    "grouped": (2, 1, 1, 2, (3, 3), (6, 6), 4, 6),
    "depthwise": (2, 1, 1, 6, (3, 3), (7, 7), 6, 6),
    "depthwise_dilated_twice": (1, 2, (2, 1), 3, (3, 3), (6, 6), 3, 6),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def geometry(name):
    """Keywords of the product, and the shapes of input and kernel; "dense" is a matrix."""
    if name == "dense":
        return {}, (5, 3, 12), (12, 7)
    stride, padding, dilation, groups, kernel, size, inputs, outputs = SHAPES[name]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return options, (3, *size, inputs), (*kernel, inputs // groups, outputs)


def product(x, w, stride=1, padding=0, dilation=1, groups=1):
    """The float reference."""
    if w.ndim == 2:
        return x @ w
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    return jax.lax.conv_general_dilated(
        x,
        w,
        pairs[0],
        [(p, p) for p in pairs[1]],
        rhs_dilation=pairs[2],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def sample(name, seed=0):
    """Float operands of a layer whose inputs are partly clipped, and half zero."""
    options, x_shape, w_shape = geometry(name)
    r = np.random.default_rng(seed)
    x, w = np.maximum(r.normal(size=x_shape), 0), r.normal(size=w_shape) * 0.3
    return options, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


# --- products --------------------------------------------------------------------------------------------------------


def reference(x, w, d, stride, padding, dilation, groups):
    """Convolution and both gradients in int64; without ``d`` the convolution alone."""
    (sh, sw), (ph, pw), (gh, gw) = ((v, v) if isinstance(v, int) else v for v in (stride, padding, dilation))
    kh, kw, _, outputs = w.shape
    x = np.pad(x.astype(np.int64), ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    high, wide = (x.shape[1] - gh * (kh - 1) - 1) // sh + 1, (x.shape[2] - gw * (kw - 1) - 1) // sw + 1
    split = lambda a: a.astype(np.int64).reshape(*a.shape[:-1], groups, -1)  # noqa: E731
    x, w, y = split(x), split(w), np.zeros((len(x), high, wide, groups, outputs // groups), np.int64)
    d = np.zeros_like(y) if d is None else split(d)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for i, j in np.ndindex(kh, kw):
        window = np.s_[:, i * gh : i * gh + (high - 1) * sh + 1 : sh, j * gw : j * gw + (wide - 1) * sw + 1 : sw]
        y += np.einsum("nhwgi,igo->nhwgo", x[window], w[i, j])
        dx[window] += np.einsum("nhwgo,igo->nhwgi", d, w[i, j])
        dw[i, j] = np.einsum("nhwgi,nhwgo->igo", x[window], d)
    dx = dx[:, ph : dx.shape[1] - ph, pw : dx.shape[2] - pw]
    return [a.reshape(*a.shape[:-2], -1) for a in (y, dx, dw)]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_exact(name, dtype):
    options, x_shape, w_shape = geometry(name)
    r, info = np.random.default_rng(1), np.iinfo(dtype)
    x = r.integers(info.min, info.max + 1, x_shape).astype(dtype)
    w = r.integers(-128, 128, w_shape).astype(np.int8)
    d = r.integers(-128, 128, reference(x, w, None, **options)[0].shape).astype(np.int8)

    @jax.jit
    def found(x, w, d):
        dx = integer.conv_grad_input(d, w, x_shape[1:3], **options)
        return integer.conv(x, w, **options), dx, integer.conv_grad_kernel(x, d, w_shape[:2], **options)

    for one, other in zip(found(x, w, d), reference(x, w, d, **options)):
        assert one.dtype == jnp.int32
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("path", GEMM, ids=lambda p: p.stem)
def test_gemm_oracle(path, x64):
    o = load(path)
    wide = jnp.uint8 if o["act_code"].max() > 127 else jnp.int8
    a, k, d = jnp.asarray(o["act_code"], wide), *(jnp.asarray(o[n], jnp.int8) for n in ("weight_code", "grad_code"))
    sa, sk, sd = (o[f"{n}_scale"] for n in ("act", "weight", "grad"))
    for acc, scale, name in (
        (integer.dense(a, k), sa * sk, "y"),
        (integer.dense_grad_input(d, k), sd * sk, "dx"),
        (integer.dense_grad_kernel(a, d), sa * sd, "dw"),
    ):
        assert acc.dtype == jnp.int32
        np.testing.assert_array_equal(acc, o[f"{name}_acc"])
        np.testing.assert_allclose(acc * scale, o[name], rtol=1e-10)


def test_there_are_oracles():
    assert len(GEMM) >= 2 and len(LAYER) >= 2


def test_a_kernel_gradient_beyond_int32_is_split():
    rows = 150_001  # not a multiple of the parts
    x = jnp.full((rows, 2), 255, jnp.uint8).at[7, 0].set(3)
    d = jnp.full((rows, 3), -127, jnp.int8)
    expected = np.asarray(x, np.float64).T @ np.asarray(d, np.float64)
    assert np.abs(expected).max() > 2 * INT32_MAX
    found = integer.dense_grad_kernel(x, d)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.float32(expected))
    depthwise = integer.conv_grad_kernel(
        x.reshape(1, rows, 1, 2), d[:, :1].repeat(2, 1).reshape(1, rows, 1, 2), (1, 1), groups=2
    )
    np.testing.assert_array_equal(depthwise[0, 0, 0], np.float32(expected[:, 0]))
    small = integer.dense_grad_kernel((x // 17).astype(jnp.int8), (d // 18).astype(jnp.int8), bounds=(15, 8))
    assert small.dtype == jnp.int32


# --- the packed input ------------------------------------------------------------------------------------------------

QUANTIZERS = [
    *((name, bits) for name in ("lbt", "lsq", "trs", "pact", "dorefa", "ewgs") for bits in (2, 8)),
    ("trs", 1),
    ("lsq", 1),
    ("binary", 1),
]


def input_quantizer(name, bits, x, **settings):
    kind = FAMILIES[name]
    quantizer = kind.activation.fit(x, bits, **{**kind.activation_settings, **settings})
    # Shrunk, so that a part of x is clipped.
    smaller = {field: getattr(quantizer, field) * 0.5 for field in quantizer.LEARNED if field != "lower"}
    return quantizer.replace(**smaller)


def edge_cases(quantizer, x):
    """x with values on and right beside the clips and the points where codes change."""
    ends = [v for v in (0.0, *(float(getattr(quantizer, f)) for f in quantizer.LEARNED)) for v in (v, -v)]
    steps = [float(quantizer.step()) * (k + h) for k in (-1, 0, 1) for h in (0.0, 0.5)]
    points = np.float32([*ends, *steps])
    points = np.concatenate([points, np.nextafter(points, np.float32(9)), np.nextafter(points, np.float32(-9))])
    return jnp.concatenate([jnp.asarray(x).reshape(-1), jnp.asarray(points), jnp.float32([1e6, -1e6])])[:, None]


def assert_packs(quantizer, x):
    """Packs, checks codes and clips, and returns the gradients at x and at what came back."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)

    @jax.jit
    def run(x):
        codes, remainder = integer.pack(x, quantizer)
        back = integer.unpack(codes, remainder, quantizer)
        gradients = [jax.vjp(lambda q, x: q(x), quantizer, at)[1](g) for at in (x, back)]
        return codes, remainder, quantizer.codes(x), quantizer.codes(back), gradients

    codes, remainder, expected, again, ((dq, dx), (dq_back, dx_back)) = run(x)
    assert codes.dtype.itemsize == remainder.dtype.itemsize == 1
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(dx == 0, dx_back == 0)  # the same side of every clip
    return (dq, dx), (dq_back, dx_back)


@pytest.mark.parametrize(("name", "bits"), QUANTIZERS)
def test_a_packed_input_has_the_same_codes_and_clips(name, bits):
    x = np.maximum(np.random.default_rng(0).normal(size=600), 0).astype(np.float32)
    if name == "binary":
        x = np.random.default_rng(0).normal(size=600).astype(np.float32)
    quantizer = input_quantizer(name, bits, jnp.asarray(x))
    (dq, dx), (dq_back, dx_back) = assert_packs(quantizer, edge_cases(quantizer, x))
    exact = name not in ("ewgs", "binary")  # whose gradients depend on the remainder
    np.testing.assert_allclose(dx_back, dx, rtol=1e-6 if exact else 0.02, atol=0 if exact else 0.05)
    for field in quantizer.LEARNED:
        np.testing.assert_allclose(getattr(dq_back, field), getattr(dq, field), rtol=4e-3, atol=2e-2)


@pytest.mark.parametrize("name", ["lbt", "lsq", "trs"])
def test_a_packed_signed_input(name):
    x = np.random.default_rng(0).normal(size=600).astype(np.float32)
    quantizer = input_quantizer(name, 4, jnp.asarray(x), signed=True)
    (dq, dx), (dq_back, dx_back) = assert_packs(quantizer, edge_cases(quantizer, x))
    np.testing.assert_allclose(dx_back, dx, rtol=1e-6)
    np.testing.assert_allclose(dq_back.scale, dq.scale, rtol=4e-3, atol=2e-2)


def test_the_packed_value_is_within_a_254th_of_a_step_and_zeros_stay():
    x = np.random.default_rng(0).uniform(-0.2, 1, 5000).astype(np.float32)[:, None]
    x[::3] = 0
    for bits in (2, 8):
        quantizer = LBTActivation(jnp.float32(1), bits)
        back = np.asarray(jax.jit(lambda x, q=quantizer: integer.unpack(*integer.pack(x, q), q))(x))
        inside = x >= 0
        assert np.abs(back - x)[inside].max() <= 1.001 / 254 / (2**bits - 1)
        assert not back[::3].any()


# --- a layer ---------------------------------------------------------------------------------------------------------


def simulated(options, x, w, q_input, q_weight, state, key, bits, kind="uniform"):
    y = product(q_input(x), q_weight(w), **options)
    return y if bits is None else gradient.gradient_gate(y, state, key, bits, kind=kind)


def in_integers(options, *args, kind="uniform"):
    return integer.quantized_product(*args, kind=kind, **options)


def both(name, q_input, q_weight, bits, kind="uniform", **sampled):
    """Outputs and gradients (x, kernel, quantizers, state) of simulation and integers."""
    options, x, w = sample(name, **sampled)
    widths = q_input.bits, q_weight.bits

    @jax.jit
    def run(x, w, q_input, q_weight, state, key):
        q_input, q_weight = q_input.replace(bits=widths[0]), q_weight.replace(bits=widths[1])  # Python ints again
        results = []
        for layer in (simulated, in_integers):
            y, pull = jax.vjp(partial(apply, layer), x, w, q_input, q_weight, state, key)
            results.append((y, pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype) ** 2).reshape(y.shape) ** 3)[:5]))
        return results

    def apply(layer, x, w, q_input, q_weight, state, key):
        return layer(options, x, w, q_input, q_weight, state, key, bits, kind=kind)

    return run(x, w, q_input, q_weight, jnp.asarray(STATE), jax.random.key(4))


def close(one, other, rtol, scale=None):
    atol = rtol * (np.abs(np.asarray(other)).max() if scale is None else scale)
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def assert_layers_agree(results, in_learned=("scale",), w_learned=("scale",)):
    (y, (dx, dw, dqi, dqw, ds)), (y_int, (dx_int, dw_int, dqi_int, dqw_int, ds_int)) = results
    close(y_int, y, 1e-6)
    close(dx_int, dx, 2e-6)
    close(dw_int, dw, 2e-6)
    for field in w_learned:
        close(getattr(dqw_int, field), getattr(dqw, field), 1e-4)
    for field in in_learned:
        close(getattr(dqi_int, field), getattr(dqi, field), 5e-3, scale=float(jnp.abs(dx).sum()) * 0.02)
    np.testing.assert_array_equal(ds_int, ds)


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((n, 4) for n in ("strided", "pixels_unused", "dilated", "grouped", "depthwise")), ("strided", 8), ("dense", 8)],
)
def test_integers_equal_the_simulation(name, bits):
    _, x, w = sample(name)
    results = both(name, LBTActivation.fit(x, bits), LBTWeight.fit(w, bits), bits)
    assert_layers_agree(results)
    assert results[0][1][4][1] > 0  # something was clipped


@pytest.mark.parametrize("name", ["strided", "dense"])
def test_gradients_in_float(name):
    _, x, w = sample(name)
    off = None if name == "dense" else gradient.OFF
    assert_layers_agree(both(name, LBTActivation.fit(x, 4), LBTWeight.fit(w, 4), off))


@pytest.mark.parametrize("family", ["lsq", "trs", "pact", "dorefa", "ewgs"])
def test_other_families(family):
    _, x, w = sample("strided")
    kind = FAMILIES[family]
    q_weight = kind.weight.fit(w, 4, **kind.weight_settings)
    results = both("strided", input_quantizer(family, 4, x), q_weight, 4)
    (y, (dx, *_)), (y_int, (dx_int, *_)) = results
    if family == "ewgs":  # its dx depends on the rounding error, hence on the remainder
        close(y_int, y, 1e-6)
        close(dx_int, dx, 1e-5)
    else:
        assert_layers_agree(results, kind.activation.LEARNED, kind.weight.LEARNED)


def test_binary_layer():
    _, x, w = sample("strided")
    kind = FAMILIES["binary"]
    (y, (dx, dw, *_)), (y_int, (dx_int, dw_int, *_)) = both("strided", kind.activation.fit(x), kind.weight.fit(w), 4)
    close(y_int, y, 1e-6)
    close(dw_int, dw, 2e-6)
    close(dx_int, dx, 0.02)


@pytest.mark.parametrize("name", ["strided", "depthwise", "dense"])
def test_a_step_for_each_output_channel(name):
    _, x, w = sample(name)
    assert_layers_agree(both(name, LBTActivation.fit(x, 4), LSQ.fit(w, 4, per_channel=True), 5))


@pytest.mark.parametrize("kind", ["piecewise", "per_channel", "dorefa"])
def test_other_gradient_quantizers_fall_back_to_float_products(kind):
    _, x, w = sample("depthwise")
    assert_layers_agree(both("depthwise", LBTActivation.fit(x, 4), LBTWeight.fit(w, 4), 4, kind))


@pytest.mark.parametrize("path", LAYER, ids=lambda p: p.stem)
def test_layer_oracle(path, x64):
    o = load(path)
    image, filters = (lambda a: jnp.asarray(a.transpose(0, 2, 3, 1))), (lambda a: a.transpose(2, 3, 1, 0))
    x, w, bits = image(o["x"]), jnp.asarray(filters(o["W"])), int(o["bits"])
    options = {"stride": int(o["stride"]), "padding": int(o["padding"])}
    state = jnp.asarray([float(o["gamma"]), 0.0, 0.0])
    quantizers = LBTActivation.fit(x, bits), LBTWeight.fit(w, bits)
    np.testing.assert_allclose([q.scale for q in quantizers], [o["u_init"], o["s_init"]], rtol=1e-10)
    for layer, tolerance in ((simulated, 1e-9), (in_integers, 2e-3)):

        @jax.jit
        def run(noise, g, layer=layer):
            y, pull = jax.vjp(lambda *a: layer(options, *a, noise, bits), x, w, *quantizers, state)
            return y, pull(g)

        y, (dx, dw, du, ds, _) = run(image(o["noise"]), image(o["upstream"]))
        np.testing.assert_allclose(y, image(o["y"]), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(dx, image(o["dx"]), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(dw, filters(o["dW"]), rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(ds.scale, o["ds"], rtol=1e-9)
        np.testing.assert_allclose(du.scale, o["du"], rtol=tolerance, atol=tolerance * np.abs(o["dx"]).sum() * 0.02)


def test_widths_from_4_to_8_share_a_program():
    options, x, w = sample("strided")
    traces = []

    def run(layer, x, w, scales, widths):
        traces.append(layer)
        quantizers = LBTActivation(scales[0], widths[1]), LBTWeight(scales[1], widths[0])
        call = lambda x, w, s: layer(options, x, w, *quantizers, s, jax.random.key(4), widths[2])  # noqa: E731
        y, pull = jax.vjp(call, x, w, jnp.asarray(STATE))
        return y, *pull(jnp.cos(y))

    scales = LBTActivation.fit(x, 4).scale, LBTWeight.fit(w, 4).scale
    traced = jax.jit(partial(run, in_integers))
    for bits in (4, 8):
        found = traced(x, w, scales, jnp.full(3, bits, jnp.int32))
        for one, other in zip(found, jax.jit(lambda *a, b=bits: run(simulated, *a, (b, b, b)))(x, w, scales)):
            close(one, other, 3e-6)
    assert traces.count(in_integers) == 1


@pytest.mark.parametrize("name", ["strided", "dense"])
def test_what_is_saved_is_two_bytes_an_input_and_at_most_035_of_the_simulation(name):
    options, x, w = sample(name)
    x = jnp.concatenate([x] * 16)
    quantizers = LBTActivation.fit(x, 4), LBTWeight.fit(w, 4)

    def saved(layer, wanted):
        @partial(jax.eval_shape, x=x, w=w, quantizers=quantizers, state=jnp.asarray(STATE))
        def leaves(x, w, quantizers, state):
            call = lambda x, w, qi, qw, s: layer(options, x, w, qi, qw, s, jax.random.key(0), 4)  # noqa: E731
            given = jax.tree.leaves((w, quantizers, state))
            pull = jax.vjp(call, x, w, *quantizers, state)[1]
            new = [leaf for leaf in jax.tree.leaves(pull) if not any(leaf is other for other in given)]
            return [leaf for leaf in new if wanted(leaf)]

        return leaves

    large = saved(in_integers, lambda leaf: leaf.size > w.size)
    assert [(leaf.shape, leaf.dtype.itemsize) for leaf in large] == [(x.shape, 1)] * 2
    size = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in saved(layer, lambda leaf: leaf.dtype != jax.dtypes.float0))
        for layer in (in_integers, simulated)
    ]
    assert size[0] <= 0.35 * size[1]


def test_a_nan_stays_visible():
    options, x, w = sample("strided")
    quantizers = LBTActivation.fit(x, 4), LBTWeight.fit(w, 4)
    run = jax.jit(lambda x, w: in_integers(options, x, w, *quantizers))
    for bad in ((x.at[0, 0, 0, 0].set(jnp.nan), w), (x, w.at[0, 0, 0, 0].set(jnp.nan))):
        assert np.isnan(run(*bad)).any()


def test_bfloat16_layers_keep_their_type():
    options, x, w = sample("strided")
    x = x.astype(jnp.bfloat16)
    quantizers = LBTActivation.fit(x, 4), LBTWeight.fit(w, 4)

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(lambda x, w: in_integers(options, x, w, *quantizers, jnp.asarray(STATE), None, 4), x, w)
        return y, *pull(y)

    y, dx, dw = run(x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    close(y.astype(jnp.float32), product(quantizers[0](x).astype(jnp.float32), quantizers[1](w), **options), 1e-2)


def test_mistakes_are_named():
    _, x, w = sample("dense")
    q_input, q_weight = LBTActivation.fit(x, 4), LBTWeight.fit(w, 4)
    bad = {
        "needs a quantizer of the input": (None, q_weight),
        "Affine has a zero point": (Affine.fit(x - 1, 4), q_weight),
        "from -255 to 255, which do not fit 8 bits": (q_input, FAMILIES["ewgs"].weight.fit(w, 8)),
        "a step for each input channel": (Affine.fit(x, 4, symmetric=True, per_channel=True), q_weight),
        "scale=0 must be finite and not 0": (q_input.replace(scale=jnp.float32(0)), q_weight),
        "bits=9 must be": (q_input, LBTWeight(jnp.float32(1), 9)),
    }
    for message, (one, other) in bad.items():
        with pytest.raises(ConfigError, match=message):
            integer.quantized_product(x, w, one, other)
    with pytest.raises(ConfigError, match="int32; integer products take int8 or uint8"):
        integer.dense(jnp.ones((2, 3), jnp.int32), jnp.ones((3, 2), jnp.int8))
    with pytest.raises(ConfigError, match="groups=3"):
        integer.conv(jnp.ones((1, 4, 4, 6), jnp.int8), jnp.ones((1, 1, 6, 3), jnp.int8), groups=3)
    with pytest.raises(ConfigError, match="may not fit int32"):
        jax.eval_shape(integer.dense, *(jax.ShapeDtypeStruct(s, jnp.uint8) for s in ((1, 70_000), (70_000, 1))))


def test_symmetric_affine_codes_run_in_integers():
    options, x, w = sample("strided")
    quantizers = Affine.fit(x, 5, symmetric=True), Affine.fit(w, 5, symmetric=True)
    y = jax.jit(lambda x, w: in_integers(options, x, w, *quantizers))(x, w)
    close(y, product(quantizers[0](x), quantizers[1](w), **options), 1e-6)
    assert integer.narrow_codes(LBTActivation(jnp.float32(1), 8), x).dtype == jnp.uint8
    assert integer.narrow_codes(LBTActivation(jnp.float32(1), 7), x).dtype == jnp.int8
