"""LGAF: backbone, global branch, local branch and their fusion by quality (paper fig. 2)."""

# Shape legend: B = batch on this rank, C = channels of C(x), H, W = its sides, D = embedding, b = heads

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.fusion import (
    QUALITY_MEASURES,
    IterativeAttentionalFusion,
    LocalGlobalFusion,
    PlainFusion,
    QualityMeasure,
)
from lgaf.models.global_branch import GlobalDepthwiseConvolution, GlobalFeatureExtraction
from lgaf.models.local_branch import (
    LANetPooling,
    MultiHeadMultiScale,
    Projection,
    ScaleForm,
    head_similarity,
)
from lgaf.models.network import FaceEmbedding, FaceNetwork

Branch = Literal["global", "local"]
Quality = Literal["norm", "entropy", "gaussian_entropy", "none"]
Fusion = Literal["add", "cat", "iaff"]

GLOBAL_PROJECTIONS: Final[dict[str, type[GlobalFeatureExtraction] | type[GlobalDepthwiseConvolution]]] = {
    "fc": GlobalFeatureExtraction,
    "gdc": GlobalDepthwiseConvolution,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LGAFConfig:
    """The network of the paper with its switches: every row of Tables 1-4 is a setting of it (docs/fidelity.md)."""

    backbone: str = "iresnet100"
    """A name of `BACKBONES`."""
    embedding_dim: int = 512
    """Length D of each branch's feature, and of the embedding (twice that for fusion cat)."""
    branches: tuple[Branch, ...] = ("global", "local")
    """Both, or one: method I of Table 1 is ("local",), method II is ("global",)."""
    num_heads: int = 4
    """Heads b of the local branch (Table 2); divides embedding_dim."""
    scales: tuple[int, ...] = (1, 3, 5)
    """Equivalent kernels of one head, odd."""
    quality: Quality = "norm"
    """What weighs the branches (Table 3): their norm, the entropy of their softmax, that of a normal distribution, or
    nothing (method III of Table 1)."""
    fusion: Fusion = "add"
    """How the branches join (Table 4); iaff learns its own weights and goes with quality none."""
    dropout: float = 0.4
    """Before the projections."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks in training and compute the rest again: less memory, more time."""
    global_projection: Literal["fc", "gdc"] = "fc"
    """G(.) of the global branch: fully connected (the paper), or one depthwise kernel first, for small backbones."""
    feature_shift: bool = False
    """Give the last batch norm of a branch a learned shift, as insightface's networks have."""
    scale_form: ScaleForm = "stacked"
    """Kernel j of the local branch as stacked 3x3 convolutions or one direct j x j."""
    local_width: int = 0
    """Channels of each scale of a head; 0: a quarter of the map's."""
    local_projection: Projection = "flatten"
    """F(.) of eq. 13 on all positions, or on their average."""
    lanet_gap: LANetPooling = "none"
    """How to read the GAP of eq. 11: not at all, over channels, or over positions as printed."""
    quality_gradient: bool = False
    """Let gradients through the weights of the branches."""
    unit_branches: bool = False
    """Give both features unit length before they are weighted, once their quality is measured."""
    diversity_weight: float = 0.0
    """Factor of a loss on how alike the heads' maps lie in space, which drives them apart; 0, as in the paper: none."""

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_choice("model.backbone", self.backbone, BACKBONES)
        require_positive("model.embedding_dim", self.embedding_dim)
        require_positive("model.num_heads", self.num_heads)
        require_in_range("model.dropout", self.dropout, 0.0, 0.99)
        require_in_range("model.local_width", self.local_width, 0, 2**16)
        require_in_range("model.diversity_weight", self.diversity_weight, 0.0, 1e6)
        require_choice("model.quality", self.quality, (*QUALITY_MEASURES, "none"))
        require_choice("model.fusion", self.fusion, ("add", "cat", "iaff"))
        require_choice("model.global_projection", self.global_projection, GLOBAL_PROJECTIONS)
        require_choice("model.scale_form", self.scale_form, ("stacked", "direct"))
        require_choice("model.local_projection", self.local_projection, ("flatten", "gap"))
        require_choice("model.lanet_gap", self.lanet_gap, ("none", "channel", "spatial"))
        for branch in self.branches:
            require_choice("model.branches", branch, ("global", "local"))
        if not self.branches or len(set(self.branches)) != len(self.branches):
            raise ValueError(f"model.branches={self.branches!r} must name one or two different branches")
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} must divide model.embedding_dim={self.embedding_dim}")
        if not self.scales or any(scale < 1 or scale % 2 == 0 for scale in self.scales):
            raise ValueError(f"model.scales={self.scales!r} must be odd kernel sizes such as (1, 3, 5)")
        if self.diversity_weight > 0 and ("local" not in self.branches or self.num_heads < 2):
            raise ValueError(
                f"model.diversity_weight={self.diversity_weight} needs a local branch of two heads or more"
            )
        if self.fusion == "iaff" and self.quality != "none":
            raise ValueError(
                f"model.fusion='iaff' learns its own weights: set model.quality='none' (it is {self.quality!r})"
            )

    @property
    def output_dim(self) -> int:
        """Length of the embedding that the head and the protocols see."""
        return self.embedding_dim * (2 if self.fusion == "cat" and len(self.branches) == 2 else 1)

    def build(self) -> LGAF:
        """Make the network with fresh weights (from torch's global generator)."""
        return LGAF(self)


