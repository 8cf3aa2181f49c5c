"""UniFace: unified cross-entropy, one threshold for all classes (Zhou et al. 2023, eq. 9 and its margin form)."""

# Shape legend: N = the samples whose own class is on this rank, G = global batch, C = classes on this rank

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State
from lgaf.heads.objective import Objective, Sigmoid


@dataclass(frozen=True, kw_only=True, slots=True)
class UniFace(Margin):
    """log(1 + exp(-(s (cos_y - m) - b))) + l * sum_j log(1 + exp(s cos_j - b)); exponents are clipped to [-s, s].

    b is learned, one for all classes. The loss of one sample is a sum over all classes, so it is large at first.

    Attributes:
        margin: m, a cosine.
        scale: s.
        l: Weight of the negatives.
        r: Share of the negatives that is seen (the head's sample rate); only sets the first value of b.
    """

    margin: float = 0.4
    scale: float = 64.0
    l: float = 1.0  # noqa: E741  # the paper's lambda, named so in the authors' code
    r: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, 2.0)
        require_positive("head.l", self.l)
        require_in_range("head.r", self.r, 1e-6, 1.0)

    @property
    def objective(self) -> Objective:
        """One binary cross-entropy a class."""
        return Sigmoid(negative_weight=self.l)

    def initial_parameters(self, num_classes: int) -> dict[str, Tensor]:
        """The threshold b."""
        return {"bias": torch.tensor(math.log(num_classes * self.r * 10))}

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        return (self.scale * (cosine_N - self.margin) - state["bias"]).clamp(-self.scale, self.scale)

    def negative_logits(
        self, cosine_GC: Tensor, target_cosine_G: Tensor | None = None, state: State = EMPTY_STATE
    ) -> Tensor:
        """Logits [G, C] of the other classes."""
        return (self.scale * cosine_GC - state["bias"]).clamp(-self.scale, self.scale)
