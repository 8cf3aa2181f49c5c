"""MobileFaceNet (Chen et al. 2018) in the form of insightface's `mbf` and `mbf_large`: 112x112 in, 7x7 out.

Wider than the paper's by `scale`; the hidden layers of its blocks are not. The published projection of the map is
the global depthwise convolution (``LGAFConfig(global_projection="gdc")``). Parameter names are those of insightface's
network, so that its released weights load (`lgaf.models.released`).
"""

# Shape legend: B = batch on this rank, C = channels, H, W = height and width of the map

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from lgaf.models.backbones.base import Backbone

MAP_CHANNELS: Final = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class MobileFaceNetSpec:
    """Size of one MobileFaceNet: residual blocks of its four stages, and a factor of its channels.

    A first stage of 1 is not a residual block but a convolution of 64 groups.
    """

    blocks: tuple[int, int, int, int]
    scale: int

    def build(self) -> MobileFaceNet:
        """Make it with fresh weights."""
        return MobileFaceNet(self)


class _Layers(nn.Module):
    """Modules in a row, under the name that insightface's keys have."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.layers(x_BCHW)
        return out


class _Stage(_Layers):
    """Residual blocks in a row."""


class DepthwiseBlock(_Layers):
    """1x1 convolution, 3x3 depthwise (stride), linear 1x1; without a stride the input is added."""

    def __init__(self, in_channels: int, channels: int, hidden: int, stride: int) -> None:
        super().__init__(
            _convolution(in_channels, hidden, 1),
            _convolution(hidden, hidden, 3, stride=stride, groups=hidden),
            _convolution(hidden, channels, 1, linear=True),
        )
        self.residual = stride == 1

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        out: Tensor = self.layers(x_BCHW)
        return out + x_BCHW if self.residual else out


class MobileFaceNet(Backbone):
    """Stem, four stages with a halving block before all but the first, and the convolution that makes the map."""

    def __init__(self, spec: MobileFaceNetSpec) -> None:
        super().__init__()
        self.out_channels = MAP_CHANNELS
        narrow, wide = 64 * spec.scale, 128 * spec.scale
        first, second, third, fourth = spec.blocks
        self.layers = nn.ModuleList(
            [
                _convolution(3, narrow, 3, stride=2),
                _convolution(narrow, narrow, 3, groups=64) if first == 1 else _stage(narrow, 128, first),
                DepthwiseBlock(narrow, narrow, 128, 2),
                _stage(narrow, 128, second),
                DepthwiseBlock(narrow, wide, 256, 2),
                _stage(wide, 256, third),
                DepthwiseBlock(wide, wide, 512, 2),
                _stage(wide, 256, fourth),
            ]
        )
        self.conv_sep = _convolution(wide, MAP_CHANNELS, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """C(x): images [B, 3, 112, 112] in [-1, 1] to the map [B, 512, 7, 7] (`conv_sep`: convolution, BN, PReLU)."""
        stem, *parts = self.layers
        x: Tensor = stem(images_BCHW)
        for part in parts:
            for block in part.layers if isinstance(part, _Stage) else (part,):
                x = self.run(block, x)
        return self.run(self.conv_sep, x)


def _convolution(
    in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1, linear: bool = False
) -> _Layers:
    convolution = nn.Conv2d(
        in_channels, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return _Layers(convolution, nn.BatchNorm2d(channels), *([] if linear else [nn.PReLU(channels)]))


def _stage(channels: int, hidden: int, num_blocks: int) -> _Stage:
    return _Stage(*(DepthwiseBlock(channels, channels, hidden, 1) for _ in range(num_blocks)))
