"""What all tools do at the command line: a mistake is one line on standard error, and the exit code says its kind."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jaxvision.core.errors import ConfigError, JaxvisionError

STOPPED = 130


class Parser(argparse.ArgumentParser):
    """A parser whose help is the tool's docstring as it stands, and whose complaints are ConfigErrors.

    Args:
      options: of ``argparse.ArgumentParser``.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def answer(tool: str, work: Callable[[], None]) -> int:
    """Does the work; returns the exit code: 0, that of a JaxvisionError, or 130 after Ctrl-C.

    Args:
      tool: its name, which begins the line about a mistake.
      work: parses and does everything.
    """
    try:
        work()
    except JaxvisionError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{tool}: stopped; the same command starts again", file=sys.stderr)
        return STOPPED
    return 0
