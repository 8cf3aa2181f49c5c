"""FQA and LGF: how good each branch's feature is, and their fusion by it (paper section 3.2, eq. 4-10).

The paper swaps its letters for the branches between its sections; here they are paired by meaning.
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lgaf.distributed import all_reduce_sum

CONCENTRATION_H: Final = 0.333  # eq. 6, three-sigma rule
EMA_ALPHA: Final = 0.01  # eq. 7-8
EPSILON: Final = 1e-3
INITIAL_MEAN: Final = 20.0
INITIAL_STD: Final = 100.0


class FeatureQualityAssessment(nn.Module):
    """FQA: the norm of a feature, standardised by running statistics of the global batch (eq. 4-8).

    Statistics live in buffers (saved with the model) and are frozen in eval mode, so that an embedding never depends
    on the other faces of its batch. Over a process group they are those of the global batch, whatever the world size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.group: ProcessGroup | None = None
        self.register_buffer("mean", torch.tensor(INITIAL_MEAN))
        self.register_buffer("std", torch.tensor(INITIAL_STD))

    @torch.no_grad()
    def update(self, norm_B: Tensor) -> None:
        """Move the running mean and standard deviation towards the global batch's (eq. 7-8); one all-reduce."""
        norms = norm_B.double()
        sums = torch.stack([norms.sum(), norms.square().sum(), norms.new_tensor(float(norms.numel()))])
        total, total_of_squares, count = all_reduce_sum(sums, self.group).unbind()
        batch_mean = total / count
        # Unbiased; a global batch of one has no deviation and leaves the running one alone.
        variance = (total_of_squares - count * batch_mean.square()).clamp_min(0) / (count - 1).clamp_min(1)
        batch_std = torch.where(count > 1, variance.sqrt(), self.std.double())
        self.mean.lerp_(batch_mean.to(self.mean.dtype), EMA_ALPHA)
        self.std.lerp_(batch_std.to(self.std.dtype), EMA_ALPHA)

    def forward(self, norm_B: Tensor) -> Tensor:
        """Norms [B] to qualities [B] in [0, 2] (eq. 6); in training the statistics move first."""
        if self.training:
            self.update(norm_B)
        standardised = (norm_B - self.mean) / (self.std + EPSILON)
        return (CONCENTRATION_H * standardised).clamp(-1.0, 1.0) + 1.0


class LocalGlobalFusion(nn.Module):
    """LGF: add the two features, each weighted by its share of the quality (eq. 9-10)."""

    def __init__(self) -> None:
        super().__init__()
        self.local_quality = FeatureQualityAssessment()
        self.global_quality = FeatureQualityAssessment()

    def forward(self, local_BD: Tensor, global_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the fused feature [B, D] (un-normalised) and the weight of the local branch [B].

        No gradient flows through the weights (as AdaFace detaches its norms). When both qualities are 0, exactly on the
        worst images, eq. 9 is 0/0; the small constant makes it 1/2.
        """
        quality_local_B = self.local_quality(local_BD.detach().float().norm(dim=1))
        quality_global_B = self.global_quality(global_BD.detach().float().norm(dim=1))
        weight_local_B = (quality_local_B + EPSILON) / (quality_local_B + quality_global_B + 2 * EPSILON)
        weight_B1 = weight_local_B.to(local_BD.dtype)[:, None]
        return weight_B1 * local_BD + (1 - weight_B1) * global_BD, weight_local_B
