"""HPDA: hierarchical pyramid diverse attention (Wang et al. 2020, CVPR, 8323-8332; ref. [17] of the LGAF paper).

Public text gives the paper's abstract and what later papers say of it, no sizes and no code; `HPDAConfig` says which
part comes from where.
"""

# Shape legend: B = batch on this rank, C = channels, H, W = sides of a map, h, w = sides of a pooled map, D = embedding
#   L = levels (3), S = scales of the pyramid, P = attentions of one scale, N = positions of a map, Q = pairs,
#   E = bilinear dimension

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgaf.config import require_in_range, require_positive
from lgaf.models.feature_norm import feature_norm
from lgaf.models.local_branch import LANet, SqueezeExcitation, scale_convolution
from lgaf.models.network import FaceEmbedding, FaceNetwork, global_embedding

MAP_SIDE: Final = 7  # of every level as the pyramid sees it
NUM_LEVELS: Final = 3
EPSILON: Final = 1e-12
ROOT_EPSILON: Final = 1e-6  # bounds the slope of the signed square root at 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HPDAConfig:
    """HPDA; `HPDAConfig(growth_rate=16, layers=(1, 1, 1), local_width=16, bilinear_dim=32)` is small enough for a CPU.

    FROM THE PAPER (its abstract): a pyramid of attentions for local features at several scales; a diverse learning that
    makes the attentions of a face look at different patches; hierarchical bilinear pooling, which fuses what several
    layers see instead of the last alone. From what others write of it: a stem CNN feeds a Global CNN (average pooling
    and a fully connected layer) and Local CNNs (LANets, then bilinear pooling), whose features are concatenated (Wang
    et al. 2022, A Survey of Face Recognition, section 4.2); the pyramid pools with different sizes (LGAF, section 2.1);
    the trunk is LS-CNN's (LGAF, Table 5).

    FROM RELATED WORK: the diversity is the Euclidean distance between every pair of attention maps (DSA-Face, by two of
    the authors), up to a margin of 1 (as the APViT code re-implements it); the bilinear pooling is that of Yu et al.
    2018 (ECCV), whose name the paper takes: products of projected maps, summed over positions, signed square root, unit
    length of each pair's vector.

    A CHOICE of ours: growth and layers of the trunk as in `lgaf.models.peers.ls_cnn`, in a plainer form (no wide 1x1
    convolutions before the 3x3 ones, transitions by average pooling as in DenseNet, attention before the layers only);
    the levels are the outputs of its three blocks, brought to 7x7 by convolutions and average poolings; pooling cells
    of 1, 2 and 4; 3 attentions a scale, diverse within their scale, since one patch may well matter at two scales; maps
    of unit length in the distance, so that attentions cannot part by their strength alone; the weight of the loss;
    widths; an embedding of which each half is one of the features, batch-normalised as in IResNets.
    """

    growth_rate: int = 48
    """Channels that each layer of the trunk's blocks adds; its stem has as many, then twice as many."""
    layers: tuple[int, int, int] = (3, 3, 5)
    """Layers of the trunk's blocks on maps of 28, 14 and 7."""
    local_width: int = 128
    """Channels of the maps on which the attentions work."""
    pyramid: tuple[int, ...] = (1, 2, 4)
    """Sides of the pooling cells, one scale each, on a map of 7."""
    attentions: int = 3
    """Attentions of each scale."""
    bilinear_dim: int = 1024
    """Dimension E to which the maps are projected before they are multiplied."""
    diversity_margin: float = 1.0
    """Distance between two attentions, of unit length, from which on they are diverse enough; at most sqrt(2)."""
    diversity_weight: float = 1.0
    """Factor of the diverse learning's loss."""
    embedding_dim: int = 512
    """Length D of the embedding, half of it global and half local."""

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_positive("model.growth_rate", self.growth_rate)
        require_positive("model.local_width", self.local_width)
        require_positive("model.bilinear_dim", self.bilinear_dim)
        require_in_range("model.attentions", self.attentions, 2, 64)
        require_positive("model.diversity_margin", self.diversity_margin)
        require_in_range("model.diversity_margin", self.diversity_margin, 0.0, math.sqrt(2))
        require_in_range("model.diversity_weight", self.diversity_weight, 0.0, 1e6)
        require_positive("model.embedding_dim", self.embedding_dim)
        if self.embedding_dim % 2:
            raise ValueError(f"model.embedding_dim={self.embedding_dim} must be even: half is global, half local")
        if len(self.layers) != 3 or min(self.layers) < 1:
            raise ValueError(f"model.layers={self.layers!r} must be three numbers of layers such as (3, 3, 5)")
        cells = set(self.pyramid)
        if not cells or len(cells) != len(self.pyramid) or not all(1 <= cell < MAP_SIDE for cell in cells):
            raise ValueError(f"model.pyramid={self.pyramid!r} must be different sides from 1 to 6 such as (1, 2, 4)")

    @property
    def output_dim(self) -> int:
        """Length of the embedding that the head and the protocols see."""
        return self.embedding_dim

    def build(self) -> HPDA:
        """Make the network with fresh weights (from torch's global generator)."""
        return HPDA(self)


