"""Spaces by name: their options, what the search may ask of each, and that what they find can be trained."""

import jax
import numpy as np
import pytest

from configs import classification
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import nb201_program
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.models import zoo


def build(name, **options):
    return catalog.build(Config({"name": name, "options": options}))


@pytest.mark.parametrize("name", sorted(catalog.SPACES))
def test_every_space_draws_changes_writes_and_counts_architectures(name):
    entry, draw = build(name), np.random.default_rng(0)
    space = entry.space
    for architecture in (space.sample(draw), space.mutate(entry.initial, draw, 2)):
        assert architecture.shape == space.shape and architecture.dtype == np.int32
        np.testing.assert_array_equal(space.from_string(space.to_string(architecture)), architecture)
        cost = space.cost(architecture)
        assert 0 < cost.params < cost.flops
    network, settings = space.model(architecture)
    zoo.build(network, num_classes=10, **settings)
    assert entry.space.proxies[-1] == "complexity"


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match=r"config.options='widht' is unknown; did you mean 'width'"):
        build("nas_bench_201", widht=4)
    with pytest.raises(ConfigError, match=r"config.options='size' is unknown"):
        build("autoformer_t", size="s")


def test_nas_bench_201_numbers_its_architectures_and_knows_equal_functions():
    entry = build("nas_bench_201")
    assert entry.number(entry.at(11663)) == 11663 and entry.size == 15625
    # The last node takes the input alone: whatever leads elsewhere is dropped.
    dangling, plain = ([3, 2, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0])
    same = entry.canonical(np.asarray(dangling, np.int32))
    np.testing.assert_array_equal(same, entry.canonical(np.asarray(plain, np.int32)))


def test_several_at_once_are_blocks_of_one_size(monkeypatch):
    shapes = []

    def make(skeleton, init, *, together):
        def score(architectures, keys):
            shapes.append((architectures.shape, keys.shape))
            return {"expressivity": architectures[:, 0].astype(np.float32)}

        return score

    monkeypatch.setattr(nb201_program, "make_batched_score", make)
    score = build("nas_bench_201").batched(8, 2, 4)
    architectures = np.arange(30, dtype=np.int32).reshape(5, 6) % 5
    for count in (5, 3):
        found = score(architectures[:count], jax.random.split(jax.random.key(0), count))
        np.testing.assert_array_equal(found["expressivity"], architectures[:count, 0])
    assert set(shapes) == {((4, 6), (4,))} and len(shapes) == 3


@pytest.mark.parametrize("name", sorted(catalog.SPACES))
def test_what_was_found_has_a_preset_that_trains_it(name):
    assert build(name).preset in ("", *classification.PRESETS)
