"""FQA and LGF: how good each branch's feature is, and their fusion by it (paper section 3.2, eq. 4-10).

The paper swaps its letters for the branches between its sections; here they are paired by meaning.
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lgaf.distributed import all_reduce_sum

CONCENTRATION_H: Final = 0.333  # eq. 6, three-sigma rule
EMA_ALPHA: Final = 0.01  # eq. 7-8
EPSILON: Final = 1e-3
INITIAL_MEAN: Final = 20.0
INITIAL_STD: Final = 100.0

QualityMeasure = Literal["norm", "entropy", "gaussian_entropy"]


def feature_norms(feature_BD: Tensor) -> Tensor:
    """E(T) of eq. 4-5: the energy of each feature, its L2 norm [B]."""
    norm_B: Tensor = feature_BD.norm(dim=1)
    return norm_B


def shannon_entropies(feature_BD: Tensor) -> Tensor:
    """Entropy in nats [B] of the softmax over a feature's D components, at most log D."""
    log_p_BD = feature_BD.log_softmax(dim=1)
    return -(log_p_BD.exp() * log_p_BD).sum(dim=1)


def gaussian_entropies(feature_BD: Tensor) -> Tensor:
    """Differential entropy in nats [B] of a normal distribution with the deviation of a feature's D components.

    The measure in the comments of TransFace, whose code returns the deviation itself. For a feature of zero mean that
    deviation is its norm / sqrt(D), so this is nearly the logarithm of the norm.
    """
    # A feature of equal components has no entropy to speak of, rather than minus infinity.
    return feature_BD.std(dim=1).clamp_min(EPSILON).log() + 0.5 * (1 + math.log(2 * math.pi))


QUALITY_MEASURES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "norm": feature_norms,
    "entropy": shannon_entropies,
    "gaussian_entropy": gaussian_entropies,
}


class FeatureQualityAssessment(nn.Module):
    """FQA: the measure of a feature, standardised by running statistics of the global batch (eq. 4-8).

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
    def update(self, measure_B: Tensor) -> None:
        """Move the running mean and standard deviation towards the global batch's (eq. 7-8); one all-reduce."""
        measures = measure_B.double()
        sums = torch.stack([measures.sum(), measures.square().sum(), measures.new_tensor(float(measures.numel()))])
        total, total_of_squares, count = all_reduce_sum(sums, self.group).unbind()
        batch_mean = total / count
        # Unbiased; a global batch of one has no deviation and leaves the running one alone.
        variance = (total_of_squares - count * batch_mean.square()).clamp_min(0) / (count - 1).clamp_min(1)
        batch_std = torch.where(count > 1, variance.sqrt(), self.std.double())
        self.mean.lerp_(batch_mean.to(self.mean.dtype), EMA_ALPHA)
        self.std.lerp_(batch_std.to(self.std.dtype), EMA_ALPHA)

    def forward(self, measure_B: Tensor) -> Tensor:
        """Measures [B] to qualities [B] in [0, 2] (eq. 6); in training the statistics move first."""
        if self.training:
            self.update(measure_B.detach())
        standardised = (measure_B - self.mean) / (self.std + EPSILON)
        return (CONCENTRATION_H * standardised).clamp(-1.0, 1.0) + 1.0


