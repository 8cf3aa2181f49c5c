"""The short form of the faults, in every test run: one job of which a worker is killed, and then all of it."""

from __future__ import annotations

import time

import psutil
import pytest

from pipeline.model_store import load_model
from pipeline.storage import join
from pipeline.tracking.registry import champion
from pipeline.training.metrics_log import read_metrics
from tests.chaos.job import SAVE_EVERY, Job, data_of, judge, kill
from tests.chaos.test_chaos import WORKER

pytestmark = pytest.mark.ray


def test_a_worker_and_the_driver_are_killed_and_no_sample_is_lost_or_doubled(tmp_path):
    job = Job(tmp_path, "--retries", "2", "--tracking.model-name", "hurt", epochs=20)
    job.start()
    moments, before = [], []
    try:
        for steps, victim in ((8, WORKER), (30, "driver")):
            job.wait_for_steps(steps)
            (driver,) = psutil.Process(job.process.pid).children()
            before += [(line["step"], line["loss"]) for line in read_metrics(job.run_uri)]
            moments.append(kill(driver if victim == "driver" else job.processes(victim)[0]))
            time.sleep(0.5)
        assert job.finish() == 0, job.log()
    finally:
        job.end()
    verdict = judge("both", job, moments, data_of(job))
    assert verdict.survived == 2
    assert verdict.wrong_samples == 0
    assert max(verdict.repeated) <= 3 * SAVE_EVERY
    # Steps that were done again gave the same to the last bit: the state came back whole.
    losses = {line["step"]: line["loss"] for line in read_metrics(job.run_uri)}
    assert before
    assert all(losses[step] == loss for step, loss in before)
    assert champion(f"sqlite:///{tmp_path / 'mlflow.db'}", "hurt").version == 1
    assert load_model(join(job.run_uri, "model"))
