"""NAS-Bench-201's network as a pure function of an architecture that is data: one program for all 15,625 cells."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import supernet_layers as layers
from jaxvision.methods.az_nas.supernet_init import STAGES, Params
from jaxvision.methods.az_nas.supernet_layers import BATCH, GIVEN, OFF
from jaxvision.models.nas_bench_201 import CONV_1X1, CONV_3X3, EDGES

Statistics = dict[str, Any]

NODES = 4
MOMENTUM = 0.1
"""Weight of a new batch in running statistics, as PyTorch's."""
_HALVINGS = {"stem": 0, "stage1": 0, "reduction1": 1, "stage2": 1, "reduction2": 2, "stage3": 2, "last": 2}
"""How often the pixels were halved before a normalisation."""


class Output(NamedTuple):
    """What a forward pass yields.

    Attributes:
      logits: float32 [B, K].
      features: float32 [B, H / 4, W / 4, 4 C], after the last ReLU, before pooling.
      statistics: ``mean`` and (biased) ``var`` float32 [..., C] of each normalisation, in the structure of
        :func:`initial_statistics`; constants to a gradient.
      agreement: float32 [B, B], over all ReLUs the number of units that are positive in both images or in neither;
        None where it isn't asked for.
      log_scale: float32 [], ln of what the activations were divided by; 0 with normalisations.
    """

    logits: jax.Array
    features: jax.Array
    statistics: Statistics
    agreement: jax.Array | None
    log_scale: jax.Array


class _Tally(NamedTuple):
    """What adds up along the network: agreement and log_scale of :class:`Output`."""

    agreement: jax.Array
    log_scale: jax.Array


def initial_statistics(params: Params) -> Statistics:
    """Running statistics at the start: ``mean`` 0 and ``var`` 1 for each scale, of its shape and dtype."""
    scales = {name: leaf for name, leaf in trees.named_leaves(params).items() if name.endswith("/scale")}
    means = {name.replace("/scale", "/mean"): jnp.zeros_like(leaf) for name, leaf in scales.items()}
    variances = {name.replace("/scale", "/var"): jnp.ones_like(leaf) for name, leaf in scales.items()}
    return trees.nested(means | variances)


