"""CurricularFace: hard negatives weigh more as training goes on (Huang et al. 2020, eq. 5-7)."""

# Shape legend: N = the samples whose own class is on this rank, G = global batch, C = classes on this rank

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State, cosine_of_sum, guarded_cosine_of_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class CurricularFace(Margin):
    """ArcFace's target; other classes with cos > cos(theta + m) get cos * (t + cos), t a running mean.

    Attributes:
        margin: m, in radians.
        scale: s.
        alpha: Share of the batch's mean target cosine in t (0.01 in the authors' code, 0.1 in TFace).
    """

    margin: float = 0.5
    scale: float = 64.0
    alpha: float = 0.01
    needs_all_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, math.pi)
        require_in_range("head.alpha", self.alpha, 0.0, 1.0)

    def initial_state(self, num_classes: int) -> dict[str, Tensor]:
        """The parameter t, 0 at first: hard negatives then weigh least."""
        return {"t": torch.tensor(0.0)}

    @torch.no_grad()
    def next_state(self, state: State, cosine_G: Tensor | None, norm_G: Tensor) -> dict[str, Tensor]:
        """Move t towards the mean target cosine of the global batch."""
        assert cosine_G is not None
        return {"t": state["t"].lerp(cosine_G.mean(), self.alpha)}

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        return self.scale * guarded_cosine_of_sum(cosine_N, self.margin)

    def negative_logits(
        self, cosine_GC: Tensor, target_cosine_G: Tensor | None = None, state: State = EMPTY_STATE
    ) -> Tensor:
        """Logits [G, C] of the other classes, the hard ones modulated."""
        assert target_cosine_G is not None
        hard_GC = cosine_GC > cosine_of_sum(target_cosine_G, self.margin)[:, None]
        return self.scale * torch.where(hard_GC, cosine_GC * (state["t"] + cosine_GC), cosine_GC)