def divergence_loss(attention_BPHW: Tensor, margin: float) -> Tensor:
    """Diverse learning: by how much the distance of two attentions falls short of the margin, mean over the pairs.

    The attentions have unit length first. As they are not negative, two that share no position are sqrt(2) apart, the
    most there is, and cost nothing; two equal ones cost the margin. Unlike its square, the distance has a slope that
    does not vanish as two maps become equal.
    """
    unit_BPN = F.normalize(attention_BPHW.float().flatten(2), dim=2)
    first, second = zip(*itertools.combinations(range(attention_BPHW.shape[1]), 2), strict=True)
    difference_BQN = unit_BPN[:, list(first)] - unit_BPN[:, list(second)]
    distance_BQ = (difference_BQN.square().sum(dim=2) + EPSILON).sqrt()
    return (margin - distance_BQ).clamp_min(0).mean()


def pool_cells(x_BCHW: Tensor, cell: int) -> Tensor:
    """Mean over square cells that part the map; the last ones are cut off by its border."""
    return F.avg_pool2d(x_BCHW, cell, ceil_mode=True)


def spread_cells(x_BChw: Tensor, cell: int, side: int) -> Tensor:
    """Give every position of a map [B, C, side, side] the value of its cell."""
    wide = x_BChw.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
    return wide[:, :, :side, :side]


class DiverseAttention(nn.Module):
    """One scale of the pyramid: several LANets on the map pooled to cells."""

    def __init__(self, channels: int, cell: int, num_attentions: int) -> None:
        super().__init__()
        self.cell = cell
        self.lanets = nn.ModuleList(LANet(channels) for _ in range(num_attentions))

    def attend(self, pooled_BChw: Tensor) -> Tensor:
        """Attentions [B, P, h, w] in (0, 1) of the pooled map."""
        return torch.cat([lanet.attention(pooled_BChw) for lanet in self.lanets], dim=1)  # type: ignore[operator]

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Map to its local maps [B, P * C, H, W], of one value a cell, and the attentions [B, P, h, w]."""
        pooled = pool_cells(map_BCHW, self.cell)
        attention_BPhw = self.attend(pooled)
        attended = (attention_BPhw[:, :, None] * pooled[:, None]).flatten(1, 2)
        return spread_cells(attended, self.cell, map_BCHW.shape[-1]), attention_BPhw


class LocalCNN(nn.Module):
    """One level: its map brought to 7x7, then the pyramid of diverse attentions (PDA)."""

    def __init__(self, in_channels: int, halvings: int, config: HPDAConfig) -> None:
        super().__init__()
        width = config.local_width
        self.reduce = nn.Sequential(scale_convolution(in_channels, width, 1))
        for _ in range(halvings):
            self.reduce.append(scale_convolution(width, width, 3, "direct")).append(nn.AvgPool2d(2))
        self.pyramid = nn.ModuleList(DiverseAttention(width, cell, config.attentions) for cell in config.pyramid)

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The level's map to local maps [B, S * P * width, 7, 7] and the attentions [B, P, h, w] of each scale."""
        reduced = self.reduce(map_BCHW)
        maps, attentions = zip(*(scale(reduced) for scale in self.pyramid), strict=True)
        return torch.cat(maps, dim=1), list(attentions)


