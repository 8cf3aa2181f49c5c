"""MHMS: multi-head multi-scale local features (paper section 3.3, eq. 11-14).

What the text leaves open: reduction ratios are 16 and branches are C / 4 wide, as in LS-CNN, where LANet comes from;
kernels of 5 are two of 3; each head keeps its spatial detail up to its projection.
"""

# Shape legend: B = batch on this rank, C = channels, H, W = map sides, D = embedding, b = heads

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgaf.models.backbones import MAP_SIDE

REDUCTION = 16


class LANet(nn.Module):
    """Local spatial attention P of eq. 11: two 1x1 convolutions give one weight per position.

    No spatial pooling: with the GAP as printed the map would be one number per image, against the paper's own prose
    and against LS-CNN, where LANet comes from.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // REDUCTION)
        self.attention = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 1, 1), nn.Sigmoid())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Weight [B, C, H, W] by its spatial attention [B, 1, H, W]."""
        attention_B1HW: Tensor = self.attention(x_BCHW)
        return x_BCHW * attention_B1HW


class SqueezeExcitation(nn.Module):
    """Channel attention S of eq. 13 (Hu et al., Squeeze-and-Excitation Networks)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // REDUCTION)
        self.excite = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Weight [B, C, H, W] by one attention per channel."""
        attention_BC: Tensor = self.excite(x_BCHW.mean(dim=(2, 3)))
        return x_BCHW * attention_BC[:, :, None, None]


def _conv_bn_relu(in_channels: int, channels: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]


def scale_convolution(in_channels: int, channels: int, equivalent_kernel: int) -> nn.Sequential:
    """Phi_j of eq. 12: a 1x1 convolution, then as many 3x3 ones as give the equivalent kernel j (1, 3, 5, ...)."""
    layers = _conv_bn_relu(in_channels, channels, 1)
    for _ in range((equivalent_kernel - 1) // 2):
        layers += _conv_bn_relu(channels, channels, 3)
    return nn.Sequential(*layers)


class MSNet(nn.Module):
    """One head: convolutions of several scales, LANet on each, SE on all, projection F (eq. 11-13)."""

    def __init__(self, in_channels: int, out_features: int, scales: Sequence[int], width: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scale_convolution(in_channels, width, scale) for scale in scales)
        self.attentions = nn.ModuleList(LANet(width) for _ in scales)
        channels = width * len(scales)
        self.excitation = SqueezeExcitation(channels)
        self.project = nn.Linear(channels * MAP_SIDE * MAP_SIDE, out_features)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out")
        nn.init.zeros_(self.project.bias)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """L^k of eq. 13: map [B, C, 7, 7] to [B, D / b]."""
        locals_ = [attend(scale(map_BCHW)) for scale, attend in zip(self.scales, self.attentions, strict=True)]
        feature: Tensor = self.project(self.excitation(torch.cat(locals_, dim=1)).flatten(1))
        return feature


class MultiHeadMultiScale(nn.Module):
    """MHMS: b heads side by side, concatenated (eq. 14), then BN without affine as in the global branch."""

    def __init__(
        self, in_channels: int, embedding_dim: int, num_heads: int, scales: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        width = max(1, in_channels // 4)
        self.heads = nn.ModuleList(
            MSNet(in_channels, embedding_dim // num_heads, scales, width) for _ in range(num_heads)
        )
        self.features = nn.BatchNorm1d(embedding_dim, affine=False)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map [B, C, 7, 7] to the un-normalised local feature [B, D]."""
        x = self.dropout(self.bn(map_BCHW))
        feature_BD: Tensor = self.features(torch.cat([head(x) for head in self.heads], dim=1))
        return feature_BD
