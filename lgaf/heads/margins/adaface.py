"""AdaFace: a margin that adapts to the image quality, read off the norm (Kim et al. 2022, eq. 7-12)."""

# Shape legend: N = the samples whose own class is on this rank, G = global batch

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State

EPSILON: Final = 1e-3
LEAST_NORM: Final = 1e-3
GREATEST_NORM: Final = 100.0
INITIAL_MEAN: Final = 20.0
INITIAL_STD: Final = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaFace(Margin):
    """s * (cos(theta + g_angle) - g_add), with g_angle = -m * z, g_add = m + m * z, z the standardised norm.

    The running mean and deviation of the norms are those of the global batch (AdaFace's own code: of each GPU's).

    Attributes:
        margin: m.
        scale: s.
        h: Concentration of z before it is clipped to [-1, 1].
        t_alpha: Share of the new batch in the running mean and deviation.
    """

    margin: float = 0.4
    scale: float = 64.0
    h: float = 0.333
    t_alpha: float = 0.01

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, math.pi / 2)
        require_positive("head.h", self.h)
        require_in_range("head.t_alpha", self.t_alpha, 0.0, 1.0)

    def initial_state(self, num_classes: int) -> dict[str, Tensor]:
        """Mean and deviation of the norms, as in AdaFace's code."""
        return {"norm_mean": torch.tensor(INITIAL_MEAN), "norm_std": torch.tensor(INITIAL_STD)}

    @torch.no_grad()
    def next_state(self, state: State, cosine_G: Tensor | None, norm_G: Tensor) -> dict[str, Tensor]:
        """Move mean and deviation (unbiased) towards the batch's; one sample alone has no deviation to move by."""
        norm_G = norm_G.clamp(LEAST_NORM, GREATEST_NORM)
        moved = {"norm_mean": state["norm_mean"].lerp(norm_G.mean(), self.t_alpha)}
        if norm_G.numel() > 1:
            moved["norm_std"] = state["norm_std"].lerp(norm_G.std(), self.t_alpha)
        return moved

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes; no gradient flows through the norm."""
        assert norm_N is not None
        norm_N = norm_N.detach().clamp(LEAST_NORM, GREATEST_NORM)
        quality_N = (self.h * (norm_N - state["norm_mean"]) / (state["norm_std"] + EPSILON)).clamp(-1.0, 1.0)
        theta_N = torch.acos(cosine_N.clamp(-1 + EPSILON, 1 - EPSILON))
        angle_N = (theta_N - self.margin * quality_N).clamp(EPSILON, math.pi - EPSILON)
        return self.scale * (angle_N.cos() - (self.margin + self.margin * quality_N))
