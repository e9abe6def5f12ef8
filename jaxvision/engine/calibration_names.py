"""What the name of an arm says: a loss and its numbers.

acls                                        the loss of that name with the numbers of the configuration
acls(margin=8, reference=min)               other numbers
acls(margin=(4, 6, 8))                      several trainings in one program, a row of the table each
my_package.my_module:my_loss(strength=2)    a function of one's own
"""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine.arm import Member
from jaxvision.losses import registry
from jaxvision.losses.registry import LossSpec

_ARM = re.compile(r"([\w.:]+)\s*(?:\((.*)\))?", re.DOTALL)


@dataclass(frozen=True)
class Recipe:
    """What an arm's name says.

    Attributes:
      text: the name, without spaces.
      loss: the loss's own name.
      spec: its entry.
      hyper: keyword arguments of the loss.
      mixing: settings of the mixing of images.
      grid: hyper-parameter -> the values that are tried.
    """

    text: str
    loss: str
    spec: LossSpec
    hyper: Mapping[str, Any] = field(default_factory=dict)
    mixing: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def label(self, member: Member) -> str:
        """The row of a member's setting in the table: ``acls(margin=6)``."""
        if not self.grid:
            return self.text
        fixed = {key: value for key, value in _written(self.text)[1].items() if key not in self.grid}
        values = [f"{key}={value:g}" for key, value in member.setting.items()]
        return f"{self.loss}({','.join([*values, *(f'{key}={value}' for key, value in fixed.items())])})"


def parse(text: str, configured: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe of an arm's name.

    Args:
      text: see the module's text.
      configured: loss -> hyper-parameters, ``config.losses``; a loss that isn't there has its general defaults.

    Raises:
      ConfigError: a name that can't be read, an unknown loss or hyper-parameter, a value of another kind.
    """
    name, given = _written(text)
    spec = registry.resolve(name)
    short = "".join(text.split())
    known = {**_defaults(spec.function), **spec.hyper, **spec.mixing}
    for key in given:
        if name in registry.LOSSES and (key not in known or key in registry.MASKS):
            raise unknown(f"config.arms has {text!r}: the hyper-parameter", key, set(known) - registry.MASKS)
    hyper, mixing = spec.settings(None, **{**configured.get(name, {}), **given})
    grid = {key: value for key, value in hyper.items() if isinstance(value, tuple)}
    for key, value in {**hyper, **mixing}.items():
        for each in value if isinstance(value, tuple) else (value,):
            if _is_number(known.get(key)) and not _is_number(each):
                raise ConfigError(f"config.arms has {text!r}: {key}={each!r} must be a number")
        if isinstance(value, tuple):
            _check_sweep(text, key, value, swept=key in grid and not isinstance(known.get(key), str | bool))
    return Recipe(short, name, spec, {k: v for k, v in hyper.items() if k not in grid}, mixing, grid)


def _written(text: str) -> tuple[str, dict[str, Any]]:
    """The loss's name, and the keyword arguments behind it; words needn't be quoted."""
    match = _ARM.fullmatch(text.strip())
    problem = f"config.arms has {text!r}, which must be written as name or name(key=value, ...)"
    if match is None:
        raise ConfigError(problem)
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
    except SyntaxError as error:
        raise ConfigError(problem) from error
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ConfigError(problem)
    values = {}
    for keyword in call.keywords:
        value = keyword.value
        try:
            values[keyword.arg] = value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
        except ValueError as error:
            raise ConfigError(problem) from error
    return match[1], values


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_sweep(text: str, key: str, values: tuple[Any, ...], *, swept: bool) -> None:
    if not swept:
        raise ConfigError(
            f"config.arms has {text!r}, but {key} can't have several values in one arm; name one arm for each"
        )
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"config.arms has {text!r}: {key}={values} must be at least one number, each once")


def read_losses(block: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``config.losses``, checked: loss -> hyper-parameters.

    Raises:
      ConfigError: a loss or a hyper-parameter that isn't there.
    """
    for name, values in block.items():
        if name not in registry.LOSSES:
            raise unknown("the loss of config.losses", name, registry.LOSSES)
        registry.resolve(name).settings(None, **values)
    return {name: dict(values) for name, values in block.items()}
