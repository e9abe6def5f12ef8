"""Frozen dataclasses that are pytrees, as ``flax.struct`` makes them, but told apart by their class.

``flax.struct.dataclass`` registers by ``jax.tree_util.register_dataclass``. In jax 0.10 the tree structures of two
classes so registered compare equal where their static fields do, although their hashes differ. A jitted function called
with both then finds, where chance puts the two hashes side by side, the program of the wrong class in its cache, and
returns wrong numbers without a word (seen once: an LBT quantizer's gradient by TRS's program). Structures registered by
``register_pytree_with_keys`` compare their classes.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def field(*, pytree_node: bool = True, **options: Any) -> Any:
    """``dataclasses.field``; with ``pytree_node=False`` static: part of the structure, hashable, compared by ``==``."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass, registered as a pytree of its fields, with ``replace(**changes)``."""
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    children = tuple(each.name for each in fields if each.metadata.get("pytree_node", True))
    static = tuple(each.name for each in fields if not each.metadata.get("pytree_node", True))

    def flatten(value: T) -> tuple[tuple, tuple]:
        return tuple(getattr(value, name) for name in children), tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: T) -> tuple[tuple, tuple]:
        leaves, settings = flatten(value)
        return tuple(zip(map(jax.tree_util.GetAttrKey, children), leaves)), settings

    def unflatten(settings: tuple, leaves: tuple) -> T:
        return made(**dict(zip(static, settings)), **dict(zip(children, leaves)))

    made.replace = dataclasses.replace
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
