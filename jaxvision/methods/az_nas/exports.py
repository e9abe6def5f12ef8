"""The files that a search leaves: the found network as a configuration, and its candidates."""

import csv
import io

import numpy as np

from jaxvision.methods.az_nas.outcome import Outcome
from jaxvision.methods.az_nas.spaces.space import Architecture, Space

MOST_CANDIDATES = 20_000
"""Rows of candidates.csv, the best ones."""


def config_file(space: Space, architecture: Architecture, title: str, preset: str) -> str:
    """A configuration file that trains an architecture with any preset of ``configs/classification.py``."""
    name, values = space.model(architecture)
    lines = "".join(f"    {key!r}: {value!r},\n" for key, value in values.items())
    return f'''"""The network that "{title}" found: {space.to_string(architecture)}

    python -m jaxvision.main --config=FILE{":PRESET"}

FILE is this file; PRESET is one of configs/classification.py [{preset or "the default"}], whose network it replaces.
"""

from ml_collections import ConfigDict

from configs import classification

SETTINGS = {{
{lines}}}


def get_config(preset: str = {preset!r}) -> ConfigDict:
    """That preset's recipe and data with the found network."""
    config = classification.get_config(preset)
    others = config.model.settings.to_dict() if config.model.name == {name!r} else {{}}
    with config.unlocked():
        config.model.name = {name!r}
        config.model.settings = ConfigDict({{**others, **SETTINGS}})
    return config
'''


def candidates_file(space: Space, outcome: Outcome) -> str:
    """The candidates as CSV, best first."""
    value = outcome.main.of(outcome.scores)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("candidate", "architecture", outcome.main.name, *outcome.scores))
    for index in np.argsort(-value, kind="stable")[:MOST_CANDIDATES]:
        scores = (f"{values[index]:.9g}" for values in outcome.scores.values())
        writer.writerow((index, space.to_string(outcome.architectures[index]), f"{value[index]:.6g}", *scores))
    return text.getvalue()
