"""How each arm chooses gamma, the clipping factor of a layer's gradients.

An arm first chooses gamma from the gradients G of the first batch (:data:`Choose`), and then

    lbt                  moves it every step: ``clip(gamma + beta sign(R - alpha / (2^b - 1)), 0.001, 1)``
    dsgc, whole_error    choose again every so many steps, from the gradients of that step's batch
    fixed, piecewise     leave it

The numbers that the members of an arm differ in (gamma, alpha, the width) are data, so that they share a program.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.engine.supervised import Controller
from jaxvision.quant import interval

Setting = Mapping[str, jax.Array]

Choose = Callable[[jax.Array, jax.Array, Setting], tuple[jax.Array, jax.Array]]
"""``(G of a layer, its width, the member's setting) -> (gamma, DSGC's distance or 0)``, float32 () each."""

LEAF = "gamma"
"""The name of a layer's leaf in the collection ``interval``."""
WIDTHS = "widths"
"""The name of a layer's leaf in the collection ``bits``: (weight, input, gradient)."""
FEWEST_PIECEWISE = 3
"""The piecewise quantizer is two quantizers with a bit less each."""


@dataclass(frozen=True)
class Control:
    """One way to choose gamma.

    Attributes:
      choose: gamma from gradients, at the start and at every search.
      grid: settings that it has a training for each of.
      kind: of the gradient quantizer.
      every: steps between two searches; 0: none after the start.
      beta: step of the controller; 0: gamma doesn't follow the clip ratio.
      freeze: the controller's last step; 0: never stops.
    """

    choose: Choose
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kind: str = "uniform"
    every: int = 0
    beta: float = 0.0
    freeze: int = 0

    @property
    def moves(self) -> bool:
        """Whether gamma changes while training."""
        return bool(self.every or self.beta)


def fixed(gammas: Sequence[float]) -> Control:
    """A constant gamma: 1 is min-max quantization."""
    return Control(lambda g, bits, setting: (setting["gamma"], jnp.zeros(())), {"gamma": tuple(gammas)})


def piecewise() -> Control:
    """Two quantizers of one bit less, wide and narrow, over +-gmax (stand-in of the authors' toolbox for IQB)."""
    return Control(lambda g, bits, setting: (jnp.ones(()), jnp.zeros(())), kind="piecewise")


def lbt(alphas: Sequence[float], beta: float, start: str, freeze: int = 0) -> Control:
    """The interval controller.

    Args:
      alphas: fractions of the gradients that count as large.
      beta: its step.
      start: "quantile", "search" or "one", see :func:`jaxvision.quant.interval.start_gamma`.
      freeze: steps after which gamma stays; 0: it never does.

    Raises:
      ConfigError: a value out of range.
    """
    for alpha in alphas:
        interval.check_controller(alpha, beta, start)

    def choose(g: jax.Array, bits: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
        return interval.start_gamma(g, start, bits, setting["alpha"]), jnp.zeros(())

    return Control(choose, {"alpha": tuple(alphas)}, beta=beta, freeze=freeze)


def dsgc(every: int, points: int, rate_factors: Sequence[float] = (0.0,)) -> Control:
    """The gamma of least cosine distance ``1 - <G, Q(G)> / (|G| |Q(G)|)`` on a grid of ``points`` from 0.05 to 1.

    ``rate_factors``: 1 scales the learning rate of a layer's kernel by max(exp(-20 d), 0.1), 0 doesn't.
    Source: Zhu et al., CVPR 2020; the factor from memory.
    """
    return Control(_search(interval.cosine_distance, points), {"rate_factor": tuple(rate_factors)}, every=every)


def whole_error(every: int, points: int) -> Control:
    """The gamma of least mean (Q(G) - G)^2 on the same grid."""
    return Control(_search(interval.squared_error, points), every=every)


def _search(measure: Callable[..., jax.Array], points: int) -> Choose:
    gammas = np.linspace(0.05, 1, points, dtype=np.float32)

    def choose(g: jax.Array, bits: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
        del setting
        return interval.least(measure, g, bits, gammas)

    return choose


# --- collections -----------------------------------------------------------------------------------------------------


def kernel_of(name: str) -> str:
    """``layer1_0/conv1/kernel`` for the leaf ``layer1_0/conv1/gamma``."""
    return f"{name.rsplit('/', 1)[0]}/kernel"


def gammas(collection: Any) -> dict[str, jax.Array]:
    """gamma float32 () of each kernel in a collection ``interval``."""
    return {kernel_of(name): leaf[0] for name, leaf in trees.named_leaves(collection).items()}


def with_gammas(collection: Any, values: Mapping[str, jax.Array]) -> Any:
    """The collection ``interval`` with these values: (gamma, 0, 0) float32 [3] a layer."""
    return trees.map_named(lambda name, leaf: _cell(values[kernel_of(name)]), collection)


def gradient_widths(collection: Any) -> dict[str, jax.Array]:
    """The gradient's width int32 () of each kernel in a collection ``bits``."""
    return {kernel_of(name): leaf[2] for name, leaf in trees.named_leaves(collection).items()}


def with_gradient_bits(collection: Any, bits: jax.Array, kernels: frozenset[str]) -> Any:
    """The collection ``bits`` with another width of the gradients of some kernels; ``bits`` int32 (), traced or not."""
    return trees.map_named(lambda name, leaf: leaf.at[2].set(bits) if kernel_of(name) in kernels else leaf, collection)


def choose(
    control: Control, gradients: Mapping[str, jax.Array], collections: Mapping[str, Any], setting: Setting
) -> tuple[Any, dict[str, jax.Array]]:
    """gamma of every layer from its gradient.

    Args:
      control: of the arm.
      gradients: by kernel, of :meth:`QuantizedNetwork.output_gradients`.
      collections: has ``interval`` and ``bits``.
      setting: of the member.

    Returns:
      The new collection ``interval``, and DSGC's distance of each kernel.
    """
    widths = gradient_widths(collections["bits"])
    found = {name: control.choose(gradients[name], widths[name], setting) for name in gammas(collections["interval"])}
    new = with_gammas(collections["interval"], {name: gamma for name, (gamma, _) in found.items()})
    return new, {name: jnp.asarray(distance, jnp.float32) for name, (_, distance) in found.items()}


def controller(control: Control, bits: Any, setting: Setting, count: jax.Array) -> Controller:
    """What :func:`supervised.train_step` does with the clip counts of a step.

    Args:
      control: of the arm.
      bits: the collection of that name.
      setting: of the member; ``alpha`` is used where the controller moves.
      count: int32 (), the arm's steps before this one.
    """
    widths = gradient_widths(bits)
    frozen = count >= control.freeze if control.freeze else False

    def update(values: Any, cotangent: Any) -> Any:
        if not control.beta:
            return values

        def one(name: str, value: jax.Array, counts: jax.Array) -> jax.Array:
            return _cell(
                interval.update_interval(
                    value[0],
                    counts[1],
                    counts[2],
                    widths[kernel_of(name)],
                    alpha=setting["alpha"],
                    beta=control.beta,
                    frozen=frozen,
                )
            )

        return trees.map_named(one, values, cotangent)

    return update


def _cell(gamma: jax.Array) -> jax.Array:
    zero = jnp.zeros((), jnp.float32)
    return jnp.stack([jnp.asarray(gamma, jnp.float32), zero, zero])
