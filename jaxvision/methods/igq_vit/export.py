"""The quantized model on disk: one safetensors file with all arrays and one JSON file that says what they are.

``<path>.safetensors`` holds, by name:

* ``variables/<collection>/<name>``: what stays float (biases, norms, embeddings, tables), our layout (Dense (in, out),
  Conv HWIO), e.g. ``variables/params/blocks_0/norm1/scale``;
* ``weights/<name>/codes`` uint8 (the kernel's shape), ``.../scale`` and ``.../zero`` float ((out,) or ()), e.g.
  ``weights/blocks_0/attn/qkv/kernel/codes``: ``w = scale * (codes - zero)``;
* ``sites/<site>/<field>``: the arrays of each activation quantizer, e.g. ``sites/blocks.0.attn.qkv/bounds`` (Hq, G_max,
  2), ``count`` and ``bits``: ``s = (u - l) / (2^bits - 1)``, ``z = round(-l / s)``, of the first ``count`` groups.

Its header's metadata repeat the format and the facts of ``model`` as strings.

``<path>.json``: ``format`` ("jaxvision.igq_vit"), ``version``, ``model`` (whatever the caller says about the network),
``weights`` {name: {"bits"}}, ``sites`` {site: {"class", static fields}}, ``sha256`` of the safetensors file.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jaxvision.core import described_file, trees
from jaxvision.core.errors import ConfigError
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
      model: JSON-able facts about the network; a run says model (its zoo name), num_classes, method, bits and seed.
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
    return described_file.contiguous(jax.device_get(arrays)), metadata


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
    described_file.check_format(metadata, FORMAT, VERSION, "quantized model")
    known = {cls.__name__: cls for cls in (*CLASSES, *classes)}
    announced = described_file.Announced(arrays, "quantized model")
    take = announced.take
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
    kernels = {f"variables/params/{name}": np.asarray(tensor.dequantize()) for name, tensor in codes.items()}
    return QuantizedModel(announced.variables(kernels), codes, quantizers, metadata["model"])


def save(path: str | os.PathLike, model: QuantizedModel) -> None:
    """Writes ``<path>.safetensors`` and then ``<path>.json``, each complete or not at all."""
    arrays, metadata = to_flat(model)
    header = {"format": FORMAT, **{key: str(value) for key, value in model.model.items()}}
    described_file.save(path, described_file.SAFETENSORS, safetensors.numpy.save(arrays, header), metadata)


def load(path: str | os.PathLike, classes: Iterable[type] = ()) -> QuantizedModel:
    """What :func:`save` wrote at ``path``, bit for bit.

    Raises:
      DataError: a file is missing, damaged, or the two don't belong together.
      ConfigError: see :func:`from_flat`.
    """
    data, metadata = described_file.load(path, described_file.SAFETENSORS, "a quantized model")
    return from_flat(safetensors.numpy.load(data), metadata, classes)
