import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxvision.core.errors import ConfigError, StorageError
from jaxvision.engine.lock import RunLock

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from jaxvision.engine.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path / "run"``, until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_held_by_another_process_until_it_releases(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            RunLock(tmp_path / "run").acquire()
        assert f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()} since 2" in str(
            raised.value
        )
        assert "\n" not in str(raised.value)
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "released\n"
    with RunLock(tmp_path / "run"):
        assert f'"pid": {os.getpid()},' in (tmp_path / "run" / ".lock").read_text()


def test_free_once_the_holder_was_killed(tmp_path, holder):
    holder.kill()  # SIGKILL
    holder.wait()
    with RunLock(tmp_path / "run"):
        pass


def test_refused_to_a_second_holder_in_the_same_process(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.acquire()  # the holder may ask again
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            RunLock(tmp_path).acquire()
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass
    lock.release()
    with RunLock(tmp_path), pytest.raises(ConfigError):
        lock.acquire()


def test_an_unreadable_holder_is_another_process(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(ConfigError, match="is in use by another process; wait"):
            RunLock(tmp_path).acquire()


def test_not_enabled_takes_nothing(tmp_path):
    with RunLock(tmp_path / "run", enabled=False):
        assert not (tmp_path / "run").exists()
        with RunLock(tmp_path / "run"), RunLock(tmp_path / "run", enabled=False):
            pass


def test_a_process_started_meanwhile_does_not_inherit_it(tmp_path):
    with RunLock(tmp_path):
        command = [sys.executable, "-c", "input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False)
    with RunLock(tmp_path):
        child.communicate(b"\n")


def test_a_forked_child_that_releases_does_not_unlock_its_parent(tmp_path):
    script = """
import os, sys
from jaxvision.core.errors import ConfigError
from jaxvision.engine.lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
if os.fork() == 0:
    lock.release()
    os._exit(0)
os.wait()
try:
    RunLock(sys.argv[1]).acquire()
except ConfigError:
    print("still held")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "still held\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_file_locks_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog, code):
    def unsupported(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path):
        pass
    assert [(record.name, record.levelno) for record in caplog.records] == [("jaxvision", logging.WARNING)]
    assert "has no file locks" in caplog.text
    assert str(tmp_path) in caplog.text


def test_storage_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match=r"can't be written: .*; use one that can"):
            RunLock(directory).acquire()

    def broken(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(StorageError, match="can't be locked: Input/output error"):
        RunLock(tmp_path).acquire()


def test_a_full_disk_still_locks(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(tmp_path), pytest.raises(ConfigError, match="in use by another process"):
        RunLock(tmp_path).acquire()
