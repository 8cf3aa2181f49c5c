"""The RecordIO reader against mxnet's own files, a writer made from the format's description, and damaged files."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.images import decode_rgb
from pipeline.data.recordio import Record, RecordIOError, RecordIOReader, image_entries, image_keys
from pipeline.data.recordio_index import RecordIndex
from tests.pipeline.data.writers import MAGIC, record_body, record_bytes, write_recordio

GOLDEN_LENGTHS = {1: 13, 2: 12, 3: 11, 4: 13, 5: 0, 6: 4096, 7: 4, 8: 1023}


@pytest.fixture(scope="session")
def golden(shared_data):
    folder = shared_data / "recordio_golden"
    expected = {
        int(key): (tuple(entry["labels"]), base64.b64decode(entry["payload_b64"]))
        for key, entry in json.loads((folder / "expected.json").read_text()).items()
    }
    assert {key: len(payload) for key, (_, payload) in expected.items()} == GOLDEN_LENGTHS
    return folder, expected


def copy_to(base: str, folder, name: str) -> str:
    for extension in ("rec", "idx"):
        storage.write_bytes(f"{base}/{name}.{extension}", (folder / f"{name}.{extension}").read_bytes())
    return f"{base}/{name}.rec"


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path) -> str:
    """A folder to write packs to; read by memory map, or by ranges as from an object store."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("name", ["header_first", "header_last"])
def test_mxnets_packs_with_header(golden, place, name):
    folder, expected = golden
    reader = RecordIOReader(copy_to(place, folder, name))
    assert len(reader) == 11
    assert image_keys(reader) == list(expected)
    for key, (labels, payload) in expected.items():
        record = reader[key]
        assert (record.labels, record.payload, record.id) == (labels, payload, key)
    assert (reader[0].labels, reader[0].payload) == ((9.0, 11.0), b"")
    assert [reader[key].labels for key in (9, 10)] == [(1.0, 5.0), (5.0, 9.0)]


def test_mxnets_pack_without_header(golden, place):
    folder, expected = golden
    reader = RecordIOReader(copy_to(place, folder, "no_header"))
    assert image_keys(reader) == reader.keys == list(range(8))
    for key in range(8):
        payload = b"z" if key == 4 else expected[key + 1][1]  # an im2rec pack has no empty image
        record = reader[key]
        assert (record.labels, record.payload, record.id) == (((key + 1) % 3,), payload, key)


def test_the_header_comes_last_in_the_index_of_real_packs(golden):
    folder, _ = golden
    assert RecordIOReader(str(folder / "header_last.rec")).keys == [*range(1, 11), 0]


def test_the_writer_of_these_tests_writes_what_mxnet_writes(golden, tmp_path):
    folder, expected = golden
    bodies = {
        key: record_body(labels, payload, key, second=3 * key, array=key == 6)
        for key, (labels, payload) in expected.items()
    }
    bodies |= {9: record_body((1, 5), b"", 9), 10: record_body((5, 9), b"", 10)}
    bodies[0] = record_body((9, 11), b"", 0, second=1)
    write_recordio(str(tmp_path), bodies, "ours")
    for extension in ("rec", "idx"):
        assert (tmp_path / f"ours.{extension}").read_bytes() == (folder / f"header_last.{extension}").read_bytes()


PIECES = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9), st.just(MAGIC[:2]), st.just(MAGIC[2:])), max_size=8)


@given(payloads=st.lists(PIECES.map(b"".join), min_size=1, max_size=5), labels=st.integers(1, 3))
def test_payloads_with_the_magic_anywhere_round_trip(tmp_path_factory, payloads, labels):
    bodies = {
        key: record_body([float(key + i) for i in range(labels)], payload, key + 100)
        for key, payload in enumerate(payloads)
    }
    for base in (str(tmp_path_factory.getbasetemp() / "magic"), "memory://magic"):
        reader = RecordIOReader(write_recordio(base, bodies))
        for key, payload in enumerate(payloads):
            record = reader[key]
            assert record.payload == payload
            assert record.labels == tuple(float(key + i) for i in range(labels))
            assert record.id == key + 100


def test_the_aligned_magic_splits_and_the_unaligned_does_not():
    aligned, unaligned = record_bytes(b"abcd" + MAGIC + b"xy"), record_bytes(b"abc" + MAGIC + b"xy")
    assert (
        aligned == MAGIC + struct.pack("<I", 1 << 29 | 4) + b"abcd" + MAGIC + struct.pack("<I", 3 << 29 | 2) + b"xy\0\0"
    )
    assert unaligned.count(MAGIC) == 2
    assert struct.unpack_from("<I", unaligned, 4) == (9,)


