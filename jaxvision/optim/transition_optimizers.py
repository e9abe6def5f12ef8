"""Optimizers whose transition rate is scheduled: :func:`scale_by_transition_rate` behind the usual directions.

Source: Lee et al., "Scheduling Weight Transitions for Quantization-Aware Training", ICCV 2025, and its official code
(``custom_optims.py``), which has SGDT and AdamT; U^0 of each is that of the paper's supplement.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxvision.optim import latent
from jaxvision.optim.transition_rate import scale_by_transition_rate

Tree = Any
Target = float | jax.Array | optax.Schedule


def _documents_control(optimizer: Callable[..., Any]) -> Callable[..., Any]:
    """Writes out what ``**control`` stands for in the signature, for ``help`` and for ``optax.inject_hyperparams``."""
    own = inspect.signature(optimizer).parameters
    taken = {*own, "momentum"} if "rate_momentum" in own else {*own}
    control = inspect.signature(scale_by_transition_rate).parameters.values()
    optimizer.__signature__ = inspect.Signature(
        [
            *(parameter for parameter in own.values() if parameter.kind is not parameter.VAR_KEYWORD),
            *(parameter for parameter in control if parameter.name not in taken),
        ]
    )
    return optimizer


@_documents_control
def with_transition_rate(
    direction: optax.GradientTransformation,
    target: Target,
    code_fn: latent.CodeFn | None = None,
    *,
    initial_step_size: float | jax.Array,
    **control: Any,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer with its transition rate scheduled: ``chain(direction, scale_by_transition_rate(...))``.

    Args:
      direction: the optimizer without its learning rate, such as ``optax.scale_by_lion()``, ``optax.scale_by_rms()`` or
        a chain with weight decay and clipping; it must point uphill, as optax's ``scale_by_*`` do.
      target, code_fn, initial_step_size, control: as :func:`scale_by_transition_rate`.

    Raises:
      ConfigError: as :func:`scale_by_transition_rate`.
    """
    last = scale_by_transition_rate(target, code_fn, initial_step_size=initial_step_size, **control)
    return optax.with_extra_args_support(optax.chain(direction, last))


@_documents_control
def sgdt(
    target: Target,
    code_fn: latent.CodeFn | None = None,
    *,
    initial_step_size: float | jax.Array = 1e-1,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_mask: Tree | Callable[[Tree], Tree] | None = None,
    rate_momentum: float = 0.99,
    **control: Any,
) -> optax.GradientTransformationExtraArgs:
    """SGD (PyTorch's) with its transition rate scheduled.

    g <- g + weight_decay W;  b <- momentum b + g;  W <- W - U (g + momentum b if nesterov else b)

    Args:
      momentum, nesterov, weight_decay, decay_mask: as :func:`jaxvision.optim.optimizers.sgd`.
      rate_momentum: ``momentum`` of :func:`scale_by_transition_rate`, m.
      target, code_fn, initial_step_size, control: as :func:`scale_by_transition_rate`.

    Raises:
      ConfigError: as :func:`scale_by_transition_rate`.
    """
    direction = optax.chain(
        _decay(weight_decay, decay_mask),
        optax.identity() if _is_zero(momentum) else optax.trace(momentum, nesterov=nesterov),
    )
    control |= {"initial_step_size": initial_step_size, "momentum": rate_momentum}
    return with_transition_rate(direction, target, code_fn, **control)


@_documents_control
def adamt(
    target: Target,
    code_fn: latent.CodeFn | None = None,
    *,
    initial_step_size: float | jax.Array = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Tree | Callable[[Tree], Tree] | None = None,
    rate_momentum: float = 0.99,
    **control: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam (PyTorch's: weight decay coupled) with its transition rate scheduled.

    g <- g + weight_decay W;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    W <- W - U m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
      b1, b2, eps, weight_decay, decay_mask: as :func:`jaxvision.optim.optimizers.adam`.
      rate_momentum: ``momentum`` of :func:`scale_by_transition_rate`, m.
      target, code_fn, initial_step_size, control: as :func:`scale_by_transition_rate`.

    Raises:
      ConfigError: as :func:`scale_by_transition_rate`.
    """
    direction = optax.chain(_decay(weight_decay, decay_mask), optax.scale_by_adam(b1, b2, eps))
    control |= {"initial_step_size": initial_step_size, "momentum": rate_momentum}
    return with_transition_rate(direction, target, code_fn, **control)


@_documents_control
def adamwt(
    target: Target,
    code_fn: latent.CodeFn | None = None,
    *,
    initial_step_size: float | jax.Array = 3e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay_mask: Tree | Callable[[Tree], Tree] | None = None,
    rate_momentum: float = 0.99,
    **control: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with its transition rate scheduled: W <- W - U (weight_decay W + d), d as in :func:`adamt` without decay.

    The paper's AdamWT isn't in the official code; that the decay is scaled by U is our reading.

    Args:
      b1, b2, eps, weight_decay, decay_mask: as :func:`jaxvision.optim.optimizers.adamw`.
      rate_momentum: ``momentum`` of :func:`scale_by_transition_rate`, m.
      target, code_fn, initial_step_size, control: as :func:`scale_by_transition_rate`.

    Raises:
      ConfigError: as :func:`scale_by_transition_rate`.
    """
    direction = optax.chain(optax.scale_by_adam(b1, b2, eps), _decay(weight_decay, decay_mask))
    control |= {"initial_step_size": initial_step_size, "momentum": rate_momentum}
    return with_transition_rate(direction, target, code_fn, **control)


def _is_zero(value: Any) -> bool:
    # Under optax.inject_hyperparams the numbers arrive as arrays, whose value must not decide the structure.
    return isinstance(value, int | float) and value == 0


def _decay(weight_decay: float, mask: Any) -> optax.GradientTransformation:
    return optax.identity() if _is_zero(weight_decay) else optax.add_decayed_weights(weight_decay, mask)
