"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lgaf.config import require_choice, require_in_range, require_positive

PAPER_EPOCHS: Final = 26
PAPER_MILESTONES: Final = (12, 20, 24)

ScheduleKind = Literal["step", "polynomial", "cosine"]


def warm_up(step: int, num_steps: int) -> float:
    """Share of the rate in a linear rise over ``num_steps``: never 0, and 1 at their last."""
    return (step + 1) / num_steps if step < num_steps else 1.0


def step_decay(step: int, total_steps: int, milestones: Sequence[float], factor: float) -> float:
    """Multiplied by ``factor`` at each milestone, a share of ``total_steps``."""
    return float(factor ** bisect_right([share * total_steps for share in milestones], step))


def polynomial_decay(step: int, total_steps: int, power: float) -> float:
    """From 1 at step 0 towards 0 at ``total_steps``: (1 - step / total_steps) ** power (arcface_torch)."""
    return float((1 - step / total_steps) ** power)


def cosine_decay(step: int, total_steps: int) -> float:
    """From 1 at step 0 towards 0 at ``total_steps`` along half a cosine (SGDR, https://arxiv.org/abs/1608.03983)."""
    return (1 + math.cos(math.pi * step / total_steps)) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the learning rate runs over a training of any length, after an optional linear warm-up.

    Attributes:
        kind: "step": drops at milestones. "polynomial", "cosine": falls from the end of the warm-up to the end of the
            run.
        milestones: Of "step": where the rate drops, as shares of the run. The default is the paper's 12, 20 and 24
            epochs (4.1.3) of 26 (AdaFace's recipe, whose milestones these are), so that a run of any length keeps the
            shape.
        factor: Of "step": what each milestone multiplies the rate by.
        power: Of "polynomial"; 1 is a straight line, insightface's.
        floor: Of "polynomial" and "cosine": share of the rate that is left at the end.
        warmup: Share of the run in which the rate rises linearly from near 0; the paper has none.
    """

    kind: ScheduleKind = "step"
    milestones: tuple[float, ...] = tuple(epoch / PAPER_EPOCHS for epoch in PAPER_MILESTONES)
    factor: float = 0.1
    power: float = 1.0
    floor: float = 0.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_choice("schedule.kind", self.kind, ("step", "polynomial", "cosine"))
        require_positive("schedule.factor", self.factor)
        require_positive("schedule.power", self.power)
        require_in_range("schedule.floor", self.floor, 0.0, 1.0)
        require_in_range("schedule.warmup", self.warmup, 0.0, 1.0)
        if any(not 0 < share <= 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"schedule.milestones={self.milestones!r} must be rising shares of the run in (0, 1]")

    def learning_rate(self, base: float, step: int, total_steps: int) -> float:
        """The rate of step ``step`` (from 0) of ``total_steps``."""
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return base * warm_up(step, warmup_steps)
        if self.kind == "step":
            return base * step_decay(step, total_steps, self.milestones, self.factor)
        past, length = step - warmup_steps, total_steps - warmup_steps
        fall = cosine_decay(past, length) if self.kind == "cosine" else polynomial_decay(past, length, self.power)
        return base * (self.floor + (1 - self.floor) * fall)
