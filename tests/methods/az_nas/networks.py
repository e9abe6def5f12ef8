"""The oracles of whole NAS-Bench-201 networks as this package's draws and as Flax variables."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxvision.methods.az_nas.nb201_draws import Draws, Reduction, Weights, pack
from jaxvision.models import nas_bench_201
from tests.arrays import load

ORACLES = Path(__file__).parents[2] / "oracles" / "az_nas"
NETS = (0, 3, 4, 5, 6)


def oracle(number, folder=ORACLES):
    """The arrays of one network."""
    return load(folder / f"nb201_net_{number}.npz")


def anchor():
    """Indices [60], and official float32 scores by name, of the oracle's first cells at 16x16, batch 16: the first 60
    rows and three columns of the official run of 1,000 (``small_scores``)."""
    arrays = load(ORACLES / "nb201_anchor_first_60.npz")
    return arrays["small_arch"], dict(zip(arrays["small_columns"], arrays["small_scores"].T, strict=True))


def _kernels(arrays, stage, cells, dtype):
    """[cells, 6, 3, 3, C, C] of one stage; 1x1 kernels in the centre, noise where no kernel belongs."""
    channels = int(arrays["C"]) << stage
    found = np.random.default_rng(0).normal(size=(cells, 6, 3, 3, channels, channels)).astype(dtype)
    for cell in range(cells):
        for edge in range(6):
            kernel = arrays.get(f"w_stage{stage + 1}_cell{cell}_edge{edge}_w")
            if kernel is not None:
                middle = slice(1, 2) if len(kernel) == 1 else slice(None)
                found[cell, edge, middle, middle] = kernel
    return jnp.asarray(found)


def draws(arrays, dtype=np.float32):
    """What the program draws, as the oracle has it."""
    cells = int(arrays["N"])
    reductions = [
        Reduction(*(jnp.asarray(arrays[f"w_red{i}_{part}_w"].astype(dtype)) for part in ("a", "b", "down")))
        for i in (1, 2)
    ]
    stem = jnp.asarray(arrays["w_stem_w"].astype(dtype))
    weights = Weights(stem, tuple(_kernels(arrays, stage, cells, dtype) for stage in range(3)), tuple(reductions))
    packed = {i: pack(jnp.asarray(arrays[f"probe_{i}"])) for i in range(1, 3 * cells + 3)}
    stages = [jnp.stack([packed[stage * (cells + 1) + cell + 1] for cell in range(cells)]) for stage in range(3)]
    images = jnp.asarray(arrays["x"].astype(dtype))
    return Draws(weights, images, tuple(stages), (packed[cells + 1], packed[2 * cells + 2]))


def variables(weights, architecture, classifier=None):
    """The weights of draws as those of ``NasBench201``, without statistics."""
    cells = len(weights.stages[0])
    params = {"stem_0": {"kernel": weights.stem}, "stem_1": _norm(weights.stem)}
    for stage in range(3):
        for cell in range(cells):
            params[f"cells_{stage * (cells + 1) + cell}"] = cell_params(weights.stages[stage][cell], architecture)
        if stage < 2:
            a, b, down = weights.reductions[stage]
            block = {"conv_a": _conv(a), "conv_b": _conv(b), "downsample_1": {"kernel": down}}
            params[f"cells_{stage * (cells + 1) + cells}"] = block
    params["lastact_0"] = _norm(weights.stages[2])
    if classifier is not None:
        params["classifier"] = {"kernel": classifier[0], "bias": classifier[1]}
    # Flax has no entry for a cell without convolutions.
    return {"params": {name: module for name, module in params.items() if module}}


def cell_params(kernels, architecture):
    """Of one ``Cell``: [6, 3, 3, C, C]."""
    made = {}
    for edge, operation in enumerate(architecture):
        if operation in (nas_bench_201.CONV_1X1, nas_bench_201.CONV_3X3):
            kernel = kernels[edge] if operation == nas_bench_201.CONV_3X3 else kernels[edge][1:2, 1:2]
            made[f"layers_{edge}"] = _conv(kernel)
    return made


def _conv(kernel):
    return {"op_1": {"kernel": kernel}, "op_2": _norm(kernel)}


def _norm(kernel):
    return {"scale": jnp.ones(kernel.shape[-1]), "bias": jnp.zeros(kernel.shape[-1])}
