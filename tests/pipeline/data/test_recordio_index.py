"""The index of a RecordIO file: parsed in large pieces, equal to a reader line by line, and checked."""

from __future__ import annotations

import hashlib
import random
import re
import uuid
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import recordio_index
from pipeline.data.recordio_format import RecordIOError
from pipeline.data.recordio_index import read_index

ENTRIES = st.lists(
    st.tuples(st.integers(0, 10**15), st.integers(0, 10**15)),
    min_size=1,
    max_size=40,
    unique_by=(lambda entry: entry[0], lambda entry: entry[1]),
)


def put(text: bytes) -> str:
    uri = f"memory://{uuid.uuid4().hex}/train.idx"
    storage.write_bytes(uri, text)
    return uri


def lines(entries: list[tuple[int, int]]) -> bytes:
    return b"".join(b"%d\t%d\n" % entry for entry in entries)


@given(entries=ENTRIES, piece=st.integers(1, 60), ends_with_newline=st.booleans())
def test_any_index_in_pieces_of_any_size(entries, piece, ends_with_newline):
    text = lines(entries) if ends_with_newline else lines(entries)[:-1]
    with mock.patch.object(recordio_index, "READ_BYTES", piece):
        index = read_index(put(text))
    assert list(zip(index.keys.tolist(), index.offsets.tolist(), strict=True)) == entries
    assert index.sha256 == hashlib.sha256(text).hexdigest()
    assert [index.entry(key) for key, _ in entries] == list(range(len(entries)))
    known = {key for key, _ in entries}
    assert all(index.entry(key) is None for key in (-1, 10**16, *(key + 1 for key in known)) if key not in known)


@pytest.mark.parametrize("text", [b"1\t0\r\n2\t40\r\n", b"1 0\n2   40\n", b" 1\t0 \n+2\t40", b"1\t\t0\n2\t40\n"])
def test_what_other_programs_write_is_read_too(text):
    index = read_index(put(text))
    assert (index.keys.tolist(), index.offsets.tolist()) == ([1, 2], [0, 40])


@pytest.mark.parametrize(
    "line",
    [b"7", b"7\t8\t9", b"seven\t8", b"", b"7\t", b"\t8", b"\t", b"7\t1.5", b"7\t0x10", b"7\t9223372036854775808"],
)
@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_a_damaged_line_is_named_by_its_number_in_the_file(line, piece, monkeypatch):
    monkeypatch.setattr(recordio_index, "READ_BYTES", piece)
    uri = put(b"0\t0\n1\t4\n2\t8\n" + line + b"\n9\t99\n")
    with pytest.raises(RecordIOError, match=rf"train\.idx: line 4: {re.escape(repr(line.decode()))} is not 'key<TAB>"):
        read_index(uri)


def test_two_halves_of_lines_do_not_make_one():
    with pytest.raises(RecordIOError, match=r"line 1: '7\\t' is not"):
        read_index(put(b"7\t\n8\t9\t\n1\n"))


@pytest.mark.parametrize(("column", "what"), [(0, "key"), (1, "offset")])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_key_or_offset_that_occurs_twice_is_named_with_its_lines(column, what, order):
    entries = [[key, 4 * key] for key in range(50)]
    if order == "shuffled":
        random.Random(0).shuffle(entries)
    entries[31][column] = entries[7][column]
    with pytest.raises(RecordIOError, match=rf"lines 8 and 32 have the same {what} {entries[7][column]}$"):
        read_index(put(lines([(key, offset) for key, offset in entries])))


def test_an_empty_or_absent_index_is_an_error():
    with pytest.raises(RecordIOError, match=r"train\.idx: the index is empty"):
        read_index(put(b""))
    with pytest.raises(storage.StorageError, match=r"memory://none/train\.idx"):
        read_index("memory://none/train.idx")


def test_the_whole_range_of_offsets_is_read():
    assert read_index(put(b"0\t9223372036854775807\n")).offsets.tolist() == [2**63 - 1]
