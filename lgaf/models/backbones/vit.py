"""ViT for faces in the insightface form: patches of 9 pixels, no class token, the tokens laid out as a map.

The vision transformer of Dosovitskiy et al. 2021 in the sizes that insightface trains (An et al. 2022, Partial FC) and
TransFace (Dan et al. 2023) starts from. Parameter names are those of the body of insightface's `VisionTransformer`; its
tail (`feature`) belongs to the branches or, for TransFace, to the network.
"""

# Shape legend: B = batch on this rank, N = tokens, M = tokens that the blocks see, C = width, A = attention heads,
# D = width of one attention head, H, W = sides of the map

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgaf.models.backbones.base import IMAGE_SIDE, Backbone

INITIAL_STD: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTSpec:
    """Size of one ViT and its two regularisers; the image's right and lower rest that fills no patch is not seen."""

    width: int
    depth: int
    num_heads: int = 8
    patch_side: int = 9
    mlp_ratio: int = 4
    drop_path: float = 0.05
    """Probability that the last block is skipped in training; those before it less, linearly down to 0."""
    mask_ratio: float = 0.0
    """Share of the tokens that the blocks do not see in training; a learned token takes their place afterwards."""

    def build(self) -> ViT:
        """Make it with fresh weights."""
        return ViT(self)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a whole branch of a sample, and scales up what is left."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The branch of each sample [B, N, C], or 0; in evaluation the branch as it is."""
        if not self.training or self.probability == 0.0:
            return x_BNC
        keep = 1.0 - self.probability
        return x_BNC * x_BNC.new_empty(x_BNC.shape[0], 1, 1).bernoulli_(keep) / keep


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(D)) V.

    insightface leaves autocast for float32 here. The fused kernels take their sums and softmax in float32 whatever the
    type of their inputs, and bfloat16 has float32's range, so the inputs may stay as autocast made them.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        assert width % num_heads == 0, f"{num_heads} heads do not divide the width {width}"
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens [B, N, C] to [B, N, C]."""
        qkv_3BAND = self.qkv(x_BNC).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended_BAND = F.scaled_dot_product_attention(*qkv_3BAND.unbind(0))
        out: Tensor = self.proj(attended_BAND.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two layers with ReLU6 between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens [B, N, C] to [B, N, C]."""
        out: Tensor = self.fc2(self.act(self.fc1(x_BNC)))
        return out


class Block(nn.Module):
    """LN, attention, shortcut, LN, feed-forward, shortcut."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, mlp_ratio * width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens [B, N, C] to [B, N, C]."""
        x_BNC = x_BNC + self.drop_path(self.attn(self.norm1(x_BNC)))
        out: Tensor = x_BNC + self.drop_path(self.mlp(self.norm2(x_BNC)))
        return out


class PatchEmbedding(nn.Module):
    """One token per patch."""

    def __init__(self, width: int, patch_side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_side, stride=patch_side)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, 112, 112] to tokens [B, N, C], row by row."""
        tokens_BNC: Tensor = self.proj(images_BCHW).flatten(2).transpose(1, 2)
        return tokens_BNC


class ViT(Backbone):
    """Patches, positions, blocks, norm.

    With ``mask_ratio``, N - int(N (1 - mask_ratio)) tokens of each image in training, drawn at random, skip the blocks,
    and ``mask_token`` stands in the map where they were.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.out_channels, self.map_side = spec.width, IMAGE_SIDE // spec.patch_side
        num_tokens = self.map_side**2
        self.num_kept = int(num_tokens * (1 - spec.mask_ratio))
        self.patch_embed = PatchEmbedding(spec.width, spec.patch_side)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, spec.width))
        rates = [spec.drop_path * index / max(spec.depth - 1, 1) for index in range(spec.depth)]
        self.blocks = nn.ModuleList(Block(spec.width, spec.num_heads, spec.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(spec.width)
        # Without masks there is none: a parameter that no gradient reaches has no place in an optimizer.
        self.mask_token: nn.Parameter | None = None
        if self.num_kept < num_tokens:
            self.mask_token = nn.Parameter(torch.empty(1, 1, spec.width))
            nn.init.normal_(self.mask_token, std=INITIAL_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INITIAL_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """C(x): images [B, 3, 112, 112] in [-1, 1] to the map [B, C, H, W] of the tokens after the last norm."""
        x_BNC: Tensor = self.patch_embed(images_BCHW) + self.pos_embed
        if self.training and self.mask_token is not None:
            kept_BM1 = torch.rand(x_BNC.shape[:2], device=x_BNC.device).argsort(dim=1)[:, : self.num_kept, None]
            kept_BMC = kept_BM1.expand(-1, -1, x_BNC.shape[2])
            seen_BMC = self._transform(x_BNC.gather(1, kept_BMC))
            x_BNC = self.mask_token.to(seen_BMC.dtype).expand(x_BNC.shape).scatter(1, kept_BMC, seen_BMC)
        else:
            x_BNC = self._transform(x_BNC)
        # A view, whose memory is that of a channels-last map.
        return x_BNC.transpose(1, 2).reshape(x_BNC.shape[0], self.out_channels, self.map_side, self.map_side)

    def _transform(self, x_BMC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BMC = self.run(block, x_BMC)
        normed_BMC: Tensor = self.norm(x_BMC)
        return normed_BMC
