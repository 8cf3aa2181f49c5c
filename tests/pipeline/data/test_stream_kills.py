"""Reading that is killed with kill -9 at random points and resumed: the sequence of samples stays exact."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.data.stream_plan import StreamConfig, StreamPlan
from tests.conftest import ROOT
from tests.pipeline.data.writers import packed_set

TRIALS = 20
SIZES, SEED, BATCH, EPOCHS = (200,) * 10, 5, 40, 40

# Reads from the first step that is not in the file to the end of the run, and notes each batch.
READER = """
import hashlib, sys, time
from pathlib import Path
from pipeline.runtime import ray_session
from pipeline.data.stream import BatchAssembler, Share, rank_dataset
from tests.pipeline.data.test_stream_kills import stream_plan

noted, plan = Path(sys.argv[2]), stream_plan(sys.argv[1])
start = len(noted.read_text().splitlines()) if noted.exists() else 0
with ray_session(), noted.open("a") as file:
    blocks = rank_dataset(plan, 1, 0, start, Share(2.0, 256 << 20)).iter_batches(batch_size=None, batch_format="numpy")
    for batch in BatchAssembler(iter(blocks), plan.batch):
        pixels = hashlib.sha256(batch.images.tobytes()).hexdigest()
        file.write(f"{' '.join(map(str, batch.indices))} {pixels}\\n")
        file.flush()
        time.sleep(0.005)
"""


def stream_plan(uri: str) -> StreamPlan:
    from pipeline.data.manifest import Manifest

    data = Manifest.load(uri)
    config = StreamConfig(num_streams=4, block_rows=80)
    return StreamPlan(data=data, config=config, seed=SEED, batch=BATCH, total_steps=EPOCHS * data.num_samples // BATCH)


def read_on(uri: str, noted: str) -> subprocess.Popen:
    """A process of a group of its own: Ray's processes are in it too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", READER, uri, noted],
        env=environment,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random_points_every_sample_comes_in_its_place(tmp_path):
    """A killed process may leave half a line: what it had not finished noting, it reads again."""
    manifest = packed_set(tmp_path / "set", SIZES)
    plan, noted = stream_plan(manifest.uri), tmp_path / "noted"
    rng, kills = np.random.default_rng(0), []
    while len(kills) < TRIALS:
        process = read_on(manifest.uri, str(noted))
        deadline = time.monotonic() + 60
        before = len(noted.read_bytes().splitlines()) if noted.exists() else 0
        if rng.random() < 0.8:  # else also before its first batch
            while process.poll() is None and time.monotonic() < deadline and _lines(noted) == before:
                time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.6)))
        if process.poll() is not None:
            break
        kill(process)
        _drop_half_a_line(noted)
        kills.append(_lines(noted))
    finished = read_on(manifest.uri, str(noted))
    assert finished.wait(timeout=300) == 0
    print("steps read when killed:", kills)
    assert len(kills) == TRIALS
    lines = noted.read_text().splitlines()
    assert len(lines) == plan.total_steps
    samples = plan.samples(1, 0, range(plan.total_steps))
    expected = (manifest.offsets[samples.shard] + samples.row).reshape(plan.total_steps, BATCH)
    np.testing.assert_array_equal(np.array([line.split()[:-1] for line in lines], np.int64), expected)
    assert hashlib.sha256(" ".join(line.split()[-1] for line in lines).encode()).hexdigest() == _pixels(plan)


def _pixels(plan: StreamPlan) -> str:
    """The digest of all batches' pixels, decoded and augmented here, without Ray."""
    from pipeline.data.decoding import Decoder
    from pipeline.data.reading import PlanReader

    reader, decoder = PlanReader(plan, 1, 0, 0), Decoder(plan)
    digests = []
    for table in reader({"chunk": np.arange(plan.num_chunks(1, 0))}):
        images = decoder(table)["image"]
        digests += [hashlib.sha256(images[i : i + BATCH].tobytes()).hexdigest() for i in range(0, len(images), BATCH)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _drop_half_a_line(path) -> None:
    if path.exists():
        data = path.read_bytes()
        path.write_bytes(data[: data.rfind(b"\n") + 1])
