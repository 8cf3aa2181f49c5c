import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from mlflow.entities import Metric

from pipeline.tracking import metric_names, runs
from pipeline.tracking.store import client, sqlite_path


def history(store, run, key="loss"):
    return [(item.step, item.value) for item in client(store).get_metric_history(run, key)]


def artifact(store, run, name, folder):
    return Path(client(store).download_artifacts(run, name, str(folder)))


@pytest.fixture
def dead_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_default_store_is_sqlite_in_the_local_storage_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert runs.default_tracking_uri(f"file://{tmp_path}") == f"sqlite:///{tmp_path}/mlflow.db"
    assert sqlite_path(runs.default_tracking_uri(str(tmp_path))) == tmp_path / "mlflow.db"
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        runs.default_tracking_uri("s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert runs.default_tracking_uri("s3://bucket/runs") == "https://mlflow.example"


def test_killed_run_is_opened_again(store):
    run = runs.open_run(store, "tests", "killed", tags={"host": "a", "config": {"lr": 0.1}})
    runs.finish_run(store, run, "KILLED")
    assert client(store).get_run(run).info.status == "KILLED"
    assert runs.open_run(store, "tests", "killed", run_id=run, tags={"host": "b"}) == run
    again = client(store).get_run(run)
    assert again.info.status == "RUNNING"
    assert (again.data.tags["host"], again.data.tags["config"]) == ("b", '{"lr": 0.1}')
    runs.finish_run(store, run)
    assert client(store).get_run(run).info.status == "FINISHED"


def test_artifacts_lie_beside_the_database_or_where_asked(store, run, tmp_path):
    assert sqlite_path(store).parent.as_uri() in client(store).get_run(run).info.artifact_uri
    other = runs.open_run(store, "elsewhere", "r", artifact_root=tmp_path.as_uri())
    runs.log_json(store, other, "report", {"accuracy": 0.5})
    assert [json.loads(path.read_text()) for path in tmp_path.rglob("report.json")] == [{"accuracy": 0.5}]


def test_deleted_experiment_is_named(store):
    experiment_id = client(store).create_experiment("deleted")
    client(store).delete_experiment(experiment_id)
    with pytest.raises(ValueError, match="experiment='deleted' was deleted"):
        runs.open_run(store, "deleted", "r")


def test_nested_and_oversized_params(store, run):
    many = {f"p{i}": i for i in range(250)}
    runs.log_params(store, run, {"model": {"branches": ("global", "local"), "margin": {"m": 0.5}}, "x@y": "z" * 7000})
    runs.log_params(store, run, {"many": many, "empty": {}})
    params = client(store).get_run(run).data.params
    assert params["model.branches"] == '["global", "local"]'
    assert params["model.margin.m"] == "0.5"
    assert len(params["x_y"]) == 6000
    assert params["empty"] == "{}"
    assert sum(key.startswith("many.") for key in params) == 250


def test_params_of_a_resumed_run_may_differ(store, run):
    runs.log_params(store, run, {"num_workers": 4, "seed": 0})
    runs.log_params(store, run, {"num_workers": 2, "seed": 0, "new": True})
    data = client(store).get_run(run).data
    assert data.params == {"num_workers": "4", "seed": "0", "new": "True"}
    assert data.tags["resumed.num_workers"] == "2"
    assert "resumed.seed" not in data.tags


def test_artifacts(store, run, tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    runs.log_file(store, run, "plots/roc.png", runs.png(figure))
    runs.log_json(store, run, "report", {"b": 1, "a": [1, 2]})
    assert artifact(store, run, "plots/roc.png", tmp_path).read_bytes()[:4] == b"\x89PNG"
    assert json.loads(artifact(store, run, "report.json", tmp_path).read_text()) == {"b": 1, "a": [1, 2]}


def test_dataset_is_an_input_with_the_whole_fingerprint_as_a_tag(store, run):
    for _ in range(2):  # a resumed run says it again
        runs.log_dataset(store, run, name="ms1m", uri="s3://b/ms1m", fingerprint="a1" * 32, num_images=5, num_classes=2)
    found = client(store).get_run(run)
    (used,) = found.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("ms1m", ("a1" * 32)[:36])
    assert json.loads(used.dataset.profile) == {"num_images": 5, "num_classes": 2}
    assert found.data.tags["training_data_fingerprint"] == "a1" * 32


def test_metric_names():
    assert metric_names.mlflow_key("../a//tar@far=1") == "a/tar_far_1"
    assert metric_names.mlflow_key("") == "_"


def test_metrics_at_once(store, run):
    runs.log_metrics(store, run, {f"lfw/tar@{i}": i for i in range(1500)}, step=7)
    assert history(store, run, "lfw/tar_1499") == [(7, 1499.0)]
    assert runs.last_logged_step(store, run, "lfw/tar_1499") == 7
    assert runs.last_logged_step(store, run) == -1


def test_sink_stores_every_step_once(store, run):
    with runs.MetricSink(store, run, flush_seconds=0.05) as sink:
        for step in range(2500):
            sink.put(step, {"loss": 1.0 / (step + 1), "lr": 0.1})
    assert sink.num_pending == 0
    assert history(store, run) == [(step, 1.0 / (step + 1)) for step in range(2500)]
    assert runs.last_logged_step(store, run, "lr") == 2499
    with pytest.raises(RuntimeError, match="step 2500 were put into a closed sink"):
        sink.put(2500, {"loss": 0.0})


def test_sink_takes_values_that_are_not_finite(store, run):
    sink = runs.MetricSink(store, run, flush_seconds=0.05)
    sink.put(0, {"loss": math.nan})
    sink.put(1, {"loss": math.inf})
    assert sink.close() == 0
    assert [step for step, _ in history(store, run)] == [0, 1]


@pytest.mark.parametrize("ask_in_the_thread", [False, True])
def test_resumed_run_has_each_step_once(store, run, ask_in_the_thread):
    with runs.MetricSink(store, run) as sink:
        for step in range(10):
            sink.put(step, {"loss": 1.0})
    start_after = None if ask_in_the_thread else runs.last_logged_step(store, run)
    with runs.MetricSink(store, run, start_after=start_after) as sink:
        for step in range(5, 20):  # the checkpoint was of step 5
            sink.put(step, {"loss": 2.0})
    assert history(store, run) == [(step, 1.0 if step < 10 else 2.0) for step in range(20)]


def test_batch_sent_twice_after_a_lost_answer_is_stored_once(store, run):
    batch = [Metric("loss", 0.5, 1_700_000_000_000 + step, step) for step in range(20)]
    client(store).log_batch(run, metrics=batch[:10])
    client(store).log_batch(run, metrics=batch)
    assert Counter(step for step, _ in history(store, run)) == Counter(range(20))


def test_dead_server_loses_nothing_and_stops_nothing(dead_server, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # with our default of 2 each attempt takes 5 s
    started = time.monotonic()
    sink = runs.MetricSink(dead_server, "0" * 32, flush_seconds=0.05)
    for step in range(1000):
        sink.put(step, {"loss": 1.0, "lr": 0.1})
    assert time.monotonic() - started < 1.0, "putting must not wait for the server"
    time.sleep(1.0)  # the first attempt is on its way
    assert sink.close(timeout_s=30.0) == 2000
    assert sink.num_pending == 2000, "nothing is dropped"
    assert time.monotonic() - started < 10.0
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, "one for the outage, one for what was left at the end"
    assert dead_server in warnings[0]
    assert "2000 metrics" in warnings[1]


def test_sink_catches_up_after_an_outage(store, run, tmp_path, caplog):
    gate = tmp_path / "gate"
    gate.write_text("a file where the store's folder should be")
    sink = runs.MetricSink(f"sqlite:///{gate / 'mlflow.db'}", run, flush_seconds=0.05)
    for step in range(100):
        sink.put(step, {"loss": float(step)})
    deadline = time.monotonic() + 20
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "kept and sent later" in caplog.text
    assert sink.num_pending == 100
    gate.unlink()
    gate.symlink_to(sqlite_path(store).parent)
    sink.put(100, {"loss": 100.0})
    assert sink.close() == 0
    assert history(store, run) == [(step, float(step)) for step in range(101)]
    assert len(caplog.records) == 1


def test_importing_changes_no_environment():
    code = (
        "import os; before = dict(os.environ); import pipeline.tracking.runs, pipeline.tracking.registry, sys;"
        "print(sorted(set(os.environ) - set(before)), 'ray' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=clean, check=True
    )
    assert "MLFLOW_HTTP" not in found.stdout
    assert found.stdout.strip().endswith("False")
