"""Learning rates as pure functions of the step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from lgaf.config import require_in_range, require_positive

PAPER_EPOCHS = 26
PAPER_MILESTONES = (12, 20, 24)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSchedule:
    """Divide the learning rate by ten at milestones, after an optional linear warm-up.

    Attributes:
        milestones: Where the rate drops, as shares of the run. The default is the paper's 12, 20 and 24 epochs (4.1.3)
            of 26 (AdaFace's recipe, whose milestones these are), so that a run of any length keeps the shape.
        factor: What each milestone multiplies the rate by.
        warmup: Share of the run in which the rate rises linearly from near 0; the paper has none.
    """

    milestones: tuple[float, ...] = tuple(epoch / PAPER_EPOCHS for epoch in PAPER_MILESTONES)
    factor: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("schedule.factor", self.factor)
        require_in_range("schedule.warmup", self.warmup, 0.0, 1.0)
        if any(not 0 < share <= 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"schedule.milestones={self.milestones!r} must be rising shares of the run in (0, 1]")

    def learning_rate(self, base: float, step: int, total_steps: int) -> float:
        """The rate of step ``step`` (from 0) of ``total_steps``."""
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return base * ((step + 1) / warmup_steps)
        reached = bisect_right([share * total_steps for share in self.milestones], step)
        return float(base * self.factor**reached)
