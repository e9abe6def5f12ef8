"""run.json and config.json: what was run, with what, on what."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxvision.core.config import flatten
from jaxvision.core.errors import ConfigError, StorageError
from jaxvision.engine.step_folders import StepFolders

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in a run directory."""
PACKAGES = ("jaxvision", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(command: list[str], seed: int) -> dict[str, Any]:
    """The facts that a person needs to repeat the run."""
    return {
        "command": command,
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout this package runs from, or None where it is no checkout."""
    folder = Path(__file__).parent
    try:
        ask = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--", str(folder)))}
    except (OSError, subprocess.SubprocessError):
        return None


def prepare(directory: Path) -> None:
    """Makes the run directory, or says in one sentence why that can't be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"--workdir={directory} can't be written: {error.strerror}; choose another directory"
        ) from error


def check(directory: Path, config: dict[str, Any]) -> None:
    """Raises ConfigError where the directory holds the run of another configuration: one that saved a step or ended.

    A configuration that got no further (its weights were refused, say) leaves nothing that must be protected.
    """
    path = directory / "config.json"
    if path.exists() and (StepFolders(directory / CHECKPOINTS).ever_saved() or (directory / "results.json").exists()):
        check_same(json.loads(path.read_text()), json.loads(_text(config)), directory)


def record(directory: Path, config: dict[str, Any], info: dict[str, Any]) -> None:
    """Writes config.json, and adds a start to run.json; see :func:`check`."""
    path, info_path = directory / "config.json", directory / "run.json"
    continued = path.exists() and path.read_text() == _text(config)
    started = json.loads(info_path.read_text())["starts"] if continued and info_path.exists() else []
    _write(path, _text(config))
    _write(info_path, json.dumps({"starts": [*started, info]}, indent=2) + "\n")


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def check_same(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    """Raises ConfigError naming the first field in which the directory's configuration differs."""
    before, now = flatten(old), flatten(new)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name, "(absent)") != now.get(name, "(absent)"):
            raise ConfigError(
                f"--workdir={directory} holds a run with config.{name}={before.get(name, '(absent)')}, now it is "
                f"{now.get(name, '(absent)')}; use another --workdir, or the same configuration to continue"
            )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)


def command_line() -> list[str]:
    """The command as typed, the module name instead of its file."""
    return ["python", "-m", "jaxvision.main", *sys.argv[1:]]
