"""The metrics of steps on their way to MLflow: whole steps in batches, and what a store has of them already."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from pipeline import storage
from pipeline.tracking import metric_names

_MAX_METRICS_PER_BATCH: Final = 1000  # MLflow's own limit

# Every step has the first; the loss of a step may be no number, and is not sent then.
STEP_KEYS: Final = (metric_names.EPOCH, metric_names.LOSS)


class StepRecord(NamedTuple):
    """Metrics of one step: its number, the time in milliseconds since 1970, and the values by name."""

    step: int
    time_ms: int
    metrics: dict[str, float]


def last_logged_step(tracking_uri: str, run_id: str, *keys: str) -> int:
    """The last step that the store has of any of some metrics (those that all steps have), -1 if none."""
    # Here and below: every training worker loads this module, one of them sends, and MLflow takes a second to load.
    from pipeline.tracking.store import client

    # The history is read whole (3 s for 100,000 steps in sqlite); the run itself carries the last value of each key.
    metrics = client(tracking_uri).get_run(run_id).data.to_proto().metrics
    return max((int(metric.step) for metric in metrics if metric.key in (keys or STEP_KEYS)), default=-1)


def first_batch(records: Iterable[StepRecord]) -> list[StepRecord]:
    """The first records that fit in one request. They are whole: a killed run has all metrics of its last step."""
    batch: list[StepRecord] = []
    num_metrics = 0
    for record in records:
        num_metrics += len(record.metrics)
        if batch and num_metrics > _MAX_METRICS_PER_BATCH:
            break
        batch.append(record)
    return batch


def send_batch(tracking_uri: str, run_id: str, batch: Sequence[StepRecord]) -> None:
    """Send what `first_batch` gave; the same again is stored once."""
    from mlflow.entities import Metric

    from pipeline.tracking.store import client

    metrics = [Metric(key, value, ms, step) for step, ms, values in batch for key, value in values.items()]
    client(tracking_uri).log_batch(run_id, metrics=metrics)


def send_missing(tracking_uri: str, run_id: str, records: Sequence[StepRecord]) -> None:
    """Send the records, in rising order of steps, that come after the last step which the store has."""
    last = last_logged_step(tracking_uri, run_id)
    start = next((i for i, record in enumerate(records) if record.step > last), len(records))
    while batch := first_batch(itertools.islice(records, start, None)):
        send_batch(tracking_uri, run_id, batch)
        start += len(batch)


def read_records(uri: str, names: Sequence[str], time_ms: int) -> list[StepRecord]:
    """The named metrics that are finite numbers of each line of a JSONL file, all with one time; none without a file.

    Raises:
        StorageError: It is there and cannot be read.
    """
    try:
        lines = storage.read_bytes(uri).decode().splitlines(keepends=True)
    except storage.MissingError:
        return []
    records = []
    for line in lines:
        if line.endswith("\n"):  # else a kill came in the middle of a write
            values = json.loads(line)
            metrics = {metric_names.mlflow_key(name): float(values[name]) for name in names if name in values}
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            records.append(StepRecord(values["step"], time_ms, finite))
    return records
