"""A trained quantized network in integers: codes and steps in place of float kernels, with the same outputs.

    integers = convert(network, variables)            # int8 codes; convert(..., "int4") packs what 4 bits hold
    logits = network.apply(integers, images)          # int8 products, int32 sums, one factor a layer
    print(memory(variables, integers))

Nothing of the network is rewritten: a layer that finds integers in its ``kernel`` and a ``kernel_step`` beside it
multiplies codes (``quantized_layer.py``). What isn't quantized (biases, normalisations, layers left in float) stays.
Files for other programs: ``integer_file.py`` and ``stablehlo.py``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models import integer_folding
from jaxvision.models.layers import Conv, Dense, pair
from jaxvision.models.patches import PatchEmbed
from jaxvision.models.quantized import QuantizedNetwork
from jaxvision.models.quantized_layer import BITS, INTERVAL

STORAGES = {"int8": jnp.int8, "int4": jnp.int4}
LARGEST = np.float32(np.finfo(np.float32).max)


def convert(network: QuantizedNetwork, variables: Any, storage: str = "int8") -> Any:
    """Variables for inference, whose quantized kernels are codes.

    Each quantized ``kernel`` becomes int8 or int4 of its shape, ``kernel_step`` float32 () or (out,) appears beside it,
    and the quantizer's own parameters (``kernel_scale``, ...) go, as does the collection of the gradients' intervals.

    Args:
      network: the network.
      variables: as training left them (concrete, not traced).
      storage: "int8"; or "int4": kernels whose codes lie in -8..7 as int4, the others as int8. Products are int8.

    Raises:
      ConfigError: an unknown storage, no quantized kernel, kernels that are converted already, or codes that int8
        doesn't hold (odd codes of 8 bits).
    """
    if storage not in STORAGES:
        raise unknown("storage", storage, STORAGES)
    params = variables["params"]
    leaves, quantizers = (
        trees.named_leaves(params),
        _by_name(params, network.quantizers(params, bits=variables.get(BITS))),
    )
    quantized = {name for name, quantizer in quantizers.items() if quantizer is not None}
    if steps := [name for name in leaves if name.rsplit("/", 1)[-1] == "kernel_step"]:
        raise ConfigError(f"{steps[0].removesuffix('_step')} holds codes already; convert what training left, once")
    if not quantized:
        raise ConfigError("no layer of this network has quantized weights, so there is nothing to convert to integers")
    new: dict[str, Any] = {}
    for name, value in leaves.items():
        scope, _, field = name.rpartition("/")
        kernel = f"{scope}/kernel"
        if name in quantized:
            new[name] = _codes(name, quantizers[name], value, storage)
            new[f"{name}_step"] = jnp.asarray(quantizers[name].step(value), jnp.float32)
        elif not (kernel in quantized and field in _learned(network, kernel)):
            new[name] = value
    kept = {name: tree for name, tree in variables.items() if name != INTERVAL}
    return {**kept, "params": trees.nested(new)}


def _by_name(params: Any, quantizers: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    trees.map_named(lambda name, _, quantizer: found.setdefault(name, quantizer), params, quantizers)
    return found


def _learned(network: QuantizedNetwork, kernel: str) -> set[str]:
    return {f"kernel_{field}" for field in network.find(kernel).weight.kind.LEARNED}


def _codes(name: str, quantizer: Any, value: jax.Array, storage: str) -> jax.Array:
    """The codes less their zero, in the narrowest container that ``storage`` allows."""
    codes = jax.device_get(quantizer.codes(value) - jnp.asarray(quantizer.zero()).astype(jnp.int32))
    low, high = int(codes.min()), int(codes.max())
    for candidate in ("int4", "int8") if storage == "int4" else ("int8",):
        limit = jnp.iinfo(STORAGES[candidate])
        if limit.min <= low and high <= limit.max:
            return jnp.asarray(codes, STORAGES[candidate])
    kind = type(quantizer).__name__
    raise ConfigError(
        f"{name}: the codes of {kind} go from {low} to {high}, which int8 doesn't hold; train with 7 bits"
    )


# --- what it weighs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of stored variables before and after :func:`convert`; int4 counts half a byte.

    Attributes:
      float_kernels, kernels: of the quantized kernels, after with their steps.
      rest: of everything else that inference needs, the same before and after.
    """

    float_kernels: int
    kernels: int
    rest: int

    @property
    def ratio(self) -> float:
        """All bytes after over all bytes before."""
        return (self.kernels + self.rest) / (self.float_kernels + self.rest)

    def __str__(self) -> str:
        before, after = self.float_kernels + self.rest, self.kernels + self.rest
        kernels = f"{_mib(self.float_kernels)} -> {_mib(self.kernels)} ({self.kernels / self.float_kernels:.3f})"
        return f"{_mib(before)} -> {_mib(after)} ({self.ratio:.3f}); quantized kernels {kernels}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"


