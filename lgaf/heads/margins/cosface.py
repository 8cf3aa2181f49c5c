"""CosFace: an additive cosine margin (Wang et al. 2018, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lgaf.config import require_in_range, require_positive
from lgaf.heads.margins.base import EMPTY_STATE, Margin, State


@dataclass(frozen=True, kw_only=True, slots=True)
class CosFace(Margin):
    """s * (cos(theta) - m).

    Attributes:
        margin: m, a cosine.
        scale: s.
    """

    margin: float = 0.4
    scale: float = 64.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("head.scale", self.scale)
        require_in_range("head.margin", self.margin, 0.0, 2.0)

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes from their cosines [N]."""
        return self.scale * (cosine_N - self.margin)
