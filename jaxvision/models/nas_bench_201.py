"""NAS-Bench-201 (Dong and Yang 2020, arXiv:2001.00326): cells of six edges in three stages."""

import re
from collections.abc import Sequence

import numpy as np

from jaxvision.core.errors import ConfigError

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NONE, SKIP, CONV_1X1, CONV_3X3, AVG_POOL = range(5)

# (to, from) of the edges in the order of an architecture's numbers.
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
NUM_ARCHITECTURES = len(OPERATIONS) ** len(EDGES)


def from_index(index: int) -> np.ndarray:
    """Operation numbers of the six edges, int32 [6], of architecture ``index``; the last edge changes fastest.

    This is the order of the product of the six choices, not the one of the NATS-Bench API.

    Raises:
      ConfigError: an index outside 0 ... 15,624.
    """
    if not 0 <= index < NUM_ARCHITECTURES:
        raise ConfigError(f"architecture {index} must be between 0 and {NUM_ARCHITECTURES - 1:,}")
    return np.asarray(np.unravel_index(index, (len(OPERATIONS),) * len(EDGES)), np.int32)


def to_index(operations: Sequence[int] | np.ndarray) -> int:
    """The inverse of :func:`from_index`."""
    return int(np.ravel_multi_index(tuple(int(op) for op in operations), (len(OPERATIONS),) * len(EDGES)))


def to_string(operations: Sequence[int] | np.ndarray) -> str:
    """``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``, the benchmark's notation."""
    nodes = [""] * 3
    for (node, source), operation in zip(EDGES, operations, strict=True):
        nodes[node - 1] += f"{OPERATIONS[int(operation)]}~{source}|"
    return "+".join(f"|{node}" for node in nodes)


def from_string(text: str) -> np.ndarray:
    """The operations int32 [6] of a string as :func:`to_string` makes it.

    Raises:
      ConfigError: another form; says which node or edge.
    """
    nodes = text.strip().split("+")
    if len(nodes) != 3:
        raise ConfigError(f"architecture '{text}' must have three nodes joined by '+', not {len(nodes)}")
    operations = []
    for node, part in enumerate(nodes, start=1):
        edges = re.fullmatch(r"\|(.+)\|", part)
        names = edges[1].split("|") if edges else []
        if len(names) != node:
            raise ConfigError(f"architecture '{text}': node {node}, '{part}', must be {node} edge(s) like |none~0|")
        for source, name in enumerate(names):
            operation, _, origin = name.partition("~")
            if operation not in OPERATIONS or origin != str(source):
                raise ConfigError(
                    f"architecture '{text}': edge {node}<-{source} is '{name}'; it must be one of "
                    f"{', '.join(OPERATIONS)} followed by ~{source}"
                )
            operations.append(OPERATIONS.index(operation))
    return np.asarray(operations, np.int32)
