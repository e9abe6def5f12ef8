"""One writer per run directory, by a lock that the operating system drops when its holder dies."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from jaxvision.core.errors import ConfigError, StorageError

FILE = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

logger = logging.getLogger("jaxvision")


class RunLock:
    """Holds ``<directory>/.lock`` from ``__enter__`` to ``__exit__`` or the death of the process, kill -9 included.

    The file stays behind, since deleting it could let two processes lock two files of the same name.

    Args:
      directory: of the run; made if it doesn't exist.
      enabled: False in the processes of a multi-process run that don't write.
    """

    def __init__(self, directory: Path, *, enabled: bool = True):
        self.path = Path(directory) / FILE
        self.enabled = enabled
        self._descriptor: int | None = None
        self._owner = 0

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          ConfigError: another process holds it.
          StorageError: the directory can't be written.
        """
        if not self.enabled or self._descriptor is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"the run directory {self.path.parent} can't be written: {error.strerror}; use one that can"
            ) from error
        try:
            self._lock(descriptor)
            _write_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._owner = descriptor, os.getpid()

    def release(self) -> None:
        """Gives the lock back; without effect where it isn't held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if os.getpid() == self._owner:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child process may still have the file open
        os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"the run directory {self.path.parent} is in use by {_holder(self.path)}; "
                "wait until it ends, or use another directory"
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise StorageError(f"{self.path} can't be locked: {error.strerror}; repair the storage") from error
            logger.warning(
                "the file system of %s has no file locks (%s): make sure yourself that no second process uses this "
                "run directory",
                self.path.parent,
                error.strerror,
            )


def _write_holder(descriptor: int) -> None:
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(path: Path) -> str:
    """Who holds the lock, as far as the file says; it may be caught in the middle of being written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    return "another process"
