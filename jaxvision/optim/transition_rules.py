"""Rules that turn a transition rate and its target into the next step size. Write your own here, or anywhere.

A rule is a function

    rule(target, running_rate, step_size, **extra) -> step_size

R^t, K^t and U^(t-1) give U^t. All are float32 (T,), one entry a latent tensor: a formula for one tensor is a rule for
all, and a rule may also look across tensors. Of ``extra`` a rule gets what it names, or everything with ``**extra``:

    rate               float32 (T,), the unsmoothed k^t
    measured           bool (T,), whether there is a k^t; where not (no weight counts), U stays whatever a rule says
    initial_step_size  float32 (T,), U^0
    count              int32 (), t
    loss, epoch, ...   every argument of ``update`` that the transformation itself doesn't know

A sound rule raises U where K < R, lowers it where K > R and keeps it where they are equal (supplement of the paper).
A rule that remembers something is an object with the two methods of :class:`TransitionRule`.

Source: Lee et al., "Scheduling Weight Transitions for Quantization-Aware Training", ICCV 2025, and its official code.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxvision.core.errors import ConfigError, unknown

EPSILON = 1e-8
"""Added to the running rate before dividing by it (official code)."""


def momentum(target: jax.Array, running_rate: jax.Array, step_size: jax.Array, *, smoothing: float = 0.99) -> jax.Array:
    """U <- m U + (1 - m) U R / (K + 1e-8): the rule of the official code (supplement S2), and the default.

    The code keeps rho = U / U^0; the rule is linear in rho, so it is written on U itself and needs no memory, and a
    limit on U can't wind anything up. It can't leave U = 0.
    """
    return step_size * (smoothing + (1 - smoothing) * target / (running_rate + EPSILON))


def additive(
    target: jax.Array,
    running_rate: jax.Array,
    step_size: jax.Array,
    *,
    initial_step_size: jax.Array,
    eta: float | None = None,
) -> jax.Array:
    """U <- max(0, U + eta (R - K)), eta = U^0 by default: the rule of the paper (eq. 11).

    Slow: with eta = U^0 and rates of 1e-3 a relative change of 1e-3 a step; short runs want 10 to 50 U^0.
    """
    gain = initial_step_size if eta is None else eta
    return jnp.maximum(0.0, step_size + gain * (target - running_rate))


def multiplicative(target: jax.Array, running_rate: jax.Array, step_size: jax.Array) -> jax.Array:
    """U <- U R / (K + 1e-8): supplement S1; unstable with step schedules, and can't leave U = 0."""
    return step_size * target / (running_rate + EPSILON)


RULES: Mapping[str, Callable[..., jax.Array]] = {
    "momentum": momentum,
    "additive": additive,
    "multiplicative": multiplicative,
}


@runtime_checkable
class TransitionRule(Protocol):
    """A rule with memory. Its state is any tree of arrays; it is saved and restored with the optimizer's."""

    def init(self, initial_step_size: jax.Array) -> Any:
        """The state before the first step, from U^0 float32 (T,)."""
        ...

    def update(
        self,
        state: Any,
        target: jax.Array,
        running_rate: jax.Array,
        rate: jax.Array,
        count: jax.Array,
        **extra: Any,
    ) -> tuple[jax.Array, Any]:
        """U^t and the next state, from R^t, K^t, k^t float32 (T,) and t int32 ().

        ``extra`` as for functions, and ``step_size``: U^(t-1) float32 (T,), with the limits applied. What is
        remembered of a tensor should stay where ``measured`` is False: K stands still there, and a sum of its
        distance from R would wind up. (Of steps at which nothing is measured the state isn't kept at all.)
        """
        ...


@dataclass(frozen=True)
class FunctionRule:
    """The :class:`TransitionRule` of a function ``rule(target, running_rate, step_size, **extra)``: no memory."""

    function: Callable[..., jax.Array]

    def init(self, initial_step_size: jax.Array) -> tuple[()]:
        del initial_step_size
        return ()

    def update(self, state, target, running_rate, rate, count, *, step_size, **extra):
        extra = accepted(self.function, {**extra, "rate": rate, "count": count})
        return self.function(target, running_rate, step_size, **extra), state


def resolve(rule: Any, *, smoothing: Any, eta: Any) -> TransitionRule:
    """The rule of a name, of a function or of an object.

    Args:
      rule: a key of :data:`RULES`, a function or a :class:`TransitionRule`.
      smoothing: m of the momentum rule.
      eta: gain of the additive rule; None: U^0.

    Raises:
      ConfigError: an unknown name, an ``eta`` that the rule doesn't have, or something that isn't a rule.
    """
    if eta is not None and rule != "additive":
        raise ConfigError(f"eta={eta} is the gain of the rule 'additive', but the rule is {rule!r}; leave it out")
    if isinstance(rule, str):
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        settings = {"momentum": {"smoothing": smoothing}, "additive": {"eta": eta}}.get(rule, {})
        return FunctionRule(functools.partial(RULES[rule], **settings))
    if not isinstance(rule, type):
        if isinstance(rule, TransitionRule):
            return rule
        if callable(rule):
            return FunctionRule(rule)
    raise ConfigError(
        f"rule={rule!r} must be one of {', '.join(RULES)}, a function rule(target, running_rate, step_size, **extra) "
        "or an object with init and update"
    )


def accepted(function: Callable[..., Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Those extra arguments that ``function`` names; all, if it takes ``**extra``.

    Raises:
      ConfigError: it needs one that isn't there.
    """
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if needed and parameter.name not in extra:
            raise ConfigError(
                f"the transition rule needs the extra argument {parameter.name!r}; call "
                f"update(updates, state, params, {parameter.name}=...)"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(extra)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in extra.items() if name in names}