class LocalGlobalFusion(nn.Module):
    """LGF: each branch's share of the quality (eq. 9), and the features fused by it (eq. 10).

    Args:
        measure: Of a feature's quality: "norm" (the paper's choice), "entropy" or "gaussian_entropy" (Table 3).
        concatenate: Put the weighted features side by side, [B, 2 D] (Table 4, CAT), instead of adding them.
        quality_gradient: Let gradients through the weights; else, as AdaFace does with its norms, none.
        unit_features: Give the features unit length once their quality is measured.
    """

    def __init__(
        self,
        measure: QualityMeasure = "norm",
        *,
        concatenate: bool = False,
        quality_gradient: bool = False,
        unit_features: bool = False,
    ) -> None:
        super().__init__()
        self.unit_features = unit_features
        self.measure = QUALITY_MEASURES[measure]
        self.concatenate, self.quality_gradient = concatenate, quality_gradient
        self.local_quality = FeatureQualityAssessment()
        self.global_quality = FeatureQualityAssessment()

    def local_weight(self, local_BD: Tensor, global_BD: Tensor) -> Tensor:
        """Weight of the local branch [B] (eq. 9); that of the global branch is the rest of 1.

        When both qualities are 0, exactly on the worst images, eq. 9 is 0/0; the small constant makes it 1/2.
        """
        if not self.quality_gradient:
            local_BD, global_BD = local_BD.detach(), global_BD.detach()
        quality_local_B = self.local_quality(self.measure(local_BD.float()))
        quality_global_B = self.global_quality(self.measure(global_BD.float()))
        weight_B: Tensor = (quality_local_B + EPSILON) / (quality_local_B + quality_global_B + 2 * EPSILON)
        return weight_B

    def forward(self, local_BD: Tensor, global_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the fused feature [B, D or 2 D] (un-normalised) and the weight of the local branch [B]."""
        weight_local_B = self.local_weight(local_BD, global_BD)
        if self.unit_features:
            local_BD, global_BD = F.normalize(local_BD), F.normalize(global_BD)
        weight_B1 = weight_local_B.to(local_BD.dtype)[:, None]
        weighted = (weight_B1 * local_BD, (1 - weight_B1) * global_BD)
        return (torch.cat(weighted, dim=1) if self.concatenate else weighted[0] + weighted[1]), weight_local_B


class PlainFusion(nn.Module):
    """The branches as they are (or of unit length), no quality asked: added (method III of Table 1) or side by side."""

    def __init__(self, *, concatenate: bool = False, unit_features: bool = False) -> None:
        super().__init__()
        self.concatenate, self.unit_features = concatenate, unit_features

    def forward(self, local_BD: Tensor, global_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the fused feature [B, D or 2 D] and the weight of the local branch, a half [B]."""
        if self.unit_features:
            local_BD, global_BD = F.normalize(local_BD), F.normalize(global_BD)
        fused = torch.cat([local_BD, global_BD], dim=1) if self.concatenate else local_BD + global_BD
        return fused, local_BD.new_full((), 0.5, dtype=torch.float32).expand(local_BD.shape[0])


class IterativeAttentionalFusion(nn.Module):
    """iAFF on two vectors (Dai et al. 2021, Attentional Feature Fusion, eq. 4-5), adapted as in Table 4.

    Two rounds of attention over the channels: the first fuses the inputs to what the second decides on. The second
    round has its own local and its own global attention (the authors' PyTorch port calls the first round's global one
    again; their MXNet original does not). On vectors the global average pooling of the paper is the identity.
    """

    def __init__(self, dim: int, reduction: int = 4, *, unit_features: bool = False) -> None:
        super().__init__()
        self.unit_features = unit_features
        self.rounds = nn.ModuleList(ChannelAttention(dim, reduction) for _ in range(2))

    def forward(self, local_BD: Tensor, global_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the fused feature [B, D] and the mean weight of the local branch over the channels [B]."""
        if self.unit_features:
            local_BD, global_BD = F.normalize(local_BD), F.normalize(global_BD)
        fused_BD = local_BD + global_BD
        weight_BD = fused_BD
        for attention in self.rounds:
            weight_BD = attention(fused_BD)
            fused_BD = weight_BD * local_BD + (1 - weight_BD) * global_BD
        return fused_BD, weight_BD.detach().float().mean(dim=1)


class ChannelAttention(nn.Module):
    """MS-CAM on a vector: sigmoid of a local and a global bottleneck's sum (Dai et al. 2021, eq. 1-2)."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.local_attention = _bottleneck(dim, reduction)
        self.global_attention = _bottleneck(dim, reduction)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Weights [B, D] in (0, 1)."""
        weight_BD: Tensor = torch.sigmoid(self.local_attention(x_BD) + self.global_attention(x_BD))
        return weight_BD


def _bottleneck(dim: int, reduction: int) -> nn.Sequential:
    hidden = max(1, dim // reduction)
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.BatchNorm1d(dim)
    )
