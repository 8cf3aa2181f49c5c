"""CQA-Face: contrastive quality-aware attentions (Wang and Guo 2022, AAAI 36(3), 2504-2512; ref. [11] of LGAF).

Public text gives the paper's abstract and its stem and margin; there is no code. `CQAFaceConfig` says which part comes
from where.
"""

# Shape legend: B = batch on this rank, C = channels of C(x), H, W = its sides, N = H * W, D = embedding, P = parts,
#   Q = pairs of parts

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.feature_norm import feature_norm
from lgaf.models.local_branch import REDUCTION, LANet
from lgaf.models.network import FaceEmbedding, FaceNetwork, global_embedding

EPSILON: Final = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class CQAFaceConfig:
    """CQA-Face; `CQAFaceConfig(backbone="tiny")` is small enough for tests on a CPU.

    FROM THE PAPER (its abstract): attentions find the useful parts of a face, without landmarks; Contrastive Attention
    Learning (CAL) pushes them to explore parts beyond the few that matter most; a Quality-Aware Network (QAN)
    emphasises the important parts and suppresses noisy ones "in a global scope"; the result is quality-aware local
    features. A public summary adds that the stem is a ResNet-100 and the margin that of CosFace.

    FROM RELATED WORK by the same authors: LANets as attentions (LS-CNN, HPDA); attentions of one face are contrasted in
    pairs, by their Euclidean distance (DSA-Face).

    A CHOICE of ours: 4 parts; that distance is taken of maps of unit length; a part's feature is the mean of the map
    weighted by its attention, through a fully connected layer of its own; the QAN is a perceptron that sees all parts
    at once (so we read "in a global scope"), with a softmax over them, and the embedding is the weighted sum of the
    parts, batch-normalised as IResNets end; no global feature beside the parts; dropout; the weight of the loss.
    """

    backbone: str = "iresnet100"
    """A name of `BACKBONES`."""
    embedding_dim: int = 512
    """Length D of each part's feature, and of the embedding."""
    num_parts: int = 4
    """Attentions P, one for each part of the face."""
    contrast_weight: float = 1.0
    """Factor of the contrastive attention learning's loss."""
    dropout: float = 0.4
    """Before the projections of the parts."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks in training and compute the rest again: less memory, more time."""

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_choice("model.backbone", self.backbone, BACKBONES)
        require_positive("model.embedding_dim", self.embedding_dim)
        require_in_range("model.num_parts", self.num_parts, 2, 64)
        require_in_range("model.contrast_weight", self.contrast_weight, 0.0, 1e6)
        require_in_range("model.dropout", self.dropout, 0.0, 0.99)

    @property
    def output_dim(self) -> int:
        """Length of the embedding that the head and the protocols see."""
        return self.embedding_dim

    def build(self) -> CQAFace:
        """Make the network with fresh weights (from torch's global generator)."""
        return CQAFace(self)


class FaceParts(NamedTuple):
    """What the network makes of a face's parts.

    Attributes:
        attention_BPHW: Where each part is looked for, in (0, 1).
        quality_BP: Share of each part in the embedding; they sum to 1.
    """

    attention_BPHW: Tensor
    quality_BP: Tensor


def contrastive_attention_loss(attention_BPHW: Tensor) -> Tensor:
    """CAL: 1 minus the distance of two attentions of a face over the greatest there is, mean over pairs and faces.

    The attentions have unit length first. As they are not negative, two that share no position are sqrt(2) apart and
    cost 0; two equal ones cost 1.
    """
    unit_BPN = F.normalize(attention_BPHW.float().flatten(2), dim=2)
    first, second = zip(*itertools.combinations(range(attention_BPHW.shape[1]), 2), strict=True)
    difference_BQN = unit_BPN[:, list(first)] - unit_BPN[:, list(second)]
    distance_BQ = (difference_BQN.square().sum(dim=2) + EPSILON).sqrt()
    return (1 - distance_BQ / math.sqrt(2)).mean()


def pool_parts(map_BCHW: Tensor, attention_BPHW: Tensor) -> Tensor:
    """Mean of the map over its positions, weighted by each attention: [B, P, C].

    What lies where a part's attention is 0 does not reach that part's feature.
    """
    weight_BPN = attention_BPHW.float().flatten(2)
    weight_BPN = weight_BPN / (weight_BPN.sum(dim=2, keepdim=True) + EPSILON)
    return weight_BPN.to(map_BCHW.dtype) @ map_BCHW.flatten(2).transpose(1, 2)


class QualityAwareNetwork(nn.Module):
    """QAN: the quality of each part, judged in view of all of them."""

    def __init__(self, num_parts: int, dim: int) -> None:
        super().__init__()
        hidden = max(1, num_parts * dim // REDUCTION)
        self.score = nn.Sequential(nn.Linear(num_parts * dim, hidden), nn.ReLU(), nn.Linear(hidden, num_parts))

    def forward(self, part_BPD: Tensor) -> Tensor:
        """Features of the parts to their qualities [B, P] in (0, 1), of sum 1."""
        score_BP: Tensor = self.score(part_BPD.flatten(1))
        return score_BP.float().softmax(dim=1)


class CQAFace(FaceNetwork):
    """Backbone, attentions of the parts, their features and their fusion by quality; see `CQAFaceConfig`."""

    def __init__(self, config: CQAFaceConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config.backbone, gradient_checkpointing=config.gradient_checkpointing)
        channels = self.backbone.out_channels
        self.bn = nn.BatchNorm2d(channels)
        self.attentions = nn.ModuleList(LANet(channels) for _ in range(config.num_parts))
        self.dropout = nn.Dropout(config.dropout)
        self.projections = nn.ModuleList(nn.Linear(channels, config.embedding_dim) for _ in range(config.num_parts))
        self.quality = QualityAwareNetwork(config.num_parts, config.embedding_dim)
        self.features = feature_norm(config.embedding_dim, learned_shift=False)

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]; in training with the loss of the contrastive attentions."""
        part_BPD, parts = self._parts(images_BCHW)
        embedding_BD = self.features(fuse_parts(part_BPD, parts.quality_BP))
        if not self.training:
            return global_embedding(embedding_BD)
        loss = self.config.contrast_weight * contrastive_attention_loss(parts.attention_BPHW)
        return global_embedding(embedding_BD, auxiliary_loss=loss)

    @torch.no_grad()
    def face_parts(self, images_BCHW: Tensor) -> FaceParts:
        """Where the network looks for the parts of images [B, 3, 112, 112], and what it thinks of each."""
        return self._parts(images_BCHW)[1]

    def _parts(self, images_BCHW: Tensor) -> tuple[Tensor, FaceParts]:
        map_BCHW = self.bn(self.backbone(images_BCHW))
        attention_BPHW = torch.cat(
            [lanet.attention(map_BCHW) for lanet in self.attentions],  # type: ignore[operator]  # ModuleList of Modules
            dim=1,
        )
        pooled = self.dropout(pool_parts(map_BCHW, attention_BPHW)).unbind(dim=1)
        part_BPD = torch.stack([project(part) for project, part in zip(self.projections, pooled, strict=True)], dim=1)
        return part_BPD, FaceParts(attention_BPHW, self.quality(part_BPD))


def fuse_parts(part_BPD: Tensor, quality_BP: Tensor) -> Tensor:
    """Sum [B, D] of the parts' features, each by its quality."""
    return (part_BPD * quality_BP.to(part_BPD.dtype)[:, :, None]).sum(dim=1)
