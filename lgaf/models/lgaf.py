"""LGAF: backbone, global branch, local branch and their fusion by quality (paper fig. 2)."""

# Shape legend: B = batch on this rank, C = channels of C(x), D = embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.fusion import LocalGlobalFusion
from lgaf.models.global_branch import GlobalFeatureExtraction
from lgaf.models.local_branch import MultiHeadMultiScale

Branch = Literal["global", "local"]


class FaceEmbedding(NamedTuple):
    """What the network says of a batch of faces.

    Attributes:
        embedding_BD: Un-normalised embedding kappa (eq. 10); the head and the protocols normalise it.
        norm_local_B: Norm of the local feature (0 where there is no local branch).
        norm_global_B: Norm of the global feature (0 where there is no global branch).
        weight_local_B: Share of the local feature in the fusion, 1 minus the global one's.
    """

    embedding_BD: Tensor
    norm_local_B: Tensor
    norm_global_B: Tensor
    weight_local_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LGAFConfig:
    """The network of the paper with its switches: methods I, II and III of Table 1 are settings of it.

    Attributes:
        backbone: A name of `BACKBONES`.
        embedding_dim: Length D of the embedding.
        branches: ("global", "local"), or one of them: method II is ("global",), method I is ("local",).
        num_heads: Heads b of the local branch (Table 2); divides `embedding_dim`.
        scales: Equivalent kernels of one head, odd.
        quality: "norm" weighs the branches by quality (LGF); "none" adds them as they are (method III).
        fusion: How the branches join; "add" is the paper's choice (eq. 10).
        dropout: Before the projections.
    """

    backbone: str = "iresnet100"
    embedding_dim: int = 512
    branches: tuple[Branch, ...] = ("global", "local")
    num_heads: int = 4
    scales: tuple[int, ...] = (1, 3, 5)
    quality: Literal["norm", "none"] = "norm"
    fusion: Literal["add"] = "add"
    dropout: float = 0.4

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_choice("model.backbone", self.backbone, BACKBONES)
        require_positive("model.embedding_dim", self.embedding_dim)
        require_positive("model.num_heads", self.num_heads)
        require_in_range("model.dropout", self.dropout, 0.0, 0.99)
        require_choice("model.quality", self.quality, ("norm", "none"))
        require_choice("model.fusion", self.fusion, ("add",))
        for branch in self.branches:
            require_choice("model.branches", branch, ("global", "local"))
        if not self.branches or len(set(self.branches)) != len(self.branches):
            raise ValueError(f"model.branches={self.branches!r} must name one or two different branches")
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} must divide model.embedding_dim={self.embedding_dim}")
        if not self.scales or any(scale < 1 or scale % 2 == 0 for scale in self.scales):
            raise ValueError(f"model.scales={self.scales!r} must be odd kernel sizes such as (1, 3, 5)")

    def build(self) -> LGAF:
        """Make the network with fresh weights (from torch's global generator)."""
        return LGAF(self)


class LGAF(nn.Module):
    """The LGAF network; `LGAFConfig.build` makes it."""

    def __init__(self, config: LGAFConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config.backbone)
        channels, dim = self.backbone.out_channels, config.embedding_dim
        self.global_branch: GlobalFeatureExtraction | None = None
        self.local_branch: MultiHeadMultiScale | None = None
        self.fusion: LocalGlobalFusion | None = None
        if "global" in config.branches:
            self.global_branch = GlobalFeatureExtraction(channels, dim, config.dropout)
        if "local" in config.branches:
            self.local_branch = MultiHeadMultiScale(channels, dim, config.num_heads, config.scales, config.dropout)
        if len(config.branches) == 2 and config.quality == "norm":
            self.fusion = LocalGlobalFusion()

    def set_process_group(self, group: ProcessGroup | None) -> None:
        """Take the fusion's batch statistics over this group's global batch (None: this process alone)."""
        if self.fusion is not None:
            self.fusion.local_quality.group = group
            self.fusion.global_quality.group = group

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]."""
        map_BCHW = self.backbone(images_BCHW)
        local_BD = self.local_branch(map_BCHW) if self.local_branch is not None else None
        global_BD = self.global_branch(map_BCHW) if self.global_branch is not None else None
        if local_BD is None or global_BD is None:
            only_BD = local_BD if global_BD is None else global_BD
            assert only_BD is not None  # LGAFConfig demands a branch
            norm_B = only_BD.detach().float().norm(dim=1)
            none_B = norm_B.new_zeros(norm_B.shape)
            if global_BD is None:
                return FaceEmbedding(only_BD, norm_B, none_B, none_B + 1)
            return FaceEmbedding(only_BD, none_B, norm_B, none_B)
        norm_local_B, norm_global_B = local_BD.detach().float().norm(dim=1), global_BD.detach().float().norm(dim=1)
        if self.fusion is None:
            return FaceEmbedding(
                local_BD + global_BD,
                norm_local_B,
                norm_global_B,
                norm_local_B.new_full((), 0.5).expand_as(norm_local_B),
            )
        fused_BD, weight_local_B = self.fusion(local_BD, global_BD)
        return FaceEmbedding(fused_BD, norm_local_B, norm_global_B, weight_local_B)