def three_records(place: str) -> tuple[str, bytes, list[int]]:
    bodies = {key: record_body([float(key)], bytes([65 + key]) * (30 + key)) for key in range(3)}
    bodies[2] = record_body([2.0], b"abcd" + MAGIC + b"efgh" + MAGIC + b"tail")
    uri = write_recordio(place, bodies)
    offsets = [int(line.split()[1]) for line in storage.read_bytes(uri[:-4] + ".idx").decode().splitlines()]
    return uri, storage.read_bytes(uri), offsets


def test_a_file_cut_anywhere_names_the_record_that_is_damaged(place):
    uri, data, offsets = three_records(place)
    payloads = [RecordIOReader(uri)[key].payload for key in range(3)]
    # The reader of a local file maps it: every cut gets a file of its own.
    for cut in range(len(data) - 1, offsets[1], -1):
        name = f"cut{cut}"
        base = uri.rsplit("/", 1)[0]
        storage.write_bytes(f"{base}/{name}.rec", data[:cut])
        storage.write_bytes(f"{base}/{name}.idx", storage.read_bytes(uri[:-4] + ".idx"))
        reader = RecordIOReader(f"{base}/{name}.rec")
        assert reader[0].payload == payloads[0]
        for key in (1, 2):  # to the last byte of their padding
            end = offsets[2] if key == 1 else len(data)
            if cut >= end:
                continue
            with pytest.raises(RecordIOError, match=rf"{name}\.rec: record {key}: ") as caught:
                reader[key]
            assert f"byte {cut}" in str(caught.value)


def test_an_empty_file_is_damaged(place):
    uri, _, _ = three_records(place)
    empty = uri.replace("train", "empty")
    storage.write_bytes(empty[:-4] + ".idx", b"0\t0\n")
    storage.write_bytes(empty, b"")
    with pytest.raises(RecordIOError, match=r"empty\.rec"):
        RecordIOReader(empty)[0]


@pytest.mark.parametrize("offset", [10_000, 200, -4])
def test_an_offset_outside_the_file_is_damaged(place, offset):
    uri, data, _ = three_records(place)
    assert len(data) < 200
    storage.write_bytes(uri[:-4] + ".idx", f"0\t0\n1\t{offset}\n".encode())
    reader = RecordIOReader(uri)
    with pytest.raises(RecordIOError, match=r"train\.(rec|idx)"):
        reader[1]


@pytest.mark.parametrize("where", ["magic", "kind", "middle magic", "offset"])
def test_a_wrong_start_of_a_record_is_damaged(place, where):
    uri, data, offsets = three_records(place)
    altered, index = bytearray(data), storage.read_bytes(uri[:-4] + ".idx")
    if where == "magic":
        altered[offsets[2]] ^= 1
    elif where == "kind":
        altered[offsets[2] + 7] = 2 << 5  # a middle part where a record starts
    elif where == "middle magic":
        altered[data.index(MAGIC, offsets[2] + 4)] ^= 1
    else:
        index = index.replace(f"2\t{offsets[2]}".encode(), f"2\t{offsets[2] + 4}".encode())
    other = uri.replace("train", "altered")
    storage.write_bytes(other, bytes(altered))
    storage.write_bytes(other[:-4] + ".idx", index)
    reader = RecordIOReader(other)
    assert reader[1].labels == (1.0,)
    with pytest.raises(
        RecordIOError, match=r"altered\.rec: record 2: no (later part of the )?record starts at byte \d+"
    ):
        reader[2]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"short", r"5 bytes are too few for a record header of 24"),
        (b"", r"0 bytes are too few"),
        (struct.pack("<IfQQ", 3, 0, 0, 0) + bytes(8), r"it announces 3 labels and has 32 bytes"),
        (struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0), r"it announces 4294967295 labels"),
    ],
)
def test_a_record_too_short_for_its_header_is_damaged(place, body, message):
    reader = RecordIOReader(write_recordio(place, {5: body}))
    with pytest.raises(RecordIOError, match=rf"train\.rec: record 5: {message}"):
        reader[5]


@pytest.mark.parametrize("line", ["7", "7 8 9", "seven\t8", "7\teight", "", "7\t1.5", "\u00e9\t0"])
def test_a_broken_line_of_the_index_is_named(place, line):
    uri, _, _ = three_records(place)
    storage.write_bytes(uri[:-4] + ".idx", f"0\t0\n{line}\n1\t4\n".encode())
    with pytest.raises(RecordIOError, match=r"train\.idx: line 2: .* is not 'key<TAB>byte offset'"):
        RecordIOReader(uri)


