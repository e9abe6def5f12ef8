"""Reductions over the devices that hold a batch, the same code under ``jit`` and under ``pmap``.

Under ``jit`` over global arrays an array already spans the devices and every function here is the identity
(or its single-device meaning). Under ``pmap`` the engine traces the step inside :func:`device_axis`, and
the functions become collectives over that axis. A training step therefore reads the same in both modes:

    grads = devices.mean_over_devices(grads)
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar("jaxvision_device_axis", default=None)


@contextlib.contextmanager
def device_axis(name: str | None) -> Iterator[None]:
    """Within this context, while tracing, the functions of this module reduce over the pmap axis ``name``."""
    token = _AXIS.set(name)
    try:
        yield
    finally:
        _AXIS.reset(token)


def mean_over_devices(tree: Any) -> Any:
    """The mean of every leaf over the devices: of gradients of a per-device mean loss, of batch statistics."""
    axis = _AXIS.get()
    return tree if axis is None else jax.lax.pmean(tree, axis)


def sum_over_devices(tree: Any) -> Any:
    """The sum of every leaf over the devices: of metric sums and counts."""
    axis = _AXIS.get()
    return tree if axis is None else jax.lax.psum(tree, axis)


def max_over_devices(tree: Any) -> Any:
    """The maximum of every leaf over the devices: of ranges."""
    axis = _AXIS.get()
    return tree if axis is None else jax.lax.pmax(tree, axis)


def row_offset(local_rows: int) -> jax.Array | int:
    """The global number of this device's first batch row; 0 under ``jit``."""
    axis = _AXIS.get()
    return 0 if axis is None else jax.lax.axis_index(axis) * local_rows


def reverse_rows(tree: Any) -> Any:
    """Every leaf ``[B, ...]`` with the rows of the *global* batch in reverse order (the partners of mixup)."""
    axis = _AXIS.get()
    flipped = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), tree)
    if axis is None:
        return flipped
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(flipped, axis, [(i, size - 1 - i) for i in range(size)])


def row_keys(key: jax.Array, local_rows: int) -> jax.Array:
    """One key per batch row, ``[B]``, a function of the row's global number: the same on any device count."""
    rows = row_offset(local_rows) + jnp.arange(local_rows)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
