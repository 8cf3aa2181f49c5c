"""How a sample's target logit and those of the other classes make its loss, class part by class part.

The other classes' logits are first taken together to one number a sample; the numbers of several parts of the classes
(shards, chunks) join to that of all. So no step needs the logits of all classes at once.
"""

# Shape legend: G = global batch, C = classes of one part, P = parts

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# softplus(x) = x beyond this, to the last digit of a float64.
_LINEAR_FROM: Final = 50.0


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=_LINEAR_FROM)


class Objective(Protocol):
    """One way to make a loss."""

    def accumulate(self, negatives_GC: Tensor) -> Tensor:
        """The logits [G, C] of other classes to one number a sample [G]; an excluded logit is the lowest float."""
        ...

    def join(self, accumulated_PG: Tensor) -> Tensor:
        """The numbers of parts of the classes [P, G] to those of all [G]."""
        ...

    def loss(self, accumulated_G: Tensor, target_G: Tensor) -> Tensor:
        """Losses [G] of the samples."""
        ...


@dataclass(frozen=True, slots=True)
class Softmax:
    """Cross-entropy: log(1 + exp(L - t)), L the log-sum-exp of the other classes' logits, t the target's.

    That is log(exp(t) + sum exp) - t without its cancellation where the target wins.
    """

    def accumulate(self, negatives_GC: Tensor) -> Tensor:
        """Log-sum-exp over the classes."""
        return negatives_GC.logsumexp(dim=1)

    def join(self, accumulated_PG: Tensor) -> Tensor:
        """Log-sum-exp over the parts."""
        return accumulated_PG.logsumexp(dim=0)

    def loss(self, accumulated_G: Tensor, target_G: Tensor) -> Tensor:
        """Cross-entropy of each sample."""
        return _softplus(accumulated_G - target_G)


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """One binary cross-entropy a class: log(1 + exp(-t)) + weight * sum_j log(1 + exp(n_j))."""

    negative_weight: float = 1.0

    def accumulate(self, negatives_GC: Tensor) -> Tensor:
        """Sum over the classes."""
        return _softplus(negatives_GC).sum(dim=1)

    def join(self, accumulated_PG: Tensor) -> Tensor:
        """Sum over the parts."""
        return accumulated_PG.sum(dim=0)

    def loss(self, accumulated_G: Tensor, target_G: Tensor) -> Tensor:
        """Sum of the binary cross-entropies of each sample."""
        return _softplus(-target_G) + self.negative_weight * accumulated_G


SOFTMAX: Final = Softmax()


def exclude(negatives_GC: Tensor, columns_G: Tensor) -> Tensor:
    """The logits with each sample's own class taken out: the lowest float, which adds nothing.

    Args:
        negatives_GC: Logits of one part of the classes.
        columns_G: Where each sample's own class is in this part; any number outside where it is not.
    """
    own_GC = columns_G[:, None] == torch.arange(negatives_GC.shape[1], device=negatives_GC.device)
    return negatives_GC.masked_fill(own_GC, torch.finfo(negatives_GC.dtype).min)
