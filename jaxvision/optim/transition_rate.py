"""Transition-rate scheduling: an optimizer for quantized networks that steers how many weights change level a step.

A learning rate doesn't control how fast a quantized weight moves: late in training latent weights lie at the transition
points, and a small rate still flips many. Here the target is the *transition rate* k, the fraction of weights whose
integer code changed since the last step, and a rule (:mod:`jaxvision.optim.transition_rules`) turns the difference
between the two into the step size U. With c the codes, d the direction of any optimizer, for each tensor of N weights:

    k^t = (1/N) sum_i [c_i^t != c_i^(t-1)]        K^t = m K^(t-1) + (1 - m) k^t
    U^t = rule(R^t, K^t, U^(t-1))                 W^(t+1) = W^t - U^t d^t

It needs the codes of the weights, nothing else, so it goes with any network and any quantizer:

>>> import jax, jax.numpy as jnp, optax
>>> from jaxvision.optim import sgdt, transition_metrics, transition_target
>>> x = jax.random.normal(jax.random.key(0), (256, 16))
>>> labels = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
>>> params = {
...     "hidden": 0.3 * jax.random.normal(jax.random.key(1), (16, 64)),
...     "head": jax.random.normal(jax.random.key(2), (64, 2)) / 8,
... }
>>> scales = {"hidden": jnp.float32(0.9), "head": None}
>>> def codes(w, scale):  # 2 bits: -2, -1, 0, 1
...     return jnp.round(jnp.clip(2 * w / scale, -2, 1)).astype(jnp.int32)
>>> def quantize(w, scale):  # straight-through
...     soft = jnp.clip(w / scale, -1, 0.5)
...     return soft + jax.lax.stop_gradient(codes(w, scale) / 2 - soft)
>>> def loss(params):
...     hidden = jax.nn.relu(x @ quantize(params["hidden"], scales["hidden"]))
...     logits = hidden @ params["head"]
...     return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
>>> latent = sgdt(transition_target(1e-2, bits=2, total=300), codes, rate_momentum=0.9)
>>> kinds = {"hidden": "latent", "head": "float"}
>>> optimizer = optax.partition({"latent": latent, "float": optax.sgd(0.5)}, kinds)
>>> @jax.jit
... def step(params, state):
...     value, gradient = jax.value_and_grad(loss)(params)
...     updates, state = optimizer.update(gradient, state, params, quantizers=scales)
...     return optax.apply_updates(params, updates), state, value
>>> state = optimizer.init(params)
>>> for _ in range(60):
...     params, state, value = step(params, state)
>>> seen = transition_metrics(state)
>>> bool(value < 0.4), bool(0.5 < seen["running_rate/hidden"] / seen["target/hidden"] < 2)
(True, True)

Source: Lee et al., "Scheduling Weight Transitions for Quantization-Aware Training", ICCV 2025 (arXiv 2404.19248), and
its official code, which is followed where the two disagree: the rule "momentum", a rate for each tensor, K^0 = R^0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.optim import latent, transition_rules

GRANULARITIES = ("tensor", "label", "model")

Tree = Any


class TransitionRateState(NamedTuple):
    """State of :func:`scale_by_transition_rate`: one byte a latent weight, and scalars.

    Trees have the structure of the parameters; float scalars are float32 (float64 where a latent weight is).

    Attributes:
      count: int32 (), completed updates: t, the schedule's own clock.
      codes: tree of int8, codes of the latent weights that the last update was computed for.
      codes_known: bool (), False before the first update and after :func:`reset_codes`: the next update then measures
        no rate and leaves K and U as they are.
      target: tree of (), R of the last update.
      rate: tree of (), k of the last update; 0 where it wasn't measured.
      running_rate: tree of (), K.
      step_size: tree of (), U.
      limited: tree of bool (), whether the last update held the rule's step size at min_step_size or max_step_size.
      rule_state: the rule's memory; () for rules that are functions.
    """

    count: jax.Array
    codes: Tree
    codes_known: jax.Array
    target: Tree
    rate: Tree
    running_rate: Tree
    step_size: Tree
    limited: Tree
    rule_state: Any


def scale_by_transition_rate(
    target: float | jax.Array | optax.Schedule,
    code_fn: latent.CodeFn | None = None,
    *,
    initial_step_size: float | jax.Array,
    momentum: float = 0.99,
    rule: str | Callable[..., jax.Array] | transition_rules.TransitionRule = "momentum",
    eta: float | None = None,
    initial_rate: float | None = None,
    granularity: str = "tensor",
    labels: Tree | Callable[[Tree], Tree] | None = None,
    target_scale: Tree | Callable[[Tree], Tree] | None = None,
    min_step_size: float | None = None,
    max_step_size: float | None = None,
    quantizers: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies a direction by -U, the step size with which the transition rate follows its target.

    The last of a chain, in place of ``optax.scale_by_learning_rate``; all parameters it is shown are latent weights
    (hide others with ``optax.partition`` or ``optax.masked``). Within step t: codes of W^t, k, K, U, update; so K^t
    reflects the update of step t - 1. At t = 0 nothing is known of the rate: the step size is U^0, K and U stay.

    Extra arguments of ``update``:
      quantizers: overrides what is bound here.
      target_rate: (), overrides R^t.
      element_mask: tree of bool arrays (None: all); weights left out neither move nor count. A tensor without any that
        counts keeps K and U; a rule's memory is the rule's own matter (its argument ``measured``).
      everything else: for the rule.

    Args:
      target: R^t: a schedule of t (:func:`transition_target`) or a number in [0, 1]. At 0 the rules "momentum" and
        "multiplicative" let U go to 0: the weights freeze.
      code_fn: ``code_fn(weight, quantizer)`` -> integer codes, those of the forward pass; None: ``quantizer.codes``.
      initial_step_size: U^0, the learning rate the plain optimizer would start with, within the limits. May be traced,
        and then isn't compared with them: the first step is taken with it as it is.
      momentum: m of K, and of the rule "momentum". 0.99 remembers 100 steps; runs below 1000 steps want 0.9.
      rule: "momentum", "additive", "multiplicative" or your own: :mod:`jaxvision.optim.transition_rules`.
      eta: gain of the rule "additive"; None: U^0.
      initial_rate: K^0; None: R^0.
      granularity: over which weights k is taken: a "tensor", all tensors of a "label", or the "model". Tensors with
        fewer than some 1 / R weights can't follow a target on their own.
      labels: for "label": tree of labels, or a function of the parameters that returns one.
      target_scale: tree of factors of R for each tensor, or a function of the parameters that returns one.
      min_step_size, max_step_size: limits of U. No rule has an upper limit of its own: U grows while nothing moves.
      quantizers: tree with the structure of the parameters: for each latent weight what ``code_fn`` takes, None
        elsewhere (inside ``optax.partition`` whole, or masked by ``mask_compatible_extra_args=True``: both are
        understood). Usually an argument of ``update``; bind it here where a training step can't pass one.

    Raises:
      ConfigError: a number out of range or an unknown name, at once; a latent weight that isn't float32 or float64, no
        quantizer, codes that aren't integers, a tree of another structure: when first traced.
    """
    _check_settings(target, initial_step_size, momentum, eta, initial_rate, min_step_size, max_step_size)
    _check_granularity(granularity, labels)
    rule = transition_rules.resolve(rule, smoothing=momentum, eta=eta)

    def targets(params, count, override, like):
        rate = override if override is not None else target(count) if callable(target) else target
        factors = 1.0 if target_scale is None else _stack(_per_tensor("target_scale", target_scale, params))
        return jnp.broadcast_to(jnp.asarray(rate * factors, like.dtype), like.shape)

    def init(params):
        weights = list(latent.latent_weights(params).values())
        scalars = _scalars_like(params)
        step_size = jnp.full(len(weights), initial_step_size, jnp.result_type(jnp.float32, *weights))
        goal = targets(params, jnp.zeros((), jnp.int32), None, step_size)
        return TransitionRateState(
            count=jnp.zeros((), jnp.int32),
            codes=jax.tree.map(lambda weight: jnp.zeros_like(weight, jnp.int8), params),
            codes_known=jnp.zeros((), bool),
            target=scalars(goal),
            rate=scalars(jnp.zeros_like(step_size)),
            running_rate=scalars(goal if initial_rate is None else jnp.full_like(goal, initial_rate)),
            step_size=scalars(step_size),
            limited=scalars(jnp.zeros(len(weights), bool)),
            rule_state=rule.init(step_size),
        )

    def update(updates, state, params=None, *, quantizers=quantizers, target_rate=None, element_mask=None, **extra):
        codes = latent.codes(code_fn, params, quantizers)
        masks = [None] * len(codes) if element_mask is None else latent.aligned("element_mask", element_mask, params)
        before, step_size = _stack(jax.tree.leaves(state.running_rate)), _stack(jax.tree.leaves(state.step_size))

        groups = _groups(granularity, labels, params)
        changed, sizes = _count_changes(codes, jax.tree.leaves(state.codes), masks, groups, before.dtype)
        measured = state.codes_known & (sizes > 0)
        rate = jnp.where(measured, changed / jnp.maximum(sizes, 1), 0)
        running_rate = jnp.where(measured, momentum * before + (1 - momentum) * rate, before)

        goal = targets(params, state.count, target_rate, before)
        extra |= {"step_size": step_size, "initial_step_size": jnp.full_like(step_size, initial_step_size)}
        extra["measured"] = jnp.broadcast_to(measured, step_size.shape)
        extra = transition_rules.accepted(rule.update, extra)
        wanted, memory = rule.update(state.rule_state, goal, running_rate, rate, state.count, **extra)
        held = jnp.clip(wanted, min_step_size, max_step_size)
        limited = jnp.broadcast_to(measured & (held != wanted), before.shape)
        step_size = jnp.where(measured, held, step_size).astype(before.dtype)

        directions, treedef = jax.tree.flatten(updates)
        scaled = [_scale(*each) for each in zip(directions, jnp.unstack(step_size), masks, strict=True)]
        scalars = _scalars_like(params)
        return treedef.unflatten(scaled), TransitionRateState(
            count=optax.safe_increment(state.count),
            codes=jax.tree.unflatten(jax.tree.structure(params), codes),
            codes_known=jnp.ones((), bool),
            target=scalars(goal),
            rate=scalars(rate),
            running_rate=scalars(running_rate),
            step_size=scalars(step_size),
            limited=scalars(limited),
            rule_state=optax.tree.where(state.codes_known, memory, state.rule_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def transition_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """What the transition-rate states anywhere inside an optimizer's state last saw, for logging. Traceable.

    Returns:
      For each latent tensor, named as ``running_rate/block1/conv/kernel``: scalars ``target`` R, ``rate`` k,
      ``running_rate`` K, ``step_size`` U, and ``limited`` (bool).

    Raises:
      ConfigError: there is no such state.
    """
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
    if not states:
        raise ConfigError("this optimizer state has no TransitionRateState in it; was scale_by_transition_rate used?")
    quantities = ("target", "rate", "running_rate", "step_size", "limited")
    return {
        f"{quantity}/{name}": value
        for state in states
        for quantity in quantities
        for name, value in trees.named_leaves(getattr(state, quantity)).items()
    }


def reset_codes(opt_state: Any, params: Tree, quantizers: Tree | None, code_fn: latent.CodeFn | None = None) -> Any:
    """The optimizer state after scales were replaced or loaded, so that codes that moved with them aren't counted.

    The next update measures no rate and leaves K and U, as the first one of a run does. Scales that an optimizer trains
    need no reset: codes that move with them are transitions.

    Args:
      opt_state: any optimizer state; the transition-rate states inside it are found.
      params: the parameters, whole.
      quantizers, code_fn: the new ones, as for :func:`scale_by_transition_rate`.
    """

    def reset(state):
        if not _is_state(state):
            return state
        codes = latent.codes(code_fn, latent.hide_like(state.codes, params), quantizers)
        tree = jax.tree.unflatten(jax.tree.structure(state.codes), codes)
        return state._replace(codes=tree, codes_known=jnp.zeros((), bool))

    return jax.tree.map(reset, opt_state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, TransitionRateState)


def _groups(granularity: str, labels: Tree | Callable[[Tree], Tree] | None, params: Tree) -> np.ndarray:
    """bool (T, T): do two latent tensors share their rate?"""
    number = len(jax.tree.leaves(params))
    if granularity == "label":
        group = np.asarray([str(label) for label in _per_tensor("labels", labels, params)])
    else:
        group = np.arange(number) if granularity == "tensor" else np.zeros(number)
    return group[:, None] == group[None, :]


def _count_changes(codes, previous, masks, groups, dtype):
    """Of each tensor's group: codes that differ, and codes that count; float (T,), exact below 2^24 (2^31 in all)."""

    def changes(new, old, mask):
        differs = new != old
        return jnp.sum(differs if mask is None else differs & mask, dtype=jnp.int32)

    def size(code, mask):
        return jnp.asarray(code.size if mask is None else jnp.sum(mask, dtype=jnp.int32), dtype)

    # Counts are stacked before they are summed over groups: integers, so no order of devices or tensors shows.
    counts = _stack([changes(*each) for each in zip(codes, previous, masks, strict=True)], jnp.int32)
    sizes = _stack([size(*each) for each in zip(codes, masks, strict=True)], dtype)
    pool = lambda values: jnp.sum(jnp.where(groups, values, 0), axis=1).astype(dtype)  # noqa: E731
    return pool(counts), pool(sizes)


def _scale(direction: jax.Array, step_size: jax.Array, mask: jax.Array | None) -> jax.Array:
    update = (-step_size * direction).astype(direction.dtype)
    return update if mask is None else jnp.where(mask, update, jnp.zeros_like(update))


def _per_tensor(what: str, tree: Tree | Callable[[Tree], Tree], params: Tree) -> list[Any]:
    return latent.aligned(what, tree(params) if callable(tree) else tree, params)


def _stack(values: list[jax.Array], dtype: Any = None) -> jax.Array:
    # A group of optax.partition may be empty.
    return jnp.stack(values) if values else jnp.zeros((0,), dtype)


def _scalars_like(params: Tree) -> Callable[[jax.Array], Tree]:
    """The function from a vector (T,) to the tree of its entries."""
    treedef = jax.tree.structure(params)
    return lambda vector: treedef.unflatten(jnp.unstack(vector))


def _check_settings(target, initial_step_size, momentum, eta, initial_rate, min_step_size, max_step_size):
    def check(name, value, ok, wanted):
        # Arrays (inject_hyperparams, a learning rate that is traced) have no value to look at.
        if isinstance(value, int | float) and not ok(value):
            raise ConfigError(f"the transition rate's {name} is {value}, but must be {wanted}")

    fraction = (lambda value: 0 <= value <= 1, "a fraction of weights, from 0 to 1")
    positive = (lambda value: 0 < value < math.inf, "a finite number above 0")
    check("target", target, *fraction)
    check("initial_rate", initial_rate, *fraction)
    check("momentum", momentum, lambda value: 0 <= value < 1, "at least 0 and below 1")
    check("initial_step_size", initial_step_size, *positive)
    check("eta", eta, *positive)
    check("min_step_size", min_step_size, lambda value: value >= 0, "at least 0")
    check("max_step_size", max_step_size, *positive)
    low = 0.0 if min_step_size is None else min_step_size
    high = math.inf if max_step_size is None else max_step_size
    if isinstance(low, int | float) and isinstance(high, int | float):
        check("min_step_size", low, lambda value: value <= high, f"at most max_step_size, which is {high}")
        check("initial_step_size", initial_step_size, lambda value: low <= value <= high, f"from {low} to {high}")


def _check_granularity(granularity: str, labels: Any) -> None:
    if granularity not in GRANULARITIES:
        raise unknown("granularity", granularity, GRANULARITIES)
    if (granularity == "label") != (labels is not None):
        raise ConfigError(
            f"granularity={granularity!r} and labels {'given' if labels is not None else 'not given'}: labels go with "
            "granularity='label', and only with it"
        )
