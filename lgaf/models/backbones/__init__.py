"""Backbones by name: a new one is one file here and one line below."""

from typing import Final

from lgaf.config import require_choice
from lgaf.models.backbones.base import IMAGE_SIDE, Backbone, BackboneSpec
from lgaf.models.backbones.iresnet import IResNetSpec

__all__ = ["BACKBONES", "IMAGE_SIDE", "Backbone", "BackboneSpec", "create_backbone"]

# In `tiny` and `micro`, for CPUs, the stem halves the image: all stages run on a quarter of the pixels.
BACKBONES: Final[dict[str, BackboneSpec]] = {
    "iresnet18": IResNetSpec(blocks=(2, 2, 2, 2)),
    "iresnet34": IResNetSpec(blocks=(3, 4, 6, 3)),
    "iresnet50": IResNetSpec(blocks=(3, 4, 14, 3)),
    "iresnet100": IResNetSpec(blocks=(3, 13, 30, 3)),
    "iresnet200": IResNetSpec(blocks=(6, 26, 60, 6)),
    "tiny": IResNetSpec(blocks=(1, 1, 1, 1), channels=(12, 24, 48, 96), stem_stride=2),
    # Not narrower: torch 2.13 corrupts memory in the float32 backward of a 1x1, stride-2, channels-last convolution
    # of, say, 4 to 8 channels at 56x56 (oneDNN, AVX-512); 12 to 24 and 16 to 16 are sound.
    "micro": IResNetSpec(blocks=(1, 1, 1, 1), channels=(16, 16, 16, 16), stem_stride=2),
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
