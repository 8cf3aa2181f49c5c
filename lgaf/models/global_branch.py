"""GFE: the global feature, one projection of the whole map (paper section 3)."""

# Shape legend: B = batch on this rank, C = channels of C(x), H, W = its sides, D = embedding

from __future__ import annotations

from torch import Tensor, nn

from lgaf.models.feature_norm import feature_norm


class GlobalFeatureExtraction(nn.Module):
    """G(C(x)): BN, dropout, flatten, fully connected, BN, as IResNets end (parameter names are insightface's)."""

    def __init__(
        self, in_channels: int, map_side: int, embedding_dim: int, dropout: float, learned_shift: bool = False
    ) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels * map_side**2, embedding_dim)
        self.features = feature_norm(embedding_dim, learned_shift)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def attended_map(self, map_BCHW: Tensor) -> Tensor:
        """The map [B, C, H, W] as the projection sees it."""
        normed: Tensor = self.bn2(map_BCHW)
        return normed

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to the un-normalised global feature [B, D]."""
        feature_BD: Tensor = self.features(self.fc(self.dropout(self.attended_map(map_BCHW)).flatten(1)))
        return feature_BD


class GlobalDepthwiseConvolution(nn.Module):
    """GDC: one kernel of the map's size per channel, BN, a projection, BN (Chen et al. 2018, MobileFaceNets).

    For small backbones, whose map would need a fully connected layer ten times their own size. The layers are those of
    insightface's `GDC`, dropout apart. Where the last BN has a shift, insightface trains its scale too; here the scale
    is a fixed parameter, which holds a released one exactly.
    """

    def __init__(
        self, in_channels: int, map_side: int, embedding_dim: int, dropout: float, learned_shift: bool = False
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, map_side, groups=in_channels, bias=False)
        self.bn = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, embedding_dim, bias=False)
        self.features = feature_norm(embedding_dim, learned_shift)
        nn.init.kaiming_normal_(self.depthwise.weight, mode="fan_out")
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out")

    def attended_map(self, map_BCHW: Tensor) -> Tensor:
        """The map [B, C, H, W] as the projection sees it: as it is."""
        return map_BCHW

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to the un-normalised global feature [B, D]."""
        pooled_BC = self.bn(self.depthwise(map_BCHW)).flatten(1)
        feature_BD: Tensor = self.features(self.fc(self.dropout(pooled_BC)))
        return feature_BD
