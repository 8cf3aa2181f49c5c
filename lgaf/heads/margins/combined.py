"""The combined margin of SphereFace, ArcFace and CosFace (Deng et al. 2019, eq. 4), and insightface's class filter."""

# Shape legend: N = the samples whose own class is on this rank, G = global batch, C = classes on this rank

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State, straight_through

EPSILON: Final = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Combined(Margin):
    """s * (cos(m1 * theta + m2) - m3); the defaults are ArcFace's.

    Attributes:
        m1: SphereFace's factor, at least 1. insightface accepts only 1.
        m2: ArcFace's angle, in radians.
        m3: CosFace's cosine.
        scale: s.
        gradient: "exact", the angle clipped to (0, pi); or "straight_through", as insightface computes it (see
            `ArcFace`).
        interclass_filtering_threshold: Where above 0: other classes whose cosine is above it are taken for the same
            person under another label, their logits are 0 (Partial FC, An et al. 2022; 0.4 in insightface's noisy-data
            configurations).
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    scale: float = 64.0
    gradient: Literal["exact", "straight_through"] = "exact"
    interclass_filtering_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.m1", self.m1, 1.0, 4.0)
        require_in_range("head.m2", self.m2, 0.0, math.pi)
        require_in_range("head.m3", self.m3, 0.0, 2.0)
        require_choice("head.gradient", self.gradient, ("exact", "straight_through"))
        require_in_range("head.interclass_filtering_threshold", self.interclass_filtering_threshold, 0.0, 1.0)

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        if self.gradient == "straight_through":
            angle_N = self.m1 * torch.acos(cosine_N.detach().clamp(-1.0, 1.0)) + self.m2
            return self.scale * straight_through(angle_N.cos() - self.m3, cosine_N)
        if self.m1 == 1.0 and self.m2 == 0.0:
            return self.scale * (cosine_N - self.m3)  # no angle: the cosine need not be clamped
        angle_N = self.m1 * torch.acos(cosine_N.clamp(-1 + EPSILON, 1 - EPSILON)) + self.m2
        return self.scale * (angle_N.clamp(EPSILON, math.pi - EPSILON).cos() - self.m3)

    @property
    def plain_negatives(self) -> bool:
        """Whether there is no filter."""
        return self.interclass_filtering_threshold == 0.0

    def negative_logits(
        self, cosine_GC: Tensor, target_cosine_G: Tensor | None = None, state: State = EMPTY_STATE
    ) -> Tensor:
        """Logits [G, C] of the other classes; 0 where the filter takes one for the sample's own person."""
        if self.interclass_filtering_threshold == 0.0:
            return self.scale * cosine_GC
        return self.scale * cosine_GC.masked_fill(cosine_GC > self.interclass_filtering_threshold, 0.0)