class HierarchicalBilinearPooling(nn.Module):
    """HBP (Yu et al. 2018, ECCV): every pair of levels, multiplied channel by channel and summed over positions."""

    def __init__(self, in_channels: int, bilinear_dim: int, out_features: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(in_channels, bilinear_dim, 1, bias=False) for _ in range(NUM_LEVELS))
        self.pairs = list(itertools.combinations(range(NUM_LEVELS), 2))
        self.fc = nn.Linear(len(self.pairs) * bilinear_dim, out_features, bias=False)

    def interactions(self, maps: list[Tensor]) -> Tensor:
        """[B, pairs, E]: sum over positions of (U^T x) * (V^T y), for each pair of levels x, y."""
        projected = [_at_least_float32(project(level)) for project, level in zip(self.projections, maps, strict=True)]
        return torch.stack([(projected[i] * projected[j]).sum(dim=(2, 3)) for i, j in self.pairs], dim=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """One map [B, C, 7, 7] of each level to the local feature [B, D / 2]."""
        products = self.interactions(maps)
        roots = products / (products.abs() + ROOT_EPSILON).sqrt()
        feature: Tensor = self.fc(F.normalize(roots, dim=2).flatten(1))
        return feature


class MultiScaleLayer(nn.Module):
    """A layer of LS-CNN: attention over positions and channels, then kernels of 1, 3 and 5 side by side, fused."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(LANet(in_channels), SqueezeExcitation(in_channels))
        self.scales = nn.ModuleList(scale_convolution(in_channels, growth, kernel) for kernel in (1, 3, 5))
        self.fuse = scale_convolution(3 * growth, growth, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Append [B, growth, H, W] to the map [B, in, H, W]."""
        attended = self.attention(x_BCHW)
        scales = torch.cat([scale(attended) for scale in self.scales], dim=1)
        return torch.cat([x_BCHW, self.fuse(scales)], dim=1)


class DenseTrunk(nn.Module):
    """Stem CNN: a dense multi-scale trunk after LS-CNN, which gives the map of each of its blocks.

    Attributes:
        out_channels: Of the three maps.
    """

    def __init__(self, growth: int, layers: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            scale_convolution(3, growth, 3, "direct"),
            scale_convolution(growth, growth, 3, "direct"),
            nn.MaxPool2d(2),
            scale_convolution(growth, 2 * growth, 3, "direct"),
            scale_convolution(2 * growth, 2 * growth, 3, "direct"),
            nn.MaxPool2d(2),
        )
        self.blocks = nn.ModuleList()
        self.out_channels: list[int] = []
        channels = 2 * growth
        for i, num_layers in enumerate(layers):
            block = nn.Sequential()
            if i > 0:
                block.append(scale_convolution(channels, channels // 2, 1)).append(nn.AvgPool2d(2))
                channels //= 2
            for _ in range(num_layers):
                block.append(MultiScaleLayer(channels, growth))
                channels += growth
            self.blocks.append(block)
            self.out_channels.append(channels)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Images [B, 3, 112, 112] to maps of 28, 14 and 7."""
        x, maps = self.stem(images_BCHW), []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class HPDA(FaceNetwork):
    """Stem CNN, Global CNN, three Local CNNs and their bilinear pooling; `HPDAConfig` says what is the paper's."""

    def __init__(self, config: HPDAConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = DenseTrunk(config.growth_rate, config.layers)
        channels, half = self.trunk.out_channels, config.embedding_dim // 2
        self.global_norm = nn.Sequential(nn.BatchNorm2d(channels[-1]), nn.ReLU())
        self.global_fc = nn.Linear(channels[-1], half, bias=False)
        self.local_cnns = nn.ModuleList(
            LocalCNN(width, NUM_LEVELS - 1 - level, config) for level, width in enumerate(channels)
        )
        local_channels = config.local_width * config.attentions * len(config.pyramid)
        self.bilinear = HierarchicalBilinearPooling(local_channels, config.bilinear_dim, half)
        self.features = feature_norm(config.embedding_dim, learned_shift=False)

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]; in training with the loss of the diverse learning."""
        levels = self.trunk(images_BCHW)
        global_BD = self.global_fc(self.global_norm(levels[-1]).mean(dim=(2, 3)))
        maps, attentions = zip(*(cnn(level) for cnn, level in zip(self.local_cnns, levels, strict=True)), strict=True)
        local_BD = self.bilinear(list(maps))
        embedding_BD = self.features(torch.cat([global_BD, local_BD], dim=1))
        if not self.training:
            return global_embedding(embedding_BD)
        losses = [divergence_loss(scale, self.config.diversity_margin) for scale in itertools.chain(*attentions)]
        return global_embedding(embedding_BD, auxiliary_loss=self.config.diversity_weight * torch.stack(losses).mean())

    @torch.no_grad()
    def attention_maps(self, images_BCHW: Tensor) -> Tensor:
        """Attentions in (0, 1) of images [B, 3, 112, 112]: [B, L, S, P, 7, 7], each with one value a cell."""
        levels = self.trunk(images_BCHW)
        per_level = []
        for cnn, level in zip(self.local_cnns, levels, strict=True):
            _, attentions = cnn(level)
            scales = zip(attentions, self.config.pyramid, strict=True)
            per_level.append(torch.stack([spread_cells(scale, cell, MAP_SIDE) for scale, cell in scales], dim=1))
        return torch.stack(per_level, dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
