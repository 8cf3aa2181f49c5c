"""RecordIO files as mxnet writes them, byte for byte, and nothing under a name that is not whole."""

from __future__ import annotations

import filecmp
import struct
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import recordio_format, recordio_writer
from pipeline.data.recordio import Record, RecordIOError, RecordIOReader, image_keys, read_records
from pipeline.data.recordio_format import encode_record
from pipeline.data.recordio_writer import RecordIOWriter, write_insightface_pack
from tests.pipeline.data.writers import MAGIC, record_body, record_bytes

PIECES = st.lists(
    st.one_of(st.just(MAGIC), st.binary(max_size=9), st.just(MAGIC[:2]), st.just(MAGIC[2:])), max_size=8
).map(b"".join)
RECORDS = st.builds(
    Record,
    labels=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=3).map(tuple),
    payload=PIECES,
    id=st.sampled_from([0, 5, 2**64 - 1, int.from_bytes(MAGIC * 2, "little")]),
    id2=st.integers(0, 2**64 - 1),
    is_array=st.booleans(),
)


SAMPLES = [(0, b"a"), (0, b"b"), (2, MAGIC * 9), (3, b"d"), (3, b"e"), (3, b"f")]


def face(key: int, label: float = 0.0) -> Record:
    return Record(labels=(label,), payload=b"image %d" % key, id=key)


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path) -> str:
    return storage.normalise(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def names(folder: str) -> list[str]:
    """Hidden files too: those of an unfinished writer."""
    return sorted(info.uri.removeprefix(f"{folder}/") for info in storage.list_files(folder))


# ---- the format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["header_first", "header_last", "no_header"])
def test_mxnets_files_written_again_are_equal_to_the_byte(shared_data, tmp_path, name):
    reader = RecordIOReader(str(shared_data / "recordio_golden" / f"{name}.rec"))
    with RecordIOWriter(str(tmp_path / f"{name}.rec")) as writer:
        for key in reader.keys:
            writer.write(reader[key], key)
    for extension in ("rec", "idx"):
        file = f"{name}.{extension}"
        assert (tmp_path / file).read_bytes() == (shared_data / "recordio_golden" / file).read_bytes()


@given(record=RECORDS)
def test_any_record_is_laid_out_as_by_an_independent_writer(record):
    body = record_body(record.labels, record.payload, record.id, second=record.id2, array=record.is_array)
    assert encode_record(record, "record") == record_bytes(body)


@given(records=st.lists(RECORDS, min_size=1, max_size=5))
def test_any_records_come_back_by_key_and_by_scanning(records):
    uri = f"memory://{uuid.uuid4().hex}/train.rec"
    with RecordIOWriter(uri) as writer:
        places = [writer.write(record, key=7 * number) for number, record in enumerate(records)]
    reader = RecordIOReader(uri)
    for number, (offset, found) in enumerate(read_records(uri)):
        record = records[number]
        expected = (record.labels, record.payload, record.id, record.id2, record.is_array or len(record.labels) > 1)
        assert (found.labels, found.payload, found.id, found.id2, found.is_array) == expected
        assert reader[7 * number] == found
        assert offset == places[number]
    assert len(reader) == len(records)


def test_a_record_is_at_most_half_a_gibibyte(monkeypatch):
    assert recordio_format.MAX_RECORD_BYTES == 536_870_911
    with pytest.raises(
        RecordIOError, match=r"^face: 536,870,912 bytes with its header; RecordIO holds at most 536,870,911"
    ):
        encode_record(Record(labels=(0.0,), payload=bytes(2**29 - 24), id=0), "face")
    monkeypatch.setattr(recordio_format, "MAX_RECORD_BYTES", 100)
    assert len(encode_record(Record(labels=(0.0,), payload=bytes(76), id=0), "face")) == 108
    with pytest.raises(RecordIOError, match=r"101 bytes"):
        encode_record(Record(labels=(0.0,), payload=bytes(77), id=0), "face")
    with pytest.raises(RecordIOError, match=r"104 bytes"):
        encode_record(Record(labels=(0.0,), payload=bytes(76), id=0, is_array=True), "face")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(labels=(), payload=b"", id=0), r"it has no label"),
        (Record(labels=(16_777_217.0,), payload=b"", id=0), r"the label 16777217 is not exact in float32"),
        (Record(labels=(1.0, 2.0**24 + 3), payload=b"", id=0), r"the label 16777219 is not exact"),
        (Record(labels=(1e39,), payload=b"", id=0), r"the label 9+\d* is not exact in float32"),
        (Record(labels=(0.0,), payload=b"", id=2**64), r"ids are 18446744073709551616 and 0"),
        (Record(labels=(0.0,), payload=b"", id=0, id2=-1), r"ids are 0 and -1"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(folder, record, message):
    with (
        pytest.raises(RecordIOError, match=rf"face\.rec: record 9: {message}"),
        RecordIOWriter(f"{folder}/face.rec") as w,
    ):
        w.write(record, 9)
    assert names(folder) == []


def test_labels_that_are_no_whole_numbers_are_rounded_as_by_mxnet():
    assert encode_record(Record(labels=(0.1,), payload=b"", id=0), "x")[12:16] == struct.pack("<f", 0.1)


# ---- files -------------------------------------------------------------------------------------------------------


def test_nothing_is_there_until_all_is_written(folder):
    with RecordIOWriter(f"{folder}/train.rec") as writer:
        writer.write(face(1))
        assert not {"train.rec", "train.idx"} & set(names(folder))
    assert names(folder) == ["train.idx", "train.rec"]
    assert writer.num_bytes == storage.size(f"{folder}/train.rec")


@pytest.mark.parametrize("index", [True, False])
def test_an_error_leaves_nothing_and_an_older_file_as_it_was(folder, index):
    def write(payload: bytes) -> None:
        with RecordIOWriter(f"{folder}/train.rec", index=index) as writer:
            writer.write(Record(labels=(0.0,), payload=payload, id=1))
            if payload == b"bad":
                raise InterruptedError

    with pytest.raises(InterruptedError):
        write(b"bad")
    assert names(folder) == []
    write(b"good")
    before = {name: storage.read_bytes(f"{folder}/{name}") for name in names(folder)}
    with pytest.raises(InterruptedError):
        write(b"bad")
    assert {name: storage.read_bytes(f"{folder}/{name}") for name in names(folder)} == before


def test_a_key_that_occurs_twice_is_named_and_nothing_is_left(folder):
    def write(keys: list[int]) -> None:
        with RecordIOWriter(f"{folder}/train.rec") as writer:
            for key in keys:
                writer.write(face(key))

    with pytest.raises(RecordIOError, match=r"train\.rec: 2 records have the key 4"):
        write([4, 9, 4])
    assert names(folder) == []


def test_without_an_index_an_older_one_goes(folder):
    for index in (True, False):
        with RecordIOWriter(f"{folder}/train.rec", index=index) as writer:
            writer.write(face(1))
            if not index:
                writer.write(face(1))
    assert names(folder) == ["train.rec"]
    assert len(list(read_records(f"{folder}/train.rec"))) == 2


@pytest.mark.parametrize("broken_file", ["train.idx", "train.rec"])
def test_an_upload_that_breaks_leaves_no_half_an_object_and_none_beside_it(monkeypatch, broken_file):
    def broken(source, target, length):
        if source.name.endswith(broken_file):
            target.write(source.read(10))
            raise ConnectionResetError("reset")
        target.write(source.read())

    folder = f"memory://{uuid.uuid4().hex}"
    write_insightface_pack(iter(SAMPLES), folder, num_identities=4)
    monkeypatch.setattr(recordio_writer.shutil, "copyfileobj", broken)
    with pytest.raises(storage.StorageError, match=rf"{broken_file}: cannot be written: reset"):
        write_insightface_pack(iter(SAMPLES), folder, num_identities=4)
    assert names(folder) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(storage.StorageError, match=r"file/train\.rec: cannot be written"),
        RecordIOWriter(str(tmp_path / "file" / "train.rec")),
    ):
        pytest.fail("went on")


