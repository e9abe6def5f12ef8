"""What an arm of a comparison is: one way to train, for several seeds and settings. They run in ``engine/arms.py``."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxvision.engine.task import Batch, Metrics, State


@dataclass(frozen=True)
class Member:
    """One training of an arm: the position of its seed, and the values of its setting."""

    seed: int
    setting: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``lr=0.1``, the same for every seed."""
        return ", ".join(f"{name}={value:g}" for name, value in self.setting.items())


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      name: of the stage and of the row in the table.
      begin: ``(variables, setting, key) -> State`` of one member; ``setting`` holds float32 () arrays that are the
        state's ``extra["setting"]`` too. Traceable.
      step: the step of one member.
      steps: how many.
      evaluate: ``(state, batch) -> metrics`` of one member.
      grid: name -> the values a member may have; all combinations are tried.
      schedules: logged values.
      separate: training metrics whose name starts with one of these are logged for each member, as ``name_0``, ...;
        the others are means over the members.
      keep: ``state -> tree`` of a finished member, for the report; see :func:`arms.kept`.
      best: ``"evaluation/metric"``: each member keeps what it was at the evaluation of its largest value (the first of
        equal ones) instead of what it is in the end; ''.
      pretrains: the arms after this one start from what it trained, its last step. It has no grid.
      check: host function of a member's state as ``begin`` made it; raises where its values can't work.
    """

    name: str
    begin: Callable[[Any, Mapping[str, jax.Array], jax.Array], State]
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
    steps: int
    evaluate: Callable[[State, Batch], Metrics]
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    schedules: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    separate: tuple[str, ...] = ()
    keep: Callable[[State], Any] | None = None
    best: str = ""
    pretrains: bool = False
    check: Callable[[State], None] | None = None

    def members(self, seeds: Sequence[int]) -> tuple[Member, ...]:
        """All trainings: for each setting every seed."""
        settings = [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]
        return tuple(Member(index, setting) for setting in settings for index in range(len(seeds)))
