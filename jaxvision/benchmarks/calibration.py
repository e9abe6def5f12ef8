"""Calibration: losses beside PyTorch eager, what ACLS adds to a training step, metrics, a file of a million rows.

    python -m jaxvision.benchmarks.calibration [--parts losses,step,metrics] [--rounds 5] [--dense 8,512,512,21]
        [--batch 128] [--rows 50000] [--classes 1000]
    python -m jaxvision.benchmarks.calibration --parts stored [--stored_rows 1000000] [--folder DIR]

"losses": loss and gradient of ACLS, MbLS and M-NDCG (three views) at (128, 100) and (256, 1000), of ACLS and MbLS on
dense logits, which M-NDCG doesn't take. Everything on one machine in one run, interleaved; PyTorch where it is
installed (the extra ``bench``). "step": a training step of ResNet-50 with the CIFAR stem with cross-entropy and with
ACLS, and what the losses alone cost at that size; in processor time, because the difference of two steps drowns in a
busy clock. "metrics", "stored": see ``calibration_metrics``; "stored" needs 4 GB of disk, so it runs only when named.
Numbers with a limit are printed beside it.
"""

import argparse
import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvision.benchmarks import calibration_metrics, timing, torch_calibration, training
from jaxvision.engine import supervised
from jaxvision.losses.calibration import cross_entropy
from jaxvision.losses.penalties import mbls
from jaxvision.methods.acls.acls import acls_loss
from jaxvision.methods.rankmixup.rankmixup import mndcg_loss
from jaxvision.models import zoo
from jaxvision.optim import optimizers

VIEWS = 3
SIZES = ((128, 100), (256, 1000))
PARTS = ("losses", "step", "metrics", "stored")
FASTER, DENSE_FASTER = 1.0, 2.0
"""How many times as fast as PyTorch a loss must be, and a dense one."""
STEP = 2.0
"""Per cent that ACLS may add to a training step."""


