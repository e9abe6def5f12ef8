"""The small networks of the AZ-NAS oracles as parameters of the supernet."""

from pathlib import Path

import numpy as np

from jaxvision.core import trees
from jaxvision.methods.az_nas import supernet_init
from jaxvision.methods.az_nas.supernet_init import Skeleton
from tests.arrays import load

FOLDER = Path(__file__).parents[2] / "oracles" / "az_nas"


def skeleton(oracle) -> Skeleton:
    """The skeleton of an oracle's network."""
    return Skeleton(int(oracle["C"]), int(oracle["N"]), int(oracle["num_classes"]), oracle["x"].shape[-1])


def params(oracle, dtype=np.float32):
    """The oracle's weights in the supernet's structure, a 1x1 kernel in the middle of its slot."""
    shapes = supernet_init.shapes(skeleton(oracle))
    values = {name: np.full(shape, name.endswith("scale"), dtype) for name, shape in shapes.items()}
    reductions = {"a": "first", "b": "second", "down": "shortcut"}
    for name in (name for name in oracle if name.startswith("w_")):
        parts, weight = name.split("_")[1:], oracle[name].astype(dtype)
        match parts:
            case ["stem", _]:
                values["stem/kernel"] = weight
            case ["fc", leaf]:
                values[f"head/{'kernel' if leaf == 'w' else 'bias'}"] = weight
            case [stage, cell, edge, _] if stage.startswith("stage"):
                offset = (3 - weight.shape[0]) // 2
                at = (int(cell.removeprefix("cell")), int(edge.removeprefix("edge")))
                values[f"{stage}/kernel"][at][offset : 3 - offset, offset : 3 - offset] = weight
            case [reduction, part, _]:
                values[f"{reduction.replace('red', 'reduction')}/{reductions[part]}/kernel"] = weight
    return trees.nested(values)


def open_case(number: int, folder: Path = FOLDER):
    """One oracle's arrays."""
    return load(folder / f"nb201_net_{number}.npz")
