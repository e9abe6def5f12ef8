"""Reads pickle files without executing what they contain.

A pickle is a program: the ordinary reader imports any function the file names and calls it. Here the names a
file may use come from an allow-list, and what stands for a name on the reader's stack is an inert
:class:`Global`, so that a call, an instantiation or an attribute assignment reaches nothing but the handlers
in the list. Everything else ends in a :class:`DataError` that names it.
"""

import io
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

from jaxvision.core.errors import DataError

Allowed = Mapping[tuple[str, str], Any]
"""``(module, name)`` as the file spells it -> a function called in its place, or a constant put in its place."""

_SCALARS = (str, bytes, int, float, bool, type(None))
_MAX_KEY = 4  # members of a tuple that is a key
# What damaged bytes can raise inside the reader and the handlers.
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class Global:
    """The place holder on the stack for an allowed function: it can't be called or changed by the file."""

    __slots__ = ("handler", "name")

    def __init__(self, name: str, handler: Callable[..., Any]):
        self.name = name
        self.handler = handler

    def __repr__(self) -> str:
        return f"Global({self.name})"


class Placeholder:
    """Stands for an object whose class is not allowed, where the caller asked to skip these.

    ``name`` is the class as ``module.name``; ``args`` what it would have been built from; ``state`` what would
    have been set on it; ``items`` what would have been put into it.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple = ()):
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"Placeholder({self.name})"


class _Bounded:
    """A file whose reads never ask for more than is left: a length in a damaged file allocates nothing."""

    def __init__(self, file: BinaryIO):
        self._file = file
        start = file.tell()
        self._size = file.seek(0, os.SEEK_END)
        file.seek(start)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._size - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline()


class SafeUnpickler(pickle._Unpickler):
    """The standard library's reader in Python, restricted.

    The one in Python because that in C grows its memo to whatever index the file names (a few bytes can claim
    all memory), and applies ``BUILD`` with ``setattr`` to whatever lies on the stack. Reading costs about a
    second per million opcodes; arrays are one opcode each.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: BinaryIO,
        *,
        name: str,
        allowed: Allowed,
        build: Mapping[type, Callable[[Any, Any], None]],
        persistent: Callable[[Any], Any] | None,
        encoding: str,
        skip_unknown: bool,
    ):
        super().__init__(file, fix_imports=False, encoding=encoding)
        self._name = name
        self._allowed = allowed
        self._build = build
        self._persistent = persistent
        self._skip_unknown = skip_unknown

    def refuse(self, what: str) -> NoReturn:
        raise DataError(f"{self._name} asks to {what}; refused")

    def find_class(self, module: str, name: str) -> Any:
        where = printable(f"{module}.{name}")
        if (module, name) not in self._allowed:
            if self._skip_unknown:
                return Placeholder(where)
            self.refuse(f"run {where}")
        value = self._allowed[module, name]
        return Global(where, value) if callable(value) else value

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            self.refuse("load an object from outside")
        return self._persistent(pid)

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError("arguments are no tuple")
        if isinstance(function, Placeholder):
            return Placeholder(function.name, args)
        if not isinstance(function, Global):
            self.refuse(f"call a {type(function).__name__}")
        return function.handler(*args)

    def _instantiate(self, klass: Any, args: list) -> None:
        """INST and OBJ."""
        self.append(self._call(klass, tuple(args)))

    def load_reduce(self) -> None:
        """REDUCE and NEWOBJ: a call."""
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        args = self.stack.pop()
        if keywords and not isinstance(self.stack[-1], Placeholder):
            self.refuse("build an object with keywords")
        self.stack[-1] = self._call(self.stack[-1], args)

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        """BUILD: attributes. Only objects that handlers made take any, and only through the ``build`` list."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif type(target) in self._build:
            self._build[type(target)](target, state)
        else:
            self.refuse(f"set attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def _extend(self, values: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.items.extend(values)
        elif type(target) is list:
            target.extend(values)
        elif type(target) is set:
            target.update(map(plain_key, values))
        else:
            self.refuse(f"put items into a {type(target).__name__}")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        """APPENDS and ADDITEMS."""
        self._extend(self.pop_mark())

    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.ADDITEMS[0]] = load_appends

    def load_frozenset(self) -> None:
        values = self.pop_mark()  # changes self.append
        self.append(frozenset(map(plain_key, values)))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def _update(self, values: list) -> None:
        target = self.stack[-1]
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, Placeholder):
            target.items.extend(pairs)
        elif type(target) is dict:
            target.update((plain_key(key), value) for key, value in pairs)
        else:
            self.refuse(f"put items into a {type(target).__name__}")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self._update(values)

    dispatch[pickle.DICT[0]] = load_dict

    def load_refused(self) -> None:
        """Extension codes run functions registered in this process; buffers claim memory before they are read."""
        self.refuse("use an extension code or a buffer")

    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        dispatch[_code[0]] = load_refused
    del _code


def load(
    file: str | Path | bytes | BinaryIO,
    *,
    allowed: Allowed,
    build: Mapping[type, Callable[[Any, Any], None]] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str = "latin1",
    skip_unknown: bool = False,
    name: str | None = None,
) -> Any:
    """Reads one pickle, in which only the names in ``allowed`` mean anything.

    Args:
      file: a path, the bytes themselves, or a seekable binary file (read from its position to the pickle's end).
      allowed: what stands for each name. Functions get the arguments the file gives: check them there.
      build: type -> function ``(object, state)`` that sets the state of objects of exactly this type.
      persistent_load: gives the object of a persistent id; None refuses them.
      encoding: of Python 2 strings; ``"bytes"`` leaves them bytes.
      skip_unknown: True puts an inert :class:`Placeholder` where a name is not allowed; False refuses the file.
      name: what error messages call the file.

    Returns:
      What the file holds. Keys of dictionaries and members of sets are plain scalars, or short tuples
      of them.

    Raises:
      DataError: the file is missing or damaged, or asks for something that is not allowed.
    """
    if isinstance(file, str | Path):
        try:
            with open(file, "rb") as stream:
                content = stream.read()
        except OSError as error:
            raise DataError(f"{file} can't be read: {error.strerror}") from error
        name, stream = name or str(file), io.BytesIO(content)
    else:
        stream = io.BytesIO(file) if isinstance(file, bytes) else file
        name = name or "the pickle"
    reader = SafeUnpickler(
        _Bounded(stream),
        name=name,
        allowed=allowed,
        build=build or {},
        persistent=persistent_load,
        encoding=encoding,
        skip_unknown=skip_unknown,
    )
    try:
        return reader.load()
    except _DAMAGE as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise DataError(f"{name} can't be read: it is damaged or of another kind ({reason})") from error


def printable(text: str) -> str:
    """Text from a file, safe to show on a terminal and short."""
    clean = ascii(text)[1:-1]
    return clean if len(clean) <= 120 else clean[:117] + "..."


def plain_key(value: Any) -> Any:
    """Keys are scalars or short tuples of them: hashing nested tuples can take time exponential in the file's size."""
    parts = value if type(value) is tuple and len(value) <= _MAX_KEY else (value,)
    if not all(isinstance(part, _SCALARS) for part in parts):
        raise TypeError(f"a {type(value).__name__} can't be a key here")
    return value
