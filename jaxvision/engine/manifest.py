"""The manifest of a checkpoint: its score, its meta data, one digest per leaf, and a digest of itself.

In JSON: ``{"body": {"format": 1, "step": 30, "score": 0.7, "meta": {...}, "leaves": {"state/params/w":
{"digest": "...", "shape": [3, 4], "dtype": "float32"}}}, "digest": "..."}``.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core.errors import ConfigError, StorageError

FORMAT = 1
PATH = Path("manifest", "metadata")  # in a step's folder: where Orbax's JSON handler puts the item "manifest"


class Damaged(Exception):
    """A checkpoint can't be used; the text says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step's manifest says, once it has been verified.

    Attributes:
      step: the step.
      score: of the step, or None.
      meta: what the caller of ``save`` gave.
      leaves: name -> {"digest": hex, "shape": list, "dtype": name}, in tree order.
    """

    step: int
    score: float | None
    meta: dict[str, Any]
    leaves: dict[str, dict[str, Any]]


def digest(array: np.ndarray) -> str:
    """SHA-256 over dtype, shape and the bytes (C order, as they lie in memory) of an array."""
    hasher = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return hasher.hexdigest()


def build(step: int, leaves: Mapping[str, np.ndarray], score: float | None, meta: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a step, for JSON; ``meta`` must have been through JSON already."""
    body = {
        "format": FORMAT,
        "step": step,
        "score": score,
        "meta": meta,
        "leaves": {
            name: {"digest": digest(array), "shape": list(array.shape), "dtype": array.dtype.name}
            for name, array in leaves.items()
        },
    }
    return {"body": body, "digest": _digest_of_json(body)}


def read(path: Path, step: int) -> Manifest:
    """The manifest in a file, verified against its own digest.

    Raises:
      Damaged: missing, no JSON, changed, or the manifest of another step.
      StorageError: written by a newer version of the package.
    """
    try:
        value = json.loads(path.read_bytes())
        body, expected = value["body"], value["digest"]
    except FileNotFoundError as error:
        raise Damaged("its manifest is missing") from error
    except OSError as error:
        raise Damaged(f"its manifest can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged("its manifest can't be parsed") from error
    if _digest_of_json(body) != expected:
        raise Damaged("its manifest was changed after it was written")
    if body["format"] != FORMAT:
        raise StorageError(
            f"{path} has the checkpoint format {body['format']}, but this version of jaxvision reads {FORMAT}; "
            "use the version that wrote it"
        )
    if body["step"] != step:
        raise Damaged(f"its manifest is that of step {body['step']}")
    return Manifest(step, body["score"], body["meta"], body["leaves"])


def check_fits(manifest: Manifest, template: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError naming the first leaf whose presence, dtype or shape differs from the template's."""
    difference = None
    for name, leaf in template.items():
        wanted = f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
        there = manifest.leaves.get(name)
        held = there and f"{there['dtype']} {there['shape']}"
        if held != wanted:
            difference = f"'{name}' is {wanted} here but {held or 'missing'} there"
            break
    else:
        if extra := [name for name in manifest.leaves if name not in template]:
            difference = f"'{extra[0]}' is there but not here"
    if difference:
        raise ConfigError(
            f"the checkpoint {where} doesn't fit this run: {difference}; "
            "continue with the configuration that wrote it, or use another run directory"
        )


def check_digests(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises Damaged naming the first leaf whose bytes, shape or dtype are not those that were saved."""
    for name, leaf in manifest.leaves.items():
        array = arrays[name]
        if [list(array.shape), array.dtype.name] != [leaf["shape"], leaf["dtype"]]:
            raise Damaged(f"its leaf '{name}' came back as {array.dtype.name} {list(array.shape)}")
        if digest(array) != leaf["digest"]:
            raise Damaged(f"its leaf '{name}' doesn't have the bytes that were saved")


def kept(scores: Mapping[int, float | None], last: int, best: int, mode: str) -> set[int]:
    """The steps to keep: the ``last`` newest and the ``best`` best.

    Args:
      scores: step -> score. None and NaN never count as best; of equal scores the newest is the best.
      last: how many of the newest.
      best: how many of the best.
      mode: "max" or "min".
    """
    return {*sorted(scores)[-last:], *ranked(scores, mode)[:best]}


def ranked(scores: Mapping[int, float | None], mode: str) -> list[int]:
    """The steps that have a score, the best first."""
    sign = {"max": -1.0, "min": 1.0}[mode]
    scored = [step for step, score in scores.items() if score is not None and not math.isnan(score)]
    return sorted(scored, key=lambda step: (sign * scores[step], -step))


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
