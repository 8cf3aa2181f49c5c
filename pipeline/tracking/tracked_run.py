"""The MLflow run of a training job: writes are durable before MLflow is asked, so a dead server stops no training."""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pipeline import storage
from pipeline.tracking import runs
from pipeline.tracking.metric_sink import STEPS, records_of
from pipeline.tracking.outbox import Event, RunAddress, kind_of, time_ms_of
from pipeline.tracking.reachability import StoreRefusedError, StoreUnreachableError, contacting, reason
from pipeline.tracking.step_metrics import read_records, send_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_logger = logging.getLogger(__name__)

FINISH: Final = "finish"
STEP_FILE: Final = "step_file"
_FIRST_RETRY_S: Final = 5.0
_LONGEST_RETRY_S: Final = 60.0


class TrackedRun:
    """Writes of one job to its MLflow run, each first to the run's outbox, then to the store, oldest first.

    While the store cannot be reached, a call costs one small file and returns; a thread tries again at growing
    intervals, and one warning says so. What is left when the process ends waits for the next one. Errors of another
    kind (no permission, a deleted experiment) are raised: by the call, or, where the thread met them, by the next one.

    One object a run: it alone makes the MLflow run, at the first contact. Workers find its id by their `RunAddress`.
    They alone send the metrics of steps within `steps_are_the_workers`.

    Args:
        address: Of the run.
        first_retry_s: Seconds from the first failure to the next attempt; doubled each time.
        longest_retry_s: At most that many.
    """

    def __init__(
        self, address: RunAddress, *, first_retry_s: float = _FIRST_RETRY_S, longest_retry_s: float = _LONGEST_RETRY_S
    ) -> None:
        self.address = address
        self._outbox = address.outbox
        self._first_retry_s, self._longest_retry_s = first_retry_s, longest_retry_s
        self._run_id: str | None = None
        self._sending = threading.Lock()  # held by whoever talks to the store
        self._left_to_workers: frozenset[str] = frozenset()
        self._state = threading.Lock()  # of the three below
        self._is_down = False
        self._thread: threading.Thread | None = None
        self._warned = False
        self._stopping = threading.Event()

    @property
    def num_waiting(self) -> int:
        """How many writes the store does not have yet."""
        return len(self._outbox.waiting())

    def begin(self, config: Mapping[str, Any]) -> None:
        """Say that the job runs (again): its configuration as parameters and as ``config.json``.

        That an earlier attempt ended is no longer news if it could not be sent: the run goes on.
        """
        for name in self._outbox.waiting():
            if kind_of(name) == FINISH:
                self._outbox.remove(name)
        self._log("params", {"params": config})
        self.log_json("config", config)

    def log_json(self, name: str, value: Any) -> None:
        """Store a JSON-serialisable value as the artifact ``<name>.json``."""
        self._log("json", {"name": name, "value": value})

    def log_figure(self, name: str, figure: Figure) -> None:
        """Store a matplotlib figure as the artifact ``<name>.png``."""
        self._log("file", {"name": f"{name}.png", "base64": base64.b64encode(runs.png(figure)).decode()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the results of an evaluation."""
        self._log("metrics", {"metrics": dict(metrics), "step": step})

    def log_dataset(self, *, name: str, uri: str, fingerprint: str, **profile: int) -> None:
        """Record which data the run trains on, as `runs.log_dataset`."""
        self._log("dataset", {"name": name, "uri": uri, "fingerprint": fingerprint, **profile})

    def log_steps_of(self, uri: str, names: Sequence[str]) -> None:
        """See to it that MLflow has the last steps too: those of a JSONL file that come after what it has.

        Args:
            uri: The file. Each line has ``step`` and metrics; it is read when it is sent.
            names: The metrics; values that are not finite are left out.
        """
        self._log(STEP_FILE, {"uri": uri, "names": list(names)})

    def finish(self, status: runs.FinalStatus) -> None:
        """Set the final status, as the last write; what cannot be sent waits for the same command.

        Raises:
            TrackingError: MLflow refuses, and the status is FINISHED. A job that failed has its own error to show.
        """
        self._stopping.set()
        try:
            self._outbox.add(FINISH, {"status": status})
            self._try_to_send()
        except Exception as error:
            if status == "FINISHED":
                raise
            _logger.warning("%s", reason(error))

    def drain(self) -> str:
        """Send everything that waits, now; gives the MLflow run's id.

        Raises:
            StoreUnreachableError: The store is away.
            StoreRefusedError: It is there and refuses.
            ValueError: The experiment was deleted.
        """
        with self._sending:
            run_id = self._opened()
            while names := self._mine():
                for name in names:
                    self._send(run_id, name)
        with self._state:
            self._is_down = False
        return run_id

    @contextmanager
    def steps_are_the_workers(self) -> Iterator[None]:
        """Leave the metrics of steps to a worker's sink: two senders at once could not tell what is stored already.

        `log_steps_of` of an earlier attempt is dropped: what the sinks left must be sent before such a file is read.
        """
        with self._sending:
            self._left_to_workers = frozenset({STEPS})
            for name in self._outbox.waiting():
                if kind_of(name) == STEP_FILE:
                    self._outbox.remove(name)
        try:
            yield
        finally:
            with self._sending:
                self._left_to_workers = frozenset()

    def _log(self, kind: str, content: Mapping[str, Any]) -> None:
        self._outbox.add(kind, content)
        with self._state:
            is_down = self._is_down
        if not is_down:
            self._try_to_send()

    def _mine(self) -> list[str]:
        return [name for name in self._outbox.waiting() if kind_of(name) not in self._left_to_workers]

    def _opened(self) -> str:
        if self._run_id is None:
            address = self.address
            started = min((time_ms_of(name) for name in self._outbox.waiting()), default=None)
            with contacting(address.tracking_uri):
                run_id = runs.open_run(
                    address.tracking_uri,
                    address.experiment,
                    address.run_name,
                    run_id=address.run_id(),
                    tags=address.tags,
                    start_time_ms=started,
                )
            address.note(run_id)
            self._run_id = run_id
        return self._run_id

    def _send(self, run_id: str, name: str) -> None:
        event = self._outbox.read(name)
        if event is None:
            return
        try:
            with contacting(self.address.tracking_uri):
                send_event(self.address.tracking_uri, run_id, event)
        except StoreRefusedError as error:
            waits = storage.join(self._outbox.uri, name)
            raise StoreRefusedError(f"{error} (what it refuses waits in {waits})") from error.__cause__
        self._outbox.remove(name)

    def _try_to_send(self) -> bool:
        try:
            self.drain()
        except StoreUnreachableError as error:
            with self._state:
                self._is_down = True
                if self._thread is None and not self._stopping.is_set():
                    # A daemon: a job that ends must not wait for a dead server.
                    self._thread = threading.Thread(target=self._keep_trying, name="mlflow-outbox", daemon=True)
                    self._thread.start()
                warned, self._warned = self._warned, True
            if not warned:
                _logger.warning("%s; the run goes on, what is logged waits in %s", error, self._outbox.uri)
            return False
        return True

    def _keep_trying(self) -> None:
        delay = self._first_retry_s
        while not self._stopping.wait(delay):
            try:
                reached = self._try_to_send()
                with self._state:
                    # Looked at once more: a call that found the store down since has only added its event.
                    if not self._is_down and not self._mine():
                        self._thread = None
                        return
            except Exception as error:  # the next call meets it too, and raises it where it is seen
                _logger.warning("%s", reason(error))
                break
            delay = 0.0 if reached else min(2 * delay, self._longest_retry_s)
        with self._state:
            self._is_down, self._thread = False, None


def send_event(tracking_uri: str, run_id: str, event: Event) -> None:
    """Write one event to the store; the same again changes nothing."""
    content = event.content
    match event.kind:
        case "params":
            runs.log_params(tracking_uri, run_id, content["params"])
        case "json":
            runs.log_json(tracking_uri, run_id, content["name"], content["value"])
        case "file":
            runs.log_file(tracking_uri, run_id, content["name"], base64.b64decode(content["base64"]))
        case "metrics":
            runs.log_metrics(tracking_uri, run_id, content["metrics"], content["step"], event.time_ms)
        case "dataset":
            runs.log_dataset(tracking_uri, run_id, **content)
        case "steps":
            send_missing(tracking_uri, run_id, records_of(content))
        case "step_file":
            records = read_records(content["uri"], content["names"], event.time_ms)
            send_missing(tracking_uri, run_id, records)
        case "finish":
            runs.finish_run(tracking_uri, run_id, content["status"], event.time_ms)
        case unknown:
            raise ValueError(f"{event.name}: kind {unknown!r} is not known; another version of the code wrote it")
