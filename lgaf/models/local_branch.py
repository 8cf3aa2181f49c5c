"""MHMS: multi-head multi-scale local features (paper section 3.3, eq. 11-14).

What the text leaves open is a setting (docs/fidelity.md). By default reduction ratios are 16 and branches C / 4 wide,
as in LS-CNN, where LANet comes from; a kernel of 5 is two of 3; each head keeps its spatial detail up to its
projection.
"""

# Shape legend: B = batch on this rank, C = channels, H, W = map sides, D = embedding, b = heads, k = scales

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgaf.models.feature_norm import feature_norm

REDUCTION: Final = 16

LANetPooling = Literal["none", "channel", "spatial"]
ScaleForm = Literal["stacked", "direct"]
Projection = Literal["flatten", "gap"]


class LANet(nn.Module):
    """Local spatial attention P of eq. 11: two 1x1 convolutions give one weight per position.

    Args:
        channels: Of the map.
        pooling: How to read the GAP of eq. 11. "none": no pooling, as in LS-CNN, where LANet comes from, and as the
            paper's prose has it. "channel": the mean over channels, which stays a map. "spatial": as printed, which
            gives one number per image.
    """

    def __init__(self, channels: int, pooling: LANetPooling = "none") -> None:
        super().__init__()
        self.pooled_dims = {"none": (), "channel": (1,), "spatial": (2, 3)}[pooling]
        in_channels = 1 if pooling == "channel" else channels
        hidden = max(1, in_channels // REDUCTION)
        self.attention = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 1, 1), nn.Sigmoid()
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Weight [B, C, H, W] by its spatial attention [B, 1, H, W] (or [B, 1, 1, 1])."""
        pooled = x_BCHW.mean(dim=self.pooled_dims, keepdim=True) if self.pooled_dims else x_BCHW
        attention_B1HW: Tensor = self.attention(pooled)
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


def scale_convolution(
    in_channels: int, channels: int, equivalent_kernel: int, form: ScaleForm = "stacked"
) -> nn.Sequential:
    """Phi_j of eq. 12, of equivalent kernel j (1, 3, 5, ...).

    Args:
        in_channels: Of C(x).
        channels: Of the result.
        equivalent_kernel: j, odd.
        form: "stacked": a 1x1 convolution, then as many 3x3 ones as give j, as LS-CNN builds its scales. "direct":
            one j x j convolution.
    """
    if form == "direct":
        return nn.Sequential(*_conv_bn_relu(in_channels, channels, equivalent_kernel))
    layers = _conv_bn_relu(in_channels, channels, 1)
    for _ in range((equivalent_kernel - 1) // 2):
        layers += _conv_bn_relu(channels, channels, 3)
    return nn.Sequential(*layers)


class MSNet(nn.Module):
    """One head: convolutions of several scales, LANet on each, SE on all, projection F (eq. 11-13)."""

    def __init__(
        self,
        in_channels: int,
        map_side: int,
        out_features: int,
        scales: Sequence[int],
        width: int,
        *,
        scale_form: ScaleForm = "stacked",
        lanet_pooling: LANetPooling = "none",
        projection: Projection = "flatten",
    ) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scale_convolution(in_channels, width, scale, scale_form) for scale in scales)
        self.attentions = nn.ModuleList(LANet(width, lanet_pooling) for _ in scales)
        channels = width * len(scales)
        self.excitation = SqueezeExcitation(channels)
        self.averages = projection == "gap"
        self.project = nn.Linear(channels * (1 if self.averages else map_side**2), out_features)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out")
        nn.init.zeros_(self.project.bias)

    def attended_map(self, map_BCHW: Tensor) -> Tensor:
        """S(Omega(l^1, ..., l^j)) of eq. 13: C(x) to the head's map [B, k * width, H, W] before its projection."""
        locals_ = [attend(scale(map_BCHW)) for scale, attend in zip(self.scales, self.attentions, strict=True)]
        excited: Tensor = self.excitation(torch.cat(locals_, dim=1))
        return excited

    def projection(self, attended_BCHW: Tensor) -> Tensor:
        """F of eq. 13: the head's map to [B, D / b]."""
        feature: Tensor = self.project(attended_BCHW.mean(dim=(2, 3)) if self.averages else attended_BCHW.flatten(1))
        return feature

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """L^k of eq. 13: map [B, C, H, W] to [B, D / b]."""
        return self.projection(self.attended_map(map_BCHW))


class MultiHeadMultiScale(nn.Module):
    """MHMS: b heads side by side, concatenated (eq. 14), then BN as in the global branch."""

    def __init__(
        self,
        in_channels: int,
        map_side: int,
        embedding_dim: int,
        num_heads: int,
        scales: Sequence[int],
        dropout: float,
        *,
        width: int | None = None,
        learned_shift: bool = False,
        scale_form: ScaleForm = "stacked",
        lanet_pooling: LANetPooling = "none",
        projection: Projection = "flatten",
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(
            MSNet(
                in_channels,
                map_side,
                embedding_dim // num_heads,
                scales,
                width or max(1, in_channels // 4),
                scale_form=scale_form,
                lanet_pooling=lanet_pooling,
                projection=projection,
            )
            for _ in range(num_heads)
        )
        self.features = feature_norm(embedding_dim, learned_shift)

    def attended_maps(self, map_BCHW: Tensor) -> list[Tensor]:
        """The map [B, k * width, H, W] of each head before its projection."""
        x = self.dropout(self.bn(map_BCHW))
        return [head.attended_map(x) for head in self.heads]  # type: ignore[operator]  # ModuleList yields Modules

    def feature(self, attended: Sequence[Tensor]) -> Tensor:
        """Psi of eq. 14: the heads' maps to the un-normalised local feature [B, D]."""
        parts = [head.projection(map_) for head, map_ in zip(self.heads, attended, strict=True)]  # type: ignore[operator]
        feature_BD: Tensor = self.features(torch.cat(parts, dim=1))
        return feature_BD

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to the un-normalised local feature [B, D]."""
        return self.feature(self.attended_maps(map_BCHW))


def head_similarity(attended: Sequence[Tensor]) -> Tensor:
    """How alike the heads' maps lie in space: mean cosine over pairs of heads and images, in [0, 1].

    A loss on it makes the heads look at different places, the aim of HPDA's diverse attention (Wang et al. 2020).
    """
    where_BbN = torch.stack([map_.float().abs().mean(dim=1).flatten(1) for map_ in attended], dim=1)
    unit_BbN = F.normalize(where_BbN, dim=2)
    num_heads = len(attended)
    cosines = (unit_BbN @ unit_BbN.mT).sum(dim=(1, 2)) - unit_BbN.square().sum(dim=(1, 2))
    return (cosines / (num_heads * (num_heads - 1))).mean()
