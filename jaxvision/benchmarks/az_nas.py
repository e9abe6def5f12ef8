"""AZ-NAS on NAS-Bench-201: architectures a second beside PyTorch and the official code, the time to the first score,
the whole space.

    python -m jaxvision.benchmarks.az_nas [--resolution 32] [--batch 64] [--architectures 20] [--seed 0] [--together 0]

On CPU on one core by processor time, which other work on the machine blurs less than the clock: the same random
architectures, PyTorch eager after jaxvision for each, where it is installed. The official code's cost is a constant,
measured once. The first score is timed by the clock in a process of its own, from its start, compiling included.
``--together 32`` times batches of so many architectures by the clock instead, without PyTorch: for accelerators.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxvision.models import nas_bench_201, nas_bench_201_graph

RATIO, SPACE_RATIO, FIRST = 1.3, 3.0, 20.0

OFFICIAL = {(32, 64): (1.05, 1.18), (16, 16): (0.099, 0.114)}
"""(resolution, batch) -> the least and the most seconds an architecture of the official code, processor time of one
thread of a 2-core Xeon, PyTorch 2.13."""


def one_core() -> None:
    """Pins this process and what it starts to one core, and XLA to one thread; before JAX starts."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"


def jaxvision_scorer(options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
    """``operations [6] -> scores`` by the compiled program."""
    import jax

    from jaxvision.methods.az_nas.nb201_draws import Sizes
    from jaxvision.methods.az_nas.nb201_program import make_score

    score, key = make_score(Sizes(options.resolution, options.batch)), jax.random.key(options.seed)
    return lambda operations: jax.device_get(score(operations, key))


def torch_scorer(options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
    """The PyTorch peer, on one thread."""
    import torch

    from jaxvision.benchmarks import torch_nas_bench_201

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    return torch_nas_bench_201.scorer(resolution=options.resolution, batch_size=options.batch)


SCORERS = {"jaxvision": jaxvision_scorer, "PyTorch": torch_scorer}


def interleaved(scorers: Mapping[str, Callable[[np.ndarray], Any]], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Processor seconds [n] of each scorer for each architecture, after one to compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for index, row in enumerate(np.concatenate([rows[:1], rows])):
        for name, score in scorers.items():
            begin = time.process_time()
            score(row)
            if index:
                seconds[name].append(time.process_time() - begin)
    return {name: np.asarray(values) for name, values in seconds.items()}


def first_score(options: argparse.Namespace, name: str) -> tuple[float, float, float]:
    """Seconds by the clock and by processor, and peak MiB, of a fresh process that makes one score."""
    command = [sys.executable, "-m", "jaxvision.benchmarks.az_nas", f"--first={name}"]
    command += [f"--{key}={getattr(options, key)}" for key in ("resolution", "batch", "seed")]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, processor, float(done.stdout.split()[-1])


def batches(options: argparse.Namespace, rows: np.ndarray) -> None:
    """Prints the time an architecture of the batched program, by the clock."""
    import jax

    from jaxvision.methods.az_nas.nb201_draws import Sizes
    from jaxvision.methods.az_nas.nb201_program import make_batched_score

    count = max(len(rows) // options.together, 1) * options.together
    rows = np.resize(rows, (count, 6))
    score = make_batched_score(Sizes(options.resolution, options.batch), together=options.together)
    keys, seconds = jax.random.split(jax.random.key(options.seed), count), []
    for _ in range(4):
        begin = time.perf_counter()
        jax.block_until_ready(score(rows, keys))
        seconds.append(time.perf_counter() - begin)
    each = 1e3 * min(seconds[1:]) / count
    print(f"{jax.devices()[0].device_kind}, {options.together} together: {each:.2f} ms an architecture, ", end="")
    print(f"{1e3 / each:.1f} a second; first {count} with compiling {seconds[0]:.1f} s")


def verdict(what: str, value: float, floor: float, *, at_most: bool = False) -> None:
    """One line: what was measured and whether the floor holds."""
    held = value <= floor if at_most else value >= floor
    print(f"{what}: {value:.2f} ({'at most' if at_most else 'at least'} {floor:g}: {'yes' if held else 'NO'})")


def compare(options: argparse.Namespace, every: np.ndarray, rows: np.ndarray) -> None:
    """Prints the tables of the CPU."""
    from jaxvision.benchmarks import torch_nas_bench_201

    names = [name for name in SCORERS if name == "jaxvision" or torch_nas_bench_201.available()]
    first = {name: first_score(options, name) for name in names}
    seconds = interleaved({name: SCORERS[name](options) for name in names}, rows)
    for name in names:
        times, (wall, processor, memory) = 1e3 * seconds[name], first[name]
        spread = f"{1e3 / times.mean():6.2f} architectures/s, {times.mean():7.1f} ms each"
        print(f"  {name:10s} {spread} ({times.min():.1f} to {times.max():.1f}); first score {wall:.1f} s, "
              f"{processor:.1f} s by processor; peak {memory:.0f} MiB")  # fmt: skip
    if (options.resolution, options.batch) in OFFICIAL:
        low, high = OFFICIAL[options.resolution, options.batch]
        ratios = " to ".join(f"{official / seconds['jaxvision'].mean():.2f}" for official in (low, high))
        print(f"  {'official':10s} {1 / high:6.2f} to {1 / low:.2f} architectures/s, {1e3 * low:.0f} to "
              f"{1e3 * high:.0f} ms each (measured once): {ratios} x jaxvision's time")  # fmt: skip
    verdict("first score, s by the clock", first["jaxvision"][0], FIRST, at_most=True)
    functions = np.unique(nas_bench_201_graph.representatives())
    chosen = np.random.default_rng(options.seed).choice(functions, len(rows), replace=False)
    alone = {"jaxvision": SCORERS["jaxvision"](options)}
    distinct = interleaved(alone, every[chosen])["jaxvision"].mean()
    one_by_one, once = len(every) * seconds["jaxvision"].mean(), len(functions) * distinct
    print(f"the whole space: {one_by_one / 3600:.2f} core hours; each of its {len(functions):,} functions once: "
          f"{once / 3600:.2f}, a factor of {one_by_one / once:.2f}")  # fmt: skip
    if "PyTorch" in names:
        # Of sums, so that a long architecture counts by its length.
        verdict("PyTorch / jaxvision, an architecture", seconds["PyTorch"].sum() / seconds["jaxvision"].sum(), RATIO)
        whole = len(every) * seconds["PyTorch"].mean() / once
        verdict("PyTorch one by one / jaxvision each function once, the whole space", whole, SPACE_RATIO)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("resolution", 32), ("batch", 64), ("architectures", 20), ("seed", 0), ("together", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--first", choices=tuple(SCORERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    every = nas_bench_201.all_architectures()
    rows = every[np.random.default_rng(options.seed).choice(len(every), options.architectures, replace=False)]
    if not options.together:
        one_core()
    if options.first:
        SCORERS[options.first](options)(rows[0])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return
    shape = f"{options.resolution}x{options.resolution}, batch {options.batch}"
    print(f"NAS-Bench-201, {shape}, {options.architectures} random architectures")
    if options.together:
        batches(options, rows)
    else:
        compare(options, every, rows)


if __name__ == "__main__":
    main()
