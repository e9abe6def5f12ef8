"""Spaces by name: their options, what the search may ask of each, and that what they find can be trained."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import az_nas, classification
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import exports, nb201_program
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.models import zoo


def build(name, **options):
    return catalog.build(Config({"name": name, "options": options}))


@pytest.mark.parametrize("name", sorted(catalog.SPACES))
def test_every_space_draws_changes_writes_and_counts_architectures(name):
    entry, draw = build(name), np.random.default_rng(0)
    space = entry.space
    start = space.sample(draw) if entry.initial is None else entry.initial
    for architecture in (space.sample(draw), space.mutate(start, draw, 2)):
        assert architecture.shape == space.shape and architecture.dtype == np.int32
        np.testing.assert_array_equal(space.from_string(space.to_string(architecture)), architecture)
        cost = space.cost(architecture)
        assert 0 < cost.params < cost.flops
    network, settings = space.model(architecture)
    zoo.build(network, num_classes=10, **settings)
    assert entry.space.proxies[-1] == "complexity"


@pytest.mark.parametrize("name", sorted(catalog.SPACES))
def test_every_option_stands_in_the_configuration_with_its_default(name):
    space = build(name, **az_nas.OPTIONS[name]).space
    fields = {field.name: field.default for field in dataclasses.fields(space) if field.init}
    for fixed in ("size", "choices"):
        fields.pop(fixed, None)
    if "supernet_seed" in fields:
        fields["supernet_seed"] = -1  # the run's
    assert az_nas.OPTIONS[name] == fields


def test_the_supernet_is_the_seeds_unless_it_has_its_own():
    config = Config({"name": "autoformer_t", "options": az_nas.OPTIONS["autoformer_t"]})
    assert catalog.build(config, 7).space.supernet_seed == 7
    own = Config({"name": "autoformer_t", "options": {"supernet_seed": 3}})
    assert catalog.build(own, 7).space.supernet_seed == 3


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match=r"config.options='widht' is unknown; did you mean 'width'"):
        build("nas_bench_201", widht=4)
    with pytest.raises(ConfigError, match=r"config.options='size' is unknown"):
        build("autoformer_t", size="s")
    with pytest.raises(ConfigError, match=r"config.options.patch_size=0 must be a number above 0"):
        build("autoformer_t", patch_size=0)


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
    entry = build(name)
    assert entry.preset in ("", *classification.PRESETS)
    architecture, module = entry.space.sample(np.random.default_rng(0)), {}
    exec(exports.config_file(entry.space, architecture, "a search", entry.preset), module)
    config = module["get_config"]()
    assert config.is_locked and config.model.name == entry.space.model(architecture)[0]
    network = zoo.build(config.model.name, num_classes=10, **config.model.settings.to_dict())
    size, channels = zoo.spec(config.model.name).input_size, 3
    shapes = zoo.variable_shapes(network, size, channels)
    logits = jax.eval_shape(network.apply, shapes, jax.ShapeDtypeStruct((2, *size, channels), "float32"))
    assert logits.shape == (2, 10)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))
    if name.startswith("autoformer"):
        # The counter is for 1,000 classes.
        width = int(architecture[1])
        assert parameters + 990 * (width + 1) == entry.space.cost(architecture).params
