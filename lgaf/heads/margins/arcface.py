"""ArcFace: an additive angular margin (Deng et al. 2019, eq. 3).

Three public variants differ beyond theta + m = pi and in their gradients. This is the AdaFace repository's, whose
recipe the paper uses: exact autograd, angles clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive

EPSILON: Final = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class ArcFace:
    """s * cos(clip(theta + m, eps, pi - eps)); LGAF trains with m = 0.4, s = 64 (paper 4.1.3)."""

    margin: float = 0.4
    scale: float = 64.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, math.pi)

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        # Clamped away from +-1, where the derivative of arccos is infinite: such samples get zero gradient, not NaN.
        theta_N = torch.acos(cosine_N.clamp(-1 + EPSILON, 1 - EPSILON))
        return self.scale * torch.cos((theta_N + self.margin).clamp(EPSILON, math.pi - EPSILON))
