"""IResNet in the insightface form: the improved residual network of ArcFace (Deng et al. 2019), 112x112 in, 7x7 out.

Parameter names are those of insightface's `iresnet`, so that its released weights load (`lgaf.models.released`).
"""

# Shape legend: B = batch on this rank, C = channels, H, W = height and width of the map

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lgaf.models.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class IResNetSpec:
    """Size of one IResNet: blocks and channels of its four stages, and what the stem does."""

    blocks: tuple[int, int, int, int]
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem_stride: int = 1

    def build(self) -> IResNet:
        """Make it with fresh weights."""
        return IResNet(self)


class IBasicBlock(nn.Module):
    """BN, conv 3x3, BN, PReLU, conv 3x3 (stride), BN, plus the shortcut (insightface `IBasicBlock`)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, channels, H / stride, W / stride]."""
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        out: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))))
        return out + shortcut


class IResNet(Backbone):
    """Stem and four stages."""

    def __init__(self, spec: IResNetSpec) -> None:
        super().__init__()
        stem = spec.channels[0]
        self.out_channels = spec.channels[-1]
        self.conv1 = nn.Conv2d(3, stem, 3, stride=spec.stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.prelu = nn.PReLU(stem)
        first_stride = 2 // spec.stem_stride
        self.layer1 = _stage(stem, spec.channels[0], spec.blocks[0], first_stride)
        self.layer2 = _stage(spec.channels[0], spec.channels[1], spec.blocks[1], 2)
        self.layer3 = _stage(spec.channels[1], spec.channels[2], spec.blocks[2], 2)
        self.layer4 = _stage(spec.channels[2], spec.channels[3], spec.blocks[3], 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """C(x): images [B, 3, 112, 112] in [-1, 1] to the map [B, C, 7, 7] (after `layer4`, before any BN)."""
        x: Tensor = self.prelu(self.bn1(self.conv1(images_BCHW)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self.run(block, x)
        return x


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    blocks = [IBasicBlock(in_channels, channels, stride)]
    blocks += [IBasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
