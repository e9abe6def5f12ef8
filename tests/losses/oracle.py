"""Reading and comparing what official codes gave."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.models.layers import BatchNorm, Conv, Dense, global_avg_pool

FOLDER = Path(__file__).parents[1] / "oracles"


def compiled(functions):
    """``run(inputs) -> name -> (the loss, the gradient of its total with respect to the logits)``, one program a shape.

    Args:
      functions: name -> loss. ``inputs`` are name -> (logits, labels, keyword arrays).
    """

    def run(inputs):
        results = {}
        for name, function in functions.items():

            def total(z, y, arrays, function=function):
                loss = function(z, y, **arrays)
                return loss.total, loss

            (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(*inputs[name])
            results[name] = loss, gradient
        return results

    program = jax.jit(run)
    return lambda inputs: jax.device_get(program({name: jax.tree.map(jnp.asarray, inputs[name]) for name in functions}))


def value_and_gradient(function, logits, labels, *, where=None, **hyper):
    """(the loss, the gradient of its total with respect to the logits), compiled."""
    arrays = {} if where is None else {"where": where}
    return compiled({"": functools.partial(function, **hyper)})({"": (logits, labels, arrays)})[""]


def check(got, expected, rtol=1e-5, err_msg=""):
    """``rtol`` of each and of the largest expected number; in float32 also 2e-8, what p - 1 is off by."""
    got, expected = np.asarray(got), np.asarray(expected)
    atol = rtol * np.max(np.abs(expected), initial=0) + (1e-13 if got.dtype == np.float64 else 2e-8)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=err_msg)


class TinyNet(nn.Module):
    """The network of the oracles' training steps."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Conv(5, 3, padding=1, use_bias=False, name="conv")(x)
        x = nn.relu(BatchNorm(name="bn")(x, train))
        return Dense(6, name="fc")(global_avg_pool(x))


def variables(data, prefix):
    """Its variables from the arrays of an oracle whose names begin with ``prefix``."""
    bn = {key: data[f"{prefix}bn_{key}"] for key in ("scale", "bias", "mean", "var")}
    params = {
        "conv": {"kernel": data[f"{prefix}conv_kernel_hwio"]},
        "bn": {key: bn[key] for key in ("scale", "bias")},
        "fc": {"kernel": data[f"{prefix}fc_kernel_io"], "bias": data[f"{prefix}fc_bias"]},
    }
    return {"params": params, "batch_stats": {"bn": {key: bn[key] for key in ("mean", "var")}}}
