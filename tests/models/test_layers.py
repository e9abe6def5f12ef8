"""Layers against PyTorch's definitions, written out in float64 NumPy."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.models import layers
from tests.devices import environment

ROOT = Path(__file__).parents[2]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv_reference(x, kernel, stride, padding, dilation, groups):
    """Sliding windows, one output pixel at a time: x [B, H, W, C], kernel [kh, kw, C / groups, O]."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    (sy, sx), (py, px), (dy, dx) = stride, padding, dilation
    kh, kw, inputs, outputs = kernel.shape
    x = np.pad(x, ((0, 0), (py, py), (px, px), (0, 0)))
    rows = (x.shape[1] - dy * (kh - 1) - 1) // sy + 1
    columns = (x.shape[2] - dx * (kw - 1) - 1) // sx + 1
    y = np.zeros((x.shape[0], rows, columns, outputs))
    per_group = outputs // groups
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * sy : i * sy + dy * kh : dy, j * sx : j * sx + dx * kw : dx]
            window = window[:, :kh, :kw]
            for g in range(groups):
                part = kernel[..., g * per_group : (g + 1) * per_group]
                inside = window[..., g * inputs : (g + 1) * inputs]
                y[:, i, j, g * per_group : (g + 1) * per_group] = np.einsum("bhwc,hwco->bo", inside, part)
    return y


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((8, 8), (3, 3), (2, 2), (1, 1), (1, 1), 1),
        ((9, 7), (7, 7), (2, 2), (3, 3), (1, 1), 1),
        ((8, 6), (3, 3), (1, 1), (2, 2), (2, 2), 2),
        ((7, 9), (1, 3), (2, 1), (0, 2), (1, 2), 4),
    ],
)
def test_conv_is_torchs(size, kernel, stride, padding, dilation, groups):
    x = draw(2, *size, 4)
    layer = layers.Conv(8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    params = {"kernel": draw(*kernel, 4 // groups, 8, seed=1), "bias": draw(8, seed=2)}
    made = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {name: leaf.shape for name, leaf in made.items()} == {name: leaf.shape for name, leaf in params.items()}
    expected = conv_reference(x, params["kernel"], stride, padding, dilation, groups) + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_conv_refuses_groups_that_do_not_divide():
    with pytest.raises(ConfigError, match="groups=3"):
        jax.eval_shape(layers.Conv(9, 3, groups=3).init, jax.random.key(0), draw(1, 4, 4, 4))


def test_dense_is_torchs():
    x = draw(3, 2, 5)
    layer = layers.Dense(4)
    params = {"kernel": draw(5, 4, seed=1), "bias": draw(4, seed=2)}
    expected = x.astype(np.float64) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    made = jax.eval_shape(layers.Dense(4, use_bias=False).init, jax.random.key(1), x)["params"]
    assert {name: leaf.shape for name, leaf in made.items()} == {"kernel": (5, 4)}


def test_compute_dtype_leaves_parameters_float32():
    x = draw(2, 8, 8, 4)
    for layer in (layers.Conv(4, 3, dtype=jnp.bfloat16), layers.Dense(4, dtype="bfloat16"),
                  layers.BatchNorm(dtype=jnp.bfloat16), layers.LayerNorm(dtype=jnp.bfloat16)):  # fmt: skip
        y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(3, 3, 16, 64), (256, 64)])
def test_initial_values_are_torchs(shape):
    """PyTorch's formulas; a sample of n values has a relative standard error of the deviation of about 1/sqrt(2n)."""
    field = math.prod(shape[:-2])
    fan_in, fan_out = field * shape[-2], field * shape[-1]
    assert layers.fans(shape) == (fan_in, fan_out)
    key = jax.random.key(3)
    uniform = np.asarray(layers.KERNEL_INITS["torch"](key, shape))
    bound = math.sqrt(2 / (1 + 5)) * math.sqrt(3 / fan_in)  # kaiming_uniform_(a=sqrt(5))
    assert bound * 0.99 < np.abs(uniform).max() <= bound * (1 + 1e-6)
    for name, std in [("kaiming_in", (2 / fan_in) ** 0.5), ("kaiming_out", (2 / fan_out) ** 0.5),
                      ("truncated_normal", 0.02)]:  # fmt: skip
        values = np.asarray(layers.KERNEL_INITS[name](key, shape))
        assert abs(values.mean()) < 5 * std / values.size**0.5
        assert abs(values.std() / std - 1) < 5 / (2 * values.size) ** 0.5


def test_bias_belongs_to_the_kernel():
    x = draw(2, 400)
    bias = layers.Dense(3000, kernel_init="kaiming_in").init(jax.random.key(0), x)["params"]["bias"]
    assert 0.049 < np.abs(bias).max() <= 0.05
    bias = layers.Dense(30, kernel_init="truncated_normal").init(jax.random.key(0), x)["params"]["bias"]
    assert not np.any(bias)
    with pytest.raises(ConfigError, match="did you mean 'kaiming_in'"):
        layers.Dense(3, kernel_init="kaiming").init(jax.random.key(0), x)


def test_batch_norm_follows_torch_over_three_steps():
    """Running statistics after batches of 5, 2 and 3 rows, unbiased variance; then evaluation with them."""
    layer, channels = layers.BatchNorm(), 4
    variables = layer.init(jax.random.key(0), draw(1, channels))
    params = {"scale": draw(channels, seed=1), "bias": draw(channels, seed=2)}
    stats = variables["batch_stats"]
    mean, var = np.zeros(channels), np.ones(channels)
    for step, shape in enumerate([(5, 3, 2), (2,), (3,)]):
        x = 3 * draw(*shape, channels, seed=10 + step) + 50  # far from 0: a one-pass variance would cancel
        y, changed = layer.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        stats = changed["batch_stats"]
        rows = x.astype(np.float64).reshape(-1, channels)
        expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * params["scale"] + params["bias"]
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        mean = 0.9 * mean + 0.1 * rows.mean(0)
        var = 0.9 * var + 0.1 * rows.var(0, ddof=1)
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    x = draw(2, channels, seed=20)
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params, "batch_stats": stats}, x), expected, rtol=1e-5, atol=1e-4)


