"""Networks."""

from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.lgaf import LGAF, FaceEmbedding, LGAFConfig

__all__ = ["BACKBONES", "LGAF", "FaceEmbedding", "LGAFConfig", "create_backbone"]
