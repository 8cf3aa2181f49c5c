"""A tracked run against a real MLflow server that is away at the start, in the middle, or all the time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipeline.tracking import runs
from pipeline.tracking.metric_sink import MetricSink
from pipeline.tracking.outbox import Outbox, RunAddress, kind_of
from pipeline.tracking.reachability import StoreRefusedError, StoreUnreachableError
from pipeline.tracking.store import client
from pipeline.tracking.tracked_run import TrackedRun
from tests.mlflow_server import MlflowServer

ROOT = Path(__file__).parents[3]
CONFIG = {"seed": 3, "model": {"backbone": "micro"}, "milestones": (12, 20)}


def figure():
    made = Figure()
    made.subplots().plot([1, 3, 2])
    return made


def log_all(run, folder):
    """One of each kind of write, as a job does; three steps are in the file alone."""
    run.begin(CONFIG)
    run.log_dataset(name="d", uri="s3://b/d", fingerprint="ab" * 32, num_samples=7)
    lines = [json.dumps({"step": i, "epoch": 0, "loss": 2.0 - i, "samples_digest": "x"}) + "\n" for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    run.log_steps_of(str(folder / "metrics.jsonl"), ("epoch", "loss"))
    run.log_figure("loss", figure())
    run.log_metrics({"eval/lfw/accuracy": 0.75}, 2)
    run.log_json("report", {"b": [1, None], "a": "ü"})


def histories(address, run_id):
    mlflow = client(address.tracking_uri)
    keys = mlflow.get_run(run_id).data.metrics
    found = {key: mlflow.get_metric_history(run_id, key) for key in keys}
    return {key: sorted((item.step, item.value, item.timestamp) for item in items) for key, items in found.items()}


def contents(address, folder):
    """All that MLflow has of a run, artifacts byte by byte; there must be one run."""
    mlflow = client(address.tracking_uri)
    experiment = mlflow.get_experiment_by_name(address.experiment)
    (info,) = [run.info for run in mlflow.search_runs([experiment.experiment_id])]
    run = mlflow.get_run(info.run_id)
    target = folder / f"download-{time.monotonic_ns()}"
    target.mkdir()
    mlflow.download_artifacts(info.run_id, "", str(target))
    return {
        "id": info.run_id,
        "status": info.status,
        "times": (info.start_time, info.end_time),
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        "inputs": [item.dataset.digest for item in run.inputs.dataset_inputs],
        "metrics": histories(address, info.run_id),
        "artifacts": {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*.*")},
    }


def check_complete(found):
    assert found["params"] == {"seed": "3", "model.backbone": "micro", "milestones": "[12, 20]"}
    assert found["tags"]["preset"] == "demo"
    assert found["tags"]["training_data_fingerprint"] == "ab" * 32
    assert found["inputs"] == [("ab" * 32)[:36]]
    assert [item[:2] for item in found["metrics"]["loss"]] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert [item[:2] for item in found["metrics"]["eval/lfw/accuracy"]] == [(2, 0.75)]
    assert found["artifacts"]["loss.png"] == runs.png(figure())
    assert json.loads(found["artifacts"]["report.json"]) == {"b": [1, None], "a": "ü"}
    assert set(found["artifacts"]) == {"config.json", "loss.png", "report.json"}


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outages(caplog):
    return [record.message for record in caplog.records if "the run goes on" in record.message]


def test_up_all_the_time(address, tmp_path, caplog):
    run = TrackedRun(address)
    log_all(run, tmp_path)
    assert run.num_waiting == 0
    assert client(address.tracking_uri).get_run(address.run_id()).info.status == "RUNNING"
    run.finish("FINISHED")
    found = contents(address, tmp_path)
    check_complete(found)
    assert found["status"] == "FINISHED"
    assert caplog.records == []


def test_down_at_the_start_then_up(address, gate, tmp_path, caplog):
    gate.shut()
    run = TrackedRun(address, first_retry_s=0.1)
    before_ms = time.time_ns() // 1_000_000
    run.begin(CONFIG)
    begun_ms = time.time_ns() // 1_000_000
    assert address.run_id() is None
    time.sleep(0.3)  # attempts fail
    gate.open()
    wait_until(lambda: run.num_waiting == 0)  # by the thread: the job itself may say nothing for hours
    log_all(run, tmp_path)
    run.finish("FINISHED")
    found = contents(address, tmp_path)
    check_complete(found)
    assert before_ms <= found["times"][0] <= begun_ms, "the run began when the job did"
    (warning,) = outages(caplog)
    assert gate.uri in warning
    assert f"{address.run_uri}/mlflow_outbox" in warning
    assert len(caplog.records) == 1


def test_down_in_the_middle_costs_no_time_and_two_outages_one_warning(address, gate, tmp_path, caplog):
    run = TrackedRun(address, first_retry_s=60.0)
    run.begin(CONFIG)
    for outage in range(2):
        gate.shut()
        run.log_metrics({"found": 1.0}, outage)
        started = time.monotonic()
        for i in range(8):
            run.log_metrics({f"m{i}": 1.0}, outage)
        assert time.monotonic() - started < 2.0, "one attempt, then files alone"
        assert run.num_waiting == 9
        gate.open()
        run.drain()
        assert run.num_waiting == 0
    log_all(run, tmp_path)
    run.finish("FINISHED")
    found = contents(address, tmp_path)
    check_complete(found)
    assert [item[0] for item in found["metrics"]["m7"]] == [0, 1]
    assert len(outages(caplog)) == 1


DRAIN = """
import sys
from pipeline.tracking.outbox import RunAddress
from pipeline.tracking.tracked_run import TrackedRun
print(TrackedRun(RunAddress(run_uri=sys.argv[1], tracking_uri=sys.argv[2], experiment=sys.argv[3], run_name="r",
    tags={"preset": "demo"})).drain())
