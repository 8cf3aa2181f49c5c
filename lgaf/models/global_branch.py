"""GFE: the global feature, one projection of the whole map (paper section 3)."""

# Shape legend: B = batch on this rank, C = channels of C(x), D = embedding

from __future__ import annotations

from torch import Tensor, nn

from lgaf.models.backbones import MAP_SIDE


class GlobalFeatureExtraction(nn.Module):
    """G(C(x)): BN, dropout, flatten, fully connected, BN without affine.

    The last BN gives each dimension unit variance, so that the norms of the two branches are of one scale, which the
    quality measure of the fusion needs.
    """

    def __init__(self, in_channels: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels * MAP_SIDE * MAP_SIDE, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim, affine=False)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map [B, C, 7, 7] to the un-normalised global feature [B, D]."""
        feature_BD: Tensor = self.features(self.fc(self.dropout(self.bn2(map_BCHW)).flatten(1)))
        return feature_BD
