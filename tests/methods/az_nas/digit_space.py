"""A search space of four digits, whose scores are known: for the tests of what works with any space."""

import jax
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas.spaces.space import Cost

PROXIES = ("expressivity", "progressivity", "trainability", "complexity")


class DigitSpace:
    """Architectures are four digits 0 ... 9; FLOPs are their sum, parameters ten times as many."""

    name = "digits"
    shape = (4,)
    proxies = PROXIES

    def sample(self, generator):
        return generator.integers(0, 10, 4).astype(np.int32)

    def mutate(self, architecture, generator, replacements):
        changed = architecture.copy()
        for _ in range(replacements):
            changed[generator.integers(4)] = generator.integers(10)
        return changed

    def to_string(self, architecture):
        return "".join(map(str, architecture))

    def from_string(self, text):
        if len(text) != 4 or not text.isdigit():
            raise ConfigError(f"architecture '{text}' must be four digits")
        return np.asarray([int(digit) for digit in text], np.int32)

    def cost(self, architecture):
        return Cost(int(architecture.sum()), 10 * int(architecture.sum()), 4)

    def scorer(self, resolution, batch_size):
        def score(architecture, key):
            noise = float(jax.random.uniform(key))
            first, second, third, _ = (float(digit) for digit in architecture)
            return {
                "expressivity": first + noise,
                "progressivity": float("nan") if third == 0 else second - third,
                "trainability": -np.inf if first == 0 else -abs(third - 5.0),
            }

        return score

    def model(self, architecture):
        return "resnet20", {"depth": 14}
