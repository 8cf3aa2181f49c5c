"""An object store and an MLflow server that are away for a while: real servers, each behind what shuts it off."""

from __future__ import annotations

import time

import pytest
from mlflow import MlflowClient

from pipeline import storage
from pipeline.training.metrics_log import read_metrics
from tests.chaos.job import Job, judge
from tests.mlflow_server import Gate, MlflowServer
from tests.s3 import BUCKET

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]
pytest_plugins = ("tests.s3",)


def test_the_store_and_mlflow_are_away_in_turn(s3, running_proxy, table, tmp_path):
    """Data, checkpoints and lines in one bucket; a minute without it, then every fifth request refused."""
    server = MlflowServer(tmp_path)
    server.start()
    gate = Gate(server.port)
    running_proxy.clear()
    place = f"s3://{BUCKET}/chaos{tmp_path.name}"
    job = Job(
        tmp_path,
        "--tracking.uri",
        gate.uri,
        "--retries",
        "3",
        epochs=100,
        environment={"AWS_ENDPOINT_URL": running_proxy.endpoint, "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"},
        storage_uri=place,
    )
    moments = [time.monotonic()]
    job.start()
    try:
        job.wait_for_steps(30)
        gate.open()

        job.wait_for_steps(60)
        moments.append(time.monotonic())
        running_proxy.inject("reset")
        time.sleep(60)
        running_proxy.clear()

        job.wait_for_steps(150)
        moments.append(time.monotonic())
        running_proxy.inject("status", status=503, rate=0.2)
        job.wait_for_steps(250)
        running_proxy.clear()

        moments.append(time.monotonic())
        gate.shut()
        time.sleep(20)
        gate.open()
        assert job.finish(900) == 0, job.log()
        (data,) = {info.uri.rsplit("/", 1)[0] for info in storage.list_files(f"{place}/data") if "manifest" in info.uri}
        whole = judge("all", job, moments, data)
        names = (
            "MLflow away from the start, to step 30",
            "object store away for 60 s",
            "every fifth request to the object store refused (503)",
            "MLflow away for 20 s in mid-run",
        )
        for number, name in enumerate(names):
            table(whole.of(number, name))
        assert whole.survived == 4
        assert whole.wrong_samples == 0
        assert set(whole.repeated) == {0}

        known = storage.read_json(storage.join(job.run_uri, "mlflow.json"))
        history = MlflowClient(server.uri).get_metric_history(known["run_id"], "loss")
        assert len(history) == job.total_steps
        lines = read_metrics(job.run_uri)
        assert {metric.step: metric.value for metric in history} == {line["step"]: line["loss"] for line in lines}
    finally:
        job.end()
        gate.shut()
        server.stop()
        running_proxy.clear()


def test_a_job_that_is_submitted_twice(s3, table, tmp_path):
    """The second goes on with the run, the first ends and says why; an object store has no locks to refuse it by."""
    place = f"s3://{BUCKET}/twice{tmp_path.name}"
    flags = ("--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    first, second = (Job(folder, *flags, epochs=60, storage_uri=place) for folder in folders)
    second.seen = first.seen
    first.start()
    try:
        first.wait_for_steps(30)
        before = [(line["step"], line["loss"]) for line in read_metrics(first.run_uri)]
        moment = time.monotonic()
        second.start()
        assert first.finish() == 1, first.log()
        assert "took this run over, from step" in first.log().replace("\n", " ")
        assert second.finish() == 0, second.log()
        (data,) = {info.uri.rsplit("/", 1)[0] for info in storage.list_files(f"{place}/data") if "manifest" in info.uri}
        verdict = judge("the same job submitted again, with the same name, while it runs", second, [moment], data)
        table(verdict)
        assert verdict.survived == 1
        assert verdict.wrong_samples == 0
        losses = {line["step"]: line["loss"] for line in read_metrics(second.run_uri)}
        assert all(losses[step] == loss for step, loss in before)
    finally:
        first.end()
        second.end()
