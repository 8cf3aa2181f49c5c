"""``metrics.jsonl``: one line a step, each step once, whatever was killed in between."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any, Final

from pipeline import storage

NAME: Final = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What is written of one step.

    Attributes:
        step: From 0, over the run.
        epoch: From 0.
        loss: Mean over the global batch.
        lr: Learning rate.
        images_per_second: Global batch over the time of this step.
        samples_digest: SHA-256 (hex) of the global batch's global sample indices, in order, as little-endian int64.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    images_per_second: float
    samples_digest: str


class MetricsLog:
    """Appends lines; on opening it drops those of steps that a resumed run will do again.

    On a file system each write appends. An object store has no append: there, the whole file is put again, which is
    done only where it must be durable, before a checkpoint counts on it.
    """

    def __init__(self, run_uri: str, first_step: int) -> None:
        self._uri = storage.join(run_uri, NAME)
        kept = [line for line in read_metrics(run_uri) if line["step"] < first_step]
        self._lines = "".join(json.dumps(line) + "\n" for line in kept)
        storage.write_bytes(self._uri, self._lines.encode())

    def write(self, metrics: list[StepMetrics], durable: bool = True) -> None:
        """Append the lines of some steps; with ``durable`` they are safe when this returns."""
        lines = "".join(json.dumps(asdict(line)) + "\n" for line in metrics)
        if storage.is_local(self._uri):
            with storage.local_path(self._uri).open("a") as file:
                file.write(lines)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            return
        self._lines += lines
        if durable:
            storage.write_bytes(self._uri, self._lines.encode())


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """All whole lines of a run's ``metrics.jsonl``; none where there is no such file."""
    uri = storage.join(run_uri, NAME)
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).decode().splitlines(keepends=True)
    # A kill in the middle of a write leaves a last line without its end.
    return [json.loads(line) for line in lines if line.endswith("\n")]
