"""Networks."""

from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.lgaf import LGAF, FeatureMaps, LGAFConfig
from lgaf.models.network import FaceEmbedding, FaceNetwork, NetworkConfig

__all__ = [
    "BACKBONES",
    "LGAF",
    "FaceEmbedding",
    "FaceNetwork",
    "FeatureMaps",
    "LGAFConfig",
    "NetworkConfig",
    "create_backbone",
]