def test_batch_norm_gradient_is_the_analytic_one():
    """dx = scale / sigma (g - mean(g) - x_hat mean(g x_hat)), through mean and variance."""
    layer, x, cotangent = layers.BatchNorm(), draw(6, 3), draw(6, 3, seed=1)
    variables = layer.init(jax.random.key(0), x)
    variables["params"]["scale"] = jnp.asarray([0.5, 1.0, 2.0])

    def loss(x):
        y, _ = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * cotangent)

    x64, g = x.astype(np.float64), cotangent.astype(np.float64)
    sigma = np.sqrt(x64.var(0) + 1e-5)
    x_hat = (x64 - x64.mean(0)) / sigma
    expected = np.asarray([0.5, 1.0, 2.0]) / sigma * (g - g.mean(0) - x_hat * (g * x_hat).mean(0))
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-6)


def test_batch_norm_needs_two_values():
    layer = layers.BatchNorm()
    variables = layer.init(jax.random.key(0), draw(1, 3))
    with pytest.raises(ConfigError, match="larger batch"):
        layer.apply(variables, draw(1, 3), train=True, mutable=["batch_stats"])


def test_batch_norm_leaves_the_statistics_at_init_and_when_frozen():
    layer, x = layers.BatchNorm(), draw(4, 3) + 1
    variables = layer.init(jax.random.key(0), x, train=True)
    assert not np.any(variables["batch_stats"]["mean"])
    y = layer.apply(variables, x, train=True)  # batch_stats not mutable: normalises by the batch, stores nothing
    np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_layer_norm_is_torchs(eps):
    x = draw(3, 4, 7) * 1e-2 + 5
    layer = layers.LayerNorm(eps=eps)
    params = {"scale": draw(7, seed=1), "bias": draw(7, seed=2)}
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + eps)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-4)


def pool_reference(x, window, stride, padding, reduce):
    """``reduce(values [B, n, C], n_with_padding)`` over the real pixels of each window."""
    (wy, wx), (sy, sx), (py, px) = window, stride, padding
    height, width = x.shape[1:3]
    rows, columns = (height + 2 * py - wy) // sy + 1, (width + 2 * px - wx) // sx + 1
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * sy - py, j * sx - px
            inside = x[:, max(top, 0) : top + wy, max(left, 0) : left + wx]
            y[:, i, j] = reduce(inside.reshape(x.shape[0], -1, x.shape[3]), wy * wx)
    return y


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_pooling_is_torchs(size):
    x = draw(2, *size, 3) - 5  # all negative: a zero in the padding would win a maximum
    expected = pool_reference(x, (3, 3), (2, 2), (1, 1), lambda v, n: v.max(1))
    np.testing.assert_array_equal(layers.max_pool(x, 3, 2, 1), expected.astype(np.float32))
    expected = pool_reference(x, (3, 3), (2, 2), (1, 1), lambda v, n: v.sum(1) / n)
    np.testing.assert_allclose(layers.avg_pool(x, 3, 2, 1), expected, rtol=1e-5)
    expected = pool_reference(x, (3, 3), (2, 2), (1, 1), lambda v, n: v.mean(1))
    np.testing.assert_allclose(layers.avg_pool(x, 3, 2, 1, count_include_pad=False), expected, rtol=1e-5)
    expected = pool_reference(x, (2, 2), (2, 2), (0, 0), lambda v, n: v.mean(1))
    np.testing.assert_allclose(layers.avg_pool(x, 2), expected, rtol=1e-5)
    np.testing.assert_allclose(layers.global_avg_pool(x), x.mean((1, 2)), rtol=1e-5)


