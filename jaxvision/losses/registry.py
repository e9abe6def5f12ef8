"""The calibration losses by name, with the hyper-parameters that were published for each data set.

    spec = registry.resolve("mbls")                # or "my_package.my_module:my_loss"
    loss = spec.bind("cifar10", alpha=0.2)         # published numbers for the data set, then one's own
    total, ce, extra = loss(logits, labels, where=mask)

A loss of one's own is a function ``(logits float[..., K], labels int32[...], *, where=None, **hyper)`` that returns a
``CalibrationLoss`` or one number. Entries name their functions instead of importing them: the list reaches up into
``methods``, and nothing is imported before it is asked for.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.losses.calibration import CalibrationLoss, cross_entropy

MASKS = frozenset({"where", "mixed_where"})
"""Arguments of losses that say which rows count: no hyper-parameters."""
Needs = Literal["logits", "history", "mixup", "raw_and_mixup", "views"]


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """A loss and its published settings.

    Attributes:
      path: "package.module:function".
      hyper: keyword arguments of the function, the general defaults.
      mixing: how images are mixed: ``alpha`` of the Beta distribution; RankMixup's ``num_views``,
        ``per_sample``, ``mix`` and ``layer``.
      by_data: data set -> numbers that replace those of ``hyper`` and ``mixing``.
      needs: what the training step has to provide. "logits": nothing else. "history": CRL's ``history`` and
        ``sample_index``. "mixup": logits of mixed images alone, ``partner_labels`` and ``lam``. "raw_and_mixup": both
        halves of one forward pass of 2 N images. "views": RankMixup's two forward passes.
      passes: "package.module:function" that makes the forward passes of a training step, for losses whose need the
        engine doesn't know; see ``jaxvision/engine/calibration_passes.py``.
    """

    path: str
    hyper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mixing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_data: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    needs: Needs = "logits"
    passes: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        """The function, imported now."""
        return _load(self.path)

    def load_passes(self) -> Callable[..., Any]:
        """The function that ``passes`` names, imported now."""
        return _load(self.passes)

    def defaults(self, data: str | None = None) -> dict[str, Any]:
        """The published numbers for a data set, of loss and mixing in one; imports nothing."""
        return {**self.hyper, **self.mixing, **self.by_data.get(data or "", {})}

    def settings(self, data: str | None = None, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(hyper, mixing) for a data set: the defaults, then the data set's numbers, then ``overrides``.

        Args:
          data: a name of the data catalog; one that isn't in ``by_data`` has the defaults.

        Raises:
          ConfigError: an override that neither the function nor the mixing knows.
        """
        accepted = _keywords(self.function) - MASKS
        hyper, mixing = dict(self.hyper), dict(self.mixing)
        for key, value in {**self.by_data.get(data or "", {}), **overrides}.items():
            if key in mixing:
                mixing[key] = value
            elif key in accepted:
                hyper[key] = value
            else:
                raise unknown(f"hyper-parameter of the loss {self.path}", key, accepted | set(mixing))
        return hyper, mixing

    def bind(self, data: str | None = None, **overrides: Any) -> Callable[..., Any]:
        """``loss(logits, labels, *, where=None, **arrays) -> CalibrationLoss`` with these numbers filled in.

        Losses that need more arrays (``needs``) take them as the function does. A function that returns one number
        becomes that total, beside the cross-entropy and the difference of the two.

        Args and errors: as for :meth:`settings`; ConfigError for a function that returns something else.
        """
        hyper, _ = self.settings(data, **overrides)
        return functools.partial(_call, self.function, self.path, hyper)


def _call(function: Callable[..., Any], path: str, hyper: dict[str, Any], *arrays: Any, where=None, **named: Any):
    loss = function(*arrays, where=where, **hyper, **named)
    if all(hasattr(loss, name) for name in CalibrationLoss._fields):
        return loss
    if getattr(loss, "shape", None) != ():
        raise ConfigError(f"the loss {path} must return a CalibrationLoss or one number, but returned {loss!r}")
    logits, labels = arrays[:2]
    ce = cross_entropy(logits, labels, where=where).total
    return CalibrationLoss(loss, ce, loss - ce)


def resolve(name: str) -> LossSpec:
    """The entry of :data:`LOSSES`, or the function that "package.module:function" names.

    Raises:
      ConfigError: no such name, module or function, or a function of another signature.
    """
    if ":" not in name:
        if name not in LOSSES:
            error = unknown("loss", name, LOSSES)
            raise ConfigError(f"{error}; or name a function of your own as package.module:function")
        return LOSSES[name]
    parameters = _parameters(_load(name))
    if len(parameters) < 2 or any(parameter.kind not in _POSITIONAL for parameter in parameters[:2]):
        raise ConfigError(_SIGNATURE.format(name))
    if "where" not in _keywords(_load(name)):
        raise ConfigError(_SIGNATURE.format(name))
    return LossSpec(name)


