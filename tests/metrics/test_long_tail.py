import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.metrics.long_tail import group_means, groups_by_rank


def test_group_means_leave_out_classes_without_rows():
    per_class = np.array([1.0, 0.5, 0.0, 0.2, np.nan, 0.4, 0.6, np.nan, np.nan, np.nan])
    assert group_means(per_class, groups_by_rank(10)) == pytest.approx({"head": 0.5, "medium": 0.4})


def test_the_groups_of_the_papers():
    assert groups_by_rank(10) == (("head", (0, 1, 2)), ("medium", (3, 4, 5, 6)), ("tail", (7, 8, 9)))
    ranges = [(name, members[0], members[-1] + 1) for name, members in groups_by_rank(100)]
    assert ranges == [("head", 0, 36), ("medium", 36, 71), ("tail", 71, 100)]
    assert groups_by_rank(3) == (("head", (0,)), ("medium", (1,)), ("tail", (2,)))
    with pytest.raises(ConfigError, match="num_classes=2"):
        groups_by_rank(2)
