"""``metrics.jsonl``: one line a step, each step once, whatever was killed in between."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from pipeline import storage

NAME: Final = "metrics.jsonl"

_logger = logging.getLogger(__name__)


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
    done only where it must be durable, before a checkpoint counts on it. A storage that is full or away does not stop
    who writes: lines are kept until it takes them, and no checkpoint counts before.

    Args:
        run_uri: Folder of the run.
        first_step: Lines from here on are dropped.
        check_newest: Called before anything is written; it raises where others have the run.
    """

    def __init__(self, run_uri: str, first_step: int, check_newest: Callable[[], None] = lambda: None) -> None:
        self._uri, self._check_newest = storage.join(run_uri, NAME), check_newest
        check_newest()
        kept = [line for line in read_metrics(run_uri) if line["step"] < first_step]
        self._stored = "".join(json.dumps(line) + "\n" for line in kept).encode()
        self._num_bytes = len(self._stored)
        self._waiting = b""
        # Training writes, the thread that commits a checkpoint makes sure: training never waits for a put.
        self._lock, self._putting = threading.Lock(), threading.Lock()
        self._warned = False
        storage.write_bytes(self._uri, self._stored)
        if storage.is_local(self._uri):
            self._stored = b""  # the file has it

    def write(self, metrics: list[StepMetrics]) -> None:
        """Take the lines of some steps; a file has them when this returns, if its disk takes them."""
        with self._lock:
            self._waiting += "".join(json.dumps(asdict(line)) + "\n" for line in metrics).encode()
            if not storage.is_local(self._uri):
                return
            try:
                self._append()
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    _logger.warning("%s: cannot be written, its lines are kept and written later: %s", self._uri, error)

    def make_durable(self) -> None:
        """Make sure that all lines so far are safe.

        Raises:
            StorageError: They cannot be written; they are kept.
            OSError: Likewise.
            SupersededError: Others write this file now.
        """
        if storage.is_local(self._uri):
            with self._lock:
                self._append()
            with storage.local_path(self._uri).open("rb") as file:
                os.fsync(file.fileno())
            return
        with self._putting:
            with self._lock:
                waiting = self._waiting
            content = self._stored + waiting
            self._check_newest()
            storage.write_bytes(self._uri, content)
            self._stored = content
            with self._lock:
                self._waiting = self._waiting[len(waiting) :]

    def _append(self) -> None:
        self._check_newest()
        with storage.local_path(self._uri).open("r+b") as file:
            # Not at the end: a disk that was full may have taken half of a line.
            file.seek(self._num_bytes)
            file.write(self._waiting)
            file.truncate()
        self._num_bytes += len(self._waiting)
        self._waiting = b""


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """All whole lines of a run's ``metrics.jsonl``; none where there is no such file."""
    uri = storage.join(run_uri, NAME)
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).decode().splitlines(keepends=True)
    # A kill in the middle of a write leaves a last line without its end.
    return [json.loads(line) for line in lines if line.endswith("\n")]
