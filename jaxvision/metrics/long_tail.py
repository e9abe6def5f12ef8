"""Groups of classes, for data sets whose classes differ in size, and the accuracy of each group."""

import numpy as np

from jaxvision.core.errors import ConfigError

Groups = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and their classes."""


def groups_by_rank(num_classes: int) -> Groups:
    """``head``, ``medium``, ``tail``: the classes before 36 %, before 71 % and the rest, sorted from the largest.

    CIFAR-10-LT: 0-2, 3-6, 7-9; CIFAR-100-LT: 0-35, 36-70, 71-99. Source: the RankMixup repository.
    """
    if num_classes < 3:
        raise ConfigError(f"num_classes={num_classes} can't be cut into head, medium and tail; use 3 or more")
    first, second = max(1, 36 * num_classes // 100), max(2, 71 * num_classes // 100)
    groups = {"head": range(first), "medium": range(first, second), "tail": range(second, num_classes)}
    return tuple((name, tuple(members)) for name, members in groups.items())


def group_means(per_class: np.ndarray, groups: Groups) -> dict[str, float]:
    """The mean of the classes' values in each group.

    Args:
      per_class: float [K], such as accuracies; NaN for a class without rows, which is left out.
      groups: of classes; one in which no class has rows is left out.
    """
    chosen = {name: per_class[list(members)] for name, members in groups}
    return {name: float(np.nanmean(values)) for name, values in chosen.items() if not np.isnan(values).all()}