"""


def test_down_for_the_whole_run_then_sent_by_another_process(address, gate, tmp_path, caplog):
    gate.shut()
    run = TrackedRun(address)
    log_all(run, tmp_path)
    run.finish("FINISHED")
    ended_ms = time.time_ns() // 1_000_000
    assert run.num_waiting == 8
    assert len(caplog.records) == 1
    with pytest.raises(StoreUnreachableError, match=gate.uri):
        run.drain()
    gate.open()
    command = [sys.executable, "-c", DRAIN, address.run_uri, address.tracking_uri, address.experiment]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == address.run_id()
    found = contents(address, tmp_path)
    check_complete(found)
    assert found["status"] == "FINISHED"
    assert found["times"][1] <= ended_ms, "it ended when the job did"
    assert run.num_waiting == 0


def test_killed_between_sending_and_forgetting_stores_nothing_twice(address, gate, tmp_path):
    gate.shut()
    run = TrackedRun(address)
    log_all(run, tmp_path)
    sink = MetricSink(address.tracking_uri, address.run_id, flush_seconds=0.05, outbox=address.outbox)
    for step in range(3, 6):
        sink.put(step, {"loss": 0.5, "epoch": 0, "data_wait_s": 0.01})
    assert sink.close() == 9
    run.finish("FINISHED")
    kept = tmp_path / "kept"
    shutil.copytree(Path(address.run_uri) / "mlflow_outbox", kept)
    assert {kind_of(path.name) for path in kept.iterdir()} == {
        *("params", "json", "dataset", "step_file", "file", "metrics", "steps", "finish")
    }
    gate.open()
    TrackedRun(address).drain()
    first = contents(address, tmp_path)
    check_complete(first | {"metrics": first["metrics"] | {"loss": first["metrics"]["loss"][:3]}})
    assert [item[0] for item in first["metrics"]["data_wait_s"]] == [3, 4, 5]
    shutil.copytree(kept, Path(address.run_uri) / "mlflow_outbox", dirs_exist_ok=True)
    TrackedRun(address).drain()
    assert contents(address, tmp_path) == first
    assert Counter(item[0] for item in first["metrics"]["loss"]) == Counter(range(6))


def test_the_order_is_kept(address, gate, tmp_path):
    gate.shut()
    run = TrackedRun(address)
    for attempt in range(12):
        run.begin({"num_workers": attempt})
        run.log_json("report", attempt)
    gate.open()
    run.drain()
    found = contents(address, tmp_path)
    assert found["params"] == {"num_workers": "0"}, "the first value stays"
    assert found["tags"]["resumed.num_workers"] == "11"
    assert json.loads(found["artifacts"]["report.json"]) == 11


def test_the_end_of_an_attempt_is_no_news_when_the_next_has_begun(address, gate):
    gate.shut()
    run = TrackedRun(address)
    run.begin(CONFIG)
    run.finish("FAILED")
    again = TrackedRun(address)
    again.begin(CONFIG)
    gate.open()
    assert client(address.tracking_uri).get_run(again.drain()).info.status == "RUNNING"
    again.finish("FINISHED")
    assert client(address.tracking_uri).get_run(again.drain()).info.status == "FINISHED"


WRITE = """
import sys
from pipeline.tracking.metric_sink import MetricSink
from pipeline.tracking.outbox import RunAddress
run = RunAddress(run_uri=sys.argv[1], tracking_uri=sys.argv[2], experiment=sys.argv[3], run_name="r")
sink = MetricSink(run.tracking_uri, run.run_id, start_after=None, flush_seconds=0.05, outbox=run.outbox)
for line in sys.stdin:
    sink.put(int(line), {"loss": 1.0, "epoch": 0, "data_wait_s": 0.5})
