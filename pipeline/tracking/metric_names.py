"""The names of the per-step metrics, in one place, and what MLflow takes as a name at all."""

from __future__ import annotations

import re
from typing import Final

LOSS: Final = "loss"
LEARNING_RATE: Final = "lr"
IMAGES_PER_SECOND: Final = "images_per_second"
EPOCH: Final = "epoch"
DATA_WAIT_S: Final = "data_wait_s"

_FORBIDDEN = re.compile(r"[^\w\-. :/]")


def mlflow_key(name: str) -> str:
    """``name`` as MLflow takes it: at most 250 letters, digits and ``_ - . space : /``, no empty or dotted part."""
    parts = _FORBIDDEN.sub("_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:250] or "_"
