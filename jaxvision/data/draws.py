"""Random numbers for the rows of a batch that don't depend on how the batch is split over hosts."""

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError


class Draws:
    """Random numbers for this host's rows of one global training batch.

    Every method draws for all ``B`` rows of the global batch and returns the rows of this shard, so that the
    concatenated shards hold exactly what one host alone would have drawn. A function of (seed, stream, step)
    and of the order of the calls.
    """

    def __init__(self, seed: int, stream: str, step: int, batch_size: int, rows: slice):
        self._key = (seed, f"{stream}/augment", step)
        self._batch_size = batch_size
        self._rows = range(batch_size)[rows]
        self._slice = rows
        self._generator = rng.generator(*self._key)
        self._row_calls = 0

    def __len__(self) -> int:
        """The number of local rows."""
        return len(self._rows)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """float64 ``[B_local, *shape]``, uniform in ``[low, high)``."""
        return self._generator.uniform(low, high, (self._batch_size, *shape))[self._slice]

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """int64 ``[B_local, *shape]``, uniform in ``low .. high - 1``."""
        return self._generator.integers(low, high, (self._batch_size, *shape))[self._slice]

    def normal(self, mean: float = 0.0, std: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """float64 ``[B_local, *shape]``, Gaussian."""
        return self._generator.normal(mean, std, (self._batch_size, *shape))[self._slice]

    def row_generators(self, where: np.ndarray | None = None) -> list[np.random.Generator | None]:
        """One generator per local row, keyed by the row's global number; for work whose amount differs by row.

        Args:
          where: bool ``[B_local]``; rows that are False get None instead (a generator costs 20 microseconds).
        """
        self._row_calls += 1
        seed, stream, step = self._key
        return [
            rng.generator(seed, f"{stream}/rows", step, row, self._row_calls) if where is None or where[i] else None
            for i, row in enumerate(self._rows)
        ]


class NoRandomness:
    """Stands in for the random numbers in evaluation: whoever asks for one gets a :class:`ConfigError`."""

    def __getattr__(self, name: str):
        raise ConfigError(
            f"an evaluation transform asked for random numbers (.{name}); evaluation must be deterministic: "
            "take the random transform out of the evaluation pipeline"
        )


NO_RANDOMNESS = NoRandomness()
