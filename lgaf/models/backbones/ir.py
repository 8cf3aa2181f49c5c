"""IR networks in the AdaFace form (Kim et al. 2022), as TFace and CVLface have them: 112x112 in, 7x7 out.

Beside insightface's IResNet, the same residual network, they differ in the shortcut of a block that keeps its channels:
it has no weights, also where the block halves the map (the first block of stage 1). Parameter names are those of
AdaFace's networks, so that their released weights load (`lgaf.models.released`).
"""

# Shape legend: B = batch on this rank, C = channels, H, W = height and width of the map

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from lgaf.models.backbones.base import Backbone

BOTTLENECK_REDUCTION: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class IRSpec:
    """Size of one IR network: blocks and channels of its four stages, channels of the stem, and the kind of block."""

    blocks: tuple[int, int, int, int]
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem_channels: int = 64
    bottleneck: bool = False

    def build(self) -> IR:
        """Make it with fresh weights."""
        return IR(self)


class IRBlock(nn.Module):
    """The residual layers, plus the shortcut (AdaFace's `BasicBlockIR` and `BottleneckIR`)."""

    def __init__(self, in_channels: int, channels: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if in_channels != channels:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        elif stride == 1:
            # Published as a max pool of one pixel, which gives its input too but keeps an int64 index per value.
            self.shortcut_layer = nn.Identity()
        else:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        layers = _bottleneck_layers if bottleneck else _basic_layers
        self.res_layer = nn.Sequential(*layers(in_channels, channels, stride))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        shortcut: Tensor = self.shortcut_layer(x_BCHW)
        residual: Tensor = self.res_layer(x_BCHW)
        return residual + shortcut


class IR(Backbone):
    """Stem and four stages."""

    def __init__(self, spec: IRSpec) -> None:
        super().__init__()
        stem = spec.stem_channels
        self.out_channels = spec.channels[-1]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem)
        )
        in_channels, blocks = stem, list[IRBlock]()
        for num_blocks, channels in zip(spec.blocks, spec.channels, strict=True):
            blocks.append(IRBlock(in_channels, channels, 2, spec.bottleneck))
            blocks += [IRBlock(channels, channels, 1, spec.bottleneck) for _ in range(num_blocks - 1)]
            in_channels = channels
        self.body = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """C(x): images [B, 3, 112, 112] in [-1, 1] to the map [B, C, 7, 7] (after the last block, before any BN)."""
        x: Tensor = self.input_layer(images_BCHW)
        for block in self.body:
            x = self.run(block, x)
        return x


def _basic_layers(in_channels: int, channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.PReLU(channels),
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    ]


def _bottleneck_layers(in_channels: int, channels: int, stride: int) -> list[nn.Module]:
    hidden = channels // BOTTLENECK_REDUCTION
    return [
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.PReLU(hidden),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.PReLU(hidden),
        nn.Conv2d(hidden, channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(channels),
    ]