def example(rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of which a part is beyond the margin of 10, and labels."""
    generator = np.random.default_rng(0)
    logits = 6 * generator.standard_normal((rows, classes), np.float32)
    return logits, generator.integers(0, classes, rows, np.int32)


def compiled(loss: Callable[..., Any], argnums: int | tuple[int, ...], *arrays: np.ndarray, **hyper: float):
    """A function without arguments: value and gradient, until they are there."""
    total = jax.jit(jax.value_and_grad(lambda *given: loss(*given, **hyper).total, argnums=argnums))
    placed = [jnp.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(total(*placed))


def repeated(candidates: Mapping[str, Callable[[], Any]], times: int, rounds: int) -> dict[str, float]:
    """Median seconds of one call, each timed ``times`` in a row."""

    def many(run):
        for _ in range(times):
            run()

    seconds = timing.interleaved({name: partial(many, run) for name, run in candidates.items()}, rounds)
    return {name: value / times for name, value in seconds.items()}


def loss_pairs(rows: int, classes: int, *, ranking: bool) -> dict[str, tuple[Callable[[], Any], Any]]:
    """name -> (ours, PyTorch's or None)."""
    logits, labels = example(rows, classes)
    peers = torch_calibration if torch_calibration.available() else None
    pairs = {
        "acls": (compiled(acls_loss, 0, logits, labels), peers and peers.acls(logits, labels)),
        "mbls": (compiled(mbls, 0, logits, labels), peers and peers.mbls(logits, labels)),
    }
    if ranking:
        mixed = example(VIEWS * rows, classes)[0].reshape(VIEWS, rows, classes)
        relevance = np.random.default_rng(1).uniform(0.5, 1, (VIEWS, rows)).astype(np.float32)
        arrays = logits, mixed, labels, relevance
        pairs["mndcg"] = compiled(mndcg_loss, (0, 1), *arrays), peers and peers.mndcg(*arrays)
    return pairs


def check(name: str, ours: Callable[[], Any], theirs: Callable[[], float]) -> None:
    """Both compute the same loss."""
    value, expected = float(ours()[0]), theirs()
    if not np.isclose(value, expected, rtol=1e-4):
        raise AssertionError(f"{name}: {value} here, {expected} in PyTorch")


def losses(dense: tuple[int, ...], rounds: int) -> None:
    """Prints the losses' times and their ratios to PyTorch."""
    cases = [(f"{size}", size, 50, True) for size in SIZES]
    cases.append((f"dense {dense}", (int(np.prod(dense[:-1])), dense[-1]), 1, False))
    for title, (rows, classes), times, ranking in cases:
        pairs = loss_pairs(rows, classes, ranking=ranking)
        candidates = {}
        for name, (ours, theirs) in pairs.items():
            candidates[name] = ours
            if theirs is not None:
                check(name, ours, theirs)
                candidates[f"{name} PyTorch"] = theirs
        seconds = repeated(candidates, times, rounds)
        print(f"loss and gradient, {title}:")
        for name in pairs:
            line = f"  {name:6s} {1e3 * seconds[name]:10.3f} ms"
            peer = seconds.get(f"{name} PyTorch")
            print(
                line
                if peer is None
                else f"{line}   PyTorch {1e3 * peer:10.3f} ms   {peer / seconds[name]:6.2f} x as fast"
            )
            if peer is not None:
                limit = FASTER if ranking else DENSE_FASTER
                training.verdict(f"{name}, {title}, PyTorch / jaxvision", peer / seconds[name], limit, at_least=True)


def step(model: str, batch: int, rounds: int) -> None:
    """Prints the time of a training step with cross-entropy and with ACLS."""
    module = zoo.build(model, num_classes=10, stem="cifar")
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.standard_normal((batch, 32, 32, 3), np.float32))
    given = {"image": images, "label": jnp.asarray(generator.integers(0, 10, batch, np.int32))}
    sgd = optimizers.sgd(0.1, 0.9, weight_decay=5e-4)
    transform = optax.chain(optimizers.clip_by_global_norm(2.0), sgd)
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    state = supervised.new_state(variables, transform, average=False)

    def program(loss):
        total = lambda outputs, batch: (loss(outputs, batch["label"]).total, {})  # noqa: E731
        step = jax.jit(supervised.train_step(module, transform, total))
        return step.lower(state, given, jax.random.key(0)).compile()

    acls = partial(acls_loss, margin=6.0)
    programs = {"ce": program(cross_entropy), "acls": program(acls)}
    run = lambda name: jax.block_until_ready(programs[name](state, given, jax.random.key(0)))  # noqa: E731
    seconds = timing.processor_seconds({name: partial(run, name) for name in programs}, rounds)
    traffic = {name: each.cost_analysis()["bytes accessed"] for name, each in programs.items()}
    logits, labels = example(batch, 10)
    alone = {"ce": compiled(cross_entropy, 0, logits, labels), "acls": compiled(acls, 0, logits, labels)}
    alone = repeated(alone, 100, rounds)
    print(f"training step, {model} with the CIFAR stem, batch {batch}, processor seconds:")
    more = {name: 100 * (values["acls"] / values["ce"] - 1) for name, values in (("time", seconds), ("bytes", traffic))}
    print(f"  cross-entropy {seconds['ce']:.3f}, ACLS {seconds['acls']:.3f}: {more['time']:+.2f} %")
    print(f"  memory that the compiled steps touch: {traffic['ce'] / 1e9:.2f} GB, with ACLS {more['bytes']:+.5f} %")
    print(f"  the losses alone, on the clock: {1e6 * alone['ce']:.0f} us, {1e6 * alone['acls']:.0f} us")
    training.verdict("ACLS over cross-entropy, a whole step by processor, %", more["time"], STEP)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="losses,step,metrics", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense", default="8,512,512,21", help="shape of the dense logits")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=128, help="of the training step")
    parser.add_argument("--rows", type=int, default=50_000, help="of the metrics")
    parser.add_argument("--classes", type=int, default=1000, help="of the metrics and of the file")
    parser.add_argument("--stored_rows", type=int, default=1_000_000, help="of the file")
    parser.add_argument("--folder", help="where the file is written; default: the system's place for temporary files")
    parser.add_argument("--torch_threads", type=int, default=0, help="0: PyTorch's own choice; its threads spin")
    options = parser.parse_args()
    dense = tuple(int(each) for each in options.dense.split(","))
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts={options.parts}: there are {', '.join(PARTS)}")
    numbers = (*dense, options.rounds, options.batch, options.rows, options.stored_rows)
    if len(dense) < 2 or min(numbers) < 1 or options.classes < 2:
        parser.error("--dense takes two numbers or more; all numbers must be positive, and --classes at least 2")
    if options.torch_threads and torch_calibration.available():
        torch_calibration.use_threads(options.torch_threads)
    print(f"{jax.devices()[0].device_kind}, {platform.processor() or 'CPU'}, {os.cpu_count()} cores")
    if "losses" in parts:
        losses(dense, options.rounds)
    if "step" in parts:
        step(options.model, options.batch, options.rounds)
    if "metrics" in parts:
        calibration_metrics.metrics(options.rows, options.classes, options.rounds)
    if "stored" in parts:
        calibration_metrics.stored(options.stored_rows, options.classes, options.folder)
    print(training.peak_memory())


if __name__ == "__main__":
    main()
