"""Random numbers named by (seed, stream, step): nothing stores a key, so resuming needs only the step.

Two families share the naming: JAX keys for what runs on the device, and NumPy generators for the host
(shuffling, augmentation).
"""

import zlib

import jax
import numpy as np


def stream_id(stream: str) -> int:
    """A stable 32-bit number for a stream's name (CRC-32; the same in every process and version)."""
    return zlib.crc32(stream.encode())


def key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The typed key of one stream at one step, ``fold(seed, stream, step)``.

    Args:
      seed: the run's seed.
      stream: what the numbers are for, such as ``"init"`` or ``"train/dropout"``.
      step: int or traced int32 scalar.

    Returns:
      A typed PRNG key, shape ().
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream_id(stream)), step)


def generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """The NumPy generator of one stream at the given counters (for example epoch, or step and row).

    Built on the counter-based Philox, seeded through ``SeedSequence``, so neighbours are independent.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream_id(stream), *counters])))