# ---- whole packs -------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_pack_written_again_is_equal_to_the_byte(shared_data, tmp_path):
    real = shared_data / "faces_celeb299"
    reader = RecordIOReader(str(real / "train.rec"))
    with RecordIOWriter(str(tmp_path / "train.rec")) as writer:
        for key, (_, record) in zip(reader.keys, read_records(str(real / "train.rec")), strict=True):
            writer.write(record, key)
    faces = ((int(reader[key].labels[0]), reader[key].payload) for key in image_keys(reader))
    pack = write_insightface_pack(faces, str(tmp_path / "pack"), num_identities=299)
    assert (pack.num_images, pack.num_identities, pack.num_bytes) == (6288, 299, (real / "train.rec").stat().st_size)
    for name in ("train.rec", "train.idx"):
        assert filecmp.cmp(real / name, tmp_path / name, shallow=False)
    for name in ("train.rec", "train.idx", "property"):
        assert filecmp.cmp(real / name, tmp_path / "pack" / name, shallow=False)


def test_a_pack_has_insightfaces_layout(folder):
    pack = write_insightface_pack(iter(SAMPLES), folder, num_identities=5, image_side=96)
    assert (pack.uri, pack.num_images, pack.num_identities) == (folder, 6, 5)
    assert names(folder) == ["property", "train.idx", "train.rec"]
    assert storage.read_bytes(f"{folder}/property") == b"5,96,96\n"
    reader = RecordIOReader(f"{folder}/train.rec")
    assert reader.keys == [*range(1, 12), 0]
    assert image_keys(reader) == [1, 2, 3, 4, 5, 6]
    assert [(int(reader[key].labels[0]), reader[key].payload) for key in range(1, 7)] == SAMPLES
    # Identity 1 and 4 have no images: their ranges are empty.
    ranges = [reader[key].labels for key in range(7, 12)]
    assert ranges == [(1.0, 3.0), (3.0, 3.0), (3.0, 4.0), (4.0, 7.0), (7.0, 7.0)]
    assert (reader[0].labels, reader[0].payload, reader[0].id, reader[0].id2) == ((7.0, 12.0), b"", 0, 1)
    assert [reader[key].id for key in reader.keys] == reader.keys