def updated(running: Statistics, found: Statistics, images: tuple[int, ...]) -> Statistics:
    """Running statistics after a batch: ``0.9 running + 0.1 found``, the variances unbiased, as PyTorch's.

    Args:
      running: as :func:`initial_statistics` makes them.
      found: of :class:`Output`.
      images: the batch's shape (B, H, W, C).

    Raises:
      ConfigError: a single pixel left after two reductions, of a single image: no variance.
    """
    count = {halvings: images[0] * (images[1] >> halvings) * (images[2] >> halvings) for halvings in range(STAGES)}
    if count[2] < 2:
        raise ConfigError(f"images {images} leave one value a channel to normalise over; use larger ones, or more")

    def update(name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        of = count[_HALVINGS[name.split("/")[0]]]
        return old + MOMENTUM * ((new * of / (of - 1) if name.endswith("/var") else new) - old)

    return trees.map_named(update, running, found)


def apply(
    params: Params,
    architecture: jax.Array,
    images: jax.Array,
    *,
    running: Statistics | None = None,
    normalised: bool = True,
    agreement: bool = False,
) -> Output:
    """The network of one architecture.

    Stem, N cells, reduction, N cells, reduction, N cells, normalisation, ReLU, mean over the pixels, linear layer. A
    node of a cell is the sum of its edges. Differentiable once in reverse mode, and then forward over reverse
    (``jax.jvp`` of ``jax.grad``).

    Args:
      params: as :func:`init` makes them.
      architecture: int32 [6], may be traced.
      images: float32 [B, H, W, channels]; H and W multiples of 4.
      running: statistics to normalise with, without gradients; None: the batch's own.
      normalised: False: every normalisation is left out, scale and bias included, and so that nothing overflows each
        cell's output is divided by its largest absolute value, a constant to gradients (SynFlow).
      agreement: whether to count it.

    Returns:
      See :class:`Output`. Source: the official code's ``tss_model``.
    """
    statistics = OFF if not normalised else GIVEN if running is not None else BATCH
    given = initial_statistics(params) if running is None else running
    net, found = _Network(architecture, statistics, agreement), {}
    x, found["stem"] = net.normalise(layers.convolve(images, params["stem"]["kernel"]), params["stem"], given["stem"])
    tally = _Tally(jnp.zeros((len(images), len(images)), x.dtype), jnp.zeros((), x.dtype))
    for stage in range(1, STAGES + 1):
        if stage > 1:
            name = f"reduction{stage - 1}"
            x, found[name], tally = net.reduce(x, params[name], given[name], tally)
        name = f"stage{stage}"
        x, found[name], tally = net.cells(x, params[name], given[name], tally)
    x, found["last"] = net.normalise(x, params["last"], given["last"])
    tally = net.count(tally, x)
    x = jax.nn.relu(x)
    logits = jnp.mean(x, (1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return Output(logits, x, found, tally.agreement if agreement else None, tally.log_scale)


@dataclass(frozen=True, eq=False)
class _Network:
    """The parts of one forward pass.

    Attributes:
      architecture: int32 [6].
      statistics: see :mod:`supernet_layers`.
      counts: whether agreements are counted.
    """

    architecture: jax.Array
    statistics: str
    counts: bool

    def normalise(self, x: jax.Array, params: Params, given: Statistics) -> tuple[jax.Array, Statistics]:
        """A normalisation outside the cells, scaled and shifted, and its moments."""
        x, (mean, var) = layers.normalise(x, (given["mean"], given["var"]), self.statistics)
        if self.statistics != OFF:
            x = x * params["scale"] + params["bias"]
        return x, jax.lax.stop_gradient({"mean": mean, "var": var})

    def count(self, tally: _Tally, x: jax.Array, times: jax.Array | float = 1.0) -> _Tally:
        """Adds the agreement of a ReLU's input, ``(units + s s^T) / 2`` with signs s of +-1; exact to 2^24 units."""
        if not self.counts:
            return tally
        signs = jnp.where(x.reshape(len(x), -1) > 0, 1, -1).astype(x.dtype)
        agreement = (signs.shape[1] + jnp.matmul(signs, signs.T, precision="highest")) / 2
        return tally._replace(agreement=tally.agreement + times * agreement)

    def rescale(self, tally: _Tally, x: jax.Array) -> tuple[jax.Array, _Tally]:
        """Without normalisations: x over its largest absolute value, and the logarithm of that added."""
        if self.statistics != OFF:
            return x, tally
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
        largest = jnp.where(largest > 0, largest, 1)
        return x / largest, tally._replace(log_scale=tally.log_scale + jnp.log(largest))

    def reduce(self, x: jax.Array, params: Params, given: Statistics, tally: _Tally) -> tuple[jax.Array, Any, _Tally]:
        """Half the pixels, twice the channels: two convolutions, and a pooled 1x1 shortcut added."""
        found = {}
        tally = self.count(tally, x)
        y = layers.convolve(jax.nn.relu(x), params["first"]["kernel"], stride=2)
        y, found["first"] = self.normalise(y, params["first"], given["first"])
        tally = self.count(tally, y)
        y = layers.convolve(jax.nn.relu(y), params["second"]["kernel"])
        y, found["second"] = self.normalise(y, params["second"], given["second"])
        batch, height, width, channels = x.shape
        pooled = jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), (2, 4))
        return y + pooled @ params["shortcut"]["kernel"][0, 0], found, tally

    def cells(self, x: jax.Array, params: Params, given: Statistics, tally: _Tally) -> tuple[jax.Array, Any, _Tally]:
        """The N cells of a stage, a scan over cells and, in it, over edges."""
        convolution = (self.architecture == CONV_1X1) | (self.architecture == CONV_3X3)
        to, source = (jnp.asarray(column, jnp.int32) for column in zip(*EDGES, strict=True))
        leaving = jnp.zeros(NODES, x.dtype).at[source].add(convolution.astype(x.dtype))

        def edge(nodes: jax.Array, it: Any) -> tuple[jax.Array, Statistics]:
            params, given, operation, convolution, to, source = it
            y, (mean, var) = layers.edge(
                nodes[source], params["kernel"], operation, (given["mean"], given["var"]), self.statistics
            )
            if self.statistics != OFF:
                y = y * jnp.where(convolution, params["scale"], 1) + jnp.where(convolution, params["bias"], 0)
            return nodes.at[to].add(y), {"mean": mean, "var": var}

        def cell(carry: Any, it: Any) -> tuple[Any, Statistics]:
            (x, tally), (params, given) = carry, it
            nodes = jnp.zeros((NODES, *x.shape), x.dtype).at[0].set(x)
            nodes, found = jax.lax.scan(edge, nodes, (params, given, self.architecture, convolution, to, source))
            for node in range(NODES - 1):
                tally = self.count(tally, nodes[node], leaving[node])
            return self.rescale(tally, nodes[-1]), found

        (x, tally), found = jax.lax.scan(cell, (x, tally), (params, given))
        return x, found, tally
