"""Per-step metrics to MLflow from a background thread, so that training neither waits for the server nor needs it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

from pipeline.tracking import metric_names
from pipeline.tracking.outbox import Outbox, kind_of
from pipeline.tracking.reachability import contacting, reason
from pipeline.tracking.step_metrics import StepRecord, first_batch, last_logged_step, send_batch, send_missing

_logger = logging.getLogger(__name__)

STEPS: Final = "steps"  # the kind of the outbox's events with what a sink could not send

_LONGEST_RETRY_S = 60.0


class MetricSink:
    """Collects the metrics of each step and sends them in batches from one thread.

    `put` costs microseconds and never waits. While the store cannot be reached everything is kept and tried again, at
    growing intervals, with one warning. What could not be sent when the sink closes goes to the outbox; without one,
    `close` reports how many metrics that are. A step is sent whole and, after a lost answer, again with the same time
    stamp, which MLflow recognises: each step is stored once.

    One sender of steps at a time: while a sink of a run is open, nothing else sends its steps. The sink itself sends
    what an earlier one left in the outbox, before its own.

    Args:
        tracking_uri: The store; nothing connects to it before the thread does.
        run_id: The run, or what gives it: None as long as it is not made.
        start_after: Steps up to this one are already stored and are skipped (a resumed run repeats the steps after its
            checkpoint). None asks the store for the last step that it has, in the thread.
        flush_seconds: How often to send.
        outbox: Where what could not be sent waits when the sink is closed.
    """

    def __init__(
        self,
        tracking_uri: str,
        run_id: str | Callable[[], str | None],
        *,
        start_after: int | None = -1,
        flush_seconds: float = 5.0,
        outbox: Outbox | None = None,
    ) -> None:
        self._tracking_uri = tracking_uri
        self._ask_run_id = run_id if callable(run_id) else lambda: run_id
        self._run_id: str | None = None
        self._start_after = start_after
        self._flush_seconds = flush_seconds
        self._outbox = outbox
        self._has_sent_left_over = outbox is None
        self._records: deque[StepRecord] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._warned = False
        # A daemon: a training that crashes must not hang on a dead server.
        self._thread = threading.Thread(target=self._run, name="mlflow-metric-sink", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; tensors and numpy scalars are turned into floats at once.

        Raises:
            RuntimeError: The sink is closed.
        """
        if self._closing.is_set():
            raise RuntimeError(f"metrics of step {step} were put into a closed sink")
        values = {metric_names.mlflow_key(key): float(metrics[key]) for key in metrics}
        record = StepRecord(step, int(time.time() * 1000), values)
        with self._lock:
            if self._start_after is None or step > self._start_after:
                self._records.append(record)

    @property
    def num_pending(self) -> int:
        """How many metrics wait to be sent."""
        with self._lock:
            return sum(len(record.metrics) for record in self._records)

    def close(self, timeout_s: float = 30.0) -> int:
        """Send the rest and stop; what cannot be sent is written to the outbox.

        Args:
            timeout_s: How long to wait for a slow store.

        Returns:
            How many metrics could not be sent; 0 if the store has everything.

        Raises:
            StorageError: The outbox cannot be written.
        """
        if self._closing.is_set():
            return self.num_pending
        self._closing.set()
        self._thread.join(timeout_s)
        num_left = self.num_pending
        if num_left and self._outbox is not None:
            # The thread may still be at it. Then both send the same, time stamps included.
            with self._lock:
                records = list(self._records)
            self._outbox.add(STEPS, {"records": records})
            _logger.info("%d metrics for MLflow at %s wait in %s", num_left, self._tracking_uri, self._outbox.uri)
        elif num_left:
            _logger.warning("%d metrics of run %s were not sent to %s", num_left, self._run_id, self._tracking_uri)
        return num_left

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
            if self._run_id is None:
                self._run_id = self._ask_run_id()
            if self._run_id is None:  # who makes the run says why it is not made
                return False
            with contacting(self._tracking_uri):
                self._send(self._run_id)
        except Exception as error:  # whatever MLflow, requests or sqlite raise: training goes on
            self._run_id = None  # it may be made anew
            if not self._warned:
                self._warned = True
                _logger.warning("%s; metrics are kept and sent later", reason(error))
            return False
        return True

    def _send(self, run_id: str) -> None:
        if not self._has_sent_left_over and self._outbox is not None:
            for name in self._outbox.waiting():
                if kind_of(name) == STEPS and (event := self._outbox.read(name)) is not None:
                    send_missing(self._tracking_uri, run_id, records_of(event.content))
                    self._outbox.remove(name)
            self._has_sent_left_over = True
        if self._start_after is None:
            self._skip_stored(last_logged_step(self._tracking_uri, run_id))
        while batch := self._next_batch():
            send_batch(self._tracking_uri, run_id, batch)
            with self._lock:
                for _ in batch:
                    self._records.popleft()

    def _skip_stored(self, last_step: int) -> None:
        with self._lock:
            self._start_after = last_step
            self._records = deque(record for record in self._records if record.step > last_step)

    def _next_batch(self) -> list[StepRecord]:
        with self._lock:
            return first_batch(self._records)


def records_of(content: Mapping[str, list[tuple[int, int, dict[str, float]]]]) -> list[StepRecord]:
    """The records in an event of the kind `STEPS`."""
    return [StepRecord(*record) for record in content["records"]]
