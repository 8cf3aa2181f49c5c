"""MLflow runs: parameters, artifacts and metrics of one training, by an explicit client and without global state.

Every function takes the tracking URI, so that two stores can be used by one process (a laptop's and the cluster's), and
raises if MLflow is down. A training writes through `pipeline.tracking.tracked_run.TrackedRun` and `MetricSink` instead,
which keep what cannot be sent yet.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.tracking import metric_names
from pipeline.tracking.metric_sink import MetricSink
from pipeline.tracking.step_metrics import last_logged_step
from pipeline.tracking.store import client, default_tracking_uri, sqlite_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MetricSink",
    "default_tracking_uri",
    "finish_run",
    "last_logged_step",
    "log_dataset",
    "log_file",
    "log_json",
    "log_metrics",
    "log_params",
    "open_run",
    "png",
]

# MLflow's own limits (mlflow.utils.validation, 3.17.2).
_MAX_METRICS_PER_BATCH = 1000
_MAX_PARAMS_PER_BATCH = 100
_MAX_PARAM_CHARS = 6000
_MAX_TAG_CHARS = 5000
_MAX_DIGEST_CHARS = 36

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]


def open_run(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    *,
    run_id: str | None = None,
    tags: Mapping[str, object] | None = None,
    artifact_root: str | None = None,
    start_time_ms: int | None = None,
) -> str:
    """Create a run, or re-open the one that was killed, and give its id.

    Args:
        tracking_uri: The store.
        experiment: Created if it is not there.
        run_name: Shown in the UI.
        run_id: An earlier run to go on with: its status becomes RUNNING again. Where it is gone, a new one is made.
        tags: Set on the run in both cases.
        artifact_root: Where a *new* experiment keeps artifacts; by default beside a sqlite store, else the server's.
        start_time_ms: Of a new run, in milliseconds since 1970; None: now.

    Raises:
        ValueError: The experiment was deleted.
        MlflowException: The server cannot be reached.
    """
    mlflow = client(tracking_uri)
    run_tags = {key: _tag(value) for key, value in (tags or {}).items()}
    if run_id is None:
        experiment_id = _experiment_id(mlflow, tracking_uri, experiment, artifact_root)
        created = mlflow.create_run(experiment_id, start_time=start_time_ms, tags=run_tags, run_name=run_name)
        return str(created.info.run_id)
    try:
        mlflow.update_run(run_id, status="RUNNING", name=run_name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        # The store was emptied, or the run deleted in the UI: the work goes on under a new one.
        return open_run(
            tracking_uri, experiment, run_name, tags=tags, artifact_root=artifact_root, start_time_ms=start_time_ms
        )
    mlflow.log_batch(run_id, tags=[RunTag(key, value) for key, value in run_tags.items()])
    return run_id


def _experiment_id(mlflow: MlflowClient, tracking_uri: str, name: str, artifact_root: str | None) -> str:
    database = sqlite_path(tracking_uri)
    if artifact_root is None and database is not None:
        # MLflow would take ./mlruns of the current folder, which the next process does not share.
        artifact_root = (database.parent / "mlflow-artifacts").as_uri()
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow.create_experiment(name, artifact_location=artifact_root))
        except MlflowException as error:  # another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = mlflow.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment={name!r} was deleted in {tracking_uri}: restore it or take another name")
    return str(found.experiment_id)


def finish_run(
    tracking_uri: str, run_id: str, status: FinalStatus = "FINISHED", end_time_ms: int | None = None
) -> None:
    """Set the final status and the end time of a run (None: now)."""
    client(tracking_uri).set_terminated(run_id, status, end_time_ms)


def log_params(tracking_uri: str, run_id: str, params: Mapping[str, Any]) -> None:
    """Log a (nested) config as parameters with dotted names.

    A parameter of a run can never change, but a resumed run may have other values (fewer workers): the first value
    stays the parameter, a later one becomes the tag ``resumed.<name>``.
    """
    mlflow = client(tracking_uri)
    logged = mlflow.get_run(run_id).data.params
    given = {metric_names.mlflow_key(key): _text(value, _MAX_PARAM_CHARS) for key, value in _flatten("", params)}
    new = [Param(key, value) for key, value in given.items() if key not in logged]
    changed = {key: value for key, value in given.items() if logged.get(key, value) != value}
    for i in range(0, len(new), _MAX_PARAMS_PER_BATCH):
        mlflow.log_batch(run_id, params=new[i : i + _MAX_PARAMS_PER_BATCH])
    for key, value in changed.items():
        mlflow.set_tag(run_id, f"resumed.{key}"[:250], _tag(value))


def _flatten(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(f"{path}.{key}" if path else str(key), item)
    else:
        yield path, value


def _text(value: Any, max_chars: int) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value)
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def _tag(value: object) -> str:
    return _text(value, _MAX_TAG_CHARS)


def log_json(tracking_uri: str, run_id: str, name: str, value: Any) -> None:
    """Store a JSON-serialisable value as the artifact ``<name>.json``."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    log_file(tracking_uri, run_id, f"{name}.json", text.encode())


def png(figure: Figure) -> bytes:
    """A matplotlib figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def log_file(tracking_uri: str, run_id: str, name: str, content: bytes) -> None:
    """Store bytes as the artifact ``name``, which may be in folders (``plots/roc.png``)."""
    folder, _, file_name = name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / file_name
        path.write_bytes(content)
        client(tracking_uri).log_artifact(run_id, str(path), folder or None)


def log_metrics(
    tracking_uri: str, run_id: str, metrics: Mapping[str, float], step: int, time_ms: int | None = None
) -> None:
    """Log metrics at once (results of an evaluation); per-step metrics go through `MetricSink`.

    The same metrics with the same ``time_ms`` (milliseconds since 1970; None: now) are stored once.
    """
    time_ms = int(time.time() * 1000) if time_ms is None else time_ms
    batch = [Metric(metric_names.mlflow_key(key), float(value), time_ms, step) for key, value in metrics.items()]
    for i in range(0, len(batch), _MAX_METRICS_PER_BATCH):
        client(tracking_uri).log_batch(run_id, metrics=batch[i : i + _MAX_METRICS_PER_BATCH])


def log_dataset(
    tracking_uri: str, run_id: str, *, name: str, uri: str, fingerprint: str, context: str = "training", **profile: int
) -> None:
    """Record which data a run used: as the run's dataset input, and with the whole fingerprint as a tag.

    Args:
        tracking_uri: The store.
        run_id: The run.
        name: The data set's name.
        uri: Where it is.
        fingerprint: SHA-256 of its manifest. MLflow keeps 36 characters of it as the digest, the tag keeps all.
        context: What it was used for.
        profile: Its figures (``num_images=...``).
    """
    dataset = Dataset(
        name=name[:500],
        digest=fingerprint[:_MAX_DIGEST_CHARS],
        source_type="uri",
        source=json.dumps({"uri": uri}),
        profile=json.dumps(profile) if profile else None,
    )
    mlflow = client(tracking_uri)
    mlflow.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
    mlflow.set_tag(run_id, f"{context}_data_fingerprint", fingerprint)
