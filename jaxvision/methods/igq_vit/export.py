"""The quantized model on disk: one safetensors file with all arrays and one JSON file that says what they are.

``<path>.safetensors`` holds, by name:

* ``variables/<collection>/<name>``: what stays float (biases, norms, embeddings, tables), our layout (Dense (in, out),
  Conv HWIO), e.g. ``variables/params/blocks_0/norm1/scale``;
* ``weights/<name>/codes`` uint8 (the kernel's shape), ``.../scale`` and ``.../zero`` float ((out,) or ()), e.g.
  ``weights/blocks_0/attn/qkv/kernel/codes``: ``w = scale * (codes - zero)``;
* ``sites/<site>/<field>``: the arrays of each activation quantizer, e.g. ``sites/blocks.0.attn.qkv/bounds`` (Hq, G_max,
  2), ``count`` and ``bits``: ``s = (u - l) / (2^bits - 1)``, ``z = round(-l / s)``, of the first ``count`` groups.

``<path>.json``: ``format`` ("jaxvision.igq_vit"), ``version``, ``model`` (whatever the caller says about the network),
``weights`` {name: {"bits"}}, ``sites`` {site: {"class", static fields}}, ``sha256`` of the safetensors file.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.methods.igq_vit.groups import InstanceGroupQuantizer
from jaxvision.quant import weights
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer

FORMAT, VERSION = "jaxvision.igq_vit", 1
CLASSES = (AffineQuantizer, DynamicGroupQuantizer, InstanceGroupQuantizer)


@dataclass(frozen=True)
class QuantizedModel:
    """Everything that inference needs besides the network's code.

    Attributes:
      variables: nested dict with ``params``; its quantized kernels are w_hat.
      codes: integer kernels by name (of :func:`weights.quantize_params`).
      quantizers: by site.
      model: JSON-able facts about the network, such as its name and number of classes.
    """

    variables: Any
    codes: Mapping[str, weights.QuantizedTensor]
    quantizers: Mapping[str, Any]
    model: Mapping[str, Any]


def to_flat(model: QuantizedModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name and the metadata, as documented above. Quantized kernels appear as codes only."""
    kernels = {f"params/{name}" for name in model.codes}
    arrays = {f"variables/{n}": leaf for n, leaf in trees.named_leaves(model.variables).items() if n not in kernels}
    sites = {}
    for name, tensor in model.codes.items():
        arrays |= {f"weights/{name}/{field}": getattr(tensor, field) for field in ("codes", "scale", "zero")}
    for site, quantizer in model.quantizers.items():
        described: dict[str, Any] = {"class": type(quantizer).__name__}
        for field in dataclasses.fields(quantizer):
            value = getattr(quantizer, field.name)
            if field.metadata.get("pytree_node", True):
                arrays[f"sites/{site}/{field.name}"] = value
            else:
                described[field.name] = value
        sites[site] = described
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(model.model),
        "weights": {name: {"bits": tensor.bits} for name, tensor in model.codes.items()},
        "sites": sites,
    }
    # safetensors writes the buffer as it lies: it must be in C order.
    return {name: np.ascontiguousarray(v).reshape(np.shape(v)) for name, v in jax.device_get(arrays).items()}, metadata


def from_flat(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], classes: Iterable[type] = ()
) -> QuantizedModel:
    """The inverse of :func:`to_flat`.

    Args:
      arrays, metadata: as documented above.
      classes: quantizer classes to know beyond :data:`CLASSES`.

    Raises:
      ConfigError: a quantizer's class isn't known.
      DataError: arrays are missing or left over.
    """
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"{metadata.get('format')!r} version {metadata.get('version')!r}"
        raise DataError(f"this is no quantized model of format {FORMAT!r} version {VERSION}, but {found}")
    known = {cls.__name__: cls for cls in (*CLASSES, *classes)}
    left = dict(arrays)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise DataError(f"the quantized model has no array {name!r}, which its JSON file announces")
        return left.pop(name)

    codes = {
        name: weights.QuantizedTensor(
            *(take(f"weights/{name}/{field}") for field in ("codes", "scale", "zero")), bits=described["bits"]
        )
        for name, described in metadata["weights"].items()
    }
    quantizers = {}
    for site, described in metadata["sites"].items():
        static = dict(described)
        if (cls := known.get(static.pop("class"))) is None:
            raise ConfigError(f"site {site}: quantizer class {described['class']!r} is unknown; pass it in `classes`")
        fields = [f.name for f in dataclasses.fields(cls) if f.metadata.get("pytree_node", True)]
        quantizers[site] = cls(**static, **{field: take(f"sites/{site}/{field}") for field in fields})
    variables: dict[str, Any] = {}
    kernels = {f"variables/params/{name}": np.asarray(tensor.dequantize()) for name, tensor in codes.items()}
    for name, leaf in (left | kernels).items():
        prefix, _, path = name.partition("/")
        if prefix != "variables":
            raise DataError(f"the quantized model has an array {name!r} that its JSON file doesn't mention")
        *parents, last = path.split("/")
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return QuantizedModel(variables, codes, quantizers, metadata["model"])


def save(path: str | os.PathLike, model: QuantizedModel) -> None:
    """Writes ``<path>.safetensors`` and then ``<path>.json``, each complete or not at all."""
    path = Path(path)
    arrays, metadata = to_flat(model)
    data = safetensors.numpy.save(arrays)
    metadata["sha256"] = hashlib.sha256(data).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path.with_name(path.name + ".safetensors"), data)
    _write(path.with_name(path.name + ".json"), (json.dumps(metadata, indent=1) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | os.PathLike, classes: Iterable[type] = ()) -> QuantizedModel:
    """What :func:`save` wrote at ``path``, bit for bit.

    Raises:
      DataError: a file is missing, damaged, or the two don't belong together.
      ConfigError: see :func:`from_flat`.
    """
    path = Path(path)
    described, stored = path.with_name(path.name + ".json"), path.with_name(path.name + ".safetensors")
    for file in (described, stored):
        if not file.is_file():
            raise DataError(f"{file} does not exist; a quantized model is a .json and a .safetensors file")
    try:
        metadata = json.loads(described.read_bytes())
    except ValueError as error:
        raise DataError(f"{described} is not valid JSON: {error}") from error
    data = stored.read_bytes()
    if hashlib.sha256(data).hexdigest() != metadata.get("sha256"):
        raise DataError(f"{stored} is damaged or belongs to another model: its SHA-256 differs from the JSON file's")
    return from_flat(safetensors.numpy.load(data), metadata, classes)