def test_adaptive_pooling_is_torchs():
    x = draw(1, 5, 4, 2)
    expected = np.zeros((1, 2, 2, 2))
    for i, rows in enumerate([slice(0, 3), slice(2, 5)]):  # floor and ceil: 5 rows in 2 cells share the middle one
        for j, columns in enumerate([slice(0, 2), slice(2, 4)]):
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(layers.adaptive_avg_pool(x, 2), expected, rtol=1e-5)


@pytest.mark.parametrize("layer", [layers.Dropout(0.3), layers.DropPath(0.3)], ids=["dropout", "droppath"])
def test_drop_rate_scale_and_rows(layer):
    x = jnp.ones((1000, 4, 5))
    y = np.asarray(layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    rows = y.reshape(1000, -1)
    whole = np.all(rows == rows[:, :1], 1)
    independent = 1000 if isinstance(layer, layers.DropPath) else 20000
    assert whole.all() == isinstance(layer, layers.DropPath)
    assert abs((y == 0).mean() - 0.3) < 4 * (0.3 * 0.7 / independent) ** 0.5
    np.testing.assert_array_equal(layer.apply({}, x, train=False), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_refuses_rates(rate):
    for layer in (layers.Dropout(rate), layers.DropPath(rate)):
        with pytest.raises(ConfigError, match="below 1"):
            layer.apply({}, jnp.ones((1, 2)), train=True, rngs={"dropout": jax.random.key(0)})


PMAP_PROGRAM = """
import json, sys
sys.path.insert(0, {root!r})
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from jaxvision.core import devices
from jaxvision.models.layers import BatchNorm, Dropout, DropPath

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return DropPath(0.4)(Dropout(0.3)(BatchNorm(name="bn")(x, train=True), True), True)

net = Net()
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((16, 3, 4)) * 2 + 10, jnp.float32)
weight = jnp.asarray(rng.standard_normal((16, 3, 4)), jnp.float32)
keys = {{"params": jax.random.key(0), "dropout": jax.random.key(1)}}
variables = net.init(keys, x)

def step(x, weight):
    def loss(params, x):
        y, stats = net.apply({{**variables, "params": params}}, x, rngs={{"dropout": jax.random.key(1)}},
                             mutable=["batch_stats"])
        return jnp.mean(jnp.square(y - weight)), (y, stats)
    (grads, (y, stats)) = jax.grad(loss, has_aux=True, argnums=(0, 1))(variables["params"], x)
    return devices.mean_over_devices(grads[0]), grads[1], y, stats

def traced(x, weight):
    with devices.device_axis("data"):
        return step(x, weight)

split = lambda a: a.reshape(8, 2, *a.shape[1:])
one = jax.jit(step)(x, weight)
many = jax.pmap(traced, axis_name="data")(split(x), split(weight))
error = lambda a, b: float(jnp.max(jnp.abs(a - b)))
join = lambda a: np.asarray(a).reshape(16, 3, 4)
print(json.dumps({{
    "devices": jax.device_count(),
    "y": error(join(many[2]), one[2]),
    # The loss of a device is a mean over an eighth of the rows.
    "dx": error(join(many[1]) / 8, one[1]),
    "grads": max(error(a[3], b) for a, b in zip(jax.tree.leaves(many[0]), jax.tree.leaves(one[0]))),
    "stats": max(error(a[5], b) for a, b in zip(jax.tree.leaves(many[3]), jax.tree.leaves(one[3]))),
    "zeros": int(np.sum(join(many[2]) == 0)),
    "moved": float(jnp.max(jnp.abs(one[3]["batch_stats"]["bn"]["mean"]))),
}}))
"""


def test_batch_norm_and_drop_under_pmap_equal_one_device():
    program = PMAP_PROGRAM.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(8))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 8
    assert result["moved"] > 0.5
    assert 0 < result["zeros"] < 16 * 12
    for name in ("y", "dx", "grads", "stats"):
        assert result[name] < 1e-5, result


def test_masks_depend_on_the_global_row_only():
    """Rows 2 and 3 of a batch of 4, taken alone with the offset of a second device, drop the same values."""
    key = jax.random.key(7)
    x = jnp.ones((4, 50))
    whole = layers.Dropout(0.5).apply({}, x, train=True, rngs={"dropout": key})

    def local(rows):
        with devices.device_axis("data"):
            return layers.Dropout(0.5).apply({}, rows, train=True, rngs={"dropout": key})

    halves = jax.vmap(local, axis_name="data")(x.reshape(2, 2, 50))
    np.testing.assert_array_equal(halves.reshape(4, 50), whole)
