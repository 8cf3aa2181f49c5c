"""The names of all metrics, in one place: the training loop, MLflow and the plots must agree on them."""

from __future__ import annotations

import re
from typing import Final

LOSS: Final = "loss"
LEARNING_RATE: Final = "lr"
IMAGES_PER_SECOND: Final = "images_per_second"
EPOCH: Final = "epoch"
DATA_WAIT_S: Final = "data_wait_s"

_FORBIDDEN = re.compile(r"[^\w\-. :/]")


def tar_at_far(far: float) -> str:
    """The name of the true accept rate at a false accept rate: ``tar_at_far_1e-4`` (MLflow forbids ``@``)."""
    mantissa, exponent = f"{far:e}".split("e")
    return f"tar_at_far_{float(mantissa):g}e{int(exponent)}"


def of_benchmark(benchmark: str, metric: str) -> str:
    """The name of a benchmark's metric: ``lfw/accuracy``. MLflow's pages group by what stands before the slash."""
    return mlflow_key(f"{benchmark}/{metric}")


def mlflow_key(name: str) -> str:
    """``name`` as MLflow takes it: at most 250 letters, digits and ``_ - . space : /``, no empty or dotted part."""
    parts = _FORBIDDEN.sub("_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:250] or "_"
