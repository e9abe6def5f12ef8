from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.data.sampler import Sampler, shard_rows

SIZES = [(1, 1), (7, 7), (8, 4), (10, 3), (10, 4), (23, 5), (64, 8)]


def sampler(n, b, **options):
    return Sampler(n, b, **({"seed": 3, "stream": "train"} | options))


@pytest.mark.parametrize(("n", "b"), SIZES)
def test_an_epoch_holds_no_example_twice(n, b):
    s = sampler(n, b)
    assert s.steps_per_epoch == n // b
    for epoch in range(3):
        seen = np.concatenate([s.indices(epoch * s.steps_per_epoch + i) for i in range(s.steps_per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == n // b * b
        assert set(seen.tolist()) <= set(range(n))


@pytest.mark.parametrize(("n", "b"), [*SIZES, (3, 8)])
def test_without_drop_every_example_comes_once_in_n_positions(n, b):
    s = sampler(n, b, drop_remainder=False)
    assert s.steps_per_epoch == -(-n // b)
    stream = np.concatenate([s.indices(i) for i in range(4 * s.steps_per_epoch)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@pytest.mark.parametrize("drop", [True, False])
def test_locate_agrees_with_indices(drop):
    s = sampler(10, 4, drop_remainder=drop)
    for step in (0, 1, 2, 7, 1000, 10**9):
        located = [s.locate(step * 4 + row) for row in range(4)]
        np.testing.assert_array_equal(s.indices(step), [index for _, index in located])
    assert [s.locate(p)[0] for p in (0, 7, 8, 9, 10)] == ([0, 0, 1, 1, 1] if drop else [0, 0, 0, 0, 1])


def test_epochs_seeds_and_streams_have_their_own_order():
    def order(**options):
        epoch = options.pop("epoch", 0)
        return sampler(100, 100, **options).indices(epoch).tolist()

    orders = [order(), order(epoch=1), order(seed=4), order(stream="other")]
    assert len({tuple(o) for o in orders}) == 4
    assert order() == order()
    assert order(shuffle=False) == order(shuffle=False, epoch=1) == list(range(100))


def test_any_order_of_steps_and_threads_gives_the_same():
    forward = [sampler(23, 5).indices(i) for i in range(40)]
    s = sampler(23, 5)
    steps = np.random.default_rng(0).permutation(40).tolist() * 3
    with ThreadPoolExecutor(8) as pool:
        for step, indices in zip(steps, pool.map(s.indices, steps)):
            np.testing.assert_array_equal(indices, forward[step])
    assert len(s._orders) <= 2


def test_the_order_is_uniform():
    first = [sampler(4, 1, seed=seed).indices(0)[0] for seed in range(2000)]
    assert np.all(abs(np.bincount(first, minlength=4) - 500) < 100)


def test_mistakes():
    with pytest.raises(ConfigError, match="batch_size=11 is larger than the data set with its 10 examples"):
        sampler(10, 11)
    for wrong in (0, -1, 2.0, True, "4"):
        with pytest.raises(ConfigError, match="batch_size="):
            sampler(10, wrong)
    with pytest.raises(ConfigError, match="seed=-1"):
        sampler(10, 2, seed=-1)
    with pytest.raises(IndexError, match="step -1"):
        sampler(10, 2).indices(-1)
    with pytest.raises(ConfigError, match="batch_size=10 can't be split evenly over 4 hosts"):
        shard_rows(10, 0, 4)
    with pytest.raises(IndexError, match="shard_index 2"):
        shard_rows(10, 2, 2)
    assert [shard_rows(12, i, 3) for i in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
