"""Straight-through building blocks: functions whose derivative isn't that of their value.

Only the step from real to integer has a derivative of its own; the affine arithmetic around it is left to autodiff,
which then gives clip masks and the gradients of scales for free. All but :func:`ewgs_round` work in forward mode too.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.custom_jvp
def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """The value of ``hard``, to the bit, with the derivative of ``soft``; two float arrays of one shape and type."""
    del soft
    return hard


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return straight_through(*primals), tangents[1]


@jax.custom_jvp
def ste_round(x: jax.Array) -> jax.Array:
    """round(x), half to even, with derivative 1; float of any shape."""
    return jnp.round(x)


@ste_round.defjvp
def _ste_round_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return ste_round(*primals), tangents[0]


@jax.custom_vjp
def ewgs_round(x: jax.Array, delta: ArrayLike) -> jax.Array:
    """round(x), half to even, whose gradient grows with the rounding error: element-wise gradient scaling.

    ``dx = g (1 + delta sign(g) (x - round(x)))``, so ``delta = 0`` is :func:`ste_round`. ``delta`` (float, broadcasts)
    is a constant: its gradient is 0. Reverse mode only. Source: EWGS (Lee et al., CVPR 2021), equation 5.
    """
    del delta
    return jnp.round(x)


def _ewgs_forward(x: jax.Array, delta: ArrayLike) -> tuple[jax.Array, tuple]:
    hard = ewgs_round(x, delta)  # and not jnp.round: a second derivative passes here as the first does
    return hard, (jax.lax.stop_gradient(x - hard), delta)


def _ewgs_backward(saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    error, delta = saved
    return (g * (1 + delta * jnp.sign(g) * error)).astype(g.dtype), jnp.zeros_like(delta)


ewgs_round.defvjp(_ewgs_forward, _ewgs_backward)


def clip(x: jax.Array, lower: ArrayLike, upper: ArrayLike) -> jax.Array:
    """x within [lower, upper], with ``torch.clamp``'s gradient: an x that equals a bound passes all of it.

    ``jnp.clip`` passes a half there and ``jax.lax.clamp`` nothing. Outside, the gradient goes to the bound. NaN stays.
    """
    return jnp.where(x < lower, lower, jnp.where(x > upper, upper, x))


def grad_scale(x: jax.Array, factor: ArrayLike) -> jax.Array:
    """x, to the bit, with its gradient multiplied by ``factor`` (LSQ's ``s gs + stop_gradient(s - s gs)``)."""
    return straight_through(x, x * jnp.asarray(factor, x.dtype))
