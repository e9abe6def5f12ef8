"""The names of the arms: ``sgd``, ``adamt_1e-2``, ``lsq_sgdt_additive``, ``freezing``. One name, one way to train."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.optim import transition_rules
from jaxvision.quant.families import FAMILIES

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULED = tuple(f"{name}t" for name in OPTIMIZERS)
REMEDIES = ("dampening", "freezing")


@dataclass(frozen=True)
class Variant:
    """What an arm's name says.

    Attributes:
      name: the name itself.
      family: of quantizers (``quant.families``).
      optimizer: "sgd", "adam" or "adamw".
      target: of the transition rate, before the factor for the bits; None: a plain learning rate.
      rule: from the transition rate to the step size; "" where there is no target.
      remedy: against oscillation: "dampening", "freezing" or "".
    """

    name: str
    family: str
    optimizer: str
    target: float | None = None
    rule: str = ""
    remedy: str = ""

    @property
    def scheduled(self) -> bool:
        """Whether transition rates are scheduled."""
        return self.target is not None


def parse(name: str, *, family: str, baseline: str, target: float, rule: str) -> Variant:
    """The variant of a name: words joined by ``_`` in any order, at most one of each kind.

    Words: an optimizer (``sgd``; ``sgdt`` with transition rates scheduled), a target rate (``1e-2``), a rule
    (``additive``), a family of quantizers (``lsq``), a remedy (``freezing``).

    Args:
      name: the name.
      family, baseline, target, rule: what holds where the name has no such word; ``baseline`` is an optimizer.

    Raises:
      ConfigError: an unknown word, two of a kind, or a target or a rule without an optimizer that has one.
    """
    found: dict[str, Any] = {}
    for word in name.split("_"):
        kind, value = _word(name, word)
        if kind in found:
            raise ConfigError(f"config.arms has {name!r}, which names two values of {kind}; keep one")
        found[kind] = value
    chosen = found.get("optimizer", baseline)
    scheduled = chosen in SCHEDULED
    if not scheduled and (extra := [kind for kind in ("target", "rule") if kind in found]):
        raise ConfigError(
            f"config.arms has {name!r}, whose {extra[0]} is for transition rates; name {chosen}t or leave it out"
        )
    return Variant(
        name,
        found.get("family", family),
        chosen.removesuffix("t") if scheduled else chosen,
        found.get("target", target) if scheduled else None,
        found.get("rule", rule) if scheduled else "",
        found.get("remedy", ""),
    )


def _word(name: str, word: str) -> tuple[str, Any]:
    kinds: Mapping[str, Iterable[str]] = {
        "optimizer": (*OPTIMIZERS, *SCHEDULED),
        "rule": transition_rules.RULES,
        "family": FAMILIES,
        "remedy": REMEDIES,
    }
    for kind, words in kinds.items():
        if word in words:
            return kind, word
    try:
        return "target", float(word)
    except ValueError:
        allowed = [each for words in kinds.values() for each in words]
        raise unknown(f"the word {word!r} of config.arms", name, allowed) from None
