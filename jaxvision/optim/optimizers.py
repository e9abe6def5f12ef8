"""Optimizers with the update rules of ``torch.optim``, as optax transformations.

Published recipes were tuned with PyTorch, whose rules differ from optax's defaults in where the weight decay
enters. All functions here return a ``GradientTransformationExtraArgs`` (unknown extra arguments are ignored), take
the learning rate as a number, an array or a schedule, and decay every parameter unless a ``decay_mask`` says otherwise.

Gradient accumulation is not here: the training step cuts its batch into micro-batches
(``engine.supervised.value_and_grad``), so that one step of the run stays one step of the optimizer and of its schedule.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError

ScalarOrSchedule = float | jax.Array | optax.Schedule
Mask = Any | Callable[[Any], Any]

NORMS_AND_BIASES = (r"(^|/)(bias|scale)$",)
"""The rule that leaves biases and the gains of normalisation layers undecayed."""


def sgd(
    lr: ScalarOrSchedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``torch.optim.SGD``: weight decay coupled, momentum without the learning rate in its buffer.

    g <- g + weight_decay p;  b <- momentum b + g (first step: b = g);
    p <- p - lr (g + momentum b if nesterov else b)

    Args:
      lr: learning rate, or schedule of the step.
      momentum: 0 keeps no buffer.
      nesterov: needs momentum > 0.
      weight_decay: L2 coefficient, added to the gradient before the momentum.
      decay_mask: True where the decay acts: a tree of bools, or a function of the parameters (:func:`decay_mask`).

    Raises:
      ConfigError: a number out of range, or ``nesterov`` without momentum.
    """
    _check("lr", lr)
    _check("momentum", momentum)
    _check("weight_decay", weight_decay)
    if nesterov and _is_zero(momentum):
        raise ConfigError("nesterov is True, but momentum is 0; give a momentum or set nesterov to False")
    trace = optax.identity() if _is_zero(momentum) else optax.trace(momentum, nesterov=nesterov)
    return _chain(_decay(weight_decay, decay_mask), trace, optax.scale_by_learning_rate(lr))


def adam(
    lr: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``torch.optim.Adam``: weight decay is L2, coupled (it passes through both moments).

    g <- g + weight_decay p;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args and errors as :func:`sgd`.
    """
    _check_adam(lr, b1, b2, eps, weight_decay)
    return _chain(_decay(weight_decay, decay_mask), optax.scale_by_adam(b1, b2, eps), optax.scale_by_learning_rate(lr))


def adamw(
    lr: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``torch.optim.AdamW``: weight decay decoupled from the moments but scaled by the learning rate.

    p <- p - lr weight_decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args and errors as :func:`sgd`; the default decay is PyTorch's 0.01 (optax's is 1e-4).
    """
    _check_adam(lr, b1, b2, eps, weight_decay)
    return _chain(optax.scale_by_adam(b1, b2, eps), _decay(weight_decay, decay_mask), optax.scale_by_learning_rate(lr))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """``torch.nn.utils.clip_grad_norm_``: g <- g min(1, max_norm / (norm + 1e-6)), norm over all leaves together.

    The norm is taken in float32. Raises ConfigError unless ``max_norm`` > 0.
    """
    _check("max_norm", max_norm, positive=True)

    def update(updates, state, params=None):
        del params
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(updates)))
        scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates), state

    return optax.with_extra_args_support(optax.GradientTransformation(optax.init_empty_state, update))


def decay_mask(no_decay: tuple[str, ...]) -> Callable[[Any], Any]:
    """The function ``params -> tree of bool``: False where one of the regexes ``no_decay`` is found in the name.

    Names are slash-joined paths (``blocks_0/attn/qkv/kernel``). Empty: decay everything, as PyTorch does by default.

    Raises:
      ConfigError: at once for a malformed regex; when applied, for a regex that is found in no name.
    """
    patterns = []
    for text in no_decay:
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise ConfigError(f"no_decay has {text!r}, which is not a regular expression: {error}") from error

    def mask(params):
        names = tuple(trees.named_leaves(params))
        for pattern in patterns:
            if not any(pattern.search(name) for name in names):
                raise ConfigError(
                    f"no_decay has {pattern.pattern!r}, which matches no parameter; names look like "
                    f"{', '.join(names[:3])}"
                )
        return trees.map_named(lambda name, _: not any(pattern.search(name) for pattern in patterns), params)

    return mask


def _decay(weight_decay, mask):
    return optax.identity() if _is_zero(weight_decay) else optax.add_decayed_weights(weight_decay, mask)


def _chain(*transforms):
    return optax.with_extra_args_support(optax.chain(*transforms))


def _is_zero(value):
    # Under optax.inject_hyperparams the numbers arrive as arrays, whose value must not decide the structure.
    return value is None or (isinstance(value, int | float) and value == 0)


def _check(name, value, *, positive=False, below=math.inf):
    if not isinstance(value, int | float):
        return
    if not ((value > 0 if positive else value >= 0) and value < below):
        bound = "above 0" if positive else "at least 0"
        raise ConfigError(
            f"the optimizer's {name} is {value}, but must be a number {bound}"
            + (f" and below {below}" if below < math.inf else "")
        )


def _check_adam(lr, b1, b2, eps, weight_decay):
    _check("lr", lr)
    _check("b1", b1, below=1)
    _check("b2", b2, below=1)
    _check("eps", eps)
    _check("weight_decay", weight_decay)
