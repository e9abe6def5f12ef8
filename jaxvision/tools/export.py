"""Writes the quantized network of a finished run as integers, for other programs.

    python -m jaxvision.tools.export --workdir RUN --to DIR [--storage int4] [--batch 1] [--image 32 32 3]

RUN holds ``quantized.safetensors``, which ``trs`` and ``lbt`` write for the arm that ``config.export`` names. DIR gets

    network.safetensors, network.json          codes, steps and what they mean (jaxvision/models/integer_file.py)
    program.mlirbc, program.mlirbc.json        the whole network as StableHLO (jaxvision/models/stablehlo.py)

From Python the same is ``integer_network.convert``, ``integer_folding.fold`` and the ``save`` functions of the two
modules, for any network.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.engine import recipes
from jaxvision.engine.quantized_files import WEIGHTS, network_of
from jaxvision.methods.igq_vit import export as igq_vit_file
from jaxvision.models import integer_file, integer_folding, integer_network, stablehlo, weight_file, zoo
from jaxvision.models.quantized import QuantizedNetwork
from jaxvision.tools import command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command_line.answer("export", lambda: _run(_parser().parse_args(arguments)))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m jaxvision.tools.export", description=__doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="directory of the finished run")
    parser.add_argument("--to", required=True, type=Path, help="directory for the files")
    parser.add_argument("--storage", default="int8", help=f"of the kernels: {', '.join(integer_network.STORAGES)}")
    parser.add_argument("--batch", type=int, help="batch size of the program [any]")
    parser.add_argument("--image", type=int, nargs=3, metavar=("H", "W", "C"), help="[that of the run's data]")
    return parser


def _run(options: argparse.Namespace) -> None:
    print(export(options.workdir, options.to, options.storage, options.batch, options.image))


def export(
    workdir: Path, to: Path, storage: str = "int8", batch: int | None = None, image: Sequence[int] | None = None
) -> str:
    """Writes the files; returns what was done in a few lines.

    Args:
      workdir, to: see above.
      storage: see :func:`integer_network.convert`.
      batch: of the program; None: any.
      image: (H, W, C); None: that of the run's data, which then must be readable.

    Raises:
      ConfigError, DataError: no such run, a run without an exported network, an impossible storage.
    """
    network, variables, shape, facts = load(workdir, image)
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    integers = integer_folding.fold(network, integer_network.convert(network, variables, storage), image)
    layers = integer_network.describe(network, integers, image)
    integer_file.save(to / "network", integer_file.IntegerModel(integers, layers, {**facts, "image": list(shape)}))
    stablehlo.save(to / "program", stablehlo.trace(lambda x: network.apply(integers, x), shape, batch=batch))
    error = _difference(network, variables, to, shape, batch or 2)
    return "\n".join(
        (
            f"{facts['model']} of {workdir}: {len(layers)} integer layers",
            str(integer_network.memory(variables, integers)),
            f"the program and the trained network differ by at most {error:.1e} of the largest logit (random images)",
            f"written to {to}",
        )
    )


def load(
    workdir: Path, image: Sequence[int] | None = None
) -> tuple[QuantizedNetwork, Any, tuple[int, int, int], dict[str, Any]]:
    """The network of a run, its variables, (H, W, C), and what its weight file says of itself; see :func:`export`."""
    described, weights = workdir / "config.json", workdir / WEIGHTS
    if not described.is_file():
        raise DataError(f"{described} does not exist; --workdir must be the directory of a run")
    if not weights.is_file():
        raise DataError(
            f"{weights} does not exist; a finished run of trs or lbt writes it where config.export names an arm"
        )
    config, facts = Config(json.loads(described.read_text())), dict(weight_file.read_metadata(weights))
    if facts.get("format") == igq_vit_file.FORMAT:
        raise DataError(
            f"{weights} is of igq_vit and holds integers already, as its JSON file says; read it with "
            "jaxvision.methods.igq_vit.export.load"
        )
    facts["num_classes"] = int(facts["num_classes"])
    if image is None:
        image = recipes.build_data(config.data, config.seed, zoo.spec(facts["model"])).image_shape
    elif min(image) < 1:
        raise ConfigError(f"--image={tuple(image)} must be three whole numbers of at least 1")
    shape = (int(image[0]), int(image[1]), int(image[2]))
    settings = config.model.settings.to_dict()
    dtype = recipes.DTYPES[config.model.one_of("dtype", tuple(recipes.DTYPES))]
    module = zoo.build(facts["model"], num_classes=facts["num_classes"], dtype=dtype, **settings)
    example = np.zeros((1, *shape), np.float32)
    network = network_of(config.quantization.to_dict(), facts, module, example)
    template = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), example)
    return network, weight_file.load_variables(weights, template), shape, facts


def _difference(network: QuantizedNetwork, variables: Any, to: Path, shape: Sequence[int], batch: int) -> float:
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    expected = np.asarray(jax.jit(network.apply)(variables, images))
    found = np.asarray(stablehlo.load(to / "program").call(images))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    sys.exit(main())
