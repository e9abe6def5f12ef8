"""Trees of device arrays as copies in the memory of the host, and back, on one process or many."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxvision.core import trees


def gather(value: int) -> np.ndarray:
    """The value of every process, ``[processes]`` int32; every process must call this."""
    if jax.process_count() == 1:
        return np.asarray([value], np.int32)
    return np.asarray(multihost_utils.process_allgather(np.int32(value))).reshape(-1)


def host_copies(payload: Any, keep: bool) -> dict[str, np.ndarray]:
    """Copies of the leaves, by name, that share no memory with the payload; empty where ``keep`` is False."""
    leaves = trees.named_leaves(payload)
    if len(leaves) != len(jax.tree.leaves(payload)):
        raise ValueError("two leaves of the payload have the same name, such as {'a/b': x, 'a': {'b': y}}")
    for leaf in leaves.values():
        if keep and isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    copies = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        if keep:
            copies[name] = np.array(leaf, order="C")
            if copies[name].dtype.kind in "OSUmM":
                raise TypeError(f"the leaf '{name}' of the payload is a {type(leaf).__name__}, not an array of numbers")
    return copies


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
    """The array with a sharding, over all processes, each of which has the whole array; as it is for None."""
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
