"""Backbones by name: a new one is one file here and one line below."""

from typing import Final

from lgaf.config import require_choice
from lgaf.models.backbones.base import IMAGE_SIDE, Backbone, BackboneSpec
from lgaf.models.backbones.ir import IRSpec
from lgaf.models.backbones.iresnet import IResNetSpec
from lgaf.models.backbones.mobilefacenet import MobileFaceNetSpec
from lgaf.models.backbones.vit import ViTSpec

__all__ = ["BACKBONES", "IMAGE_SIDE", "Backbone", "BackboneSpec", "create_backbone"]

# In `tiny` and `micro`, for CPUs, the stem halves the image: all stages run on a quarter of the pixels.
BACKBONES: Final[dict[str, BackboneSpec]] = {
    "iresnet18": IResNetSpec(blocks=(2, 2, 2, 2)),
    "iresnet34": IResNetSpec(blocks=(3, 4, 6, 3)),
    "iresnet50": IResNetSpec(blocks=(3, 4, 14, 3)),
    "iresnet100": IResNetSpec(blocks=(3, 13, 30, 3)),
    "iresnet200": IResNetSpec(blocks=(6, 26, 60, 6)),
    "ir_18": IRSpec(blocks=(2, 2, 2, 2)),
    "ir_34": IRSpec(blocks=(3, 4, 6, 3)),
    "ir_50": IRSpec(blocks=(3, 4, 14, 3)),
    "ir_101": IRSpec(blocks=(3, 13, 30, 3)),
    "ir_152": IRSpec(blocks=(3, 8, 36, 3), channels=(256, 512, 1024, 2048), bottleneck=True),
    "ir_200": IRSpec(blocks=(3, 24, 36, 3), channels=(256, 512, 1024, 2048), bottleneck=True),
    "mobilefacenet": MobileFaceNetSpec(blocks=(1, 4, 6, 2), scale=2),
    "mobilefacenet_large": MobileFaceNetSpec(blocks=(2, 8, 12, 4), scale=4),
    "tiny": IResNetSpec(blocks=(1, 1, 1, 1), channels=(12, 24, 48, 96), stem_stride=2),
    # Not narrower: torch 2.13 corrupts memory in the float32 backward of a 1x1, stride-2, channels-last convolution
    # of, say, 4 to 8 channels at 56x56 (oneDNN, AVX-512); 12 to 24 and 16 to 16 are sound.
    "micro": IResNetSpec(blocks=(1, 1, 1, 1), channels=(16, 16, 16, 16), stem_stride=2),
    # insightface's `vit_*_dp005_*`. The 0.05 in the masked ones' names is not what they do: its code masks 0.1 of the
    # tokens whatever it is told.
    "vit_t": ViTSpec(width=256, depth=12),
    "vit_s": ViTSpec(width=512, depth=12),
    "vit_b": ViTSpec(width=512, depth=24, mask_ratio=0.1),
    "vit_l": ViTSpec(width=768, depth=24, mask_ratio=0.1),
    "vit_tiny": ViTSpec(width=32, depth=2, num_heads=4, patch_side=16, mask_ratio=0.1),
}


def create_backbone(name: str, *, gradient_checkpointing: bool = False) -> Backbone:
    """Build a backbone of `BACKBONES` by name, with fresh weights (from torch's global generator).

    Args:
        name: Of `BACKBONES`.
        gradient_checkpointing: In training keep only the inputs of blocks, and compute the rest again going backward.

    Raises:
        ValueError: The name is unknown; the message gives the nearest and all valid ones.
    """
    require_choice("backbone", name, BACKBONES)
    backbone = BACKBONES[name].build()
    backbone.gradient_checkpointing = gradient_checkpointing
    return backbone
