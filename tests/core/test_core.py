"""Keys by name, named leaves, configurations that know what was read, and reductions over devices."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import devices, errors, rng, trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.core.types import no_tap, scoped


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_keys_differ_by_seed_stream_and_step_and_are_stable():
    keys = {data(rng.key(seed, stream, step)) for seed in (0, 1) for stream in ("a", "b") for step in range(3)}
    assert len(keys) == 12
    assert data(rng.key(0, "a", 2)) == data(jax.jit(lambda step: rng.key(0, "a", step))(2))
    assert rng.stream_id("train") == zlib.crc32(b"train")


def test_generators_are_independent_and_repeatable():
    draws = {rng.generator(seed, stream, step).random() for seed in (0, 1) for stream in ("a", "b") for step in (0, 1)}
    assert len(draws) == 8
    assert rng.generator(3, "x", 5).random() == rng.generator(3, "x", 5).random()


def test_leaves_are_named_by_slashes():
    tree = {"a": {"b": jnp.zeros(2)}, "c": [jnp.ones(3), jnp.ones(4)]}
    assert list(trees.named_leaves(tree)) == ["a/b", "c/0", "c/1"]
    assert trees.count_parameters(tree) == 9
    assert trees.map_named(lambda name, leaf: name, tree)["a"]["b"] == "a/b"


def test_nonfinite_flags_name_the_bad_leaf_and_skip_integers():
    tree = {"good": jnp.zeros(2), "bad": jnp.array([0.0, jnp.inf]), "count": jnp.array(3)}
    assert {name: bool(flag) for name, flag in trees.nonfinite_flags(tree).items()} == {"good": False, "bad": True}


def test_config_remembers_what_was_read():
    config = Config({"a": 1, "b": {"c": 2, "d": 3}, "name": "x"})
    assert (config.a, config.b.c, config.name) == (1, 2, "x")
    assert config.unread() == ["config.b.d"]
    with pytest.raises(ConfigError, match=r"config\.b\.d is set but nothing in this task reads it"):
        config.check_all_read()
    assert config.b.to_dict() == {"c": 2, "d": 3}
    config.check_all_read()
    assert config.get("zzz", 5) == 5


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda config: config.missing, "config has no field 'missing'"),
        (lambda config: config.one_of("mode", ("x", "y")), r"config\.mode='z' is not one of 'x', 'y'"),
        (lambda config: config.positive("rate"), r"config\.rate=-1 must be a number above 0"),
        (lambda config: config.positive("mode"), r"config\.mode='z' must be a number"),
    ],
)
def test_config_errors_name_the_field(read, message):
    with pytest.raises(ConfigError, match=message):
        read(Config({"mode": "z", "rate": -1}))


def test_unknown_names_get_the_closest_one():
    error = errors.unknown("config.model", "resnet2", ["resnet20", "vit"])
    assert "did you mean 'resnet20'?" in str(error)
    assert error.exit_code == 64


def test_reductions_are_identities_outside_pmap():
    tree = {"x": jnp.arange(4.0)}
    assert devices.mean_over_devices(tree) is tree
    assert devices.sum_over_devices(tree) is tree
    np.testing.assert_array_equal(devices.reverse_rows(tree)["x"], [3, 2, 1, 0])


def test_row_keys_depend_on_the_global_row_only():
    key = jax.random.key(0)
    whole, part = devices.row_keys(key, 4), devices.row_keys(key, 2)
    np.testing.assert_array_equal(jax.random.key_data(whole)[:2], jax.random.key_data(part))


def test_taps_are_scoped():
    seen = []
    tap = scoped(scoped(lambda name, value: seen.append(name) or value, "blocks.0"), "attn")
    assert tap("qkv", 1) == 1
    assert seen == ["blocks.0.attn.qkv"]
    assert scoped(no_tap, "x") is no_tap
