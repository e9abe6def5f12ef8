"""A converted network on disk: one safetensors file with all arrays and one JSON file that says what they are.

``<path>.safetensors`` holds, by name:

* ``variables/<collection>/<name>``, our layout (Dense (in, out), Conv HWIO, images NHWC), e.g.
  ``variables/params/bn1/scale``. An integer kernel ``variables/params/<layer>/kernel`` is int8 of the kernel's shape,
  or, where the JSON file says "int4", uint8 of ceil(n / 2): two's complement, the element with the even index in the
  low half of the byte, C order; its step is ``.../kernel_step``.
* ``inputs/<layer>/kernel/thresholds``, ``.../step``, ``.../zero``: how the layer's input becomes codes.

``<path>.json``: ``format`` ("jaxvision.integer_network"), ``version``, ``model`` (whatever the caller says about the
network), ``sha256`` of the safetensors file, ``layers`` in the order of their use: ``kernel``, ``product`` ("conv",
"dense"), ``shape``, ``storage`` ("int8", "int4"), ``stride``, ``padding``, ``dilation``, ``groups``, ``input``
(``lowest``, ``kind``, ``bits``; null: float), ``norm`` (null: none). With these

    c = lowest + number of thresholds <= x        y = |output_scale| kernel_step step conv(c - zero, kernel) + bias

in exact integers (padding is 0 of ``c - zero``); ``output_scale`` and ``bias`` only where the file has them.
``kernel_step`` is one number or one an output channel. Where ``norm`` names a batch normalisation, that one is folded
into the layer: of it ``variables/params/<norm>/bias`` alone is there, to be added to y. What lies
between the layers (normalisation, ReLU, sums) is the network's code, or the StableHLO program (``stablehlo.py``).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxvision.core import described_file, trees
from jaxvision.models.integer_network import InputCodes, IntegerLayer

FORMAT, VERSION = "jaxvision.integer_network", 2


@dataclass(frozen=True)
class IntegerModel:
    """What the files hold.

    Attributes:
      variables: of :func:`jaxvision.models.integer_network.convert`.
      layers: of :func:`jaxvision.models.integer_network.describe`.
      model: JSON-able facts about the network, such as its name and number of classes.
    """

    variables: Any
    layers: Mapping[str, IntegerLayer]
    model: Mapping[str, Any] = field(default_factory=dict)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int4 of any shape -> uint8 (ceil(n / 2),), see above."""
    flat = np.asarray(codes).astype(np.int8).reshape(-1)
    flat = np.pad(flat, (0, flat.size % 2)).view(np.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse: int8 of ``shape``."""
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: int(np.prod(shape))]
    return ((halves ^ 8).astype(np.int8) - 8).reshape(shape)


def to_flat(model: IntegerModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name and the metadata, as documented above."""
    arrays = {f"variables/{name}": leaf for name, leaf in jax.device_get(trees.named_leaves(model.variables)).items()}
    layers = []
    for name, layer in model.layers.items():
        kernel = f"variables/params/{name}"
        storage = str(arrays[kernel].dtype)
        if storage == "int4":
            arrays[kernel] = pack_int4(arrays[kernel])
        described = {"kernel": name, "product": layer.product, "shape": list(layer.shape), "storage": storage}
        table = layer.input
        if table is not None:
            arrays |= {f"inputs/{name}/{part}": getattr(table, part) for part in ("thresholds", "step", "zero")}
        known = None if table is None else {part: getattr(table, part) for part in ("lowest", "kind", "bits")}
        layers.append({**described, **layer.geometry, "input": known, "norm": layer.norm or None})
    metadata = {"format": FORMAT, "version": VERSION, "model": dict(model.model), "layers": layers}
    return described_file.contiguous(arrays), metadata


def from_flat(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> IntegerModel:
    """The inverse of :func:`to_flat`.

    Raises:
      DataError: another format, arrays that are missing or left over.
    """
    described_file.check_format(metadata, FORMAT, VERSION, "integer network")
    announced, layers, kernels = described_file.Announced(arrays, "integer network"), {}, {}
    take = announced.take
    for described in metadata["layers"]:
        name, shape = described["kernel"], tuple(described["shape"])
        geometry = {part: described[part] for part in ("stride", "padding", "dilation", "groups") if part in described}
        table = described["input"]
        if table is not None:
            table = InputCodes(
                **table, **{part: take(f"inputs/{name}/{part}") for part in ("thresholds", "step", "zero")}
            )
        norm = described["norm"] or ""
        layers[name] = IntegerLayer(name, described["product"], shape, geometry, table, norm)
        kernel = take(f"variables/params/{name}")
        if described["storage"] == "int4":
            kernel = jnp.asarray(unpack_int4(kernel, shape), jnp.int4)
        kernels[f"variables/params/{name}"] = kernel
    return IntegerModel(announced.variables(kernels), layers, metadata["model"])


def save(path: str | os.PathLike, model: IntegerModel) -> None:
    """Writes ``<path>.safetensors`` and then ``<path>.json``, each complete or not at all."""
    arrays, metadata = to_flat(model)
    described_file.save(path, described_file.SAFETENSORS, safetensors.numpy.save(arrays), metadata)


def load(path: str | os.PathLike) -> IntegerModel:
    """What :func:`save` wrote at ``path``, bit for bit.

    Raises:
      DataError: a file is missing, damaged, or the two don't belong together.
    """
    data, metadata = described_file.load(path, described_file.SAFETENSORS, "an integer network")
    return from_flat(safetensors.numpy.load(data), metadata)
