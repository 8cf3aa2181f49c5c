"""No step is lost and none is stored twice, whatever a sink left behind: an event, or lines of metrics.jsonl alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking.metric_sink import MetricSink
from pipeline.tracking.outbox import Outbox, RunAddress, kind_of
from pipeline.tracking.step_metrics import read_records
from pipeline.tracking.store import client
from pipeline.tracking.tracked_run import TrackedRun

ROOT = Path(__file__).parents[3]
NAMES = ("loss", "lr", "epoch")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def address(store, tmp_path):
    return RunAddress(run_uri=str(tmp_path), tracking_uri=store, experiment="steps", run_name="r")


def line(step, loss=1.0):
    return {"step": step, "epoch": step // 4, "loss": loss, "lr": 0.1, "samples_digest": "x"}


def write_lines(address, lines):
    uri = f"{address.run_uri}/metrics.jsonl"
    Path(uri).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return uri


def steps(address, key="loss"):
    return [item.step for item in client(address.tracking_uri).get_metric_history(address.run_id(), key)]


def sink_of(address, uri=None):
    """As rank 0 has it; with an address of a dead server where ``uri`` says so."""
    return MetricSink(
        uri or address.tracking_uri, address.run_id, start_after=None, flush_seconds=0.05, outbox=address.outbox
    )


def put(sink, numbers, **more):
    for step in numbers:
        sink.put(step, {key: line(step)[key] for key in NAMES} | more)


def test_what_a_sink_could_not_send_the_next_one_sends_with_all_its_values(address, caplog):
    TrackedRun(address).begin({})
    with sink_of(address) as sink:
        put(sink, range(4), data_wait_s=0.5)
    cut_off = sink_of(address, NOWHERE)
    put(cut_off, range(4))  # of metrics.jsonl: the store may have them or not
    put(cut_off, range(4, 8), data_wait_s=0.5)
    assert cut_off.close() == 4 * 3 + 4 * 4
    assert [kind_of(name) for name in address.outbox.waiting()] == ["steps"]
    assert len(caplog.records) <= 1, "no warning but that of the outage: nothing is lost"
    with sink_of(address) as sink:
        put(sink, range(8))  # again of the file, without data_wait_s
        put(sink, range(6, 12), data_wait_s=0.25)  # the checkpoint was of step 6
    assert address.outbox.waiting() == []
    assert steps(address) == list(range(12))
    assert steps(address, "data_wait_s") == list(range(12))
    waits = client(address.tracking_uri).get_metric_history(address.run_id(), "data_wait_s")
    assert [item.value for item in waits] == [0.5] * 8 + [0.25] * 4, "the first attempt at a step counts"


def test_two_sinks_that_never_met_the_store(address):
    for attempt, numbers in enumerate((range(6), range(4, 9))):
        sink = sink_of(address, NOWHERE)
        put(sink, range(6) if attempt else ())  # metrics.jsonl
        put(sink, numbers, data_wait_s=0.5)
        sink.close()
    assert len(address.outbox.waiting()) == 2
    TrackedRun(address).drain()
    assert steps(address) == list(range(9))
    assert steps(address, "data_wait_s") == list(range(9))


KILLED = """
import sys, time
from pipeline.tracking.metric_sink import MetricSink
from pipeline.tracking.outbox import RunAddress
run = RunAddress(run_uri=sys.argv[1], tracking_uri=sys.argv[2], experiment="steps", run_name="r")
sink = MetricSink(run.tracking_uri, run.run_id, start_after=None, flush_seconds=0.05, outbox=run.outbox)
for step in range(5):
    sink.put(step, {"loss": 1.0, "lr": 0.1, "epoch": step // 4})
while sink.num_pending:
    time.sleep(0.02)
sink._flush_seconds = 1e9  # from now on in memory alone
time.sleep(0.2)
sink.put(5, {"loss": 1.0})
print("ready", flush=True)
time.sleep(600)
"""


def test_the_last_steps_of_a_worker_that_was_killed_come_from_the_file(address):
    run = TrackedRun(address)
    run.begin({})
    command = [sys.executable, "-c", KILLED, address.run_uri, address.tracking_uri]
    worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with run.steps_are_the_workers():
        assert worker.stdout.readline().strip() == "ready"
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    assert steps(address)[:5] == list(range(5))
    uri = write_lines(address, [line(step) for step in range(2500)])
    run.log_steps_of(uri, NAMES)
    run.log_steps_of(uri, NAMES)
    assert run.num_waiting == 0
    for key in NAMES:
        assert steps(address, key) == list(range(2500))


def test_a_last_step_without_a_loss_is_not_sent_twice(address):
    run = TrackedRun(address)
    uri = write_lines(address, [line(0), line(1), line(2, math.nan)])
    run.log_steps_of(uri, NAMES)
    run.log_steps_of(uri, NAMES)
    assert (steps(address), steps(address, "lr")) == ([0, 1], [0, 1, 2])


def test_while_workers_train_only_they_send_steps(address):
    address.outbox.add("step_file", {"uri": write_lines(address, [line(0)]), "names": list(NAMES)})
    sink = sink_of(address, NOWHERE)
    put(sink, range(3), data_wait_s=0.5)
    sink.close()
    run = TrackedRun(address)
    with run.steps_are_the_workers():
        run.log_json("report", 1)
        assert [kind_of(name) for name in address.outbox.waiting()] == ["steps"], "the file was of an earlier attempt"
        assert steps(address) == []
    run.log_steps_of(write_lines(address, [line(step) for step in range(5)]), NAMES)
    assert steps(address) == list(range(5))
    assert steps(address, "data_wait_s") == list(range(3)), "the sink's were first"


def test_a_sink_waits_for_the_run_to_be_made(address):
    with sink_of(address) as sink:
        put(sink, range(3))
        TrackedRun(address).begin({})
    assert sink.num_pending == 0
    assert steps(address) == [0, 1, 2]


def test_putting_costs_microseconds_while_the_store_is_away(address):
    import time

    sink = sink_of(address, NOWHERE)
    started = time.perf_counter()
    put(sink, range(5000))
    assert (time.perf_counter() - started) / 5000 < 1e-4
    assert sink.close() == 15000
    (name,) = address.outbox.waiting()
    assert len(Outbox(address.outbox.uri).read(name).content["records"]) == 5000


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(line(0)) + "\n" + json.dumps(line(1))[:20])
    (record,) = read_records(str(tmp_path / "m.jsonl"), NAMES, 77)
    assert record == (0, 77, {"loss": 1.0, "lr": 0.1, "epoch": 0.0})
    assert read_records(str(tmp_path / "none.jsonl"), NAMES, 77) == []
