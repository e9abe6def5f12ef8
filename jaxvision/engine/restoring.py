"""The walk from the newest checkpoint to the first one that verifies, on one process or many."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import JaxvisionError, StorageError
from jaxvision.engine import manifest as manifests
from jaxvision.engine.host_copies import gather, place
from jaxvision.engine.manifest import Damaged, Manifest
from jaxvision.engine.step_folders import StepFolders, guarded

logger = logging.getLogger("jaxvision")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
      step: its step.
      payload: the template's tree with arrays: ``jax.Array`` where the template names a sharding, else ``np.ndarray``.
      meta: what was given to ``save``.
    """

    step: int
    payload: Any
    meta: dict[str, Any]


class Restoring:
    """Restores from step folders; see :meth:`Checkpoints.restore` for what it promises.

    Args:
      folders: of the run.
      read_arrays: ``(folder, manifest) -> {name: np.ndarray}``; raises Damaged.
    """

    def __init__(self, folders: StepFolders, read_arrays: Callable[[Path, Manifest], dict[str, np.ndarray]]):
        self._folders = folders
        self._read_arrays = read_arrays
        self._first = jax.process_index() == 0

    def newest(self, template: Any | Callable[[int], Any]) -> Restored | None:
        """The newest good step; None where there has never been one. Process 0 says which step all try next."""
        ledger, pending, saved = None, [], False
        if self._first:
            ledger = self._folders.read_ledger()
            pending = sorted({*self._folders.steps(), *(ledger or ())})
            saved = self._folders.ever_saved()
        if not gather(saved)[0]:
            return None
        if not gather(ledger is not None or bool(pending))[0]:
            directory, marker = self._folders.directory, self._folders.marker
            raise StorageError(
                f"{directory.parent} has saved checkpoints, but {directory} holds none any more; put them back, start "
                f"in another --workdir, or remove {marker} to start from step 0"
            )
        refused: dict[int, str] = {}
        restored = None
        while restored is None and (step := int(gather(pending.pop() if pending else -1)[0])) >= 0:
            restored = self._try(step, template(step) if callable(template) else template, refused)
        if self._first and (steps := self._folders.steps()) != ledger:
            guarded(self._folders.write_ledger, steps)
        if restored is None:
            raise StorageError(self._refusal(refused))
        return restored

    def one(self, step: int, template: Any) -> Restored:
        """The given step; moves nothing."""
        try:
            return self._load(step, template)
        except Damaged as error:
            raise StorageError(f"the checkpoint {self._folders.path(step)} can't be used: {error}") from error

    def _try(self, step: int, template: Any, refused: dict[int, str]) -> Restored | None:
        """The step, if every process could load it; None after process 0 found it damaged and moved it away."""
        outcome: Restored | Exception
        try:
            outcome = self._load(step, template)
        except (Damaged, JaxvisionError) as error:
            outcome = error
        verdicts = gather({Restored: 0, Damaged: 1}.get(type(outcome), 2))
        if verdicts[0] == 1:
            refused[step] = str(outcome)
            self._folders.forget(step)
            if self._first:
                self._put_away(step, str(outcome))
            return None
        if isinstance(outcome, JaxvisionError):
            raise outcome
        if verdicts.any():
            raise StorageError(
                f"the processes {np.flatnonzero(verdicts)} could not read {self._folders.path(step)} but others could; "
                "all processes need the same file system and configuration"
            )
        return outcome

    def _load(self, step: int, template: Any) -> Restored:
        folder = self._folders.path(step)
        if not folder.is_dir():
            raise Damaged("its folder is gone")
        self._folders.check_readable(step)
        manifest = manifests.read(folder / manifests.PATH, step)
        abstract = trees.named_leaves(template)
        manifests.check_fits(manifest, abstract, folder)
        arrays = self._read_arrays(folder, manifest)
        manifests.check_digests(manifest, arrays)
        leaves = [place(arrays[name], getattr(leaf, "sharding", None)) for name, leaf in abstract.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), leaves), manifest.meta)

    def _put_away(self, step: int, problem: str) -> None:
        path, target = self._folders.path(step), guarded(self._folders.put_away, step)
        if target is None:
            logger.warning("checkpoint %s can't be used: %s", path, problem)
        else:
            guarded(self._folders.write_ledger, self._folders.steps())
            logger.warning("checkpoint %s is damaged: %s; moved to %s", path, problem, target)

    def _refusal(self, refused: dict[int, str]) -> str:
        tried = "; ".join(f"step {step}: {problem}" for step, problem in refused.items()) or "no step folder is left"
        directory, quarantine = self._folders.directory, self._folders.quarantine
        return (
            f"no checkpoint of {directory} can be used ({tried}); damaged ones lie in {quarantine}: "
            f"put a good copy back as {directory}/<step>, or start anew in another run directory"
        )
