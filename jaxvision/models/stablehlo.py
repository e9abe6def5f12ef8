"""A network with its variables as one StableHLO program, through ``jax.export``.

    save(path, trace(lambda images: network.apply(integers, images), (32, 32, 3)))
    logits = load(path).call(images)

``<path>.mlirbc`` is the program in MLIR's portable bytecode, which every compiler that reads StableHLO takes; its only
argument is the images, the variables are constants in it. ``<path>.mlirbc.json`` says of which shape and type they are,
and holds what ``jax.export`` needs besides to call the program.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from jaxvision.core import described_file

FORMAT, VERSION = "jaxvision.stablehlo", 1
ENDINGS = (".mlirbc", ".mlirbc.json")
BATCH = "batch"
PLATFORMS = ("cpu", "cuda", "tpu")


def trace(
    function: Callable[[jax.Array], jax.Array],
    image_shape: Sequence[int],
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> export.Exported:
    """The program of ``function``, float32 [B, *image_shape] -> one array.

    Args:
      function: traceable; what it closes over becomes constants.
      image_shape: (H, W, C).
      batch: B, or None for a program that takes any.
      platforms: it can run on.
    """
    size: Any = batch
    if batch is None:
        (size,) = export.symbolic_shape(BATCH)
    images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    return export.export(jax.jit(function), platforms=tuple(platforms))(images)


def save(path: str | os.PathLike, program: export.Exported) -> None:
    """Writes ``<path>.mlirbc`` and then ``<path>.mlirbc.json``, each complete or not at all."""
    data = program.mlir_module_serialized
    (images,), (outputs,) = program.in_avals, program.out_avals
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "input": {"shape": [_dimension(size) for size in images.shape], "dtype": str(images.dtype)},
        "output": {"shape": [_dimension(size) for size in outputs.shape], "dtype": str(outputs.dtype)},
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
    }
    described_file.save(path, ENDINGS, data, metadata)


def load(path: str | os.PathLike) -> export.Exported:
    """The program that :func:`save` wrote; ``load(path).call(images)`` runs it.

    Raises:
      DataError: a file is missing, damaged, or the two don't belong together.
    """
    data, metadata = described_file.load(path, ENDINGS, "a StableHLO program")
    described_file.check_format(metadata, FORMAT, VERSION, "program")
    # jax's own file format needs a package of its own; a program of the same signature stands in for its envelope.
    sizes, output = metadata["input"]["shape"], metadata["output"]
    batch = None if sizes[0] == BATCH else sizes[0]

    def same_signature(images: jax.Array) -> jax.Array:
        shape = [images.shape[0] if size == BATCH else size for size in output["shape"]]
        return jnp.zeros(shape, output["dtype"])

    envelope = trace(same_signature, sizes[1:], batch=batch, platforms=metadata["platforms"])
    return dataclasses.replace(
        envelope,
        mlir_module_serialized=data,
        module_kept_var_idx=(0,),
        calling_convention_version=metadata["calling_convention_version"],
    )


def _dimension(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)
