"""LS-CNN: local patches at multiple scales (Wang and Guo 2020, IEEE TIFS 15, 1640-1653; ref. [18] of the LGAF paper).

The paper itself is behind a paywall. Its abstract says what the network is made of; sizes and wiring are those of the
public re-implementation Ksuryateja/LS-CNN.
"""

# Shape legend: B = batch on this rank, C = channels, H, W = sides of a map, D = embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from lgaf.config import require_choice, require_positive
from lgaf.models.feature_norm import feature_norm
from lgaf.models.local_branch import LANet, SqueezeExcitation
from lgaf.models.network import FaceEmbedding, FaceNetwork, global_embedding

Attention = Literal["dfa", "spatial", "channel", "none"]

# What weighs the input of each layer, in this order.
ATTENTIONS: Final[dict[str, tuple[type[LANet] | type[SqueezeExcitation], ...]]] = {
    "dfa": (LANet, SqueezeExcitation),
    "spatial": (LANet,),
    "channel": (SqueezeExcitation,),
    "none": (),
}

BOTTLENECK: Final = 4  # times the growth: width of the 1x1 convolution before a layer's 3x3 ones


@dataclass(frozen=True, kw_only=True, slots=True)
class LSCNNConfig:
    """LS-CNN; `LSCNNConfig(growth_rate=16, layers=(1, 1, 1))` is small enough for tests on a CPU.

    FROM THE PAPER (its abstract): the backbone HSNet, multi-scale in two ways, by kernels of several sizes in one layer
    and by concatenating the maps of different layers; a spatial attention (LANet) and a channel attention (SE), fused
    into the Dual Face Attention; LS-CNN is HSNet with it. ``attention`` takes the parts away again.

    FROM THE RE-IMPLEMENTATION: growth 48, blocks of 3, 3 and 5 layers, four 3x3 convolutions and two poolings before
    them, transitions that halve channels and sides, attention before every layer and transition, LANet before SE,
    reduction 16, average pooling of the last map.

    A CHOICE of ours: poolings and strided convolutions pad by 1, so that 112 gives 28, 14 and 7 (the re-implementation
    does not pad and is fed 128); the averages are projected to the embedding and batch-normalised as in IResNets, where
    the re-implementation classifies them; the convolutions of the stem have no bias (batch norm follows); SE's linear
    layers do, as they have everywhere in this project.
    """

    growth_rate: int = 48
    """Channels that each layer of a block adds; the stem has as many, then twice as many."""
    layers: tuple[int, int, int] = (3, 3, 5)
    """Layers of the blocks on maps of 28, 14 and 7."""
    attention: Attention = "dfa"
    """Both attentions (dfa), one of them, or the bare backbone HSNet (none)."""
    embedding_dim: int = 512
    """Length D of the embedding."""

    def __post_init__(self) -> None:
        """Check every field; ``ValueError`` names the field, its value and what is valid."""
        require_positive("model.growth_rate", self.growth_rate)
        require_positive("model.embedding_dim", self.embedding_dim)
        require_choice("model.attention", self.attention, ATTENTIONS)
        if len(self.layers) != 3 or min(self.layers) < 1:
            raise ValueError(f"model.layers={self.layers!r} must be three numbers of layers such as (3, 3, 5)")

    @property
    def output_dim(self) -> int:
        """Length of the embedding that the head and the protocols see."""
        return self.embedding_dim

    def build(self) -> LSCNN:
        """Make the network with fresh weights (from torch's global generator)."""
        return LSCNN(self)


class MultiScaleLayer(nn.Module):
    """One layer of HSNet: kernels of 1, 3 and 5 (as two of 3) side by side, fused by a 1x1 convolution.

    An Inception module without its pooling.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        wide = BOTTLENECK * growth
        self.one = _conv_bn_relu(in_channels, growth, 1)
        self.three = nn.Sequential(_conv_bn_relu(in_channels, wide, 1), _conv_bn_relu(wide, growth, 3))
        self.five = nn.Sequential(
            _conv_bn_relu(in_channels, wide, 1), _conv_bn_relu(wide, growth, 3), _conv_bn_relu(growth, growth, 3)
        )
        self.fuse = _conv_bn_relu(3 * growth, growth, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, growth, H, W]."""
        fused: Tensor = self.fuse(torch.cat([self.one(x_BCHW), self.three(x_BCHW), self.five(x_BCHW)], dim=1))
        return fused


