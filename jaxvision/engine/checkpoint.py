"""Checkpoints that verify: a digest per leaf, a fall back to the newest good step, never a silent new start.

Every save is one Orbax folder ``<directory>/<step>`` that appears by an atomic rename: the arrays, and the manifest of
:mod:`jaxvision.engine.manifest`. Orbax alone survives a kill but not damage: a flipped byte restores silently and an
empty folder counts as the newest step. This is the only file that imports Orbax.

Several processes: all of them call ``save``, ``wait`` and ``restore`` in the same order, on one shared file system;
process 0 writes. Each process uses Orbax by itself, so nothing here runs a collective in a background thread.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxvision.core.errors import ConfigError, StorageError
from jaxvision.engine import manifest as manifests
from jaxvision.engine.host_copies import gather, host_copies
from jaxvision.engine.manifest import Damaged
from jaxvision.engine.restoring import Restored, Restoring
from jaxvision.engine.step_folders import StepFolders, cause, guarded

_PATIENCE = 30.0  # seconds

logger = logging.getLogger("jaxvision")


class Checkpoints:
    """The checkpoints of one run; see the module. A context manager, or call :meth:`close`.

    Args:
      directory: where the step folders lie; made by the first ``save`` or ``restore``.
      keep_last: how many of the newest steps to keep, at least 1.
      keep_best: how many of the best-scored steps to keep besides.
      best_mode: "max" or "min"; a step without score never counts as best.
      asynchronous: digest and write in a background thread.
    """

    def __init__(
        self, directory: Path, *, keep_last: int, keep_best: int, best_mode: str = "max", asynchronous: bool = True
    ):
        if keep_last < 1 or keep_best < 0:
            raise ConfigError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
        if best_mode not in ("max", "min"):
            raise ConfigError(f"best_mode={best_mode!r} is not one of 'max', 'min'")
        self._folders = StepFolders(directory)
        self.directory = self._folders.directory
        self._keep = (keep_last, keep_best, best_mode)
        self._first = jax.process_index() == 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint") if asynchronous and self._first else None
        self._restoring = Restoring(self._folders, _read_arrays)
        self._pending: concurrent.futures.Future | None = None
        self._prepared = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            self.close()
        except StorageError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # the exception under way is the one to report

    def close(self) -> None:
        """Waits for this process's save under way and ends the thread. Raises StorageError if the save failed."""
        try:
            self._join()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def save(self, step: int, payload: Any, *, score: float | None = None, meta: dict[str, Any] | None = None) -> None:
        """Copies the payload to the host, then digests and writes it in the background.

        First waits for the save before. When this returns, the payload may be donated or changed.

        Args:
          step: newer than every step in the directory.
          payload: tree of ``jax.Array`` (replicated or sharded) and ``np.ndarray`` of any shapes and dtypes.
          score: what keep_best ranks by.
          meta: anything that JSON holds.

        Raises:
          StorageError: the save before, or (if not asynchronous) this one, could not be written.
          ConfigError: the step is not newer than those there.
        """
        self.wait()
        meta = json.loads(json.dumps(meta or {}))
        leaves = host_copies(payload, self._first)
        if not self._first:
            return
        self._prepare()
        if not 0 <= step < 10**9:
            raise ConfigError(f"step {step} can't be saved: steps lie between 0 and a billion")
        if (steps := self.steps()) and steps[-1] >= step:
            raise ConfigError(f"step {step} can't be saved in {self.directory}, which holds step {steps[-1]} already")
        arguments = (step, leaves, None if score is None else float(score), meta)
        if self._pool is None:
            self._write(*arguments)
        else:
            self._pending = self._pool.submit(self._write, *arguments)

    def wait(self) -> None:
        """Returns when the last save is on the disk; raises StorageError, in every process, if it failed."""
        try:
            self._join()
        except StorageError:
            gather(1)
            raise
        if gather(0).any():
            raise StorageError(f"process 0 could not write a checkpoint to {self.directory}; see its message")

    def steps(self) -> list[int]:
        """The steps that have a folder, oldest first; without the save under way."""
        return self._folders.steps()

    def best_step(self) -> int | None:
        """The step with the best score among those there; None if none has a score."""
        return next(iter(manifests.ranked(self._folders.scores(), self._keep[2])), None)

    def restore(self, template: Any | Callable[[int], Any]) -> Restored | None:
        """The newest checkpoint that verifies; None only where there has never been one.

        Damaged steps met on the way are moved to ``quarantine`` beside the directory, each with a warning.

        Args:
          template: tree of ``jax.ShapeDtypeStruct``, with or without sharding, or a function of the step that gives it.

        Raises:
          StorageError: there were checkpoints, and none verifies or can be read.
          ConfigError: a good checkpoint doesn't fit the template.
        """
        self.wait()
        if self._first:
            self._prepare()
        return self._restoring.newest(template)

    def load(self, step: int, template: Any) -> Restored:
        """One given step, verified; moves nothing. StorageError if it is damaged, ConfigError if it doesn't fit."""
        return self._restoring.one(step, template)

    def _write(self, step: int, leaves: dict[str, np.ndarray], score: float | None, meta: dict[str, Any]) -> None:
        """Digests and commits a step, and deletes what need not be kept."""
        try:
            _write_folder(self._folders.path(step), leaves, manifests.build(step, leaves, score, meta))
            self._folders.commit(step, manifests.kept(self._folders.scores(), *self._keep))
        except (OSError, ValueError, RuntimeError, concurrent.futures.CancelledError) as error:
            with contextlib.suppress(OSError):  # the first error is the one to report
                self._folders.sweep()
            raise StorageError(
                f"the checkpoint of step {step} can't be written to {self.directory}: {cause(error)}; the older ones "
                "are untouched: make room or repair the storage, and the same command continues"
            ) from error

    def _join(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _prepare(self) -> None:
        if not self._prepared:
            guarded(self._folders.prepare)
            self._prepared = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax logs through absl meanwhile; its errors arrive as exceptions."""
    marker = os.path.join("orbax", "checkpoint", "")

    def foreign(record: logging.LogRecord) -> bool:
        return marker not in record.pathname

    absl = logging.getLogger("absl")
    absl.addFilter(foreign)
    try:
        yield
    finally:
        absl.removeFilter(foreign)


class _Patient(ocp.type_handlers.NumpyHandler):
    """Reads and writes arrays with Orbax, and waits for all of them before it reports what failed.

    Orbax itself leaves at the first failure and closes its event loop; the arrays still on their way then print
    "Event loop is closed". ``_background_serialize`` isn't public: without it a full disk would be as loud again.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        parent = super().deserialize
        loaded = await _all(parent([info], [arg]) for info, arg in zip(infos, args))
        return [array for (array,) in loaded]

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        parent = super()._background_serialize
        await _all(parent([value], [info], [arg]) for value, info, arg in zip(values, infos, args))


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _handler() -> tuple[ocp.PyTreeCheckpointHandler, ocp.options.MultiprocessingOptions]:
    """Orbax for trees of numpy arrays, without the other processes: no barriers, so that it may run in a thread."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _Patient(deepcopy_host_arrays=False)))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options), options


@_quiet()
def _write_folder(folder: Path, leaves: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    """Commits the arrays and the manifest as one folder. Orbax can't store empty arrays, nor all one-byte types."""
    items = {"manifest": ocp.args.JsonSave(manifest)}
    if stored := {name: _stored(array) for name, array in leaves.items() if array.size}:
        items["payload"] = ocp.args.PyTreeSave(stored)
    arrays, options = _handler()
    handler = ocp.CompositeCheckpointHandler(
        payload=arrays,
        manifest=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        try:
            checkpointer.save(folder, args=ocp.args.Composite(**items))
        except Exception:
            # A part that failed ends the save while Orbax's other threads still write into the temporary folder.
            for thread in threading.enumerate():
                if type(thread).__module__.startswith("orbax."):
                    threading.Thread.join(thread, _PATIENCE)  # its own join raises
            raise


def _stored(array: np.ndarray) -> np.ndarray:
    """int4, uint4, float8 and their like as bytes."""
    return array.view(np.uint8) if array.dtype.kind == "V" and array.dtype.itemsize == 1 else array


@_quiet()
def _read_arrays(folder: Path, manifest: manifests.Manifest) -> dict[str, np.ndarray]:
    """The arrays that the manifest lists, on the host, not yet verified. Raises Damaged if they can't be loaded."""
    dtypes = {name: np.dtype(leaf["dtype"]) for name, leaf in manifest.leaves.items()}
    shapes = {name: leaf["shape"] for name, leaf in manifest.leaves.items()}
    arrays = {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items() if 0 in shape}
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in dtypes if name not in arrays}
    if not wanted:
        return arrays
    handler, options = _handler()
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            loaded = checkpointer.restore(folder / "payload", args=ocp.args.PyTreeRestore(restore_args=wanted))
            arrays |= {name: np.asarray(loaded[name]) for name in wanted}
    except MemoryError:
        raise
    except Exception as error:  # whatever the reader of a damaged file stumbles over
        raise Damaged(f"its arrays can't be loaded ({cause(error)})") from error
    for name in wanted:
        if _stored(np.empty(0, dtypes[name])).dtype == arrays[name].dtype == np.uint8:
            arrays[name] = arrays[name].view(dtypes[name])
    return arrays