def _load(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"loss={path!r} must be written as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"loss={path!r}: {error}; write it as package.module:function, importable from the current folder"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        raise unknown(f"function of {module_name}", attribute, [key for key in own if key[0] != "_"])
    return function


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_SIGNATURE = "the loss {} must have the signature (logits, labels, *, where=None, **hyper)"


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions written in C
        return []


def _keywords(function: Callable[..., Any]) -> set[str]:
    """The names behind logits and labels."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name for parameter in _parameters(function)[2:] if parameter.kind in kinds}


_ACLS = "jaxvision.methods.acls.acls"
_RANKMIXUP = "jaxvision.methods.rankmixup.rankmixup"
_LOSSES = "jaxvision.losses"

# CIFAR's for our own small data too: the logits of a small network hardly reach 10.
_SMALL = ("cifar10", "cifar100", "cifar10_lt", "cifar100_lt", "digits", "scenes")
_SMALL_MARGIN = {name: {"margin": 6.0} for name in _SMALL}
_VIEWS = {"alpha": 2.0, "per_sample": False, "mix": "mixup", "layer": "input"}
_TINY_VIEWS = {"tiny_imagenet": {"alpha": 1.0}}
_REGMIXUP = {"cifar10": {"alpha": 20.0}, "cifar10_lt": {"alpha": 20.0}}

LOSSES: dict[str, LossSpec] = {
    "ce": LossSpec(f"{_LOSSES}.calibration:cross_entropy"),
    "label_smoothing": LossSpec(f"{_LOSSES}.calibration:label_smoothing", {"epsilon": 0.05}),
    "brier": LossSpec(f"{_LOSSES}.calibration:brier"),
    "focal": LossSpec(f"{_LOSSES}.focal:focal", {"gamma": 3.0}),
    "flsd53": LossSpec(f"{_LOSSES}.focal:flsd", {"gamma": 3.0}),
    "flsd52": LossSpec(f"{_LOSSES}.focal:flsd", {"gamma": 2.0}),
    "entropy_penalty": LossSpec(f"{_LOSSES}.penalties:entropy_penalty", {"alpha": 0.1}),
    "l1_penalty": LossSpec(f"{_LOSSES}.penalties:l1_penalty", {"alpha": 0.1}),
    "mbls": LossSpec(f"{_LOSSES}.penalties:mbls", {"margin": 10.0, "alpha": 0.1}, by_data=_SMALL_MARGIN),
    "mdca": LossSpec(f"{_LOSSES}.penalties:mdca", {"beta": 1.0}),
    "dca": LossSpec(f"{_LOSSES}.penalties:dca", {"beta": 1.0}),
    "mmce": LossSpec(f"{_LOSSES}.pairwise:mmce", {"weight": 1.0, "width": 0.4}),
    "mmce_weighted": LossSpec(f"{_LOSSES}.pairwise:mmce_weighted", {"weight": 2.0, "width": 0.4}),
    "cpc": LossSpec(f"{_LOSSES}.pairwise:cpc", {"lambda_bdc": 0.1, "lambda_bec": 1.0}),
    "crl": LossSpec(f"{_LOSSES}.correctness_ranking:crl", {"weight": 1.0, "confidence": "max"}, needs="history"),
    "mixup": LossSpec(f"{_LOSSES}.mixup:mixup", mixing={"alpha": 0.2}, needs="mixup"),
    "regmixup": LossSpec(
        f"{_LOSSES}.mixup:regmixup",
        {"eta": 1.0, "reduction": "mean2n"},
        mixing={"alpha": 10.0},
        by_data=_REGMIXUP,
        needs="raw_and_mixup",
    ),
    "acls": LossSpec(
        f"{_ACLS}:acls_loss",
        {"margin": 10.0, "lambda_top": 1.0, "lambda_rest": 0.1, "alpha": 0.1},
        by_data=_SMALL_MARGIN,
    ),
    "mrl": LossSpec(
        f"{_RANKMIXUP}:mrl_loss",
        {"margin": 2.0, "weight": 0.1},
        mixing={"num_views": 1, **_VIEWS},
        by_data={"tiny_imagenet": {"alpha": 1.0, "margin": 1.0}},
        needs="views",
        passes="jaxvision.methods.rankmixup.training:mrl_passes",
    ),
    "mndcg": LossSpec(
        f"{_RANKMIXUP}:mndcg_loss",
        {"weight": 0.1},
        mixing={"num_views": 3, **_VIEWS},
        by_data=_TINY_VIEWS,
        needs="views",
        passes="jaxvision.methods.rankmixup.training:mndcg_passes",
    ),
}
