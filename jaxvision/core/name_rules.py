"""Regular expressions that select layers by name; in a list of rules the first that is found in a name decides."""

import re
from collections.abc import Sequence

from jaxvision.core.errors import ConfigError


def first(patterns: Sequence[str], name: str) -> int | None:
    """The index of the rule that decides about ``name``, or None."""
    return next((index for index, pattern in enumerate(patterns) if re.search(pattern, name)), None)


def check(where: str, patterns: Sequence[str], names: Sequence[str], *, ordered: bool = True) -> None:
    """Refuses a pattern that has no effect.

    Args:
      where: the field of the patterns, for messages.
      patterns: in order of precedence.
      names: of everything that they could concern.
      ordered: whether earlier patterns take names from later ones; else all mean the same, and may overlap.

    Raises:
      ConfigError: a pattern that is no regular expression, is found in no name, or only where an earlier one is.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{where} has {pattern!r}, which is not a regular expression: {error}") from error
    deciding = {name: first(patterns, name) for name in names}
    for index, pattern in enumerate(patterns):
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise ConfigError(
                f"{where} has {pattern!r}, which matches no layer that it could concern; "
                f"kernels are called {', '.join(names[:3])}, ..."
            )
        if ordered and index not in deciding.values():
            earlier = " and ".join(dict.fromkeys(repr(patterns[deciding[name] or 0]) for name in found))
            raise ConfigError(
                f"{where} has {pattern!r}, which decides nothing: {earlier} before it takes all its layers; "
                "put the narrower rule first, or remove one"
            )
