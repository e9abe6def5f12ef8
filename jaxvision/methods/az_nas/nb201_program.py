"""AZ-NAS's proxies of any NAS-Bench-201 architecture by one compiled program: the operations are data.

Trainability needs each block's own VJP only, so the network is a scan over blocks: run one forward and backward, take
its statistics, drop it. Memory is one block's; no tape through the network, no gradient of weights.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import proxies
from jaxvision.methods.az_nas.nb201_cell import cell, convolve, normalise, reduction
from jaxvision.methods.az_nas.nb201_draws import Draws, Sizes, check, draw, unpack
from jaxvision.models import nas_bench_201_graph

Score = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]


def block_scores(
    architecture: jax.Array, draws: Draws, *, merge: bool = False, clamp: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Entropies [L + 1], singular values [L] and identity guards bool [L], of the stem's output and L blocks.

    Args:
      architecture: int32 [6].
      draws: weights, images and probes; float32, or float64 throughout.
      merge: masked kernels instead of conditionals, for ``jax.vmap``.
      clamp: of :func:`~jaxvision.methods.az_nas.proxies.spectrum_entropy`.
    """
    # The same numbers without the work: edges that lead nowhere carry and return exact zeros.
    architecture = nas_bench_201_graph.prune(architecture)
    entropy = partial(proxies.spectrum_entropy, clamp=clamp)

    def one_cell(x: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        kernels, packed = inputs
        probe = unpack(packed, x.shape).astype(x.dtype)
        y, g = cell(architecture, x, kernels, probe, merge=merge)
        return y, (entropy(y), proxies.block_singular_value(g, probe), proxies.is_identity(g, probe))

    x = normalise(convolve(draws.images, draws.weights.stem)).output
    entropies, sigmas, guards = [entropy(x)[None]], [], []
    for stage in range(3):
        x, found = lax.scan(one_cell, x, (draws.weights.stages[stage], draws.stage_probes[stage]))
        for values, new in zip((entropies, sigmas, guards), found, strict=True):
            values.append(new)
        if stage < 2:
            batch, height, width, channels = x.shape
            probe = unpack(draws.reduction_probes[stage], (batch, height // 2, width // 2, 2 * channels))
            kernels = draws.weights.reductions[stage]
            block = proxies.block_statistics(lambda x, kernels=kernels: reduction(x, *kernels), x, probe, clamp=clamp)
            x = block.features
            for values, new in zip((entropies, sigmas, guards), block[1:], strict=True):
                values.append(new[None])
    return jnp.concatenate(entropies), jnp.concatenate(sigmas), jnp.concatenate(guards)


def score_given(architecture: jax.Array, draws: Draws, *, merge: bool = False) -> dict[str, jax.Array]:
    """``expressivity``, ``progressivity`` and ``trainability`` float32 [] with given weights, images and probes."""
    return proxies.summarise(*block_scores(architecture, draws, merge=merge))


def make_score(sizes: Sizes, init: str = "kaiming_normal_in") -> Score:
    """``(architecture int32 [6], key) -> {name: float32 []}``, compiled once for all 15,625 architectures.

    Compute one architecture after the other on CPU (under ``jax.vmap`` every conditional runs all its branches).

    Args:
      sizes: resolution, batch size, width and cells a stage.
      init: of ``nb201_draws.INITS``.

    Raises:
      ConfigError: an unknown ``init``, a resolution that isn't a multiple of 4, or a size below 1.
    """
    check(sizes, init)

    @jax.jit
    def score(architecture: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        return score_given(architecture, draw(architecture, key, sizes, init))

    return score


def make_batched_score(
    sizes: Sizes, init: str = "kaiming_normal_in", *, together: int = 1, merge: bool = True
) -> Score:
    """``(architectures int32 [n, 6], keys [n]) -> {name: float32 [n]}``.

    The same numbers as :func:`make_score`'s with the same keys.

    Args:
      sizes: resolution, batch size, width and cells a stage.
      init: of ``nb201_draws.INITS``.
      together: how many architectures a step of the loop computes at once; memory grows by it.
      merge: masked kernels, batched over the architectures. False: conditionals, one architecture at a time.

    Raises:
      ConfigError: as in :func:`make_score`; or several ``together`` without ``merge``.
    """
    check(sizes, init)
    if together > 1 and not merge:
        raise ConfigError(f"together={together} needs merge=True: a batched conditional runs all its branches")

    def one(inputs: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        architecture, key = inputs
        return score_given(architecture, draw(architecture, key, sizes, init), merge=merge)

    @jax.jit
    def score(architectures: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        return lax.map(one, (architectures, keys), batch_size=together if together > 1 else None)

    return score