def test_an_empty_index_is_refused(place):
    uri, _, _ = three_records(place)
    storage.write_bytes(uri[:-4] + ".idx", b"")
    with pytest.raises(RecordIOError, match=r"train\.idx: the index is empty"):
        RecordIOReader(uri)


def test_missing_files_and_keys_are_named(place):
    uri, _, _ = three_records(place)
    with pytest.raises(KeyError, match=r"train\.rec: no record with key 17"):
        RecordIOReader(uri)[17]
    with pytest.raises(storage.StorageError, match=r"other\.idx: does not exist"):
        RecordIOReader(uri.replace("train", "other"))
    storage.delete_file(uri)
    with pytest.raises(storage.StorageError, match=r"train\.rec: does not exist"):
        RecordIOReader(uri)


def test_a_header_that_announces_more_images_than_the_index_has(place):
    bodies = {0: record_body((4, 6), b""), 1: record_body((0,), b"a"), 2: record_body((1,), b"b")}
    with pytest.raises(RecordIOError, match=r"the header announces 3 images, the index has 2"):
        image_keys(RecordIOReader(write_recordio(place, bodies)))


@pytest.mark.parametrize("label", [0.0, -3.0, 1.5, float("nan"), float("inf")])
def test_a_header_that_announces_nonsense_is_damaged(place, label):
    bodies = {0: record_body((label, 6), b""), 1: record_body((0,), b"a")}
    with pytest.raises(RecordIOError, match=r"train\.rec: record 0: the header's first label is"):
        image_keys(RecordIOReader(write_recordio(place, bodies)))


@pytest.mark.parametrize("num_images", [2**24 - 2, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2, 2**24 + 4])
def test_a_header_that_float32_rounds_loses_no_image_and_gains_none(num_images):
    order = np.arange(num_images + 4)
    index = RecordIndex(uri="train.idx", keys=order, offsets=order, sha256="", _by_key=None)
    announced = float(np.float32(num_images + 1))  # of an odd number above 2**24: the even one below or above

    def read(key: int) -> Record:
        if 1 <= key <= num_images:
            return Record(labels=(0.0,), payload=b"image", id=key)
        labels = (announced, announced + 2) if key == 0 else (1.0, 2.0)
        return Record(labels=labels, payload=b"", id=key, is_array=True)

    entries = image_entries(index, read, "train.rec")
    assert (len(entries), entries[0], entries[-1]) == (num_images, 1, num_images)


def test_an_image_with_several_labels_at_key_0_is_no_header(place):
    bodies = {0: record_body((2, 9), b"image"), 1: record_body((1, 9), b"image"), 2: record_body((0, 9), b"image")}
    assert image_keys(RecordIOReader(write_recordio(place, bodies))) == [0, 1, 2]


def test_remote_reading_equals_local_in_any_order(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    bodies = {key: record_body([float(key)], rng.bytes(int(rng.integers(0, 400)))) for key in range(60)}
    local = RecordIOReader(write_recordio(str(tmp_path), bodies))
    remote = RecordIOReader(write_recordio("memory://order", bodies))
    # A window much smaller than the file: records within, across and beyond it.
    monkeypatch.setattr(remote._data.__class__, "WINDOW_BYTES", 300)
    for key in rng.integers(0, 60, 300).tolist():
        assert remote[key] == local[key]
        assert remote[key].payload == bodies[key][24:]


def test_a_header_last_pack_cut_at_its_end_is_not_taken_for_one_without(golden, tmp_path):
    folder, _ = golden
    for extension in ("rec", "idx"):
        shutil.copy(folder / f"header_last.{extension}", tmp_path / f"train.{extension}")
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(data[:-20])
    with pytest.raises(RecordIOError, match=r"train\.rec: record 0: the file ends"):
        image_keys(RecordIOReader(str(tmp_path / "train.rec")))


@pytest.mark.data
def test_the_real_pack(shared_data):
    reader = RecordIOReader(str(shared_data / "faces_celeb299" / "train.rec"))
    keys = image_keys(reader)
    assert len(keys) == 6288
    labels = np.array([reader[key].labels[0] for key in keys])
    assert len(np.unique(labels)) == 299
    assert (labels.min(), labels.max()) == (0, 298)
    assert decode_rgb(reader[keys[0]].payload).shape == (112, 112, 3)
