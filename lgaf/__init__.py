"""LGAF: the science. Needs torch and numpy, and safetensors to load an exported model.

The names below are imported on first use, so that ``import lgaf.config`` in a process that only handles data does not
load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lgaf.evaluation.verification import VerificationResult, verification_accuracy
    from lgaf.export import load_exported
    from lgaf.heads.margins import MARGINS, Margin, create_margin
    from lgaf.heads.screening import SampleScreening
    from lgaf.heads.sharded import ShardedMarginHead
    from lgaf.models import BACKBONES, LGAF, NETWORKS, FaceEmbedding, LGAFConfig, create_backbone

__all__ = [
    "BACKBONES",
    "LGAF",
    "MARGINS",
    "NETWORKS",
    "FaceEmbedding",
    "LGAFConfig",
    "Margin",
    "SampleScreening",
    "ShardedMarginHead",
    "VerificationResult",
    "create_backbone",
    "create_margin",
    "load_exported",
    "verification_accuracy",
]

_HOMES = {
    "lgaf.evaluation.verification": ("VerificationResult", "verification_accuracy"),
    "lgaf.export": ("load_exported",),
    "lgaf.heads.margins": ("MARGINS", "Margin", "create_margin"),
    "lgaf.heads.screening": ("SampleScreening",),
    "lgaf.heads.sharded": ("ShardedMarginHead",),
    "lgaf.models": ("BACKBONES", "LGAF", "NETWORKS", "FaceEmbedding", "LGAFConfig", "create_backbone"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'lgaf' has no attribute {name!r}")
