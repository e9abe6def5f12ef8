"""Many architectures trained at once are each trained alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas.ground_truth import ARCHITECTURES, Training
from jaxvision.methods.az_nas.supernet_init import Skeleton

TRAINING = Training(Skeleton(width=4, cells=1, num_classes=3, channels=1), steps=6, lr=0.05)
MEMBERS = jnp.asarray([[3, 2, 1, 4, 0, 3], [0, 0, 0, 0, 0, 0], [1, 1, 2, 3, 1, 2]], jnp.int32)


@pytest.fixture(scope="module")
def batches():
    generator = np.random.default_rng(0)
    return [
        {
            "image": generator.normal(size=(6, 8, 8, 1)).astype(np.float32),
            "label": generator.integers(0, 3, 6).astype(np.int32),
        }
        for _ in range(3)
    ]


@pytest.fixture(scope="module")
def programs():
    return tuple(map(jax.jit, (TRAINING.init_members, TRAINING.train_step, TRAINING.evaluate)))


@pytest.fixture(scope="module")
def trained(batches, programs):
    init, step, _ = programs
    states, state = [], init(jax.random.key(0), MEMBERS)
    for batch in batches:
        state, metrics = step(state, batch)
        states.append((state, metrics))
    return states


def test_members_learn_and_their_architectures_stay(trained, batches, programs):
    init, *_ = programs
    state, metrics = trained[-1]
    assert metrics["loss"].count == len(MEMBERS) * 6
    np.testing.assert_array_equal(state.extra[ARCHITECTURES], MEMBERS)
    before = trees.named_leaves(init(jax.random.key(0), MEMBERS).params)
    after = trees.named_leaves(state.params)
    for name, leaf in after.items():
        assert np.isfinite(leaf).all()
        if name.startswith("stage") and name.endswith("kernel"):
            # Weights that an architecture doesn't have never come to be.
            np.testing.assert_array_equal(leaf != 0, before[name] != 0)
    assert np.any(after["head/kernel"] != before["head/kernel"])


def test_a_member_does_not_see_the_others(trained, batches, programs):
    """The second member's neighbours are other architectures: bit for bit the same."""
    init, step, _ = programs
    others = MEMBERS.at[0].set(MEMBERS[2]).at[2].set(MEMBERS[1])
    state = init(jax.random.key(0), others)
    for batch in batches:
        state, _ = step(state, batch)
    same = lambda tree: jax.tree.map(lambda leaf: leaf[1], tree)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, same(state.params), same(trained[-1][0].params))


def test_going_on_from_a_state_is_the_same_run(trained, batches, programs):
    """What a killed run restores: arrays on the host."""
    _, step, _ = programs
    restored = jax.device_get(trained[0][0])
    for batch in batches[1:]:
        restored, _ = step(restored, batch)
    jax.tree.map(np.testing.assert_array_equal, restored, trained[-1][0])


def test_evaluation_counts_each_example_once(trained, batches, programs):
    *_, evaluate = programs
    state, batch = trained[-1][0], batches[0]
    found = evaluate(state, batch | {"mask": np.ones(6, np.float32)})
    assert list(found) == ["accuracy_0", "accuracy_1", "accuracy_2"]
    half = np.array([1, 1, 1, 0, 0, 0], np.float32)
    first, second = (evaluate(state, batch | {"mask": mask}) for mask in (half, 1 - half))
    for name, whole in found.items():
        merged = first[name].merge(second[name])
        assert merged.total == whole.total and merged.count == whole.count == 6


def test_learning_rate_ends_at_zero():
    rate = TRAINING.learning_rate()
    assert rate(0) == np.float32(0.05) and rate(6) == 0


def test_malformed_architectures_are_named():
    with pytest.raises(ConfigError, match=r"\(3, 5\)"):
        TRAINING.init_members(jax.random.key(0), jnp.zeros((3, 5), jnp.int32))