def nbytes(leaf: Any) -> int:
    """Bytes of an array where two int4 share one."""
    size = math.prod(leaf.shape)
    return -(-size // 2) if leaf.dtype == jnp.int4 else size * leaf.dtype.itemsize


def memory(variables: Any, integers: Any) -> Memory:
    """Compares float ``variables`` with what :func:`convert` made of them."""
    before, after = trees.named_leaves(variables), trees.named_leaves(integers)
    kernels = [name for name, leaf in after.items() if jnp.issubdtype(leaf.dtype, jnp.integer) and name in before
               and jnp.issubdtype(before[name].dtype, jnp.floating)]  # fmt: skip
    own = {*kernels, *(f"{name}_step" for name in kernels)}
    return Memory(
        sum(nbytes(before[name]) for name in kernels),
        sum(nbytes(after[name]) for name in own),
        sum(nbytes(leaf) for name, leaf in after.items() if name not in own),
    )


# --- what another program must know ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntegerLayer:
    """One layer with an integer kernel, ``y = step s_in sum (c_in - zero) codes``, then ``|output_scale|``, then bias,
    then the bias that is left of a folded normalisation.

    Attributes:
      kernel: its name, ``layer1_0/conv1/kernel``.
      product: "conv" or "dense".
      shape: of the kernel, HWIO or (in, out).
      geometry: stride, padding (both sides alike), dilation, groups; empty for a matrix.
      input: how its input becomes codes; None: it stays float.
      norm: name of the normalisation that was folded into the layer (``integer_folding.py``); "": none.
    """

    kernel: str
    product: str
    shape: tuple[int, ...]
    geometry: Mapping[str, Any]
    input: "InputCodes | None"
    norm: str = ""


@dataclass(frozen=True)
class InputCodes:
    """A quantizer of inputs as a table: ``c = lowest + number of thresholds <= x``, ``x_hat = step (c - zero)``.

    The thresholds are exactly the float32 numbers at which the trained quantizer goes to the next code, whatever its
    formula is; codes that it never gives have the threshold of the next one.

    Attributes:
      lowest: the smallest code.
      thresholds: float32 (codes - 1,), or (codes - 1, C) for quantizers of each channel; ascending.
      step, zero: float32 () or (C,).
      kind, bits: the quantizer's class and width, for people.
    """

    lowest: int
    thresholds: np.ndarray
    step: np.ndarray
    zero: np.ndarray
    kind: str
    bits: int


def describe(network: QuantizedNetwork, integers: Any, image: Any) -> dict[str, IntegerLayer]:
    """The integer layers of a converted network in the order of their use, by kernel name.

    Args:
      network, integers: as in :func:`convert`.
      image: an example or its shape, [1, H, W, C].
    """
    params = integers["params"]
    inputs = _by_name(params, network.quantizers(params, "input", bits=integers.get(BITS)))
    leaves, found = trees.named_leaves(params), {}
    norms = integer_folding.followers(network.module, image)
    for kernel, module in _modules(network.module, image).items():
        if kernel in leaves and jnp.issubdtype(leaves[kernel].dtype, jnp.integer):
            product = "dense" if isinstance(module, Dense) else "conv"
            table = None if inputs[kernel] is None else tabulate(inputs[kernel])
            norm, _ = norms.get(kernel.removesuffix("/kernel"), ("", 0.0))
            norm = norm if f"{norm}/bias" in leaves and f"{norm}/scale" not in leaves else ""
            found[kernel] = IntegerLayer(kernel, product, leaves[kernel].shape, _geometry(module), table, norm)
    return found


def _modules(module: nn.Module, image: Any) -> dict[str, nn.Module]:
    seen: dict[str, nn.Module] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Conv | Dense | PatchEmbed) and context.method_name == "product":
            seen["/".join((*context.module.path, "kernel"))] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    return seen


def _geometry(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Dense):
        return {}
    pairs = {name: list(pair(getattr(module, name))) for name in ("stride", "padding", "dilation")}
    return {**pairs, "groups": module.groups}


def tabulate(quantizer: Any) -> InputCodes:
    """The table of a (monotone) quantizer, by bisection over all float32 numbers at once."""
    step, zero = (np.asarray(value, np.float32) for value in (quantizer.step(), quantizer.zero()))
    fields = [np.shape(leaf) for leaf in (*jax.tree.leaves(quantizer), step, zero)]
    channels = max((shape[-1] for shape in fields if shape), default=0)
    codes = jax.jit(lambda order: quantizer.codes(_float_of(order)))
    shape, top = (max(channels, 1),), int(LARGEST.view(np.int32))
    lowest = int(np.min(codes(np.full((1, *shape), -top, np.int32))))
    highest = int(np.max(codes(np.full((1, *shape), top, np.int32))))
    wanted = np.arange(lowest + 1, highest + 1, dtype=np.int32)[:, None] * np.ones(shape, np.int32)
    # Invariant: the code at `low` is below what is wanted, that at `high` is not.
    low, high = np.full(wanted.shape, -top - 1, np.int64), np.full(wanted.shape, top, np.int64)
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = np.asarray(codes(middle.astype(np.int32))) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    thresholds = np.asarray(_float_of(high.astype(np.int32)))
    kind, bits = type(quantizer).__name__, int(np.max(quantizer.bits))
    return InputCodes(lowest, thresholds if channels else thresholds[:, 0], step, zero, kind, bits)


def _float_of(order: Any) -> jax.Array:
    """The float32 numbers in their order: 0 for 0, n for the n-th above it, -n for the n-th below it."""
    size = jax.lax.bitcast_convert_type(jnp.abs(jnp.asarray(order, jnp.int32)), jnp.float32)
    return jnp.where(jnp.asarray(order) < 0, -size, size)
