"""What a transformation sees of quantized training: latent weights, the quantizers beside them, and integer codes.

Only trees and dtypes are dealt with here. A quantizer is whatever ``code_fn(weight, quantizer)`` understands; without a
``code_fn`` it is an object with ``codes(weight)``, as all of :mod:`jaxvision.quant` are.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError

CodeFn = Callable[..., jax.Array]
"""``code_fn(weight, quantizer)`` -> integer codes of the weight's shape; ``code_fn(weight)`` where none are given."""


def latent_weights(params: Any) -> dict[str, jax.Array]:
    """The latent weights by name, in tree order; what ``optax.masked`` or ``optax.partition`` hide is absent.

    Raises:
      ConfigError: no parameters were given, or one is not float32 or float64.
    """
    if params is None:
        raise ConfigError("the transformation compares codes of parameters; call update(updates, state, params)")
    weights = trees.named_leaves(params)
    for name, weight in weights.items():
        dtype = jnp.result_type(weight)
        if dtype not in (jnp.float32, jnp.float64):
            raise ConfigError(
                f"the latent weight {name!r} is {dtype}, in which small updates round away and transitions are lost; "
                "keep latent weights in float32 and cast them in the forward pass"
            )
    return weights


def aligned(what: str, tree: Any, params: Any) -> list[Any]:
    """For each latent weight of ``params``, in tree order, the subtree (quantizer, mask, number) of ``tree`` there.

    ``tree`` has the structure of ``params`` as the network knows them: whole, or with the same parts hidden.

    Raises:
      ConfigError: the structures differ.
    """
    nodes, treedef = jax.tree.flatten(params, is_leaf=_is_hidden)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{what} must be a tree with the structure of the parameters, None where there is nothing to give: {error}"
        ) from error
    return [subtree for node, subtree in zip(nodes, subtrees) if not _is_hidden(node)]


def hide_like(masked: Any, tree: Any) -> Any:
    """``tree`` with those parts hidden that are hidden in ``masked``."""
    return jax.tree.map(lambda node, part: node if _is_hidden(node) else part, masked, tree, is_leaf=_is_hidden)


def codes(code_fn: CodeFn | None, params: Any, quantizers: Any) -> list[jax.Array]:
    """The codes of every latent weight as int8, in tree order.

    Codes of weights fit int8 up to 8 bits: -128..127, or 0..255 stored modulo 256, which keeps them apart. (EWGS's odd
    codes span 510 at 8 bits; there a jump of exactly 256, half the range in one step, would not be seen.)

    Args:
      code_fn: see :data:`CodeFn`; None: ``quantizer.codes(weight)``.
      params: tree of float arrays.
      quantizers: tree as :func:`aligned` takes it; None: ``code_fn`` takes the weight alone.

    Raises:
      ConfigError: a latent weight has no quantizer, or the codes aren't integers of the weight's shape.
    """
    weights = latent_weights(params)
    if quantizers is None:
        _check_alone(code_fn)
        found = {name: code_fn(weight) for name, weight in weights.items()}
    else:
        pairs = zip(weights.items(), aligned("quantizers", quantizers, params), strict=True)
        found = {name: _call(code_fn, name, weight, quantizer) for (name, weight), quantizer in pairs}
    for name, code in found.items():
        if not jnp.issubdtype(code.dtype, jnp.integer) or code.shape != weights[name].shape:
            raise ConfigError(
                f"the codes of {name!r} are {code.dtype}{list(code.shape)}, but must be integers of the weight's shape "
                f"{list(weights[name].shape)}; end code_fn with jnp.round(...).astype(jnp.int32)"
            )
    return [code.astype(jnp.int8) for code in found.values()]


def _call(code_fn: CodeFn | None, name: str, weight: jax.Array, quantizer: Any) -> jax.Array:
    if quantizer is None:
        raise ConfigError(
            f"the parameter {name!r} has no quantizer; give one, or hide parameters that aren't quantized with "
            "optax.partition or optax.masked"
        )
    if code_fn is not None:
        return code_fn(weight, quantizer)
    if not hasattr(quantizer, "codes"):
        raise ConfigError(
            f"the quantizer of {name!r} is a {type(quantizer).__name__} without codes(weight); give a code_fn"
        )
    return quantizer.codes(weight)


def _check_alone(code_fn: CodeFn | None) -> None:
    try:
        if code_fn is not None:
            inspect.signature(code_fn).bind(None)
            return
    except TypeError:
        pass
    raise ConfigError(
        "no quantizers were given: pass update(..., quantizers=tree), or bind them, quantizers=tree when the "
        "transformation is built or functools.partial(code_fn, ...)"
    )


def _is_hidden(node: Any) -> bool:
    # It has no children: seen as a leaf it stands for whatever the whole tree has in its place.
    return isinstance(node, optax.MaskedNode)