class FeatureMaps(NamedTuple):
    """Where the branches look (paper fig. 6): mean magnitude over the channels at each position.

    Attributes:
        global_BHW: Of the map as the global branch's projection sees it.
        local_BbHW: Of each head's map before its projection, attention applied.
    """

    global_BHW: Tensor
    local_BbHW: Tensor


class LGAF(FaceNetwork):
    """The LGAF network; `LGAFConfig.build` makes it."""

    def __init__(self, config: LGAFConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config.backbone, gradient_checkpointing=config.gradient_checkpointing)
        self.global_branch: GlobalFeatureExtraction | GlobalDepthwiseConvolution | None = None
        self.local_branch: MultiHeadMultiScale | None = None
        self.fusion: LocalGlobalFusion | PlainFusion | IterativeAttentionalFusion | None = None
        shape = (self.backbone.out_channels, self.backbone.map_side, config.embedding_dim)
        if "global" in config.branches:
            projection = GLOBAL_PROJECTIONS[config.global_projection]
            self.global_branch = projection(*shape, config.dropout, config.feature_shift)
        if "local" in config.branches:
            self.local_branch = MultiHeadMultiScale(
                *shape,
                config.num_heads,
                config.scales,
                config.dropout,
                width=config.local_width or None,
                learned_shift=config.feature_shift,
                scale_form=config.scale_form,
                lanet_pooling=config.lanet_gap,
                projection=config.local_projection,
            )
        if len(config.branches) == 2:
            self.fusion = _create_fusion(config)

    def set_process_group(self, group: ProcessGroup | None) -> None:
        """Take the fusion's batch statistics over this group's global batch (None: this process alone)."""
        if isinstance(self.fusion, LocalGlobalFusion):
            self.fusion.local_quality.group = group
            self.fusion.global_quality.group = group

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]."""
        map_BCHW = self.backbone(images_BCHW)
        local_BD, auxiliary_loss = self._local(map_BCHW)
        global_BD = self.global_branch(map_BCHW) if self.global_branch is not None else None
        if local_BD is None or global_BD is None or self.fusion is None:
            return self._one_branch(local_BD, global_BD)._replace(auxiliary_loss=auxiliary_loss)
        norm_local_B, norm_global_B = local_BD.detach().float().norm(dim=1), global_BD.detach().float().norm(dim=1)
        fused_BD, weight_local_B = self.fusion(local_BD, global_BD)
        return FaceEmbedding(fused_BD, norm_local_B, norm_global_B, weight_local_B, auxiliary_loss=auxiliary_loss)

    def _local(self, map_BCHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.local_branch is None:
            return None, None
        attended = self.local_branch.attended_maps(map_BCHW)
        weight = self.config.diversity_weight if self.training else 0.0
        return self.local_branch.feature(attended), weight * head_similarity(attended) if weight > 0 else None

    def _one_branch(self, local_BD: Tensor | None, global_BD: Tensor | None) -> FaceEmbedding:
        only_BD = local_BD if global_BD is None else global_BD
        assert only_BD is not None  # LGAFConfig demands a branch
        norm_B = only_BD.detach().float().norm(dim=1)
        none_B = norm_B.new_zeros(norm_B.shape)
        if global_BD is None:
            return FaceEmbedding(only_BD, norm_B, none_B, none_B + 1)
        return FaceEmbedding(only_BD, none_B, norm_B, none_B)

    @torch.no_grad()
    def feature_maps(self, images_BCHW: Tensor) -> FeatureMaps:
        """The global and the b local feature maps of images [B, 3, 112, 112] in [-1, 1] (paper fig. 6).

        Raises:
            ValueError: The network lacks a branch.
        """
        if self.global_branch is None or self.local_branch is None:
            raise ValueError(f"feature maps need both branches; this network has {self.config.branches!r}")
        map_BCHW = self.backbone(images_BCHW)
        local_maps = [attended.abs().mean(dim=1) for attended in self.local_branch.attended_maps(map_BCHW)]
        return FeatureMaps(self.global_branch.attended_map(map_BCHW).abs().mean(dim=1), torch.stack(local_maps, dim=1))


def _create_fusion(config: LGAFConfig) -> LocalGlobalFusion | PlainFusion | IterativeAttentionalFusion:
    if config.fusion == "iaff":
        return IterativeAttentionalFusion(config.embedding_dim, unit_features=config.unit_branches)
    concatenate = config.fusion == "cat"
    if config.quality == "none":
        return PlainFusion(concatenate=concatenate, unit_features=config.unit_branches)
    measure: QualityMeasure = config.quality
    return LocalGlobalFusion(
        measure,
        concatenate=concatenate,
        quality_gradient=config.quality_gradient,
        unit_features=config.unit_branches,
    )
