"""RecordIO read by ranges of bytes without an index: every record exactly once, and no damage unseen."""

from __future__ import annotations

import itertools
import struct
import uuid
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import recordio
from pipeline.data.recordio import Record, RecordIOError, RecordIOReader, read_indexed_records, read_records
from tests.pipeline.data.writers import MAGIC, record_body, record_bytes

MAGIC_AS_FLOAT = struct.unpack("<f", MAGIC)[0]
MAGIC_AS_ID = int.from_bytes(MAGIC * 2, "little")
PIECES = st.lists(
    st.one_of(st.just(MAGIC), st.just(MAGIC * 2), st.binary(max_size=9), st.just(MAGIC[:3]), st.just(MAGIC[1:])),
    max_size=8,
).map(b"".join)
BODIES = st.lists(
    st.builds(
        record_body,
        st.lists(st.sampled_from([0.0, 7.0, MAGIC_AS_FLOAT]), min_size=1, max_size=3),
        PIECES,
        st.sampled_from([0, 1, MAGIC_AS_ID]),
        second=st.sampled_from([0, MAGIC_AS_ID]),
        array=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
CUTS = st.lists(st.floats(0, 1), max_size=5)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows much smaller than the files: records and heads lie within, across and beyond them."""
    monkeypatch.setattr(recordio._WindowedFile, "WINDOW_BYTES", 52)
    monkeypatch.setattr(recordio, "_SEARCH_BYTES", 12)
    monkeypatch.setattr(recordio, "_SLACK_BYTES", 8)


def put(data: bytes) -> str:
    uri = f"memory://{uuid.uuid4().hex}/train.rec"
    storage.write_bytes(uri, data)
    return uri


def file_of(bodies: list[bytes]) -> tuple[bytes, list[int]]:
    records = [record_bytes(body) for body in bodies]
    return b"".join(records), [0, *itertools.accumulate(len(record) for record in records)]


def ranges(num_bytes: int, cuts: list[float]) -> list[tuple[int, int]]:
    bounds = sorted({0, num_bytes, *(int(cut * num_bytes) for cut in cuts)})
    return list(itertools.pairwise(bounds))


def read_all(uri: str, num_bytes: int, cuts: list[float]) -> list[tuple[int, Record]]:
    return [found for start, stop in ranges(num_bytes, cuts) for found in read_records(uri, start, stop)]


@given(bodies=BODIES, cuts=CUTS)
def test_any_cut_of_a_file_gives_every_record_once(bodies, cuts):
    data, offsets = file_of(bodies)
    found = read_all(put(data), len(data), cuts)
    assert [offset for offset, _ in found] == offsets[:-1]
    for body, (_, record) in zip(bodies, found, strict=True):
        flag, label, first, second = struct.unpack_from("<IfQQ", body)
        labels = np.frombuffer(body, "<f4", flag, 24).tolist() if flag else [label]
        assert (list(record.labels), record.id, record.id2, record.is_array) == (labels, first, second, flag > 0)
        assert record.payload == body[24 + 4 * flag :]


@given(bodies=BODIES)
def test_an_aligned_magic_is_always_a_head(bodies):
    data, _ = file_of(bodies)
    heads, position = [], 0
    while position < len(data):  # by the lengths alone
        heads.append(position)
        length = struct.unpack_from("<I", data, position + 4)[0] & (2**29 - 1)
        position += 8 + (length + 3) // 4 * 4
    words = np.frombuffer(data, "<u4")
    assert (4 * np.flatnonzero(words == struct.unpack("<I", MAGIC)[0])).tolist() == heads


@given(bodies=BODIES, cuts=CUTS, end=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_but_between_records_is_noticed(bodies, cuts, end):
    data, offsets = file_of(bodies)
    num_bytes = int(end * len(data))
    assume(num_bytes not in offsets)
    with pytest.raises(RecordIOError, match=r"train\.rec: .*byte \d+"):
        read_all(put(data[:num_bytes]), num_bytes, cuts)


def test_a_file_cut_off_at_each_of_its_bytes():
    data, offsets = file_of([record_body([2.0], b"abcd" + MAGIC + b"tail"), record_body([1.0, 2.0], b"x" * 9)])
    for num_bytes in range(1, len(data)):
        uri = put(data[:num_bytes])
        if num_bytes in offsets:  # a shorter file, and as whole as the longer one
            assert len(list(read_records(uri))) == offsets.index(num_bytes)
            continue
        with pytest.raises(RecordIOError, match=rf"train\.rec: record at byte \d+: the file ends at byte {num_bytes}"):
            list(read_records(uri))


@given(bodies=BODIES, cuts=CUTS, which=st.integers(0, 5), byte=st.integers(0, 3), at_the_record=st.booleans())
def test_a_damaged_head_is_noticed_wherever_the_file_is_cut(bodies, cuts, which, byte, at_the_record):
    data, offsets = file_of(bodies)
    head = offsets[which % len(bodies)]
    altered = bytearray(data)
    altered[head + byte] ^= 0x10
    cuts = [*cuts, head / len(data)] if at_the_record else cuts
    with pytest.raises(RecordIOError, match=r"train\.rec: .*byte \d+"):
        read_all(put(bytes(altered)), len(data), cuts)


@given(
    bodies=BODIES, cuts=CUTS, which=st.integers(0, 6), garbage=st.sampled_from([bytes(4), b"abcd" * 5, bytes(2), MAGIC])
)
def test_garbage_between_records_is_noticed_wherever_the_file_is_cut(bodies, cuts, which, garbage):
    data, offsets = file_of(bodies)
    place = offsets[which % len(offsets)]
    with pytest.raises(RecordIOError, match=r"train\.rec: .*byte \d+"):
        read_all(put(data[:place] + garbage + data[place:]), len(data) + len(garbage), cuts)


@given(bodies=BODIES, cuts=CUTS, which=st.integers(0, 20), kind=st.integers(0, 7))
def test_parts_out_of_order_are_noticed_wherever_the_file_is_cut(bodies, cuts, which, kind):
    data, _ = file_of(bodies)
    heads = 4 * np.flatnonzero(np.frombuffer(data, "<u4") == struct.unpack("<I", MAGIC)[0])
    word = int(heads[which % len(heads)]) + 7
    altered = bytearray(data)
    altered[word] = altered[word] & 0x1F | kind << 5
    assume(kind != data[word] >> 5)
    with pytest.raises(RecordIOError, match=r"train\.rec: .*byte \d+"):
        read_all(put(bytes(altered)), len(data), cuts)


def test_a_magic_of_an_impossible_kind_is_no_place_to_start():
    data, offsets = file_of([record_body([0.0], bytes(64)), record_body([1.0], bytes(8))])
    altered = data[: offsets[1] + 7] + b"\xc0" + data[offsets[1] + 8 :]
    with pytest.raises(RecordIOError, match=rf"train\.rec: byte {offsets[1]}: a magic number that is no head"):
        list(read_records(put(altered), 4, len(data)))


def test_a_range_within_one_record_holds_none():
    data, offsets = file_of([record_body([0.0], bytes(100)), record_body([1.0], b"")])
    uri = put(data)
    assert list(read_records(uri, 1, offsets[1])) == []
    assert list(read_records(uri, 0, 0)) == []
    assert [offset for offset, _ in read_records(uri, offsets[1], offsets[1] + 1)] == [offsets[1]]
    assert [offset for offset, _ in read_records(uri, 0, 1)] == [0]


def test_ranges_that_are_none_and_files_that_are_empty_or_shorter():
    data, _ = file_of([record_body([0.0], b"abc")])
    uri = put(data)
    for start, stop in ((-4, 8), (12, 8)):
        with pytest.raises(ValueError, match=rf"train\.rec: bytes {start} to {stop} are no range"):
            list(read_records(uri, start, stop))
    with pytest.raises(RecordIOError, match=rf"the file ends at byte {len(data)}, {len(data) + 4} are expected"):
        list(read_records(uri, 0, len(data) + 4))
    with pytest.raises(RecordIOError, match=r"train\.rec: the file is empty"):
        list(read_records(put(b"")))
    with pytest.raises(storage.StorageError, match=r"memory://none/train\.rec"):
        list(read_records("memory://none/train.rec"))


@pytest.mark.parametrize("name", ["header_first", "header_last", "no_header"])
@pytest.mark.parametrize("remote", [False, True])
def test_mxnets_files_by_scanning_are_as_by_their_index(shared_data, name, remote):
    file = shared_data / "recordio_golden" / f"{name}.rec"
    reader = RecordIOReader(str(file))
    uri = put(file.read_bytes()) if remote else storage.normalise(str(file))
    expected = [(int(o), reader[k]) for k, o in zip(reader.keys, reader.index.offsets, strict=True)]
    assert list(read_records(uri)) == expected


def test_a_scan_asks_for_large_ranges_and_little_more_than_the_file(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(recordio._WindowedFile, "WINDOW_BYTES", 100_000)
    rng = np.random.default_rng(0)
    data, _ = file_of([record_body([0.0], rng.bytes(int(rng.integers(3000, 7000)))) for _ in range(300)])
    uri, asked = put(data), []

    def spy(uri: str, start: int, num_bytes: int) -> bytes:
        asked.append(num_bytes)
        return data[start : start + num_bytes]

    half = len(data) // 2
    with mock.patch.object(storage, "read_range", spy):
        assert sum(1 for part in ((0, half), (half, len(data))) for _ in read_records(uri, *part)) == 300
    assert len(asked) <= len(data) // 100_000 * 1.1 + 3
    assert max(asked) == 100_000
    assert sum(asked) <= 1.1 * len(data) + 2 * 64 * 1024


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    data, _ = file_of([record_body([float(n)], bytes(40)) for n in range(20)])
    path = tmp_path / "train.rec"
    path.write_bytes(data)
    records = read_records(str(path))
    next(records)
    with path.open("r+b") as file:
        file.truncate(len(data) // 2)
    with pytest.raises(RecordIOError, match=r"it changed while it was read"):
        list(records)


def test_a_file_that_is_replaced_while_it_is_read_stays_the_one_that_was_opened(tmp_path):
    data, _ = file_of([record_body([float(n)], bytes(40)) for n in range(20)])
    path = tmp_path / "train.rec"
    path.write_bytes(data)
    records = read_records(str(path))
    first = next(records)
    storage.write_bytes(str(path), data[: len(data) // 2 // 72 * 72])
    assert [first, *records] == list(read_records(put(data)))


def indexed(uri: str, entries: list[tuple[int, int, int]]) -> list[tuple[int, Record]]:
    keys, offsets, ends = np.array(entries, np.int64).T
    return list(read_indexed_records(uri, keys, offsets, ends))


def test_records_by_their_places_may_leave_others_out():
    data, offsets = file_of([record_body([float(n)], bytes(30 + n)) for n in range(5)])
    found = indexed(put(data), [(70, offsets[1], offsets[3]), (80, offsets[3], len(data))])
    assert [(key, record.labels) for key, record in found] == [(70, (1.0,)), (80, (3.0,))]


def test_a_record_that_has_become_shorter_is_noticed_by_what_lies_behind_it():
    data, offsets = file_of([record_body([float(n)], b"x" * 40) for n in range(3)])
    altered = bytearray(data)
    altered[offsets[1] + 4] -= 8
    entries = [(key, offsets[key], offsets[key + 1]) for key in range(3)]
    with pytest.raises(
        RecordIOError, match=rf"no record starts at byte {offsets[2] - 8}, where the one before it ends"
    ):
        indexed(put(bytes(altered)), entries)
