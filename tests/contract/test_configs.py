"""What every configuration promises: all presets load, are locked, use tuples, and name things that exist.

A new method adds its file to FILES and gives it a ``PRESETS`` tuple.
"""

import importlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvision.core.config import Config, flatten
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.models import zoo

FILES = ("acls", "az_nas", "classification", "igq_vit", "lbt", "rankmixup", "trs")
PRESETS = [(file, preset) for file in FILES for preset in ("", *importlib.import_module(f"configs.{file}").PRESETS)]


@pytest.fixture(params=PRESETS, ids=lambda pair: ":".join(pair))
def config(request):
    file, preset = request.param
    return importlib.import_module(f"configs.{file}").get_config(preset)


def test_a_preset_loads_locked_and_names_a_method(config):
    assert isinstance(config, ConfigDict)
    assert config.is_locked
    importlib.import_module(f"jaxvision.methods.{config.method}.task")


def test_sequences_are_tuples_of_plain_values(config):
    """A list can't be overridden from the command line."""
    for name, value in flatten(config.to_dict()).items():
        assert not isinstance(value, list), name
        assert isinstance(value, str | int | float | bool | tuple | None), name


def network(config):
    """The name in the zoo, the settings, the channels of its images and whether these are 16 pixels wide."""
    if "space" in config:
        entry = catalog.build(Config(config).space)
        architecture = entry.space.sample(np.random.default_rng(0))
        return *entry.space.model(architecture), 3, False
    channels = len(config.data.mean) or len(zoo.spec(config.model.name).mean)
    return config.model.name, config.model.settings.to_dict(), channels, config.data.source == "digits16"


def test_the_network_builds_at_full_size_without_allocating(config):
    name, settings, channels, small = network(config)
    spec = zoo.spec(name)
    module = zoo.build(name, num_classes=10, **settings)
    size = (16, 16) if small else spec.input_size
    shapes = zoo.variable_shapes(module, size, channels)
    image = jax.ShapeDtypeStruct((2, *size, channels), "float32")
    expected = (2, *size, 10) if spec.dense else (2, 10)
    assert jax.eval_shape(module.apply, shapes, image).shape == expected


@pytest.mark.parametrize("file", FILES)
def test_a_file_says_how_to_run_it_and_refuses_unknown_presets(file):
    module = importlib.import_module(f"configs.{file}")
    assert f"python -m jaxvision.main --config=configs/{file}.py" in module.__doc__
    assert "smoke" in module.PRESETS
    with pytest.raises(ConfigError, match="preset='smok' is unknown; did you mean 'smoke'"):
        module.get_config("smok")
