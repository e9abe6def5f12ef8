"""Runs a method: flags -> config -> task -> engine -> exit code.

    python -m jaxvision.main --config=configs/igq_vit.py
    python -m jaxvision.main --config=configs/classification.py:cifar10_resnet20 --config.data.path=DIR --workdir=RUN

Exit codes: 0 done, 64 bad command, configuration or data, 70 non-finite numbers, 74 storage or no good
checkpoint, 75 preempted and saved (start the same command again).
"""

import errno
import gc
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxvision.core import host_memory
from jaxvision.core.errors import ConfigError, JaxvisionError, Preempted, StorageError, unknown

STORAGE_TROUBLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EIO), "repair the storage"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the permission"),
}
"""What the person can do about an error of the file system."""

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, with a preset after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; the same one continues a run. [runs/<config>]")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved configuration and stop.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build everything, lower one step of each stage, run nothing.")
MULTIHOST = flags.DEFINE_bool("multihost", False, "Join the cluster that jax.distributed finds (Slurm, TPU pod).")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, to start several processes by hand.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: this process, from 0.")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Mistakes of the person who typed it end in one line, no traceback."""
    try:
        config, name = parse(sys.argv if arguments is None else arguments)
        if PRINT_CONFIG.value:
            print(json.dumps(config, indent=2))
            return 0
        return run(config, name)
    except JaxvisionError as error:
        print(f"jaxvision: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in STORAGE_TROUBLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        advice = STORAGE_TROUBLE[error.errno]
        print(f"jaxvision: {error.strerror}{where}; {advice}, and the same command continues", file=sys.stderr)
        return StorageError.exit_code


def parse(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """The resolved configuration as plain values, and the default name of its run directory."""
    if {"--help", "-h", "-help"} & set(arguments[1:]):
        print(f"{__doc__}\n{FLAGS.main_module_help()}")
        raise SystemExit(0)
    try:
        rest = FLAGS(arguments)
        config = CONFIG.value
        values = None if config is None else _plain(config.to_dict())
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # What a configuration file or an override can raise: absl and ml_collections name the flag.
        raise ConfigError(_one_line(error)) from error
    if rest[1:]:
        raise ConfigError(f"'{rest[1]}' is not a flag; settings are given as --config.name=value")
    if values is None:
        raise ConfigError("--config=FILE is needed, for example --config=configs/igq_vit.py")
    file, _, preset = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return values, Path(file).stem + (f"-{preset}" if preset else "")


def run(values: dict[str, Any], name: str) -> int:
    """Builds the task and runs it in its directory; returns the exit code."""
    _prepare_jax()
    # Imported here so that --help and --print_config answer at once.
    from jaxvision.core.config import Config
    from jaxvision.engine import loop, parallel, plan, report, runinfo
    from jaxvision.engine.interrupt import Interrupt
    from jaxvision.engine.lock import RunLock
    from jaxvision.engine.options import Options
    from jaxvision.engine.progress import Progress

    config = Config(values)
    options = Options.read(config)
    devices = parallel.create(options.parallel)
    task = make_task(config)
    config.check_all_read()
    if DRY_RUN.value:
        print(plan.describe(task, options, devices))
        return 0
    directory = Path(WORKDIR.value or Path("runs") / name)
    first_host = devices.shard_index == 0
    runinfo.prepare(directory)
    with RunLock(directory, enabled=first_host):
        if first_host:
            runinfo.check(directory, values)
        if (directory / "results.json").exists():
            if first_host:
                print((directory / "report.md").read_text())
                print(f"This run is finished; its report is {directory / 'report.md'}.")
            return 0
        planned = plan.Plan(task, options, devices)
        if first_host:
            runinfo.record(directory, values, runinfo.describe(runinfo.command_line(), options.seed))
        with Interrupt() as interrupt:
            with Progress(first_host) as progress:
                results = loop.run(task, options, directory, devices, progress, plan=planned, interrupt=interrupt)
            if first_host:
                where = f"while it made the report; all steps are saved in {directory}, the same command makes it again"
                with interrupt.at_once(where):
                    made = task.report(results)
                    report.write(made, directory)
                report.show(made, directory)
    return 0


def make_task(config: Any) -> Any:
    """The task of ``config.method``, made by ``jaxvision.methods.<method>.task.make``."""
    methods = Path(__file__).parent / "methods"
    names = sorted(path.parent.name for path in methods.glob("*/task.py"))
    if config.method not in names:
        raise unknown("config.method", config.method, names)
    return importlib.import_module(f"jaxvision.methods.{config.method}.task").make(config)


def _prepare_jax() -> None:
    """What must be set before the backend starts: memory, the compilation cache, the cluster where there is one."""
    host_memory.keep_freed_memory()
    # Tracing makes millions of objects that stay: Python's default thresholds look through them again and again.
    gc.set_threshold(100_000, 50, 1000)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxvision" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if COORDINATOR.value is None and not MULTIHOST.value:
        return
    import jax

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # Collectives between CPU processes need gloo; accelerators bring their own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if COORDINATOR.value is None:
        jax.distributed.initialize()
        return
    if NUM_PROCESSES.value is None or PROCESS_ID.value is None:
        raise ConfigError("--coordinator needs --num_processes and --process_id as well")
    jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)


def _plain(value: Any) -> Any:
    """Tuples stay tuples; nested ConfigDicts become dicts."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _one_line(error: Exception) -> str:
    """What the libraries said, as one sentence."""
    text = str(error.args[0] if error.args else error)
    if isinstance(error, OSError):
        missing = next((line.strip() for line in text.splitlines() if "No such file" in line), text)
        return f"--config: {' '.join(missing.split())}; give the path of a file such as configs/igq_vit.py"
    if match := re.search(r"(\w+)\W+Did you mean \W*(\w+)", text.replace("\\n", "\n")):
        return f"--config has no field '{match[1]}'; did you mean '{match[2]}'?"
    if isinstance(error, AttributeError | KeyError):
        return f"--config has no field {text.strip(chr(34))}; --print_config shows those there are"
    return " ".join(text.split())


def _leave(code: int) -> None:
    """Ends the process with its exit code; once all is saved at a signal, without waiting for threads.

    A method may build ahead on threads (a row of a table takes a minute), and Python would wait for them, while the
    cluster counts the seconds from its signal. Several processes leave JAX's service together, in order.
    """
    if code == Preempted.exit_code and NUM_PROCESSES.value is None and not MULTIHOST.value:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