def test_a_pack_without_header_has_images_alone(folder):
    write_insightface_pack(iter(SAMPLES), folder, num_identities=4, header=False)
    reader = RecordIOReader(f"{folder}/train.rec")
    assert reader.keys == image_keys(reader) == list(range(6))
    assert [(int(reader[key].labels[0]), reader[key].payload) for key in range(6)] == SAMPLES


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 0], r"record 3: the class number 0 is not expected here: 1 to 2, in ascending order"),
        ([0, 3], r"record 2: the class number 3 is not expected here: 0 to 2"),
        ([-1], r"record 1: the class number -1 is not expected here: 0 to 2"),
        ([], r"there are no images to write"),
    ],
)
def test_samples_out_of_order_are_named_and_an_older_pack_stays(folder, labels, message):
    write_insightface_pack(iter(SAMPLES), folder, num_identities=4)
    before = {name: storage.read_bytes(f"{folder}/{name}") for name in names(folder)}
    with pytest.raises(RecordIOError, match=rf"train\.rec: {message}"):
        write_insightface_pack(((label, b"x") for label in labels), folder, num_identities=3)
    assert {name: storage.read_bytes(f"{folder}/{name}") for name in names(folder)} == before


def test_a_header_that_float32_cannot_hold_is_refused(tmp_path):
    uri = str(tmp_path / "train.rec")
    with (
        pytest.raises(RecordIOError, match=r"record 0: the header cannot say that 16,777,216 images end before"),
        RecordIOWriter(uri) as writer,
    ):
        recordio_writer._write_bookkeeping(writer, np.array([2**24 - 7, 7]))
    with RecordIOWriter(uri) as writer:  # an even number is one of float32; the ranges of identities are rounded
        recordio_writer._write_bookkeeping(writer, np.array([2**24, 1]))
    assert [record.labels for _, record in read_records(uri)] == [
        (1.0, 2.0**24),
        (2.0**24, 2.0**24 + 2),
        (2.0**24 + 2, 2.0**24 + 4),
    ]


def test_sizes_of_a_pack_are_checked_before_anything_is_written(tmp_path):
    for sizes in ({"num_identities": 0}, {"num_identities": 1, "image_side": 0}):
        with pytest.raises(ValueError, match=r"(num_identities|image_side)=0 must be greater than 0"):
            write_insightface_pack(iter(SAMPLES), str(tmp_path / "pack"), **sizes)
    assert not Path(tmp_path / "pack").exists()
