"""Faults against whole training jobs: real kills, a real local Ray; the verdict is what the run's lines say.

``make test-chaos`` runs all of it and writes the table of docs/faults.md to ``outputs/chaos.md``.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline import storage
from pipeline.training.commits import MARKER, committed_steps, latest_checkpoint, latest_step
from pipeline.training.metrics_log import read_metrics
from tests.chaos.job import SAVE_EVERY, Job, Verdict, data_of, judge, kill
from tests.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[float]:
    """The losses of a run that nothing happened to; long enough for all others."""
    job = Job(tmp_path_factory.mktemp("reference"), epochs=60)
    job.start()
    try:
        assert job.finish() == 0, job.log()
    finally:
        job.end()
    return [line["loss"] for line in read_metrics(job.run_uri)]


@pytest.fixture
def start(tmp_path):
    """Starts jobs that do not outlive the test."""
    jobs: list[Job] = []

    def begin(*flags: str, epochs: int, folder: Path | None = None, **named) -> Job:
        job = Job(folder or tmp_path, *flags, epochs=epochs, **named)
        jobs.append(job)
        job.start()
        return job

    yield begin
    for job in jobs:
        job.end()


def _check(verdict: Verdict, table, *, repeats_at_most: int = 3 * SAVE_EVERY) -> None:
    table(verdict)
    assert verdict.survived == verdict.tried
    assert verdict.wrong_samples == 0
    # A checkpoint is under way while steps go on, and its marker may come late on a busy machine.
    assert max(verdict.repeated) <= repeats_at_most


def _is_reference(job: Job, reference: list[float]) -> None:
    """To the last bit what the undisturbed run was, as far as that schedule is the same: equal lengths only."""
    losses = [line["loss"] for line in read_metrics(job.run_uri)]
    assert losses == reference[: len(losses)]


@pytest.mark.timeout(1200)  # twenty restarts and the reference
def test_kill_of_a_random_worker(start, table, reference):
    """Twenty times over one run."""
    job = start("--workers.max-failures", "-1", epochs=60)
    draw, moments = random.Random(0), []
    job.wait_for_steps(3)
    for _ in range(20):
        workers = job.processes(WORKER)
        moments.append(kill(draw.choice(workers)))
        _wait_for_others(job, workers)
        time.sleep(draw.uniform(0.0, 4.0))
    assert job.finish() == 0, job.log()
    _check(judge("kill -9 of a random worker", job, moments, data_of(job)), table)
    _is_reference(job, reference)


def _wait_for_others(job: Job, workers: list[psutil.Process]) -> None:
    """Until a group of other processes has done a step."""
    before = {process.pid for process in workers}

    def are_others() -> bool:
        found = {process.pid for process in job.processes(WORKER)}
        return len(found) == len(before) and not found & before

    job.wait_until(are_others)
    moment = time.monotonic()
    job.wait_until(lambda: job.seen.at[-1][0] > moment and len(job.seen.at) > 1 and _rises(job))


def _rises(job: Job) -> bool:
    return job.seen.at[-1][1] > job.seen.at[-2][1]


def test_kill_of_the_controller(start, table, reference):
    job = start(epochs=60)
    moments = []
    for steps in (10, 60, 120):
        job.wait_for_steps(steps)
        moments.append(kill(job.processes(CONTROLLER)[0]))
        time.sleep(1)
    assert job.finish() == 0, job.log()
    _check(judge("kill -9 of Ray Train's controller", job, moments, data_of(job)), table)
    _is_reference(job, reference)


def test_kill_of_the_driver(start, table, reference):
    """With its whole Ray: --retries starts the same command again."""
    job = start("--retries", "5", epochs=60)
    moments = []
    for steps in (10, 60, 120):
        job.wait_for_steps(steps)
        (driver,) = [
            child for child in psutil.Process(job.process.pid).children() if "train_demo" in str(child.cmdline())
        ]
        moments.append(kill(driver))
        time.sleep(1)
    assert job.finish(500) == 0, job.log()
    _check(judge("kill -9 of the driver, with --retries", job, moments, data_of(job)), table)
    _is_reference(job, reference)


def test_sigterm_of_the_job(start, table, reference):
    """A preempted pod, `ray job stop`: a checkpoint within the grace time, and nothing is done twice."""
    job = start(epochs=60)
    moments, graces = [], []
    for steps in (13, 61, 118):
        job.wait_for_steps(steps)
        moments.append(time.monotonic())
        os.kill(job.process.pid, signal.SIGTERM)
        job.wait_until(lambda: latest_step(job.run_uri) % SAVE_EVERY != 0 or job.process.poll() is not None, 60)
        graces.append(time.monotonic() - moments[-1])
        assert job.finish(60) == 143, job.log()
        assert latest_step(job.run_uri) == len(read_metrics(job.run_uri))
        job.start()
    assert job.finish() == 0, job.log()
    verdict = judge(f"SIGTERM (checkpoint after {max(graces):.1f} s at most)", job, moments, data_of(job))
    _check(verdict, table, repeats_at_most=0)
    _is_reference(job, reference)


def test_kill_in_the_middle_of_a_checkpoint(start, table, reference):
    job = start("--workers.max-failures", "-1", epochs=60)
    folder = job.folder / job.name / "checkpoints"
    moments = []
    for steps in (7, 32, 61, 88, 118):
        job.wait_for_steps(steps)
        job.wait_until(lambda: any(not (path / MARKER).exists() for path in folder.glob("step_*")))
        moments.append(kill(job.processes(WORKER)[-1]))
        time.sleep(1)
    assert job.finish(500) == 0, job.log()
    _check(judge("kill -9 while a checkpoint is written", job, moments, data_of(job)), table, repeats_at_most=20)
    _is_reference(job, reference)


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_checkpoint(start, table, reference, damage):
    job = start(epochs=60)
    job.wait_for_steps(33)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.finish(60) == 143, job.log()
    newest = storage.local_path(latest_checkpoint(job.run_uri).uri)
    path = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    moments = [time.monotonic()]
    job.start()
    assert job.finish() == 0, job.log()
    what = {"cut": "newest checkpoint cut to half", "bit": "a bit of the newest checkpoint changed"}[damage]
    _check(judge(what, job, moments, data_of(job)), table)
    _is_reference(job, reference)


def test_a_full_disk(start, table, reference, tmp_path):
    """A file system of its own, filled to the last block in mid-run and emptied again."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(small)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        job = start(epochs=60, folder=small)
        job.wait_for_steps(23)
        moments = [time.monotonic()]
        filler = (small / "filler").open("wb", buffering=0)
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            filler.close()
        before = committed_steps(job.run_uri)
        # Lines wait in memory: how far it gets is seen in its log.
        time.sleep(12)
        assert job.process.poll() is None, job.log()
        assert committed_steps(job.run_uri) == before
        (small / "filler").unlink()
        job.wait_until(lambda: max(committed_steps(job.run_uri)) > max(before))
        assert job.finish() == 0, job.log()
        assert "the checkpoint is not written, training goes on" in job._log.read_text()
        _check(judge("disk full for 12 s", job, moments, data_of(job)), table, repeats_at_most=0)
        _is_reference(job, reference)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_rank_that_hangs(start, table, reference):
    """SIGSTOP: it neither dies nor gets on; the run is told which rank it is, and starts again."""
    job = start("--workers.hang-timeout-s", "20", "--workers.storage-patience-s", "15", epochs=60)
    job.wait_for_steps(33)
    victim = job.processes(WORKER)[-1]
    moments = [time.monotonic()]
    os.kill(victim.pid, signal.SIGSTOP)
    assert job.finish() == 0, job.log()
    log = job._log.read_text()
    assert "the run hangs" in log
    assert f"(pid {victim.pid} on" in log
    assert "not heard of (stopped, or its node is lost)" in log
    _check(judge("SIGSTOP of a worker (hang_timeout_s 20)", job, moments, data_of(job)), table)
    _is_reference(job, reference)


def test_restarts_that_are_used_up_are_told_in_one_line(start):
    job = start("--workers.max-failures", "0", epochs=60)
    job.wait_for_steps(12)
    kill(job.processes(WORKER)[0])
    assert job.finish(120) == 75, job.log()
    end = job.log().rsplit("error:", 1)[1]
    assert "the workers died more often than workers.max_failures=0 allows; the same command goes on from step" in end
    assert "Traceback" not in end
    assert latest_step(job.run_uri) > 0


def test_ctrl_c_saves_and_a_second_one_ends_at_once(start):
    job = start(epochs=60)
    job.wait_for_steps(12)
    job.process.send_signal(signal.SIGINT)
    assert job.finish(60) == 130, job.log()
    assert latest_step(job.run_uri) == len(read_metrics(job.run_uri))
    assert ROOT.exists()
