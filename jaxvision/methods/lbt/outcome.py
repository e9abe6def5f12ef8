"""What became of the arms: accuracy, loss and gradients of each way to train, at the learning rate that was chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvision.engine import arms, reestimation
from jaxvision.engine.recipes import Model
from jaxvision.engine.report import Results

PROBE = "probe"
"""The evaluation that measures gradients on one training batch at the end of an arm."""
NAMES = {
    "float": "float",
    "wa": "W, A only",
    "fixed": "gamma",
    "dsgc": "DSGC",
    "whole_error": "whole error",
    "piecewise": "piecewise",
    "lbt": "LBT",
}


@dataclass(frozen=True)
class Comparison:
    """What the report knows of the run besides its rows.

    Attributes:
      title: network and data.
      arms: in the order of their stages.
      seeds: of the run.
      bits: widths of gradients.
      alpha: the fraction of gradients whose error is E(G_L).
      steps: of each arm.
      reestimated: batches that the statistics are averaged over before an arm is judged; 0: the running ones are kept.
      choose: the evaluation on which a learning rate is chosen; "test" is the one that is reported.
      images: images of each evaluation.
      warning: of too few elements, or "".
      export: the arm whose network is written, "": none.
      model, family: of the run.
      network: of the arm that is written.
    """

    title: str
    arms: tuple[arms.Arm, ...]
    seeds: tuple[int, ...]
    bits: tuple[int, ...]
    alpha: float
    steps: int
    reestimated: int
    choose: str
    images: Mapping[str, int]
    warning: str
    export: str = ""
    model: Model | None = None
    family: str = ""
    network: Any = None

    def judged(self, arm: str) -> str:
        """The stage whose evaluations count."""
        return reestimation.judged(arm, self.reestimated)


@dataclass(frozen=True, eq=False)
class Cell:
    """One way to train at one width, with its chosen learning rate.

    Attributes:
      arm, label: name of the stage; the row of the table.
      bits: of the gradients; None: float.
      rate: learning rate.
      alpha: of the target clip ratio.
      members: positions in the arm, one a seed.
      accuracy, loss: float64 [S]: test accuracy; training loss, mean over the last tenth of the steps.
      layers: diagnostic -> layer -> float64 [S]; empty where gradients are float.
    """

    arm: str
    label: str
    bits: int | None
    rate: float
    alpha: float
    members: tuple[int, ...]
    accuracy: np.ndarray
    loss: np.ndarray
    layers: Mapping[str, Mapping[str, np.ndarray]]

    def mean(self, diagnostic: str) -> float:
        """Over layers and seeds."""
        return float(np.mean(list(self.layers[diagnostic].values())))


def collect(comparison: Comparison, results: Results) -> list[Cell]:
    """One cell for each arm, setting and width, at the learning rate of the best mean accuracy for choosing."""
    cells = []
    for arm in comparison.arms:
        groups: dict[tuple, dict[float, list[int]]] = {}
        for index, one in enumerate(arm.members(comparison.seeds)):
            setting = dict(one.setting)
            rate = setting.pop("lr")
            groups.setdefault(tuple(setting.items()), {}).setdefault(rate, []).append(index)
        for setting, rates in groups.items():
            judged = comparison.judged(arm.name)
            means = {rate: _last(results, judged, comparison.choose, m).mean() for rate, m in rates.items()}
            cells.append(_cell(comparison, results, arm.name, dict(setting), rates, max(means, key=means.get)))
    return cells


def _cell(
    comparison: Comparison,
    results: Results,
    arm: str,
    setting: dict[str, float],
    rates: Mapping[float, list[int]],
    rate: float,
) -> Cell:
    members = rates[rate]
    curves = [results.curve(arm, f"loss_{index}")[1] for index in members]
    layers: dict[str, dict[str, np.ndarray]] = {}
    row = next((row for row in reversed(results.rows) if (row["stage"], row.get("eval")) == (arm, PROBE)), {})
    for name in row:
        diagnostic, _, rest = name.partition("/")
        if rest and rest.endswith(f"_{members[0]}"):
            layer = rest.removesuffix(f"_{members[0]}")
            layers.setdefault(diagnostic, {})[layer] = np.asarray([row[f"{diagnostic}/{layer}_{i}"] for i in members])
    bits = setting.get("gradient_bits")
    return Cell(
        arm,
        _label(arm, setting),
        None if bits is None else int(bits),
        rate,
        setting.get("alpha", comparison.alpha),
        tuple(members),
        _last(results, comparison.judged(arm), "test", members),
        np.asarray([np.mean(curve[-max(1, len(curve) // 10) :]) for curve in curves]),
        layers,
    )


def _label(arm: str, setting: Mapping[str, float]) -> str:
    extra = [f"{value:g}" if name == "gamma" else f"{name} {value:g}"
             for name, value in setting.items() if name in ("gamma", "alpha")]  # fmt: skip
    extra += ["with rate factor"] if setting.get("rate_factor") else []
    return " ".join([NAMES[arm], *extra])


def _last(results: Results, arm: str, evaluation: str, members: Sequence[int]) -> np.ndarray:
    return np.asarray([results.last(arm, evaluation, f"accuracy_{index}") for index in members])
