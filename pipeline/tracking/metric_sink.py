"""Per-step metrics to MLflow from a background thread, so that training neither waits for the server nor needs it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from pipeline.tracking import metric_names

_logger = logging.getLogger(__name__)

_MAX_METRICS_PER_BATCH = 1000  # MLflow's own limit
_LONGEST_RETRY_S = 60.0
_THREAD_NAME = "mlflow-metric-sink"

_Record = tuple[int, int, dict[str, float]]  # step, time in ms, metrics


class _NotFromTheSink(logging.Filter):
    """Drops urllib3's line for each retry if it comes from the sink's thread: the sink itself warns once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != _THREAD_NAME


_NOT_FROM_THE_SINK = _NotFromTheSink()


def last_logged_step(tracking_uri: str, run_id: str, key: str = metric_names.LOSS) -> int:
    """The last step that the store has of a metric, -1 if none."""
    # Here and below: every training worker loads this module, one of them sends, and MLflow takes a second to load.
    from pipeline.tracking.store import client

    # The history is read whole (3 s for 100,000 steps in sqlite); the run itself carries the last value of each key.
    metrics = client(tracking_uri).get_run(run_id).data.to_proto().metrics
    return max((int(metric.step) for metric in metrics if metric.key == key), default=-1)


class MetricSink:
    """Collects the metrics of each step and sends them in batches from one thread.

    `put` costs microseconds and never waits. While the store cannot be reached everything is kept and tried again, at
    growing intervals, with one warning. `close` reports how many metrics could not be sent; the training's own
    ``metrics.jsonl`` still has them. A step is sent whole and, after a lost answer, again with the same time stamp,
    which MLflow recognises: each step is stored once.

    Args:
        tracking_uri: The store; nothing connects to it before the thread does.
        run_id: The run.
        start_after: Steps up to this one are already stored and are skipped (a resumed run repeats the steps after its
            checkpoint). None asks the store for the last step of the metric ``loss``, in the thread.
        flush_seconds: How often to send.
    """

    def __init__(
        self, tracking_uri: str, run_id: str, *, start_after: int | None = -1, flush_seconds: float = 5.0
    ) -> None:
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._start_after = start_after
        self._flush_seconds = flush_seconds
        self._records: deque[_Record] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._warned = False
        logging.getLogger("urllib3.connectionpool").addFilter(_NOT_FROM_THE_SINK)
        # A daemon: a training that crashes must not hang on a dead server.
        self._thread = threading.Thread(target=self._run, name=_THREAD_NAME, daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; tensors and numpy scalars are turned into floats at once.

        Raises:
            RuntimeError: The sink is closed.
        """
        if self._closing.is_set():
            raise RuntimeError(f"metrics of step {step} were put into a closed sink")
        record = (step, int(time.time() * 1000), {metric_names.mlflow_key(key): float(metrics[key]) for key in metrics})
        with self._lock:
            if self._start_after is None or step > self._start_after:
                self._records.append(record)

    @property
    def num_pending(self) -> int:
        """How many metrics wait to be sent."""
        with self._lock:
            return sum(len(metrics) for _, _, metrics in self._records)

    def close(self, timeout_s: float = 30.0) -> int:
        """Send the rest and stop.

        Args:
            timeout_s: How long to wait for a slow store.

        Returns:
            How many metrics could not be sent; 0 if the store has everything.
        """
        self._closing.set()
        self._thread.join(timeout_s)
        num_lost = self.num_pending
        if num_lost:
            _logger.warning("%d metrics of run %s were not sent to %s", num_lost, self._run_id, self._tracking_uri)
        return num_lost

    def __enter__(self) -> MetricSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        delay = self._flush_seconds
        while not self._closing.wait(delay):
            delay = self._flush_seconds if self._try_to_send() else min(2 * delay, _LONGEST_RETRY_S)
        self._try_to_send()

    def _try_to_send(self) -> bool:
        try:
            from mlflow.entities import Metric

            from pipeline.tracking.store import client

            if self._start_after is None:
                self._skip_stored(last_logged_step(self._tracking_uri, self._run_id))
            while batch := self._next_batch():
                metrics = [Metric(key, value, ms, step) for step, ms, values in batch for key, value in values.items()]
                client(self._tracking_uri).log_batch(self._run_id, metrics=metrics)
                with self._lock:
                    for _ in batch:
                        self._records.popleft()
        except Exception as error:  # whatever MLflow, requests or sqlite raise: training goes on
            if not self._warned:
                self._warned = True
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _logger.warning(
                    "cannot send metrics to MLflow at %s, they are kept and sent later: %s", self._tracking_uri, reason
                )
            return False
        return True

    def _skip_stored(self, last_step: int) -> None:
        with self._lock:
            self._start_after = last_step
            self._records = deque(record for record in self._records if record[0] > last_step)

    def _next_batch(self) -> list[_Record]:
        """Whole steps that fit in one request: a killed run then has all metrics of its last step, or none."""
        batch: list[_Record] = []
        num_metrics = 0
        with self._lock:
            for record in self._records:
                num_metrics += len(record[2])
                if batch and num_metrics > _MAX_METRICS_PER_BATCH:
                    break
                batch.append(record)
        return batch
