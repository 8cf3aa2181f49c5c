"""Where rank 0 reports the steps: ``metrics.jsonl``, MLflow, and the progress display."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np

from lgaf.step import StepResult
from pipeline.data.stream_plan import StreamPlan
from pipeline.tracking import metric_names
from pipeline.tracking.metric_sink import MetricSink
from pipeline.training.metrics_log import MetricsLog, StepMetrics, read_metrics

LOSSES_BEFORE: Final = 20  # that are noted with a step that is not finite
FILED_METRICS: Final = (
    metric_names.LOSS,
    metric_names.LEARNING_RATE,
    metric_names.EPOCH,
    metric_names.IMAGES_PER_SECOND,
)

_logger = logging.getLogger(__name__)


class PendingStep(NamedTuple):
    """A step whose loss is not read yet: reading it would wait for the device."""

    step: int
    result: StepResult
    passed_over: bool
    seconds: float
    data_wait_s: float
    indices: np.ndarray

    def is_bad(self, precision: str) -> bool:
        """Whether its loss or gradient was not finite, and that is no part of the recipe."""
        # In half precision updates are left out while the scale finds its height, which is above 1.
        left_out = self.result.left_out and (precision != "float16" or self.result.scale < 1)
        return not self.passed_over and (left_out or not bool(self.result.loss.isfinite()))


class StepLog:
    """Of rank 0.

    Args:
        run_uri: Folder of the run.
        first_step: Where this attempt goes on.
        plan: The run's samples.
        sink: To MLflow.
        board: Told how far the run is; or None.
        check_newest: As for `MetricsLog`.
    """

    def __init__(
        self,
        run_uri: str,
        first_step: int,
        plan: StreamPlan,
        sink: MetricSink,
        board: Any,
        check_newest: Callable[[], None],
    ) -> None:
        self._plan, self._board, self._sink = plan, board, sink
        self.check_newest = check_newest
        self._per_epoch = plan.steps_per_epoch
        self._file = MetricsLog(run_uri, first_step, check_newest)
        self._losses: deque[float] = deque(maxlen=LOSSES_BEFORE)
        # What a killed attempt had in memory only is in the file; the sink skips what MLflow has.
        for line in read_metrics(run_uri):
            self._send(line)

    def write(self, entries: list[PendingStep], batches: list[np.ndarray]) -> None:
        """Write the lines of some steps; ``batches`` are the global sample indices of each."""
        lines = []
        for entry, batch in zip(entries, batches, strict=False):  # a run may end before the last of the batches
            line = StepMetrics(
                step=entry.step,
                epoch=entry.step // self._per_epoch,
                loss=float(entry.result.loss),
                lr=entry.result.learning_rate,
                images_per_second=self._plan.batch / entry.seconds,
                samples_digest=hashlib.sha256(batch.astype("<i8").tobytes()).hexdigest(),
            )
            lines.append(line)
            self._send(asdict(line) | {metric_names.DATA_WAIT_S: entry.data_wait_s})
        self._file.write(lines)
        self._losses.extend(line.loss for line in lines)
        if self._board is not None and lines:
            self._board.update.remote(lines[-1].step + 1, lines[-1].loss, lines[-1].images_per_second)

    def statistics(self, pending: list[PendingStep], row: int, spoilt: str) -> dict[str, Any]:
        """What is noted of the pending step ``row`` beside its samples; those before it are not written yet."""
        losses = [*self._losses, *(float(entry.result.loss) for entry in pending[: row + 1])]
        return {
            "epoch": pending[row].step // self._per_epoch,
            "learning_rate": pending[row].result.learning_rate,
            "loss": str(losses[-1]),  # JSON has no word for nan
            "losses_before": [str(loss) for loss in losses[:-1][-LOSSES_BEFORE:]],
            "found": spoilt if row == len(pending) - 1 else "",
        }

    def make_durable(self) -> None:
        """Make sure that the lines so far are safe; raises as `MetricsLog.make_durable`."""
        self._file.make_durable()

    def _send(self, line: Mapping[str, Any]) -> None:
        """Give MLflow the numbers of a step that are numbers."""
        found = {name: line[name] for name in (*FILED_METRICS, metric_names.DATA_WAIT_S) if name in line}
        self._sink.put(line["step"], {name: value for name, value in found.items() if np.isfinite(value)})

    def settle(self) -> None:
        """The same, where nothing counts on it: a storage that will not is warned of."""
        try:
            self.make_durable()
        except OSError as error:
            _logger.warning("the last lines of metrics.jsonl are not written: %s", error)

    def close(self) -> None:
        """Write and send what the storage and MLflow do not have yet."""
        try:
            self.settle()
        finally:
            try:
                self._sink.close()
            except OSError as error:
                _logger.warning("metrics that MLflow does not have are not kept: %s", error)
