"""A configuration that knows which of its fields were read, so that a field nobody uses is an error."""

from collections.abc import Iterator
from typing import Any

from jaxvision.core.errors import ConfigError


class Config:
    """Read-only view of a ``ConfigDict`` (or nested dict) that remembers what was read.

    Fields are attributes; a nested dict is a ``Config`` that shares the memory. ``make(config)`` functions read
    every field they stand for, up front, even one that another field switches off: :meth:`check_all_read` then
    finds the typos and the left-overs.
    """

    def __init__(self, values: Any, name: str = "config", _read: set[str] | None = None):
        self._values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
        self._name = name
        self._read = set() if _read is None else _read

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        if key not in self._values:
            raise ConfigError(
                f"{self._name} has no field '{key}', which this task needs; it has: {', '.join(sorted(self._values))}"
            )
        value, name = self._values[key], f"{self._name}.{key}"
        if isinstance(value, dict):
            return Config(value, name, self._read)
        self._read.add(name)
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or ``default`` where the configuration has none of that name."""
        return getattr(self, key) if key in self else default

    def to_dict(self) -> dict[str, Any]:
        """Everything below as plain dicts; counts as read."""
        return {key: (value.to_dict() if isinstance(value := getattr(self, key), Config) else value) for key in self}

    def where(self, key: str) -> str:
        """``config.data.batch_size`` for messages."""
        return f"{self._name}.{key}"

    def unread(self) -> list[str]:
        """The full names of the fields that nobody has read yet."""
        return [name for name in flatten(self._values, f"{self._name}.") if name not in self._read]

    def check_all_read(self) -> None:
        """Raises ConfigError naming the fields that the task never read."""
        if names := self.unread():
            raise ConfigError(
                f"{names[0]} is set but nothing in this task reads it; remove it"
                + (f" (likewise {', '.join(names[1:])})" if names[1:] else "")
            )

    def one_of(self, key: str, allowed: tuple[Any, ...]) -> Any:
        """The field's value, which must be one of ``allowed``."""
        value = getattr(self, key)
        if value not in allowed:
            raise ConfigError(f"{self.where(key)}={value!r} is not one of {', '.join(map(repr, allowed))}")
        return value

    def positive(self, key: str, *, zero: bool = False) -> Any:
        """The field's value, a number that must be above 0 (or, with ``zero``, at least 0)."""
        value = getattr(self, key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or (value == 0 and not zero):
            raise ConfigError(f"{self.where(key)}={value!r} must be a number {'of at least' if zero else 'above'} 0")
        return value

    def numbers(self, key: str, *, whole: bool = False) -> tuple[Any, ...]:
        """The field's values, a sequence of numbers (``whole``: whole numbers), which may be empty."""
        values = getattr(self, key)
        kinds = int if whole else int | float
        if not isinstance(values, tuple | list) or any(type(v) is bool or not isinstance(v, kinds) for v in values):
            example = "(0, 1)" if whole else "(0.1, 0.01)"
            raise ConfigError(
                f"{self.where(key)}={values!r} must be {'whole ' if whole else ''}numbers, such as {example}"
            )
        return tuple(values)

    def words(self, key: str) -> tuple[str, ...]:
        """The field's values, a sequence of strings, which may be empty."""
        values = getattr(self, key)
        if not isinstance(values, tuple | list) or not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self.where(key)}={values!r} must be strings, such as ('a', 'b')")
        return tuple(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
