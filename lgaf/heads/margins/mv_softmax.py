"""MV-Softmax: mis-classified vectors weigh more (Wang et al. 2020, eq. 4-7), with an additive or angular margin."""

# Shape legend: N = the samples whose own class is on this rank, G = global batch, C = classes on this rank

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State, cosine_of_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class MVSoftmax(Margin):
    """Other classes that beat the target with its margin get t * cos + t - 1.

    Attributes:
        margin: m, a cosine ("am") or an angle in radians ("arc").
        scale: s.
        t: Emphasis on the mis-classified, at least 1; 1 is none.
        variant: "am": cos(theta) - m where cos(theta) > m. "arc": cos(theta + m) where cos(theta) > 0.
    """

    margin: float = 0.35
    scale: float = 32.0
    t: float = 1.12
    variant: Literal["am", "arc"] = "am"
    needs_all_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, math.pi / 2)
        require_in_range("head.t", self.t, 1.0, 100.0)
        require_choice("head.variant", self.variant, ("am", "arc"))

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        with_margin_N = self._with_margin(cosine_N)
        has_margin_N = cosine_N > (self.margin if self.variant == "am" else 0.0)
        return self.scale * torch.where(has_margin_N, with_margin_N, cosine_N)

    def negative_logits(
        self, cosine_GC: Tensor, target_cosine_G: Tensor | None = None, state: State = EMPTY_STATE
    ) -> Tensor:
        """Logits [G, C] of the other classes, the mis-classified emphasised."""
        assert target_cosine_G is not None
        beats_target_GC = cosine_GC > self._with_margin(target_cosine_G)[:, None]
        return self.scale * torch.where(beats_target_GC, self.t * cosine_GC + (self.t - 1.0), cosine_GC)

    def _with_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin if self.variant == "am" else cosine_of_sum(cosine, self.margin)
