"""The fields of a configuration that the engine itself reads, the same for every method.

    seed        int    everything random in the run follows from it
    parallel    str    "jit" (one program over global arrays) or "pmap"
    log_every   int    steps between two rows of metrics.jsonl
    save_every  int    steps between two checkpoints; the end of a stage always saves
    keep_last   int    newest checkpoints to keep
    keep_best   int    besides, the best ones by the task's ``best`` metric
    tensorboard bool   write TensorBoard events

How often to evaluate belongs to the task (``Eval.every``).
"""

from dataclasses import dataclass
from typing import Any

from jaxvision.core.config import Config


@dataclass(frozen=True)
class Options:
    """See the module's docstring."""

    seed: int = 0
    parallel: str = "jit"
    log_every: int = 50
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    tensorboard: bool = True

    @classmethod
    def read(cls, config: Config) -> "Options":
        """The engine's part of a configuration, checked."""
        return cls(
            seed=int(config.positive("seed", zero=True)),
            parallel=config.one_of("parallel", ("jit", "pmap")),
            log_every=config.positive("log_every"),
            save_every=config.positive("save_every"),
            keep_last=config.positive("keep_last"),
            keep_best=config.positive("keep_best", zero=True),
            tensorboard=config.one_of("tensorboard", (True, False)),
        )


def defaults() -> dict[str, Any]:
    """The engine's fields with their default values, to start a configuration from."""
    return dict(vars(Options()))
