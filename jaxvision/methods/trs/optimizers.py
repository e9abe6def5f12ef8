"""The optimizer of an arm: one group each for latent weights, float weights, normalisation, scales.

    latent   the kernels that are quantized    base rate, or a step size that follows the transition rate
    float    other kernels, biases, embeddings base rate, momentum, weight decay
    norm     gains and biases of normalisation base rate, no decay, no momentum; ReActNet's shifts and slopes too
    scale    what quantizers learn             a rate of their own, no decay, no momentum
    clip     PACT's bound                      as scale, with weight decay (the paper regularises it)
    frozen   the kernel's scales, under TRS    nothing: otherwise levels would move without the weights

Adam's arms use Adam in every group. All rates have the same shape over time. Source: official code, ``run.sh`` and
``custom_optims.py``; the groups of normalisation and scales without momentum are the code's.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from jaxvision.core import trees
from jaxvision.methods.trs.diagnostics import scale_of_output
from jaxvision.methods.trs.variants import Variant
from jaxvision.models.quantized_attention import PREFIX
from jaxvision.optim import adamt, adamwt, freeze_oscillating, optimizers, schedules, sgdt

GROUPS = ("latent", "float", "norm", "scale", "clip", "frozen")


def label(name: str, latent: Collection[str], siblings: Collection[str], *, freeze_scales: bool) -> str:
    """The group of a parameter.

    Args:
      name: ``layer1_0/conv1/kernel``.
      latent: names of the quantized kernels.
      siblings: names of all parameters.
      freeze_scales: whether the scales of kernels stay at their start values.
    """
    scope, _, leaf = name.rpartition("/")
    kernel = f"{scope}/kernel" if scope else "kernel"
    if name in latent:
        return "latent"
    if kernel in latent and leaf.startswith("kernel_"):
        return "frozen" if freeze_scales else "scale"
    if kernel in latent and leaf == "input_alpha":
        return "clip"
    if kernel in latent and leaf.startswith(("input_", "output_")):
        return "scale"
    if leaf.startswith(PREFIX):  # of the products of attention
        return "clip" if leaf.endswith("_alpha") else "scale"
    if leaf in ("scale", "bias", "slope") and kernel not in siblings:
        return "norm"
    return "float"


def labels(params: Any, latent: Collection[str], *, freeze_scales: bool) -> Any:
    """The tree of groups of a tree of parameters; see :func:`label`."""
    names = trees.named_leaves(params)
    return trees.map_named(lambda name, _: label(name, latent, names, freeze_scales=freeze_scales), params)


@dataclass(frozen=True)
class Recipe:
    """What the arms of a run share.

    Attributes:
      shape: t -> factor of every rate and target, 1 at the start.
      momentum, nesterov: of SGD, on latent and float weights.
      b1, b2, eps: of Adam.
      weight_decay: on latent and float weights.
      scale_lr: rate of the scales.
      control: of ``scale_by_transition_rate`` (granularity, limits, ...), without target, rule and U^0.
      target_factors: latent weight's name -> factor of the target; where it has none: 1.
      rate_momentum: m of the running rate.
      eta: gain of the rule "additive"; None: U^0.
      freezing: threshold as a function of t.
      freezing_momentum: of the frequency of oscillation.
      oscillation: measure it in every arm, at 11 bytes a latent weight; the arm that freezes always does.
    """

    shape: optax.Schedule
    momentum: float = 0.9
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    scale_lr: float = 1e-2
    control: dict[str, Any] = field(default_factory=dict)
    target_factors: Mapping[str, float] = field(default_factory=dict)
    rate_momentum: float = 0.99
    eta: float | None = None
    freezing: optax.Schedule = field(default_factory=lambda: schedules.constant(0.01))
    freezing_momentum: float = 0.01
    oscillation: bool = True

    def measures_oscillation(self, variant: Variant) -> bool:
        """Whether an arm's optimizer has a detector of oscillation in it."""
        return self.oscillation or variant.remedy == "freezing"


def build(
    variant: Variant, recipe: Recipe, latent: Collection[str], lr: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of an arm; ``update`` takes ``quantizers=`` (``QuantizedNetwork.quantizers``).

    Args:
      variant: the arm.
      recipe: of the run.
      latent: names of the quantized kernels.
      lr: base rate and U^0, float32 (), traceable.
    """

    def rate(peak: float | jax.Array) -> optax.Schedule:
        return lambda count: peak * recipe.shape(count)

    def plain(peak: float | jax.Array, *, momentum: float, decay: float, name: str) -> optax.GradientTransformation:
        if name == "sgd":
            nesterov = recipe.nesterov and momentum > 0
            return optimizers.sgd(rate(peak), momentum, nesterov, weight_decay=decay)
        rule = {"adam": optimizers.adam, "adamw": optimizers.adamw}[name]
        return rule(rate(peak), recipe.b1, recipe.b2, recipe.eps, weight_decay=decay)

    name = variant.optimizer
    whole = plain(lr, momentum=recipe.momentum, decay=recipe.weight_decay, name=name)
    if variant.scheduled:
        moving = _scheduled(variant, recipe, lr)
    else:
        moving = whole
    if recipe.measures_oscillation(variant):
        threshold = recipe.freezing if variant.remedy == "freezing" else None
        held = freeze_oscillating(
            threshold=threshold, momentum=recipe.freezing_momentum, latent_fn=_grid_point if threshold else None
        )
        moving = optax.chain(moving, held)
    groups = {
        "latent": moving,
        "float": whole,
        "norm": plain(lr, momentum=0.0, decay=0.0, name=name),
        "scale": plain(recipe.scale_lr, momentum=0.0, decay=0.0, name=name),
        "clip": plain(recipe.scale_lr, momentum=0.0, decay=recipe.weight_decay, name=name),
        "frozen": optax.set_to_zero(),
    }
    group_of: Callable[[Any], Any] = lambda params: labels(params, latent, freeze_scales=variant.scheduled)  # noqa: E731
    return optax.partition(groups, group_of, mask_compatible_extra_args=True)


def _scheduled(variant: Variant, recipe: Recipe, lr: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """The latent weights' optimizer with its transition rate scheduled."""
    factor = lambda name, _: recipe.target_factors.get(name, 1.0)  # noqa: E731
    control = {
        **recipe.control,
        "initial_step_size": lr,
        "rate_momentum": recipe.rate_momentum,
        "rule": variant.rule,
        "weight_decay": recipe.weight_decay,
        "target_scale": functools.partial(trees.map_named, factor) if recipe.target_factors else None,
        "eta": recipe.eta if variant.rule == "additive" else None,
    }
    target = lambda count: variant.target * recipe.shape(count)  # noqa: E731
    if variant.optimizer == "sgd":
        return sgdt(target, momentum=recipe.momentum, nesterov=recipe.nesterov, **control)
    make = {"adam": adamt, "adamw": adamwt}[variant.optimizer]
    return make(target, b1=recipe.b1, b2=recipe.b2, eps=recipe.eps, **control)


def _grid_point(codes: jax.Array, quantizer: Any) -> jax.Array:
    """The latent weight that stands for a code: where a frozen weight is put."""
    return codes * quantizer.step() * scale_of_output(quantizer)
