"""Pytrees whose leaves have names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path: tuple[Any, ...]) -> str:
    """``params/block_0/conv/kernel`` for a key path as ``jax.tree_util`` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves by their slash-joined path, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a/b": 1}`` -> ``{"a": {"b": 1}}``: the inverse of :func:`named_leaves` for nested dicts."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` whose function receives ``(name, leaf, *other_leaves)``."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def count_parameters(tree: Any) -> int:
    """The number of scalars in all leaves."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def nonfinite_flags(tree: Any) -> dict[str, jax.Array]:
    """For each floating-point leaf, by name, a bool scalar: does it hold a NaN or an infinity? Traceable."""
    return {
        name: ~jnp.all(jnp.isfinite(leaf))
        for name, leaf in named_leaves(tree).items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    }
