"""A packed data set back to an InsightFace pack: every image once, by identity, in bounded memory."""

from __future__ import annotations

import collections
import hashlib
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.data import export
from pipeline.data.export import export_recordio
from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.recordio import RecordIOReader, image_keys
from pipeline.data.shards import ShardError
from pipeline.packing_cli import export_job
from tests.conftest import ROOT
from tests.pipeline.data.writers import jpeg, label_of, packed_set, shard_info, tar_bytes


@pytest.fixture
def packed(tmp_path) -> str:
    return packed_set(tmp_path / "packed", [7, 7, 7, 2]).uri


@pytest.fixture
def spill(tmp_path, monkeypatch) -> Path:
    """The temporary folder, to see that nothing stays in it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def images_of(uri: str) -> list[tuple[int, bytes]]:
    reader = RecordIOReader(storage.join(uri, "train.rec"))
    return [(int(reader[key].labels[0]), reader[key].payload) for key in image_keys(reader)]


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_every_image_once_by_identity_in_the_order_of_the_set(packed, tmp_path, spill, num_buckets, place):
    output = str(tmp_path / "rec") if place == "local" else f"memory://export-{num_buckets}"
    num_bytes = sum(shard.num_bytes for shard in Manifest.load(packed).shards)
    pack = export_recordio(packed, output, bucket_bytes=-(-num_bytes // num_buckets))
    assert images_of(output) == [(label, jpeg(i)) for label in range(5) for i in range(23) if label_of(i) == label]
    assert (pack.num_images, pack.num_identities) == (23, 5)
    reader = RecordIOReader(storage.join(output, "train.rec"))
    counts = collections.Counter(label_of(i) for i in range(23))
    assert [reader[24 + c].labels[1] - reader[24 + c].labels[0] for c in range(5)] == [counts[c] for c in range(5)]
    assert storage.read_bytes(storage.join(output, "property")) == b"5,112,112\n"
    assert list(spill.iterdir()) == []


def test_buckets_change_nothing_in_the_bytes(packed, tmp_path):
    sums = set()
    for number, bucket_bytes in enumerate((1, 20_000, 1 << 30)):
        export_recordio(packed, str(tmp_path / str(number)), bucket_bytes=bucket_bytes)
        files = sorted((tmp_path / str(number)).iterdir())
        assert [file.name for file in files] == ["property", "train.idx", "train.rec"]
        sums.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
    assert len(sums) == 1


def test_without_a_header_there_are_images_alone(packed, tmp_path):
    export_recordio(packed, str(tmp_path / "rec"), header=False)
    assert RecordIOReader(str(tmp_path / "rec" / "train.rec")).keys == list(range(23))


def test_an_identity_without_images_keeps_its_number(tmp_path):
    data = tar_bytes([("0", jpeg(0), b"3"), ("1", jpeg(1), b"1")])
    storage.write_bytes(str(tmp_path / "packed" / "shard.tar"), data)
    Manifest(
        uri=storage.normalise(tmp_path / "packed"),
        shards=(shard_info("shard.tar", data, 2),),
        num_classes=5,
        image_side=112,
        seed=0,
        source={},
        identities=tuple("abcde"),
    ).save()
    pack = export_recordio(str(tmp_path / "packed"), str(tmp_path / "rec"))
    assert images_of(pack.uri) == [(1, jpeg(1)), (3, jpeg(0))]
    assert pack.num_identities == 5


def test_a_damaged_shard_is_named_and_the_older_pack_stays(packed, tmp_path, spill):
    output = tmp_path / "rec"
    export_recordio(packed, str(output))
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    shard = storage.local_path(packed) / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"shard-000002\.tar: corrupt"):
        export_recordio(packed, str(output))
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    with pytest.raises(ShardError, match=r"shard-000002\.tar"):
        export_recordio(packed, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert list(spill.iterdir()) == []


def test_no_data_set_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ManifestError, match=r"none/manifest\.json: there is no manifest here"):
        export_recordio(str(tmp_path / "none"), str(tmp_path / "rec"))
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_temporary_folder_is_told_before_anything_is_read(packed, tmp_path, spill, monkeypatch):
    usage = export.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(storage.StorageError, match=r"tmp: 1,000 bytes are free, up to [\d,]+ are needed .*TMPDIR"):
        export_recordio(packed, str(tmp_path / "rec"))


def test_progress_counts_shards_then_images(packed, tmp_path):
    told: list[tuple[str, int, int]] = []
    export_recordio(packed, str(tmp_path / "rec"), on_progress=lambda *step: told.append(step))
    assert told == [*(("read", n, 4) for n in range(5)), ("write", 0, 23), ("write", 23, 23)]


def test_memory_holds_a_shard_and_no_identity_however_large(tmp_path):
    rng, shards, shard_bytes, classes = np.random.default_rng(0), [], 1 << 20, 3
    for number in range(24):  # nearly all images are of one identity
        samples = [(str(i), rng.bytes(shard_bytes // 8), b"1" if i else b"2") for i in range(8)]
        data = tar_bytes(samples)
        storage.write_bytes(str(tmp_path / "packed" / f"{number}.tar"), data)
        shards.append(shard_info(f"{number}.tar", data, 8))
    Manifest(
        uri=storage.normalise(tmp_path / "packed"),
        shards=tuple(shards),
        num_classes=classes,
        image_side=112,
        seed=0,
        source={},
        identities=tuple("abc"),
    ).save()
    tracemalloc.start()
    try:
        export_recordio(str(tmp_path / "packed"), str(tmp_path / "rec"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * shard_bytes + 2 * 1024 * 1024  # of 24 shards
    assert len(images_of(str(tmp_path / "rec"))) == 24 * 8


# ---- the job -----------------------------------------------------------------------------------------------------


def test_the_job_writes_a_pack_and_says_where(packed, tmp_path, capsys):
    output = str(tmp_path / "rec")
    assert export_job(["--data", packed, "--output", output]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("read: 4/4 shards", "write: 23/23 images", "images │ 23", "people │ 5"):
        assert words in shown
    assert len(images_of(output)) == 23


def test_a_mistake_is_one_line_and_an_exit_code(tmp_path, capsys):
    assert export_job(["--data", str(tmp_path / "none"), "--output", str(tmp_path / "rec")]) == 1
    assert "there is no manifest here" in capsys.readouterr().err


def test_the_job_is_executable_and_has_help(capsys):
    assert os.access(ROOT / "jobs" / "export_recordio.py", os.X_OK)
    with pytest.raises(SystemExit) as exit_:
        export_job(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--data" in shown
    assert "InsightFace pack" in shown
