"""What arms' names say, and every way to write one wrong."""

import importlib

import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms
from jaxvision.engine.calibration_names import parse, read_losses
from jaxvision.losses import registry
from jaxvision.losses.calibration import cross_entropy

CONFIGURED = {"acls": {"margin": 6.0, "alpha": 0.2}, "mrl": {"alpha": 1.5, "weight": 0.3}}


def own(logits, labels, *, where=None, strength=1.0, kind="a"):
    return strength * cross_entropy(logits, labels, where=where).total


def test_numbers_of_the_configuration_then_those_of_the_name():
    plain, changed = parse("acls", CONFIGURED), parse(" acls( margin = 8, reference=min ) ", CONFIGURED)
    assert plain.hyper == {"margin": 6.0, "lambda_top": 1.0, "lambda_rest": 0.1, "alpha": 0.2}
    assert changed.hyper == {**plain.hyper, "margin": 8, "reference": "min"}
    assert (plain.text, changed.text) == ("acls", "acls(margin=8,reference=min)")
    mixed = parse("mrl(weight=0.5)", CONFIGURED)
    assert (mixed.hyper["weight"], mixed.mixing) == (
        0.5,
        {"alpha": 1.5, "num_views": 1, "per_sample": False, "mix": "mixup", "layer": "input"},
    )


@pytest.mark.parametrize("name", registry.LOSSES)
def test_every_registered_loss_is_an_arm(name):
    recipe = parse(name, {name: registry.LOSSES[name].defaults("cifar10") for name in registry.LOSSES})
    assert recipe.loss == recipe.text == name and not recipe.grid
    assert {**recipe.hyper, **recipe.mixing} == registry.LOSSES[name].defaults("cifar10")


def test_several_values_are_members_and_rows():
    recipe = parse("acls(margin=(4, 6),reference='min')", CONFIGURED)
    assert recipe.grid == {"margin": (4, 6)} and "margin" not in recipe.hyper
    members = arms.Arm("", None, None, 0, None, grid=recipe.grid).members((0, 1))
    labels = ["acls(margin=4,reference=min)"] * 2 + ["acls(margin=6,reference=min)"] * 2
    assert [recipe.label(member) for member in members] == labels
    assert parse("ce", {}).label(members[0]) == "ce"


def test_a_function_of_ones_own():
    recipe = parse(f"{__name__}:own(strength=3)", {})
    assert recipe.hyper == {"strength": 3} and recipe.spec.needs == "logits"
    assert recipe.spec.function.__name__ == "own"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aclss", "loss='aclss' is unknown; did you mean 'acls'.*package.module:function"),
        ("acls(margn=3)", r"config.arms has 'acls\(margn=3\)': the hyper-parameter='margn' is unknown; did you mean"),
        ("acls(margin=big)", "margin='big' must be a number"),
        ("acls(margin=(4,'x'))", "margin='x' must be a number"),
        ("acls(margin=())", r"margin=\(\) must be at least one number, each once"),
        ("acls(margin=(4,4))", r"margin=\(4, 4\) must be at least one number, each once"),
        ("acls(reference=(min,zero))", "must be written as name"),
        ("acls(reference=('min','zero'))", "reference can't have several values in one arm"),
        ("mixup(alpha=(0.1,0.2))", "alpha can't have several values in one arm; name one arm for each"),
        ("mixup(lam=0.5)", "the hyper-parameter='lam' is unknown"),
        ("regmixup(mixed_where=1)", "the hyper-parameter='mixed_where' is unknown"),
        ("acls(8)", "must be written as name or name"),
        ("acls(margin=8", "must be written as name or name"),
        ("acls(margin=1+x)", "must be written as name or name"),
        ("acls(**x)", "must be written as name or name"),
        ("a b", "must be written as name or name"),
        ("", "must be written as name or name"),
        ("nowhere.at_all:loss", "No module named 'nowhere'"),
    ],
)
def test_mistakes_are_one_sentence(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(text, CONFIGURED)
    assert "\n" not in str(error.value)


def test_the_block_of_losses_is_checked():
    assert read_losses(CONFIGURED) == CONFIGURED
    with pytest.raises(ConfigError, match=r"the loss of config.losses='aclss' is unknown; did you mean 'acls'"):
        read_losses({"aclss": {}})
    with pytest.raises(ConfigError, match=r"hyper-parameter of the loss .*='margn' is unknown"):
        read_losses({"acls": {"margn": 1.0}})


@pytest.mark.parametrize("file", ["acls", "rankmixup"])
def test_the_arms_of_every_preset_can_be_read(file):
    configs = importlib.import_module(f"configs.{file}")
    for preset in ("", *configs.PRESETS):
        config = configs.get_config(preset)
        losses = read_losses(config.losses.to_dict())
        assert set(losses) == set(registry.LOSSES)
        assert all(parse(name, losses).loss in losses for name in config.arms)
    margins = [
        configs.get_config(preset).losses.mbls.margin for preset in ("", "cifar10_resnet50", "imagenet_resnet50")
    ]
    assert margins == [6.0, 6.0, 10.0]
