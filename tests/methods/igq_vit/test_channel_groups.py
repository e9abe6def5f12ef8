import numpy as np
import pytest

from jaxvision.methods.igq_vit import channel_groups

EXTREMES = np.asarray([[-1.0, 1.0], [-9.0, 9.0], [-2.0, 1.0], [-8.0, 7.0]], np.float32)


def test_consecutive_groups_take_neighbours():
    np.testing.assert_array_equal(channel_groups.consecutive_bounds(EXTREMES, 2), [[-9, 9], [-9, 9], [-8, 7], [-8, 7]])


def test_peg_groups_by_width():
    np.testing.assert_array_equal(channel_groups.peg_bounds(EXTREMES, 2), [[-2, 1], [-9, 9], [-2, 1], [-9, 9]])


def test_kmeans_takes_the_mean_of_each_cluster():
    expected = [[-1.5, 1], [-8.5, 8], [-1.5, 1], [-8.5, 8]]
    np.testing.assert_allclose(channel_groups.kmeans_bounds(EXTREMES, 2), expected)


@pytest.mark.parametrize("grouping", channel_groups.BOUNDS)
def test_limits(grouping):
    """A group for each channel (or more groups than channels) is per channel; one group is per tensor."""
    for count in (4, 9):
        np.testing.assert_allclose(channel_groups.BOUNDS[grouping](EXTREMES, count), EXTREMES)
    one = channel_groups.BOUNDS[grouping](EXTREMES, 1)
    expected = EXTREMES.mean(0) if grouping == "kmeans" else [-9, 9]
    np.testing.assert_allclose(one, np.broadcast_to(expected, (4, 2)))


def test_group_sizes_are_equal_where_channels_do_not_divide():
    extremes = np.stack([-np.arange(10.0), np.arange(10.0) ** 2], -1)
    for bounds in (channel_groups.consecutive_bounds(extremes, 4), channel_groups.peg_bounds(extremes, 4)):
        _, counts = np.unique(bounds, axis=0, return_counts=True)
        assert sorted(counts) == [2, 2, 3, 3]
        assert np.all(bounds[:, 0] <= extremes[:, 0]) and np.all(bounds[:, 1] >= extremes[:, 1])
