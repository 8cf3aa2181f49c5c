"""Networks: LGAF with its ablations, and those that the paper compares with."""

from typing import Final

from lgaf.models.backbones import BACKBONES, create_backbone
from lgaf.models.lgaf import LGAF, FeatureMaps, LGAFConfig
from lgaf.models.network import FaceEmbedding, FaceNetwork, NetworkConfig
from lgaf.models.peers import PEERS

# name -> the dataclass of its settings, whose ``build`` makes the network
NETWORKS: Final[dict[str, type[NetworkConfig]]] = {"lgaf": LGAFConfig, **PEERS}

__all__ = [
    "BACKBONES",
    "LGAF",
    "NETWORKS",
    "FaceEmbedding",
    "FaceNetwork",
    "FeatureMaps",
    "LGAFConfig",
    "NetworkConfig",
    "create_backbone",
]
