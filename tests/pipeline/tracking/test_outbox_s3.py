"""The outbox in an object store: what one process leaves there, another sends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pipeline.tracking.outbox import RunAddress
from pipeline.tracking.store import client
from pipeline.tracking.tracked_run import TrackedRun

pytest_plugins = ("tests.s3",)

LEAVES = """
import sys
from pipeline.tracking.outbox import RunAddress
from pipeline.tracking.tracked_run import TrackedRun
run = TrackedRun(RunAddress(run_uri=sys.argv[1], tracking_uri=sys.argv[2], experiment="s3", run_name="r"))
run.begin({"seed": 3})
run.log_metrics({"eval/accuracy": 0.75}, 9)
run.finish("FINISHED")
"""


def test_another_machine_sends_what_a_run_left_in_a_bucket(s3, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"s3://faces/{tmp_path.name}/run"
    command = [sys.executable, "-c", LEAVES, uri, "http://127.0.0.1:9"]  # nothing listens there
    found = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert found.stderr.count("the run goes on") == 1
    assert f"{uri}/mlflow_outbox" in found.stderr
    run = TrackedRun(RunAddress(run_uri=uri, tracking_uri=store, experiment="s3", run_name="r"))
    assert run.num_waiting == 4
    data = client(store).get_run(run.drain())
    assert run.num_waiting == 0
    assert (data.info.status, data.data.params, data.data.metrics) == (
        "FINISHED",
        {"seed": "3"},
        {"eval/accuracy": 0.75},
    )
    assert json.loads(Path(client(store).download_artifacts(data.info.run_id, "config.json")).read_text()) == {
        "seed": 3
    }
