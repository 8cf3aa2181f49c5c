"""Real packing jobs, ended by kill -9 at random points: what comes out in the end is what would have come out."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg

from pipeline.data.checks import PackChecks
from pipeline.data.manifest import Manifest
from pipeline.data.pack import PackSettings, pack
from pipeline.data.shards import read_shard
from pipeline.data.sources import SourceSpec
from tests.pipeline.data.packing import assert_complete, in_process, recordio, shard_bytes

ROOT = Path(__file__).resolve().parents[3]
NUM_IMAGES = 700
SETTINGS = PackSettings(samples_per_shard=16, memory_mib=1)
CHECKS = PackChecks(duplicates="drop")
TIMEOUT_S = 240.0
NUM_EVENTS = 62  # 18 parts, 43 shards, the manifest


@dataclass(frozen=True)
class Killed:
    """What a kill left: finished parts and shards, files of shards, the manifest; and how the job ended."""

    parts: int
    noted: int
    shards: int
    finished: bool
    returncode: int


def noise(number: int) -> bytes:
    """A JPEG of about 20 KB, so that a few hundred are many parts."""
    pixels = np.random.default_rng((9, number)).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, 92, "RGB", "444"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    # Every 30th image is a copy of another person's.
    images = {i: noise(i // 2 if i % 30 == 0 else i) for i in range(NUM_IMAGES)}
    return recordio(tmp_path_factory.mktemp("kills"), [i // 9 for i in range(NUM_IMAGES)], images)


def command(source: SourceSpec, output: Path) -> list[str]:
    options = {"source": source.uri, "output": str(output), "samples-per-shard": "16", "memory-mib": "1"}
    options["checks.duplicates"] = "drop"
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "jobs" / "pack_dataset.py"), *given]


def of_session(session: int) -> dict[psutil.Process, str]:
    """All living processes of a session by name: Ray gives its workers groups of their own, but no sessions."""
    found = {}
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = process.name()
    return found


def kill_session(job: subprocess.Popen[bytes], grace_s: float) -> list[str]:
    """SIGKILL to the driver, and to all of Ray's processes some time later; gives who they were.

    By itself Ray ends its processes within seconds to a minute of the driver's death; until then tasks go on writing.
    """
    names = list(of_session(job.pid).values())
    if job.poll() is None:  # until it is waited for, its number is nobody else's
        if grace_s:
            os.kill(job.pid, signal.SIGKILL)
            time.sleep(grace_s)
        os.killpg(job.pid, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT_S
    while left := of_session(job.pid):
        assert time.monotonic() < deadline, f"still alive: {left}"
        for process in left:  # workers have process groups of their own
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)
    job.wait()
    return names


def events(output: Path) -> int:
    """How far a packing is: parts and shards that are finished, and the manifest."""
    staging = output / ".packing"
    done = sum(len(list(staging.glob(f"*/{folder}/*.json"))) for folder in ("parts", "shards"))
    return NUM_EVENTS if (output / "manifest.json").exists() else done


def lock_time(output: Path) -> int:
    """When a job last began to pack there."""
    lock = output / ".lock"
    return lock.stat().st_mtime_ns if lock.exists() else 0


def run_and_kill(source: SourceSpec, output: Path, target: int, delay_s: float, grace_s: float) -> Killed:
    """Start the job and kill it a moment after it has come as far as ``target``."""
    before = lock_time(output)
    with subprocess.Popen(
        command(source, output), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while job.poll() is None and (lock_time(output) == before or events(output) < target):
                assert time.monotonic() < deadline, f"the job did not come to {target} of {NUM_EVENTS}"
                time.sleep(0.002)
            time.sleep(delay_s)
        finally:
            names = kill_session(job, grace_s)
    assert job.returncode in (0, -signal.SIGKILL), job.returncode
    if job.returncode:
        assert {"raylet", "gcs_server"} <= set(names), names
    staging = output / ".packing"
    return Killed(
        parts=len(list(staging.glob("*/parts/*.json"))),
        noted=len(list(staging.glob("*/shards/*.json"))),
        shards=len(list(output.glob("shard-*.tar"))),
        finished=(output / "manifest.json").exists(),
        returncode=job.returncode,
    )


def finished_shards(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the shards that are noted as finished."""
    noted = [path.name.removesuffix(".json") for path in (output / ".packing").glob("*/shards/*.json")]
    return {name: ((output / name).stat().st_ino, (output / name).stat().st_mtime_ns) for name in noted}


def resumed(source: SourceSpec, killed: Path, copy: Path, reference: Manifest) -> None:
    """Pack to the end over a copy of what a kill left, in the session's own cluster, and compare."""
    shutil.copytree(killed, copy)
    # Without a plan (a kill while the staging folder was deleted) it starts over.
    before = finished_shards(copy) if (copy / ".packing" / "plan.json").exists() else {}
    manifest = pack(source, str(copy), SETTINGS, CHECKS)
    compare(manifest, reference)
    after = {name: ((copy / name).stat().st_ino, (copy / name).stat().st_mtime_ns) for name in before}
    assert after == before, "finished shards were written again"
    shutil.rmtree(copy)


def compare(manifest: Manifest, reference: Manifest) -> None:
    assert shard_bytes(manifest) == shard_bytes(reference)
    assert manifest.fingerprint == reference.fingerprint
    assert_complete(manifest)


@pytest.fixture(scope="module")
def reference(source: SourceSpec, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What an uninterrupted packing makes."""
    with in_process(min_task_bytes=1 << 20):
        manifest = pack(source, str(tmp_path_factory.mktemp("reference")), SETTINGS, CHECKS)
    assert_complete(manifest)
    return manifest


def kill_at_random(source: SourceSpec, output: Path, rng: random.Random, *, driver_first: bool) -> Killed:
    target = rng.randint(min(events(output), NUM_EVENTS), NUM_EVENTS)
    delay_s = rng.uniform(0.0, 0.2)
    grace_s = rng.uniform(0.05, 0.5) if driver_first else 0.0
    killed = run_and_kill(source, output, target, delay_s, grace_s)
    print(f"\nat event {target} and {delay_s * 1000:.0f} ms, Ray {grace_s * 1000:.0f} ms later: {killed}", end="")
    if not killed.finished:
        assert killed.noted <= killed.shards
    elif killed.shards:
        manifest = Manifest.load(str(output))
        for number, info in enumerate(manifest.shards):
            read_shard(manifest.shard_uri(number), info, manifest.num_classes)
    return killed


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_packing_goes_on_to_the_same_bytes(tmp_path, source, reference, ray_cluster):
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    kill_at_random(source, tmp_path / "out", random.Random(seed), driver_first=False)
    resumed(source, tmp_path / "out", tmp_path / "copy", reference)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_packings_killed_twenty_times_go_on_to_the_same_bytes(tmp_path, source, reference, ray_cluster):
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    rng, output, left = random.Random(seed), tmp_path / "out", []
    for trial in range(20):
        left.append(kill_at_random(source, output, rng, driver_first=trial % 2 == 1))
        resumed(source, output, tmp_path / "copy", reference)
        if left[-1].finished or rng.random() < 0.5:  # else the next kill hits a packing that goes on
            shutil.rmtree(output)
    assert sum(killed.returncode < 0 for killed in left) >= 15
    assert sum(not killed.finished for killed in left) >= 10
    # The command itself goes on to the end too.
    done = subprocess.run(command(source, output), capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr
    compare(Manifest.load(str(output)), reference)
