"""AZ-NAS's proxies of any AutoFormer architecture of one embedding width by one compiled program.

Depth, heads and MLP ratios are data: a loop runs over the blocks there are, and what a block lacks is masked. The
embedding's width shapes the spectra and the layer normalisations, so each of a space's three widths has its program.
Weights are slices of one random supernet. Memory is that of half a block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvision.methods.az_nas import proxies
from jaxvision.methods.az_nas.nb201_draws import unpack, words
from jaxvision.models.attention import merge_heads
from jaxvision.models.autoformer import EPS, TABLE_SIZE, TABLES, relative_attention, relative_positions
from jaxvision.models.autoformer_architecture import HEAD_WIDTH
from jaxvision.models.mlp import gelu, truncated_normal

Probes = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Supernet(NamedTuple):
    """The largest network of a space: width D, H heads, inner width M, L blocks; the classifier plays no part.

    Attributes:
      patch: kernel float32 [p, p, 3, D].
      patch_bias: float32 [D].
      cls_token: float32 [D].
      pos_embed: float32 [N, D], N patches and the class token.
      blocks: by name, of all blocks, float32: ``ln1_scale``, ``ln1_bias``, ``ln2_scale``, ``ln2_bias`` [L, D];
        ``qkv_kernel`` [L, D, 3 64 H], whose columns are q, k, v, q, k, v ... in turn; ``qkv_bias`` [L, 3 64 H], all of
        q, then k, then v of the heads in use; ``rel_k_v``, ``rel_k_h``, ``rel_v_v``, ``rel_v_h`` [L, 30, 64];
        ``proj_kernel`` [L, 64 H, D], ``proj_bias`` [L, D]; ``fc1_kernel`` [L, D, M], ``fc1_bias`` [L, M],
        ``fc2_kernel`` [L, M, D], ``fc2_bias`` [L, D].
    """

    patch: jax.Array
    patch_bias: jax.Array
    cls_token: jax.Array
    pos_embed: jax.Array
    blocks: dict[str, jax.Array]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def init(key: jax.Array, width: int, heads: int, inner: int, depth: int, patches: int, patch_size: int) -> Supernet:
    """Official initial values: N(0, 0.02^2), biases 0, scales 1; the patch convolution U(+-1 / sqrt(fan_in)).

    Args:
      key: typed key.
      width, heads, inner, depth: D, H, M, L of :class:`Supernet`.
      patches: of an image.
      patch_size: p.
    """
    normal, keys = truncated_normal(0.02), iter(jax.random.split(key, 8 + len(TABLES)))
    attention, bound = HEAD_WIDTH * heads, (3 * patch_size**2) ** -0.5
    kernels = {"qkv": (width, 3 * attention), "proj": (attention, width), "fc1": (width, inner), "fc2": (inner, width)}
    blocks = {name: normal(next(keys), (depth, TABLE_SIZE, HEAD_WIDTH)) for name in TABLES}
    for name, shape in kernels.items():
        blocks[f"{name}_kernel"] = normal(next(keys), (depth, *shape))
        blocks[f"{name}_bias"] = jnp.zeros((depth, shape[1]))
    for name in ("ln1", "ln2"):
        blocks[f"{name}_scale"], blocks[f"{name}_bias"] = jnp.ones((depth, width)), jnp.zeros((depth, width))
    return Supernet(
        jax.random.uniform(next(keys), (patch_size, patch_size, 3, width), minval=-bound, maxval=bound),
        jax.random.uniform(next(keys), (width,), minval=-bound, maxval=bound),
        normal(next(keys), (width,)),
        normal(next(keys), (patches + 1, width)),
        blocks,
    )


def embed(supernet: Supernet, images: jax.Array, width: int) -> jax.Array:
    """Tokens [B, N, width] of images [B, H, W, 3], the class token first."""
    kernel = supernet.patch[..., :width]
    x = lax.conv_general_dilated(images, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = x.reshape(len(images), -1, width) + supernet.patch_bias[:width]
    token = jnp.broadcast_to(supernet.cls_token[:width], (len(images), 1, width))
    return jnp.concatenate([token, x], 1) + supernet.pos_embed[:, :width]


def attention_half(
    block: dict[str, jax.Array], x: jax.Array, heads: jax.Array, positions: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """``x + proj(attention(LN x))`` with the first ``heads`` heads of a block of the supernet.

    Args:
      block: of :class:`Supernet`, without the axis L.
      x: [B, N, E], E the first channels of the supernet's.
      heads: int32 [].
      positions: vertical and horizontal table entries, int32 [N, N] each.
    """
    width = x.shape[-1]
    attention = block["proj_kernel"].shape[0]
    y = _layer_norm(x, block["ln1_scale"], block["ln1_bias"])

    def part(number: int) -> jax.Array:
        # Kernel columns are interleaved, biases are not; the official code slices them so.
        bias = lax.dynamic_slice_in_dim(block["qkv_bias"], number * HEAD_WIDTH * heads, attention)
        z = y @ block["qkv_kernel"][:width, number::3] + bias
        return z.reshape(*x.shape[:2], -1, HEAD_WIDTH).transpose(0, 2, 1, 3)

    k_v, k_h, v_v, v_h = (block[name] for name in TABLES)
    vertical, horizontal = positions
    out = relative_attention(*map(part, range(3)), k_v[vertical] + k_h[horizontal], v_v[vertical] + v_h[horizontal])
    # Behind the attention: a head without values would still add its relative positions.
    out = jnp.where(jnp.arange(attention) < HEAD_WIDTH * heads, merge_heads(out), 0)
    return x + out @ block["proj_kernel"][:, :width] + block["proj_bias"][:width]


def mlp_half(block: dict[str, jax.Array], x: jax.Array, hidden: jax.Array) -> jax.Array:
    """``x + fc2(gelu(fc1(LN x)))`` of [B, N, E] with the first ``hidden`` (int32 []) channels inside."""
    width = x.shape[-1]
    y = _layer_norm(x, block["ln2_scale"], block["ln2_bias"])
    y = gelu(y @ block["fc1_kernel"][:width] + block["fc1_bias"])
    y = jnp.where(jnp.arange(y.shape[-1]) < hidden, y, 0)
    return x + y @ block["fc2_kernel"][:, :width] + block["fc2_bias"][:width]


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    width = x.shape[-1]
    return centred * lax.rsqrt(variance + EPS) * scale[:width] + bias[:width]


def measure(
    supernet: Supernet,
    images: jax.Array,
    depth: jax.Array,
    heads: jax.Array,
    hidden: jax.Array,
    probes: Probes,
    *,
    width: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs a subnet and takes what the proxies need from both halves of each block.

    Args:
      supernet: of at least the subnet's sizes.
      images: float32 [B, H, W, 3].
      depth: int32 [], at most L.
      heads, hidden: int32 [L], of each block; not read behind ``depth``.
      probes: (number of a feature, shape) -> +-1.
      width: E of the subnet.

    Returns:
      The subnet's tokens [B, N, E], the 2 L features' entropies, the singular values of their Jacobians with respect
      to the feature before (the first is the embedding's, which isn't counted) and whether those are identities; zeros
      and False behind ``depth``.
    """
    x = embed(supernet, images, width)
    size, patch = images.shape[1:3], supernet.patch.shape[0]
    positions = relative_positions(size[0] // patch, size[1] // patch)
    positions = tuple(jnp.asarray(index) for index in positions)
    count = 2 * heads.shape[0]
    carry = x, jnp.zeros(count, x.dtype), jnp.zeros(count, x.dtype), jnp.zeros(count, bool)

    def run(layer: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, *lists = carry
        block = {name: values[layer] for name, values in supernet.blocks.items()}
        halves = (
            lambda x: attention_half(block, x, heads[layer], positions),
            lambda x: mlp_half(block, x, hidden[layer]),
        )
        for half, function in enumerate(halves):
            index = 2 * layer + half
            x, *numbers = proxies.block_statistics(function, x, probes(index, x.shape))
            lists = [values.at[index].set(number) for values, number in zip(lists, numbers, strict=True)]
        return x, *lists

    return lax.fori_loop(0, depth, run, carry)


def summarise(depth: jax.Array, entropies: jax.Array, sigma: jax.Array, identical: jax.Array) -> dict[str, jax.Array]:
    """``expressivity`` and ``trainability`` (float32 [], -inf instead of NaN) of what :func:`measure` returns.

    There is no progressivity: under Gaussian images attention is nearly uniform, and growth from block to block says
    little (the paper's footnote). Halves that are an identity are left out of T.
    """
    present = jnp.arange(entropies.shape[0]) < 2 * depth
    scores = {
        "expressivity": jnp.sum(jnp.where(present, entropies, 0)),
        "trainability": proxies.trainability(sigma[1:], identical[1:] | ~present[1:], leave_out=True),
    }
    return {name: proxies.lowest_if_nan(score) for name, score in scores.items()}


@functools.partial(jax.jit, static_argnames=("width", "batch_size", "resolution"))
def score(
    supernet: Supernet,
    depth: jax.Array,
    heads: jax.Array,
    hidden: jax.Array,
    key: jax.Array,
    *,
    width: int,
    batch_size: int,
    resolution: int,
) -> dict[str, jax.Array]:
    """E and T of a subnet on fresh Gaussian images; arguments as of :func:`measure`."""
    key_images, key_probes = jax.random.split(key)
    images = jax.random.normal(key_images, (batch_size, resolution, resolution, 3))

    def probes(index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return unpack(jax.random.bits(jax.random.fold_in(key_probes, index), (words(shape),), jnp.uint32), shape)

    _, *numbers = measure(supernet, images, depth, heads, hidden, probes, width=width)
    return summarise(depth, *numbers)