print(sink.close())
"""


def test_a_worker_and_the_driver_at_once(address, gate):
    """The worker starts before there is an MLflow run; only the driver makes one."""
    gate.shut()
    command = [sys.executable, "-c", WRITE, address.run_uri, address.tracking_uri, address.experiment]
    run = TrackedRun(address, first_retry_s=0.1)
    with run.steps_are_the_workers():
        worker = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for step in range(50):
            worker.stdin.write(f"{step}\n")
        worker.stdin.flush()
        run.begin(CONFIG)
        gate.open()
        for step in range(50, 100):
            run.log_metrics({"eval": float(step)}, step)
            worker.stdin.write(f"{step}\n")
        out, _ = worker.communicate(timeout=60)
    run.drain()
    found = histories(address, address.run_id())
    assert {key: [item[0] for item in items] for key, items in found.items()} == {
        **{key: list(range(100)) for key in ("loss", "epoch", "data_wait_s")},
        "eval": list(range(50, 100)),
    }
    mlflow = client(address.tracking_uri)
    assert len(mlflow.search_runs([mlflow.get_experiment_by_name(address.experiment).experiment_id])) == 1
    assert worker.returncode == 0, out


def test_refusals_are_raised_and_say_what_waits(address, tmp_path, caplog):
    mlflow = client(address.tracking_uri)
    mlflow.delete_experiment(mlflow.create_experiment(address.experiment))
    run = TrackedRun(address)
    with pytest.raises(ValueError, match=f"experiment='{address.experiment}' was deleted"):
        run.begin(CONFIG)
    run.finish("FAILED")  # the job has its own error to show
    with pytest.raises(ValueError, match="was deleted"):
        run.finish("FINISHED")
    unnamed = RunAddress(
        run_uri=str(tmp_path / "x"), tracking_uri=address.tracking_uri, experiment="e" * 600, run_name="r"
    )
    with pytest.raises(StoreRefusedError, match=address.tracking_uri):
        TrackedRun(unnamed).begin(CONFIG)
    named = TrackedRun(
        RunAddress(run_uri=str(tmp_path / "y"), tracking_uri=address.tracking_uri, experiment="named", run_name="r")
    )
    with pytest.raises(StoreRefusedError, match=r"refuses: .*waits in .*/y/mlflow_outbox/.*-json\.json"):
        named.log_json("../../outside", 1)
    assert outages(caplog) == []


def test_a_run_that_was_deleted_is_made_anew(address):
    run = TrackedRun(address)
    run.begin(CONFIG)
    first, identity = address.run_id(), address.identity()
    client(address.tracking_uri).delete_run(first)
    TrackedRun(address).begin(CONFIG)
    assert address.run_id() != first
    assert address.identity() != identity, "what was logged to the other is logged again"


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = MlflowServer(tmp_path)
    address = RunAddress(
        run_uri=str(tmp_path / "run"), tracking_uri=server.uri, experiment="e", run_name="r", tags={"preset": "demo"}
    )
    run = TrackedRun(address, first_retry_s=0.2)
    run.begin(CONFIG)
    try:
        server.start()
        wait_until(lambda: run.num_waiting == 0, 60)
        first = address.run_id()
        server.stop()
        log_all(run, tmp_path)
        assert run.num_waiting == 7
        server.start()
        wait_until(lambda: run.num_waiting == 0, 60)
        run.finish("FINISHED")
        found = contents(address, tmp_path)
        check_complete(found)
        assert found["id"] == first
    finally:
        server.stop()


def test_the_outbox_may_be_in_memory(address, gate, tmp_path):
    elsewhere = RunAddress(
        run_uri=f"memory://{tmp_path.name}", tracking_uri=gate.uri, experiment=address.experiment, run_name="r"
    )
    gate.shut()
    run = TrackedRun(elsewhere)
    run.log_metrics({"m": 1.0}, 4)
    assert Outbox(f"memory://{tmp_path.name}/mlflow_outbox").waiting()
    gate.open()
    assert histories(elsewhere, run.drain())["m"][0][:2] == (4, 1.0)
