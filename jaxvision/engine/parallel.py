"""Placing state and batches on devices, and compiling steps: ``jit`` over a one-axis mesh, or ``pmap``.

Both modes run the same step function. Under ``jit`` arrays are global, the batch is split over the mesh axis
``"data"``, everything else is replicated, and XLA inserts the collectives. Under ``pmap`` every device holds a
copy of the state behind a leading axis and the reductions of :mod:`jaxvision.core.devices` become collectives.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError

AXIS = "data"


class Parallel(Protocol):
    """What the loop needs to know of devices."""

    num_devices: int
    shard_index: int
    shard_count: int

    def replicate(self, tree: Any) -> Any:
        """Puts the same values on every device."""
        ...

    def initialize(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, compiled, with its result on every device."""
        ...

    def place(self, batch: Any) -> Any:
        """Splits this host's rows over its devices."""
        ...

    def compile(
        self, function: Callable[..., Any], donate: tuple[int, ...] = (), *, quickly: bool = False
    ) -> Callable[..., Any]:
        """Compiles ``function(*replicated, batch)``: the last argument is a placed batch, the result replicated.

        As a training step of many (:func:`training_options`), or ``quickly``: spend less on optimising, for programs
        that run a few times (:func:`compiler_options`).
        """
        ...

    def single(self, tree: Any) -> Any:
        """One copy of a replicated tree, as arrays that a checkpoint or the host can read."""
        ...

    def restore_sharding(self) -> Any:
        """The sharding with which a checkpoint is read back, before :meth:`replicate`."""
        ...


def create(mode: str) -> Parallel:
    """The mode named by ``config.parallel``: "jit" or "pmap". Starts the JAX backend."""
    return {"jit": JitParallel, "pmap": PmapParallel}[mode]()


class JitParallel:
    """One program over global arrays; works on one device, on many, and over many hosts."""

    def __init__(self):
        self.num_devices = jax.device_count()
        self.shard_index, self.shard_count = jax.process_index(), jax.process_count()
        self.mesh = jax.make_mesh((self.num_devices,), (AXIS,), axis_types=(AxisType.Auto,))
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._split = NamedSharding(self.mesh, PartitionSpec(AXIS))

    def replicate(self, tree: Any) -> Any:
        if self.shard_count == 1:
            return jax.device_put(tree, self._replicated)
        put = jax.make_array_from_process_local_data
        return jax.tree.map(lambda leaf: put(self._replicated, np.asarray(leaf)), tree)

    def initialize(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.jit(function, out_shardings=self._replicated, compiler_options=compiler_options(0))(*arguments)

    def place(self, batch: Any) -> Any:
        if self.shard_count == 1:
            return jax.device_put(batch, self._split)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self._split, leaf), batch)

    def compile(
        self, function: Callable[..., Any], donate: tuple[int, ...] = (), *, quickly: bool = False
    ) -> Callable[..., Any]:
        options = compiler_options(1) if quickly else training_options()
        return jax.jit(function, donate_argnums=donate, out_shardings=self._replicated, compiler_options=options)

    def single(self, tree: Any) -> Any:
        return tree

    def restore_sharding(self) -> Any:
        return self._replicated


class PmapParallel:
    """One copy of the program a device; gradients and batch statistics go through ``core.devices``."""

    def __init__(self):
        self.num_devices = jax.device_count()
        self.shard_index, self.shard_count = jax.process_index(), jax.process_count()
        self._local = jax.local_devices()
        mesh = jax.make_mesh((self.num_devices,), (AXIS,), axis_types=(AxisType.Auto,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        local = jax.sharding.Mesh(np.asarray(self._local), (AXIS,))
        self._stacked = NamedSharding(local, PartitionSpec(AXIS))

    def _stack(self, leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return np.broadcast_to(host, (len(self._local), *host.shape))

    def replicate(self, tree: Any) -> Any:
        # The identity, pmapped, lays the copies out as every later step expects them.
        return jax.pmap(lambda leaf: leaf, axis_name=AXIS)(jax.tree.map(self._stack, tree))

    def initialize(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.replicate(jax.jit(function, compiler_options=compiler_options(0))(*arguments))

    def place(self, batch: Any) -> Any:
        count = len(self._local)
        return jax.tree.map(lambda leaf: leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:]), batch)

    def compile(
        self, function: Callable[..., Any], donate: tuple[int, ...] = (), *, quickly: bool = False
    ) -> Callable[..., Any]:
        del quickly  # pmap takes no compiler options

        def traced(*arguments):
            with devices.device_axis(AXIS):
                return function(*arguments)

        return jax.pmap(traced, axis_name=AXIS, donate_argnums=donate)

    def single(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0], tree)

    def restore_sharding(self) -> Any:
        return self._replicated


def compiler_options(level: int) -> dict[str, int]:
    """LLVM's optimisation level on CPU, where compiling takes seconds; nothing on accelerators.

    0 is for programs that run once: random initialisers compile ten times faster. 1 is for evaluations: a
    transformer compiles in 60 % of the time and, measured on AVX2, runs no slower.
    """
    return {"xla_backend_optimization_level": level} if jax.default_backend() == "cpu" else {}


def training_options() -> dict[str, str]:
    """On CPU: leave nothing but sums to YNN, XLA's experimental library of kernels; nothing on accelerators.

    XLA's own choice (jaxlib 0.10.2) leaves convolutions and matrix products to it as well, but YNN computes a
    convolution on one thread: by the clock of two cores a ResNet-20's training step takes a quarter to two fifths
    longer with it (``benchmarks.trs --default_fusions``; as much processor time). A MobileNetV2's takes as long, and a
    small vision transformer's is up to a fifth faster with XLA's choice. A choice in ``XLA_FLAGS`` stays.
    """
    option = "xla_cpu_experimental_ynn_fusion_type"
    if jax.default_backend() != "cpu" or option in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {option: "LIBRARY_FUSION_TYPE_REDUCE"}


def check_batch_size(batch_size: int, parallel: Parallel, what: str) -> None:
    """Raises ConfigError when a training batch can't be split evenly over devices and hosts."""
    if batch_size % parallel.num_devices:
        raise ConfigError(
            f"{what}: the batch size {batch_size} can't be split over {parallel.num_devices} devices; "
            f"use a multiple of {parallel.num_devices}"
        )


def pad_rows(batch: dict[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Repeats row 0, with ``mask`` 0, until the number of rows is a multiple of ``multiple``."""
    rows = next(iter(batch.values())).shape[0]
    extra = -rows % multiple
    if not extra:
        return batch
    padded = {name: np.concatenate([leaf, np.repeat(leaf[:1], extra, 0)]) for name, leaf in batch.items()}
    padded["mask"][rows:] = 0
    return padded
