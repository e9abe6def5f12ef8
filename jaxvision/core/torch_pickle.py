"""What the names in a PyTorch checkpoint's pickle mean: storages, tensors, and the containers around them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxvision.core.safe_pickle import Placeholder, plain_key

_MAX_EXPANDED = 1 << 24  # elements of a tensor that repeats a smaller storage (Tensor.expand)

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


@dataclass(frozen=True)
class StorageType:
    """Stands for a storage class. ``dtype`` is uint8 for one without a type (its tensors name theirs)."""

    dtype: np.dtype
    typed: bool = True


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory of one or more tensors: ``data`` ``[n]`` of the storage's dtype, read-only."""

    data: np.ndarray

    @classmethod
    def from_bytes(cls, raw: bytes, kind: StorageType, big: bool) -> "Storage":
        """``big``: the bytes are of a big-endian machine."""
        if big and not kind.typed:
            raise ValueError("storages without a type from big-endian machines are not read")
        data = np.frombuffer(raw, kind.dtype) if raw else np.empty(0, kind.dtype)
        if big:
            data = data.byteswap()
        data.setflags(write=False)
        return cls(data)

    def checked(self, kind: StorageType, numel: int) -> "Storage":
        """Itself, if it is what a persistent id claims."""
        if self.data.dtype != kind.dtype or len(self.data) < numel:
            raise ValueError(f"a storage holds {self.data.nbytes} bytes, not {numel} elements of {kind.dtype}")
        return self

    def part(self, offset: Any, length: Any) -> "Storage":
        """Elements ``[offset, offset + length)``."""
        if not (_is_count(offset) and _is_count(length) and offset + length <= len(self.data)):
            raise ValueError("a view outside its storage")
        return Storage(self.data[offset : offset + length])


def storage_id(pid: Any) -> tuple[StorageType, str, int]:
    """Type, key and number of elements, of ``("storage", type, key, location, number of elements, ...)``."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], StorageType):
        raise ValueError("a persistent id that is no storage")
    if not isinstance(pid[2], str) or not _is_count(pid[4]):
        raise ValueError("a storage without a key or a size")
    return pid[1], pid[2], pid[4]


def unknown_id(pid: Any) -> Placeholder | None:
    """The place holder in a persistent id: a storage class that isn't read, or the class of a pickled network."""
    known = type(pid) is tuple and len(pid) >= 2 and pid[0] in ("storage", "module")
    return pid[1] if known and isinstance(pid[1], Placeholder) else None


def names(tensor: Callable[..., Any]) -> dict[tuple[str, str], Any]:
    """The allow-list for :func:`safe_pickle.load`; ``tensor`` makes the tensors, as :func:`view` does."""
    table: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor_v3"): lambda storage, offset, size, stride, grad, hooks, dtype, meta=None: (
            tensor(storage, offset, size, stride, grad, hooks, meta, dtype)
        ),
        ("torch._utils", "_rebuild_parameter"): lambda data, grad, hooks: data,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, grad, hooks, state: data,
        ("torch", "Size"): lambda items=(): tuple(items),
        ("torch", "device"): lambda *parts: ":".join(str(part) for part in parts),
        ("collections", "OrderedDict"): _dict,
        ("collections", "Counter"): _dict,
        ("collections", "defaultdict"): lambda *factory: {},
    }
    for module in ("builtins", "__builtin__"):
        table[module, "set"] = lambda items=(): {plain_key(item) for item in items}
        for factory in ("dict", "list", "int", "float"):  # what a defaultdict is made with
            table[module, factory] = factory
    for module in ("torch", "torch.cuda"):
        for kind, dtype in _STORAGES.items():
            table[module, f"{kind}Storage"] = StorageType(np.dtype(_DTYPES[dtype]))
    for module in ("torch", "torch.storage"):
        table[module, "UntypedStorage"] = StorageType(np.dtype(np.uint8), typed=False)
    table.update({("torch", dtype): np.dtype(kind) for dtype, kind in _DTYPES.items()})
    return table


def view(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: Any = None,
) -> np.ndarray:
    """``torch._utils._rebuild_tensor_v2``: a read-only view ``[*size]`` of a storage.

    Args:
      storage: a :class:`Storage`.
      offset: of the first element, in elements.
      size: tuple of int.
      stride: tuple of int, in elements; every element must lie inside the storage.
      requires_grad: not used.
      hooks: not used.
      metadata: conjugate and negative bits; refused.
      dtype: of the elements, where the storage has no type.

    Raises:
      ValueError: an argument is of another type, or the tensor reaches outside its storage.
    """
    del requires_grad, hooks
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without storage, size or stride")
    if metadata:
        raise ValueError("a tensor is a conjugated or negated view; save it with .resolve_conj().resolve_neg()")
    data = storage.data
    if dtype is not None:
        data = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    if not all(_is_count(n) for n in (offset, *size, *stride)) or len(size) != len(stride) or len(size) > 32:
        raise ValueError("a tensor with a wrong size or stride")
    if 0 in size:
        return np.empty(size, data.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(data):
        raise ValueError(f"a tensor of size {size} reaches outside its storage of {len(data)} elements")
    if math.prod(size) > max(len(data), _MAX_EXPANDED):
        raise ValueError(f"a tensor of size {size} claims more than its storage of {len(data)} elements")
    steps = tuple(step * data.itemsize for step in stride)
    # np.ndarray checks the bounds once more; as_strided would not, and fails on float8.
    return np.ndarray(size, data.dtype, data.view(np.uint8), offset * data.itemsize, steps)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _dict(items: Any = ()) -> dict:
    items = items.items() if type(items) is dict else items
    return {plain_key(key): value for key, value in items}
