"""What a margin is to the head."""

# Shape legend: N = the samples whose own class is on this rank

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Margin(Protocol):
    """A margin: a frozen config whose method rewrites the logit of a sample's own class.

    The other classes' logits are ``scale * cosine``.
    """

    @property
    def scale(self) -> float:
        """The factor s from cosines to logits."""
        ...

    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None) -> Tensor:
        """Logits [N] of the own classes from their cosines [N] and, where known, the embeddings' norms [N]."""
        ...
