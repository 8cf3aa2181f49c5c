"""The memory that packing takes: as `PackSettings.memory_mib` says, however large the source is."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import simplejpeg

from pipeline import storage
from pipeline.data.checks import PackChecks
from pipeline.data.pack import PackSettings, pack
from pipeline.data.recordio_writer import write_insightface_pack
from pipeline.data.sources import SourceSpec

MIB = 1 << 20
SOURCE_BYTES = 2 << 30
MEMORY_MIB = 64
WORKER_MIB = 250  # of a Ray worker that has loaded the code and done nothing
TIMES = 4  # as the docstring of PackSettings.memory_mib says


def varied_jpegs() -> list[bytes]:
    """Of 5 to 12 KB, as aligned faces are."""
    rng, found = np.random.default_rng(0), []
    for number in range(64):
        coarse = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        found.append(bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(coarse), 60 + number % 36, "RGB", "420")))
    return found


def faces(num_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Images that differ by a comment in their headers, until there are so many bytes."""
    jpegs, written, number = varied_jpegs(), 0, 0
    while written < num_bytes:
        plain = jpegs[number % len(jpegs)]
        image = plain[:2] + struct.pack(">HHQ", 0xFFFE, 10, number) + plain[2:]
        yield number // 40, image
        written, number = written + len(image), number + 1


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """The largest unique memory (USS) of each Ray worker of this machine's own cluster, in bytes, by process."""
    found: dict[str, int] = {}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    name = process.name()
                    if name.startswith("ray::") and not name.endswith("Agent"):
                        found[str(process.pid)] = max(found.get(str(process.pid), 0), process.memory_full_info().uss)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_packing_two_gigabytes_takes_the_memory_that_is_asked_for(tmp_path, ray_cluster, duplicates):
    source = str(tmp_path / "source")
    write_insightface_pack(faces(SOURCE_BYTES), source, num_identities=1 << 20, header=False)
    num_bytes = storage.size(f"{source}/train.rec")
    assert num_bytes > SOURCE_BYTES
    started = time.perf_counter()
    with peaks() as peak:
        manifest = pack(
            SourceSpec(format="recordio", uri=source),
            str(tmp_path / "out"),
            PackSettings(memory_mib=MEMORY_MIB),
            PackChecks(decode=False, duplicates=duplicates),
        )
    took = time.perf_counter() - started
    figures = sorted(value // MIB for value in peak.values())
    print(
        f"\n{manifest.num_samples} images, {num_bytes >> 20} MiB in {took:.0f} s: {num_bytes / took / 1e6:.0f} MB/s, "
        f"{manifest.num_samples / took:.0f} images/s; peak MiB of each worker: {figures}"
    )
    assert len(manifest.shards) > 50
    assert max(figures) > MEMORY_MIB  # the workers were seen at work
    assert max(figures) < TIMES * MEMORY_MIB + WORKER_MIB
