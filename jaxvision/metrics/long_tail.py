"""Accuracy per class and per group of classes, for data sets whose classes differ in size."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError

Groups = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and their classes."""


@struct.dataclass
class ClassAccuracy:
    """Right rows and all rows of each class.

    Attributes:
      correct, count: int32 [K].
      groups: static; what :meth:`compute` gives besides the mean over all classes.
    """

    correct: jax.Array
    count: jax.Array
    groups: Groups = struct.field(pytree_node=False, default=())

    @classmethod
    def of(
        cls, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, *, groups: Groups = ()
    ) -> "ClassAccuracy":
        """The counts of one batch; the prediction is the argmax, and a row that holds a NaN is wrong.

        Args:
          logits: float [B, K].
          labels: int [B]; one that is no class is left out.
          mask: [B], 1 for what counts.
          groups: from :func:`groups_by_rank` or :func:`groups_by_count`.
        """
        chex.assert_rank([logits, labels], [2, 1])
        classes = logits.shape[-1]
        known = (labels >= 0) & (labels < classes)
        index = jnp.where(known if mask is None else known & (jnp.asarray(mask) > 0), labels, classes)
        right = (jnp.argmax(logits, -1) == labels) & ~jnp.any(jnp.isnan(logits), axis=-1)
        zeros = jnp.zeros(classes, jnp.int32)
        return cls(zeros.at[index].add(right, mode="drop"), zeros.at[index].add(1, mode="drop"), groups)

    def merge(self, other: "ClassAccuracy") -> "ClassAccuracy":
        """The counts of both sets of rows."""
        return jax.tree.map(jnp.add, self, other)

    def per_class(self) -> np.ndarray:
        """float64 [K] on the host; NaN for a class without rows."""
        correct, count = np.asarray(self.correct, np.float64), np.asarray(self.count)
        return np.divide(correct, count, out=np.full(len(count), np.nan), where=count > 0)

    def compute(self) -> dict[str, np.float64]:
        """``mean``, the mean of the classes' accuracies, and that of each group; classes without rows are left out.

        NaN where none has rows. On the host, not traceable. (Plain accuracy weights classes by their rows.)
        """
        values = self.per_class()
        return {"mean": _mean(values)} | {name: _mean(values[list(members)]) for name, members in self.groups}


def groups_by_rank(num_classes: int) -> Groups:
    """``head``, ``medium``, ``tail``: the classes before 36 %, before 71 % and the rest, sorted from the largest.

    CIFAR-10-LT: 0-2, 3-6, 7-9; CIFAR-100-LT: 0-35, 36-70, 71-99. Source: the RankMixup repository.
    """
    if num_classes < 3:
        raise ConfigError(f"num_classes={num_classes} can't be cut into head, medium and tail; use 3 or more")
    first, second = max(1, 36 * num_classes // 100), max(2, 71 * num_classes // 100)
    return _groups({"head": range(first), "medium": range(first, second), "tail": range(second, num_classes)})


def groups_by_count(counts: np.ndarray, many: int = 100, few: int = 20) -> Groups:
    """Groups ``many`` (more than so many training images), ``few`` (fewer than so many), ``medium`` (the rest).

    A group without classes is left out.

    Args:
      counts: int [K], training images of each class.
      many, few: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, use 100 and 20.
    """
    if not 0 < few <= many:
        raise ConfigError(f"groups_by_count got many={many}, few={few}; use 0 < few <= many")
    counts = np.asarray(counts)
    sets = {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}
    return _groups({name: np.flatnonzero(members) for name, members in sets.items()})


def _groups(groups: Mapping[str, range | np.ndarray]) -> Groups:
    return tuple((name, tuple(int(label) for label in members)) for name, members in groups.items() if len(members))


def _mean(values: np.ndarray) -> np.float64:
    values = values[~np.isnan(values)]
    return values.mean() if len(values) else np.float64(np.nan)
