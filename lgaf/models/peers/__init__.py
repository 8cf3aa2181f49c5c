"""The networks that the paper compares with (Table 5), by name: a new one is one file here and one line below."""

from typing import Final

from lgaf.models.network import NetworkConfig
from lgaf.models.peers.cqa_face import CQAFaceConfig
from lgaf.models.peers.hpda import HPDAConfig
from lgaf.models.peers.ls_cnn import LSCNNConfig
from lgaf.models.peers.transface import TransFaceConfig
from lgaf.models.peers.url import URLConfig

__all__ = ["PEERS", "CQAFaceConfig", "HPDAConfig", "LSCNNConfig", "TransFaceConfig", "URLConfig"]

PEERS: Final[dict[str, type[NetworkConfig]]] = {
    "ls_cnn": LSCNNConfig,
    "hpda": HPDAConfig,
    "cqa_face": CQAFaceConfig,
    "transface": TransFaceConfig,
    "url": URLConfig,
}
