"""The names of arms: what they say, and what can't be said."""

import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.trs.variants import Variant, parse

DEFAULTS = {"family": "trs", "baseline": "sgd", "target": 5e-3, "rule": "momentum"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", Variant("sgd", "trs", "sgd")),
        ("sgdt", Variant("sgdt", "trs", "sgd", 5e-3, "momentum")),
        ("adamt_1e-2", Variant("adamt_1e-2", "trs", "adam", 1e-2, "momentum")),
        ("sgdt_1e-2_additive", Variant("sgdt_1e-2_additive", "trs", "sgd", 1e-2, "additive")),
        ("adamwt", Variant("adamwt", "trs", "adamw", 5e-3, "momentum")),
        ("lsq", Variant("lsq", "lsq", "sgd")),
        ("pact_adam", Variant("pact_adam", "pact", "adam")),
        ("lsq_sgdt", Variant("lsq_sgdt", "lsq", "sgd", 5e-3, "momentum")),
        ("freezing", Variant("freezing", "trs", "sgd", remedy="freezing")),
        ("lsq_dampening_adam", Variant("lsq_dampening_adam", "lsq", "adam", remedy="dampening")),
    ],
)
def test_a_name_is_words_in_any_order(name, expected):
    assert parse(name, **DEFAULTS) == expected
    assert parse(name, **DEFAULTS).scheduled == (expected.target is not None)


def test_what_the_name_leaves_out_is_the_configurations():
    made = parse("lsq", family="ewgs", baseline="adamw", target=1e-3, rule="additive")
    assert (made.optimizer, made.target, made.rule) == ("adamw", None, "")
    assert parse("adamt", family="ewgs", baseline="sgd", target=1e-3, rule="additive").rule == "additive"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sgdd", r"the word 'sgdd' of config.arms='sgdd' is unknown; did you mean 'sgd'"),
        ("lsq_pact", r"config.arms has 'lsq_pact', which names two values of family"),
        ("sgd_1e-2", r"config.arms has 'sgd_1e-2', whose target is for transition rates; name sgdt"),
        ("additive", r"config.arms has 'additive', whose rule is for transition rates"),
    ],
)
def test_mistakes(name, message):
    with pytest.raises(ConfigError, match=message):
        parse(name, **DEFAULTS)
