"""What a NAS-Bench-201 cell computes: which of its edges matter, and which cells compute the same function."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.models import nas_bench_201
from jaxvision.models.nas_bench_201 import AVG_POOL, CONV_1X1, EDGES, NONE, SKIP


def live(operations: Any) -> Any:
    """Which edges lie on a path from the cell's input to its output: bool [..., 6] of int [..., 6], NumPy or JAX.

    All others may as well be ``none``: an edge behind a node without input carries zeros (through a convolution and its
    normalisation too), and one before a node without output has no gradient.
    """
    used = [operations[..., edge] != NONE for edge in range(len(EDGES))]
    one, zero_to_two, one_to_two, zero_to_three, one_to_three, two_to_three = used
    two = zero_to_two | (one & one_to_two)
    out_of_one = one_to_three | (one_to_two & two_to_three)
    edges = (
        one & out_of_one, zero_to_two & two_to_three, one & one_to_two & two_to_three,
        zero_to_three, one & one_to_three, two & two_to_three,
    )  # fmt: skip
    return (jnp if isinstance(operations, jax.Array) else np).stack(edges, -1)


def prune(operations: Any) -> Any:
    """The cell with ``none`` for every edge that isn't :func:`live`: int [..., 6] of the same, the same function."""
    xp = jnp if isinstance(operations, jax.Array) else np
    return xp.where(live(operations), operations, NONE)


def is_disconnected(operations: np.ndarray) -> np.ndarray:
    """Whether no path leads from input to output (341 of all): bool [...] of int [..., 6]."""
    return ~live(operations).any(-1)


def is_identity(operations: np.ndarray) -> np.ndarray:
    """Whether the cell is one path of skip connections and nothing else (400 of all): bool [...] of int [..., 6].

    Two such paths are no identity, but twice the input.
    """
    edges = live(operations)
    skips = (~edges | (operations == SKIP)).all(-1)
    targets = np.asarray([node for node, _ in EDGES])
    # One path: no node has two live edges into it.
    single = np.stack([edges[..., targets == node].sum(-1) <= 1 for node in (1, 2, 3)], -1).all(-1)
    return edges.any(-1) & skips & single


def canonical(operations: Sequence[int] | np.ndarray) -> str:
    """The function of a cell as text: the same text, the same function of its input and of freshly drawn weights.

    A node is a sum of terms: the input ``x``, a convolution with weights of its own, or a pooled term (pooling is
    linear). Skips disappear, edges that aren't live are dropped, and convolutions are numbered only to be told apart.
    So a convolution that is used twice differs from two convolutions of the same input, which the benchmark's count of
    6,466 cells doesn't see; and 2x stays different from x in front of a convolution, where the epsilon of its
    normalisation differs.
    """
    operations = np.asarray(operations)
    edges = [edge for edge in range(len(EDGES)) if live(operations)[edge]]
    convolutions = [edge for edge in edges if operations[edge] not in (SKIP, AVG_POOL)]
    looks = _terms(operations, edges, dict.fromkeys(convolutions, 0))
    # Only convolutions that look the same without their numbers can change places.
    alike: dict[str, list[int]] = {}
    for edge in convolutions:
        alike.setdefault(looks[edge][0], []).append(edge)
    orders = itertools.product(*(itertools.permutations(alike[look]) for look in sorted(alike)))
    texts = []
    for order in orders:
        numbers = {edge: number for number, edge in enumerate(itertools.chain(*order))}
        terms = _terms(operations, edges, numbers)
        texts.append(_sum(term for edge in edges if EDGES[edge][0] == 3 for term in terms[edge]))
    return min(texts)


def _terms(operations: np.ndarray, edges: list[int], numbers: Mapping[int, int]) -> dict[int, list[str]]:
    """The terms that each edge adds to its node."""
    found: dict[int, list[str]] = {}
    for edge in edges:
        source, operation = EDGES[edge][1], operations[edge]
        terms = ["x"] if source == 0 else [t for e in edges if EDGES[e][0] == source for t in found[e]]
        if operation == AVG_POOL:
            terms = [f"pool({term})" for term in terms]
        elif operation != SKIP:
            terms = [f"{'1x1' if operation == CONV_1X1 else '3x3'}_{numbers[edge]}({_sum(terms)})"]
        found[edge] = terms
    return found


def _sum(terms: Any) -> str:
    return "+".join(sorted(terms)) or "0"


@functools.cache
def representatives() -> np.ndarray:
    """For each of the 15,625 cells the index of one that computes the same function with the fewest operations to run:
    int32 [15625]. It stands for itself; the cost counters of the two may differ."""
    cells = nas_bench_201.all_architectures()
    # Running a 3x3 convolution costs about nine times a 1x1, all else little.
    price = nas_bench_201.flops(cells, 32, 10)
    best: dict[str, int] = {}
    names = [canonical(cell) for cell in cells]
    for index, name in enumerate(names):
        if name not in best or price[index] < price[best[name]]:
            best[name] = index
    found = np.asarray([best[name] for name in names], np.int32)
    found.setflags(write=False)
    return found
