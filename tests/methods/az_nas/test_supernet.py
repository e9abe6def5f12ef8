"""One program for all NAS-Bench-201 cells is each cell's own network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import supernet, supernet_init
from jaxvision.methods.az_nas.supernet_init import Skeleton
from jaxvision.models.nas_bench_201 import CONV_1X1, CONV_3X3
from tests.methods.az_nas import oracle_networks

TINY = Skeleton(width=4, cells=1, channels=3)


@pytest.fixture(scope="module")
def forward():
    """One program for all oracles: architectures are data."""
    return jax.jit(lambda params, architecture, images: supernet.apply(params, architecture, images))


@pytest.mark.parametrize("case", [0, 3, 4, 5, 6])
def test_logits_and_features_are_the_official_networks(case, forward):
    oracle = oracle_networks.open_case(case)
    with jax.enable_x64(True):
        params = oracle_networks.params(oracle, np.float64)
        out = forward(params, oracle["arch_ops"].astype(np.int32), oracle["x"].astype(np.float64))
        np.testing.assert_allclose(out.logits, oracle["logits"], rtol=1e-9, atol=1e-9)
        # The oracle rounds features to float32.
        np.testing.assert_allclose(out.features, oracle["pre_gap"], rtol=1e-6, atol=1e-6)
        assert forward._cache_size() == 1


def test_edge_has_the_gradients_of_the_plain_formula():
    """The backward pass by hand against autodiff of the same edge, for each operation."""
    from jaxvision.methods.az_nas import supernet_layers as layers

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        x, probe = (jax.random.normal(key, (2, 4, 4, 3), jnp.float64) for key in keys[:2])
        kernel = jax.random.normal(keys[2], (3, 3, 3, 3), jnp.float64)
        given = (jnp.zeros(3, jnp.float64), jnp.ones(3, jnp.float64))

        @jax.jit
        def both(operation):
            plain = lambda x, kernel: layers._edge(x, kernel, operation, given, layers.BATCH)[0]  # noqa: E731
            ours = lambda x, kernel: layers.edge(x, kernel, operation, given, layers.BATCH)[0]  # noqa: E731
            return jax.vjp(plain, x, kernel)[1](probe), jax.vjp(ours, x, kernel)[1](probe)

        for operation in range(5):
            expected, found = both(jnp.int32(operation))
            jax.tree.map(lambda e, f: np.testing.assert_allclose(f, e, rtol=1e-9, atol=1e-12), expected, found)


@pytest.mark.parametrize("how", supernet_init.INITS)
def test_init_spreads_as_its_distribution_says(how):
    skeleton = Skeleton(width=16, cells=1)
    architecture = jnp.asarray([CONV_3X3, CONV_1X1, 0, 1, 4, CONV_3X3])
    params = jax.jit(lambda key: supernet_init.init(key, architecture, skeleton, how))(jax.random.key(0))
    edges = np.asarray(params["stage3"]["kernel"][0])
    fans = {0: 9 * 64, 1: 64}
    deviation = {
        "kaiming": lambda fan: (2 / fan) ** 0.5,
        "normal": lambda fan: 1,
        "default": lambda fan: (3 * fan) ** -0.5,
    }
    np.testing.assert_allclose(edges[0].std(), deviation[how](fans[0]), rtol=0.05)
    np.testing.assert_allclose(edges[1, 1, 1].std(), deviation[how](fans[1]), rtol=0.05)
    assert np.count_nonzero(edges[1]) == 64 * 64
    assert not edges[2:5].any()
    np.testing.assert_allclose(params["reduction2"]["second"]["kernel"].std(), deviation[how](9 * 64), rtol=0.05)
    assert np.any(params["head"]["bias"] != 0) == (how == "default")
    np.testing.assert_array_equal(params["stem"]["scale"], 1)


def test_weights_are_counted():
    skeleton, architecture = Skeleton(width=4, cells=2), np.array([3, 2, 0, 1, 4, 3], np.int32)
    draw = jax.jit(lambda key: supernet_init.init(key, jnp.asarray(architecture), skeleton, "default"))
    params = trees.named_leaves(draw(jax.random.key(0)))
    counted = sum(np.count_nonzero(leaf) for name, leaf in params.items() if name.endswith("kernel"))
    assert supernet_init.weights_of(architecture, skeleton) == counted
    every = supernet_init.weights_of(np.full(6, CONV_3X3), skeleton) + 6 * 2 * (4**2 + 8**2 + 16**2)
    assert supernet_init.weights_of_supernet(skeleton) == every


def test_running_statistics_normalise_as_the_batch_that_gave_them():
    """Evaluation with a batch's own (biased) moments is training mode on that batch."""
    architecture = jnp.asarray([3, 2, 1, 4, 0, 3])

    @jax.jit
    def compare(key):
        params = supernet_init.init(key, architecture, TINY)
        images = jax.random.normal(key, (4, 8, 8, 3))
        out = supernet.apply(params, architecture, images)
        again = supernet.apply(params, architecture, images, running=out.statistics)
        running = supernet.updated(supernet.initial_statistics(params), out.statistics, images.shape)
        return out, again, running

    out, again, running = compare(jax.random.key(1))
    np.testing.assert_allclose(again.logits, out.logits, rtol=1e-4, atol=1e-5)
    stem = out.statistics["stem"]
    np.testing.assert_allclose(running["stem"]["mean"], 0.1 * stem["mean"], rtol=1e-6)
    np.testing.assert_allclose(running["stem"]["var"], 0.9 + 0.1 * stem["var"] * 256 / 255, rtol=1e-6)
    np.testing.assert_allclose(running["last"]["var"], 0.9 + 0.1 * out.statistics["last"]["var"] * 16 / 15, rtol=1e-6)
    assert not running["stage1"]["mean"][0, 2].any()  # a skip


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="cells=0"):
        Skeleton(cells=0)
    with pytest.raises(ConfigError, match="how"):
        supernet_init.init(jax.random.key(0), jnp.zeros(6, jnp.int32), TINY, "xavier")
    with pytest.raises(ConfigError, match="one value a channel"):
        supernet.updated({}, {}, (1, 4, 4, 3))
