"""ArcFace: an additive angular margin (Deng et al. 2019, eq. 3).

Public code has it in three forms, which differ beyond theta + m = pi and in their gradients (docs/fidelity.md).
"""

# Shape legend: N = the samples whose own class is on this rank

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State, cosine_of_sum, straight_through

EPSILON: Final = 1e-4

Gradient = Literal["exact", "straight_through"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArcFace(Margin):
    """s * cos(theta + m).

    Attributes:
        margin: m, in radians.
        scale: s.
        gradient: "exact": s * cos(clip(theta + m, eps, pi - eps)) with its own gradient, as in the AdaFace repository,
            whose recipe LGAF uses. "straight_through": as in insightface, where the margin is applied without
            gradient, so that the cosine's gradient is s whatever the angle, and theta + m may pass pi.
    """

    margin: float = 0.5
    scale: float = 64.0
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, math.pi)
        require_choice("head.gradient", self.gradient, ("exact", "straight_through"))

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        if self.gradient == "straight_through":
            return self.scale * straight_through(cosine_of_sum(cosine_N, self.margin), cosine_N)
        # Clamped away from +-1, where the derivative of arccos is infinite: such samples get zero gradient, not NaN.
        theta_N = torch.acos(cosine_N.clamp(-1 + EPSILON, 1 - EPSILON))
        return self.scale * torch.cos((theta_N + self.margin).clamp(EPSILON, math.pi - EPSILON))
