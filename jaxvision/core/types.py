"""The few types that several layers share."""

from collections.abc import Callable

import jax

Tap = Callable[[str, jax.Array], jax.Array]
"""Observes or replaces a named intermediate of a network: ``tap(name, value) -> value``.

Networks call ``x = tap("blocks.0.attn.qkv", x)`` at each named place. The default is :func:`no_tap`; a
quantizer replaces values, a recorder stores them. A tap runs while the network is traced.
"""


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    del name
    return value


def scoped(tap: Tap, scope: str) -> Tap:
    """A tap that puts ``scope.`` before every name; keeps :func:`no_tap` as it is."""
    return tap if tap is no_tap else lambda name, value: tap(f"{scope}.{name}", value)
