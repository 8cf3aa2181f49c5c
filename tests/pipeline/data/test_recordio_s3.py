"""RecordIO packs on a real S3 server: written, read by ranges, and through a connection that fails."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import storage
from pipeline.data import recordio, recordio_writer
from pipeline.data.recordio_writer import write_insightface_pack
from pipeline.data.sources.base import SourceSpec
from pipeline.data.sources.recordio import RecordIOSource
from tests.pipeline.data.writers import MAGIC

pytest_plugins = ("tests.s3",)

NUM_IMAGES = 400


def faces() -> list[tuple[int, bytes]]:
    rng = np.random.default_rng(0)
    return [(label, MAGIC + rng.bytes(int(rng.integers(20_000, 40_000)))) for label in np.arange(NUM_IMAGES) // 7]


def images(uri: str) -> list[tuple[int, bytes]]:
    parts = RecordIOSource(SourceSpec(format="recordio", uri=uri)).parts(2_000_000)
    assert len(parts) > 4
    return [(int(sample.identity), sample.image) for part in parts for sample in part.samples()]


@pytest.mark.parametrize("index", [True, False])
def test_a_pack_is_written_and_read_in_parts(s3, index):
    folder = f"s3://faces/recordio-{index}"
    pack = write_insightface_pack(iter(faces()), folder, num_identities=NUM_IMAGES // 7 + 1)
    assert pack.num_bytes == storage.size(f"{folder}/train.rec") > storage.READ_BUFFER_BYTES
    if not index:
        storage.delete_file(f"{folder}/train.idx")
    assert images(folder) == faces()


def test_an_upload_that_is_interrupted_leaves_nothing(s3, monkeypatch):
    def interrupted(source, target, length):
        target.write(source.read(length))
        raise KeyboardInterrupt

    monkeypatch.setattr(recordio_writer.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_insightface_pack(iter(faces()), "s3://faces/interrupted", num_identities=NUM_IMAGES // 7 + 1)
    assert storage.list_files("s3://faces/interrupted") == []


def test_a_connection_that_fails_now_and_then_loses_and_doubles_no_image(s3_proxy, monkeypatch):
    folder = "s3://faces/faulty"
    write_insightface_pack(iter(faces()), folder, num_identities=NUM_IMAGES // 7 + 1)
    monkeypatch.setattr(recordio._WindowedFile, "WINDOW_BYTES", 1_000_000)
    for kind, after_bytes in (("status", 0), ("reset", 50_000), ("truncate", 50_000)):
        s3_proxy.inject(kind, after_bytes=after_bytes, times=2, match="train.rec", methods=["GET"])
    assert images(folder) == faces()
    assert sum(1 for request in s3_proxy.requests("GET") if " " in request) == 6
