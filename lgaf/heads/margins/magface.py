"""MagFace: a margin that grows with the norm, and a regulariser that makes it grow (Meng et al. 2021, eq. 3-5)."""

# Shape legend: N = the samples whose own class is on this rank

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State, cosine_of_sum, guarded_cosine_of_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class MagFace(Margin):
    """s * cos(theta + m(a)) with a = clip(norm, l_a, u_a), plus lambda_g * (a / u_a^2 + 1 / a).

    Gradients flow through the norm, in the margin and in the regulariser.

    Attributes:
        scale: s.
        l_a: Least norm that counts.
        u_a: Greatest norm that counts.
        l_margin: m(l_a), in radians.
        u_margin: m(u_a), in radians.
        lambda_g: Weight of the regulariser.
        easy_margin: Margin only where cos(theta) > 0 (the authors' default); else beyond pi a line (see
            `guarded_cosine_of_sum`).
    """

    scale: float = 64.0
    l_a: float = 10.0
    u_a: float = 110.0
    l_margin: float = 0.45
    u_margin: float = 0.8
    lambda_g: float = 35.0
    easy_margin: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_positive("head.l_a", self.l_a)
        require_in_range("head.lambda_g", self.lambda_g, 0.0, 1e6)
        require_in_range("head.l_margin", self.l_margin, 0.0, math.pi / 2)
        require_in_range("head.u_margin", self.u_margin, self.l_margin, math.pi / 2)
        if not self.u_a > self.l_a:
            raise ValueError(f"head.u_a={self.u_a!r} must be greater than head.l_a={self.l_a!r}")

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from cosines [N] and norms [N], with gradients to both."""
        assert norm_N is not None
        slope = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        margin_N = self.l_margin + slope * (norm_N.clamp(self.l_a, self.u_a) - self.l_a)
        if self.easy_margin:
            return self.scale * torch.where(cosine_N > 0, cosine_of_sum(cosine_N, margin_N), cosine_N)
        return self.scale * guarded_cosine_of_sum(cosine_N, margin_N)

    def penalty(self, norm_N: Tensor) -> Tensor | None:
        """The regulariser [N], least at the norm u_a."""
        a_N = norm_N.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a_N / self.u_a**2 + 1.0 / a_N)
