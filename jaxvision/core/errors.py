"""Errors that end a command with one clear sentence and a documented exit code.

``main`` prints ``str(error)`` without a traceback and exits with ``error.exit_code``. The message names
what was wrong (the key or the file), the value found, and the way out.
"""

import difflib
from collections.abc import Iterable


class JaxvisionError(Exception):
    """Base class. Raise one of the subclasses."""

    exit_code = 70


class ConfigError(JaxvisionError):
    """A wrong command line or configuration value."""

    exit_code = 64


class DataError(JaxvisionError):
    """An input file (image, archive, weights, data folder) that is missing, damaged or of the wrong form."""

    exit_code = 64


class NonFiniteError(JaxvisionError):
    """The loss or the state became NaN or infinite."""

    exit_code = 70


class StorageError(JaxvisionError):
    """The run directory can't be written or holds no checkpoint that verifies."""

    exit_code = 74


class Preempted(JaxvisionError):
    """A signal asked the run to stop; its state was saved and the same command continues it."""

    exit_code = 75


def unknown(what: str, value: object, allowed: Iterable[str]) -> ConfigError:
    """The error for a name that doesn't exist, with the closest name that does.

    Args:
      what: the field or option, such as ``config.model.name``.
      value: what was given.
      allowed: the names there are.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    if len(names) > 24:
        # A sentence, not a catalogue.
        names = [*(close or names[:8]), f"... ({len(names)} in all)"]
    return ConfigError(f"{what}={value!r} is unknown; {hint}there are: {', '.join(names)}")