class DenseBlock(nn.Module):
    """Layers that each see the maps of all before them: [B, C, H, W] to [B, C + layers * growth, H, W]."""

    def __init__(self, in_channels: int, growth: int, num_layers: int, attention: Attention) -> None:
        super().__init__()
        widths = [in_channels + i * growth for i in range(num_layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(_face_attention(width, attention), MultiScaleLayer(width, growth)) for width in widths
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Append each layer's map to its input."""
        for layer in self.layers:
            x_BCHW = torch.cat([x_BCHW, layer(x_BCHW)], dim=1)
        return x_BCHW


class Transition(nn.Module):
    """Half the channels and half the sides, at several scales: two strided convolutions and a max pooling, fused."""

    def __init__(self, in_channels: int, channels: int, attention: Attention) -> None:
        super().__init__()
        self.attention = _face_attention(in_channels, attention)
        self.pool = nn.Sequential(_conv_bn_relu(in_channels, channels, 1), nn.MaxPool2d(3, stride=2, padding=1))
        self.three = nn.Sequential(_conv_bn_relu(in_channels, channels, 1), _conv_bn_relu(channels, channels, 3, 2))
        self.five = nn.Sequential(
            _conv_bn_relu(in_channels, channels, 1),
            _conv_bn_relu(channels, channels, 3),
            _conv_bn_relu(channels, channels, 3, 2),
        )
        self.fuse = _conv_bn_relu(3 * channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, channels, H / 2, W / 2]."""
        x = self.attention(x_BCHW)
        fused: Tensor = self.fuse(torch.cat([self.pool(x), self.three(x), self.five(x)], dim=1))
        return fused


class LSCNN(FaceNetwork):
    """HSNet with Dual Face Attention; `LSCNNConfig` says what is the paper's."""

    def __init__(self, config: LSCNNConfig) -> None:
        super().__init__()
        self.config = config
        growth = config.growth_rate
        self.stem = nn.Sequential(
            _conv_bn_relu(3, growth, 3),
            _conv_bn_relu(growth, growth, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
            _conv_bn_relu(growth, 2 * growth, 3),
            _conv_bn_relu(2 * growth, 2 * growth, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.trunk = nn.Sequential()
        channels = 2 * growth
        for i, num_layers in enumerate(config.layers):
            if i > 0:
                halved = (channels + 1) // 2
                self.trunk.append(Transition(channels, halved, config.attention))
                channels = halved
            self.trunk.append(DenseBlock(channels, growth, num_layers, config.attention))
            channels += num_layers * growth
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.fc = nn.Linear(channels, config.embedding_dim, bias=False)
        self.features = feature_norm(config.embedding_dim, learned_shift=False)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out")

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        """Embed RGB images [B, 3, 112, 112] in [-1, 1]."""
        map_BCHW = self.norm(self.trunk(self.stem(images_BCHW)))
        return global_embedding(self.features(self.fc(map_BCHW.mean(dim=(2, 3)))))

    @torch.no_grad()
    def attention_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Spatial attention in (0, 1) of every layer and transition, first to last: maps [B, H, W] of 28, 14 and 7.

        Raises:
            ValueError: The network has no spatial attention.
        """
        if LANet not in ATTENTIONS[self.config.attention]:
            raise ValueError(f"model.attention={self.config.attention!r} has no spatial attention to show")
        maps: list[Tensor] = []
        spatial = [module.attention for module in self.modules() if isinstance(module, LANet)]
        hooks = [
            attend.register_forward_hook(lambda _, __, map_B1HW: maps.append(map_B1HW[:, 0])) for attend in spatial
        ]
        try:
            self.forward(images_BCHW)
        finally:
            for hook in hooks:
                hook.remove()
        return maps


def _face_attention(channels: int, attention: Attention) -> nn.Sequential:
    return nn.Sequential(*(kind(channels) for kind in ATTENTIONS[attention]))


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())
