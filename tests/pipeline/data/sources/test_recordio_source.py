"""InsightFace packs as a source: the same images in the same order however they are cut, with an index or without."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import uuid
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.recordio import RecordIOError
from pipeline.data.recordio_writer import write_insightface_pack
from pipeline.data.sources.base import Place, RawSample, SourceError, SourceSpec
from pipeline.data.sources.recordio import RecordIOSource
from tests.pipeline.data.writers import MAGIC, record_body, record_bytes, write_recordio

LABELS = [0, 0, 1, 70, 70, 70, 16_777_216]


def image(number: int) -> bytes:
    return MAGIC + b"image %d" % number * (number + 1)


def bodies(header: str) -> dict[int, bytes]:
    """Seven images of four identities, in the layout of a pack with its header first, last or absent."""
    images = {key: record_body([label], image(key), key) for key, label in enumerate(LABELS, 1)}
    if header == "absent":
        return {key - 1: body for key, body in images.items()}
    identities = {
        key: record_body(bounds, b"", key)
        for key, bounds in zip(range(8, 12), [(1, 3), (3, 4), (4, 7), (7, 8)], strict=True)
    }
    head = {0: record_body((8, 12), b"", 0, second=1)}
    return head | images | identities if header == "first" else images | identities | head


def put(header: str = "last", index: bool = True) -> str:
    folder = f"memory://{uuid.uuid4().hex}"
    write_recordio(folder, bodies(header))
    if not index:
        storage.delete_file(f"{folder}/train.idx")
    return folder


def source(uri: str) -> RecordIOSource:
    return RecordIOSource(SourceSpec(format="recordio", uri=uri))


def samples(uri: str, part_bytes: int = 1 << 20) -> list[RawSample]:
    return [sample for part in source(uri).parts(part_bytes) for sample in part.samples()]


def lengths(num_bytes: int) -> list[int]:
    """Of a file cut short: all at which nothing but its contents tell, and a few of the others."""
    return [*range(0, num_bytes, 4), 1, 7, 1001 % num_bytes | 1, num_bytes - 1]


HEADERS = pytest.mark.parametrize("header", ["first", "last", "absent"])


# ---- what is in a pack -------------------------------------------------------------------------------------------


@HEADERS
@pytest.mark.parametrize("index", [True, False])
def test_images_and_identities_of_a_pack(header, index):
    folder = put(header, index)
    found = samples(folder)
    assert [(sample.identity, sample.image) for sample in found] == [
        (str(label), image(key)) for key, label in enumerate(LABELS, 1)
    ]
    offsets, position = {}, 0
    for key, body in bodies(header).items():
        offsets[key] = position
        position += len(record_bytes(body))
    first = 0 if header == "absent" else 1
    for key, sample in enumerate(found, first):
        place = f"record {key}" if index else f"record at byte {offsets[key]}"
        assert sample.name == f"{folder}/train.rec: {place}"


@given(header=st.sampled_from(["first", "last", "absent"]), index=st.booleans(), part_bytes=st.integers(1, 900))
def test_the_cut_into_parts_changes_neither_samples_nor_order(header, index, part_bytes):
    folder = put(header, index)
    parts = source(folder).parts(part_bytes)
    assert [sample for part in parts for sample in part.samples()] == samples(folder)
    sizes = [part.num_bytes for part in parts]
    whole = storage.size(f"{folder}/train.rec")
    assert sum(sizes) <= whole
    assert sum(sizes) >= (whole - 5 * 40 if index else whole)  # all but header and identity records
    if not index:
        assert max(sizes) <= max(part_bytes, 4)
    largest = max(len(record_bytes(body)) for body in bodies(header).values())
    assert max(sizes) <= max(part_bytes, largest)


@pytest.mark.parametrize("index", [True, False])
def test_parts_travel_by_pickle(index):
    folder = put(index=index)
    parts = source(folder).parts(200)
    assert len(parts) > 2
    sent = pickle.loads(pickle.dumps(parts))
    assert [sample for part in sent for sample in part.samples()] == samples(folder)


@pytest.mark.parametrize("name", ["header_first", "header_last", "no_header"])
@pytest.mark.parametrize("index", [True, False])
def test_mxnets_own_files(shared_data, tmp_path, name, index):
    golden = shared_data / "recordio_golden"
    for extension in ("rec", "idx") if index else ("rec",):
        shutil.copy(golden / f"{name}.{extension}", tmp_path)
    expected = {
        int(key): (str(int(entry["labels"][0])), base64.b64decode(entry["payload_b64"]))
        for key, entry in json.loads((golden / "expected.json").read_text()).items()
    }
    if name == "no_header":  # PROTOCOLS 3(d): its labels count modulo 3, and its fifth image is not empty
        expected = {key: (str(key % 3), b"z" if key == 5 else payload) for key, (_, payload) in expected.items()}
    for part_bytes in (1, 300, 1 << 20):
        found = samples(str(tmp_path), part_bytes)
        assert [(sample.identity, sample.image) for sample in found] == list(expected.values())


@pytest.mark.data
def test_the_real_pack_is_the_same_with_its_index_and_without(shared_data, tmp_path):
    real = shared_data / "faces_celeb299"
    shutil.copy(real / "train.rec", tmp_path)
    indexed, scanned = samples(str(real), 5_000_000), samples(str(tmp_path), 5_000_000)
    assert len(indexed) == 6288
    assert {sample.identity for sample in indexed} == {str(label) for label in range(299)}
    assert [sample[1:] for sample in indexed] == [sample[1:] for sample in scanned]
    assert source(str(real)).describe()["property"] == "299,112,112"


@pytest.mark.parametrize("label", [0.5, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("index", [True, False])
def test_a_label_that_is_no_class_number_is_named(tmp_path, label, index):
    write_recordio(str(tmp_path), {0: record_body([0.0], b"a"), 1: record_body([label], b"b")})
    if not index:
        (tmp_path / "train.idx").unlink()
    with pytest.raises(RecordIOError, match=r"train\.rec: record (1|at byte 36): the label .* is not a class number"):
        samples(str(tmp_path))


def test_an_index_may_name_some_of_the_records_in_any_order(tmp_path):
    write_recordio(str(tmp_path), bodies("absent"))
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join([lines[6], *reversed(lines[:6])]))
    assert [sample.image for sample in samples(str(tmp_path))] == [image(number) for number in range(1, 8)]
    parts = source(str(tmp_path)).parts(1)
    assert [part.num_bytes for part in parts] == [len(record_bytes(body)) for body in bodies("absent").values()]
    (tmp_path / "train.idx").write_text("".join([lines[5], lines[1], lines[3]]))
    assert [sample.image for sample in samples(str(tmp_path))] == [image(number) for number in (2, 4, 6)]


# ---- finding and opening -----------------------------------------------------------------------------------------


def test_what_is_recognised():
    def place(*files: str, uri: str = "memory://set", is_file: bool = False) -> Place:
        return Place(uri=uri, is_file=is_file, files=files, folders=())

    assert RecordIOSource.recognises(place("train.rec", "train.idx"))
    assert RecordIOSource.recognises(place("faces.rec"))
    assert RecordIOSource.recognises(place(uri="memory://set/faces.rec", is_file=True))
    assert not RecordIOSource.recognises(place("train.idx", "train.rec.txt"))
    assert not RecordIOSource.recognises(place(uri="memory://set/faces.zip", is_file=True))
    assert not RecordIOSource.recognises(place(uri="memory://set.rec"))


def test_a_folder_with_train_rec_or_one_other_or_the_file_itself(tmp_path):
    for name, label in (("train", 1), ("other", 2)):
        write_recordio(str(tmp_path), {0: record_body([label], b"a")}, name)
    assert samples(str(tmp_path))[0].identity == "1"
    assert samples(str(tmp_path / "other.rec"))[0].identity == "2"
    (tmp_path / "train.rec").rename(tmp_path / "third.rec")
    with pytest.raises(SourceError, match=r"holds 2 RecordIO files \(other\.rec, third\.rec\); name the one to read"):
        source(str(tmp_path))
    (tmp_path / "third.rec").unlink()
    assert samples(str(tmp_path))[0].identity == "2"
    (tmp_path / "other.rec").unlink()
    with pytest.raises(storage.MissingError, match=r"train\.rec: does not exist"):
        source(str(tmp_path))


@pytest.mark.parametrize("header", ["first", "last"])
def test_opening_reads_the_index_and_no_image(header):
    folder = put(header)
    read, data = [], storage.read_bytes(f"{folder}/train.rec")

    def spy(uri: str, start: int, num_bytes: int) -> bytes:
        read.append((uri.rsplit("/", 1)[1], num_bytes))
        return storage_read_range(uri, start, num_bytes)

    storage_read_range = storage.read_range
    with mock.patch.object(storage, "read_range", spy):
        source(folder).parts(100)
        # 40 bytes each: the header, and the last record, which shows that the file is whole.
        assert sum(num_bytes for name, num_bytes in read if name == "train.rec") == 80
        storage.delete_file(f"{folder}/train.idx")
        read.clear()
        source(folder).parts(100)
    assert read == []
    assert len(data) > 400


def test_a_pack_without_images_is_refused(tmp_path):
    write_recordio(str(tmp_path), {0: record_body((1, 1), b"")})
    with pytest.raises(SourceError, match=r"train\.rec: it holds no images"):
        source(str(tmp_path))


def test_the_description_tells_contents_apart_and_not_places(tmp_path):
    one, same, other = put(), put(), put("first")
    assert source(one).describe() == source(same).describe()
    assert source(one).describe() != source(other).describe()
    assert source(one).describe() == storage.plain_json(source(one).describe())
    description = source(one).describe()
    assert (description["format"], description["num_records"]) == ("recordio", 12)
    assert description["num_bytes"] == storage.size(f"{one}/train.rec")
    storage.write_bytes(f"{one}/property", b"4,112,112\n")
    assert source(one).describe() == description | {"property": "4,112,112"}
    assert set(source(put(index=False)).describe()) == {"format", "num_bytes"}


def test_the_version_changes_with_the_files(tmp_path):
    write_recordio(str(tmp_path), bodies("last"))
    version = source(str(tmp_path)).version()
    assert version == storage.plain_json(source(str(tmp_path)).version())
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").unlink()
    (tmp_path / "train.rec").write_bytes(data)
    changed = source(str(tmp_path)).version()
    assert changed != version
    lines = (tmp_path / "train.idx").read_bytes().splitlines(keepends=True)
    (tmp_path / "train.idx").write_bytes(b"".join(reversed(lines)))
    assert source(str(tmp_path)).version()["index_sha256"] != changed["index_sha256"]


# ---- damage ------------------------------------------------------------------------------------------------------


@HEADERS
def test_a_pack_with_an_index_cut_off_at_any_byte_is_noticed(tmp_path, header):
    data = storage.read_bytes(write_recordio(str(tmp_path), bodies(header)))
    for num_bytes in lengths(len(data)):
        (tmp_path / "train.rec").write_bytes(data[:num_bytes])
        with pytest.raises(RecordIOError, match=r"train\.(rec|idx)"):
            samples(str(tmp_path), 100)


@pytest.mark.parametrize(("header", "part_bytes"), [("first", 1 << 20), ("first", 60), ("last", 60)])
def test_a_pack_without_an_index_cut_off_within_a_record_is_noticed(tmp_path, header, part_bytes):
    data = storage.read_bytes(write_recordio(str(tmp_path), bodies(header)))
    boundaries = {int(line.split()[1]) for line in (tmp_path / "train.idx").read_text().splitlines()}
    (tmp_path / "train.idx").unlink()
    for num_bytes in lengths(len(data)):
        (tmp_path / "train.rec").write_bytes(data[:num_bytes])
        if num_bytes % 4:
            with pytest.raises(RecordIOError, match=rf"train\.rec: it ends within a record at byte {num_bytes}"):
                source(str(tmp_path))
        elif num_bytes == 0 or num_bytes not in boundaries:
            with pytest.raises(RecordIOError, match=r"train\.rec"):
                samples(str(tmp_path), part_bytes)
        elif header == "first" and part_bytes >= num_bytes:  # one part sees that less is there than is announced
            with pytest.raises(RecordIOError, match=r"the header announces 7 images and 4 identities, the file has \d"):
                samples(str(tmp_path), part_bytes)
        else:
            samples(str(tmp_path), part_bytes)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", r"train\.idx: the index is empty"),
        (b"0\t0\nx\n", r"train\.idx: line 2: 'x' is not"),
        (b"0\t0\n0\t48\n", r"train\.idx: lines 1 and 2 have the same key 0"),
        (b"0\t0\n1\t0\n", r"train\.idx: lines 1 and 2 have the same offset 0"),
        (b"0\t0\n1\t100000\n", r"train\.idx: line 2: record 1 starts at byte 100000, .*train\.rec has \d+ bytes"),
        (b"0\t0\n1\t-4\n", r"train\.idx: line 2: record 1 starts at byte -4"),
        (b"0\t0\n1\t4\n", r"train\.rec: record 1: no record starts at byte 4"),
        (b"0\t0\n1\t46\n", r"train\.rec: record 1: no record starts at byte 46"),
    ],
)
def test_an_index_that_does_not_fit_its_file_is_an_error(tmp_path, index, message):
    write_recordio(str(tmp_path), bodies("absent"))
    (tmp_path / "train.idx").write_bytes(index)
    with pytest.raises(RecordIOError, match=message):
        samples(str(tmp_path))


def test_an_index_that_points_at_the_files_end_is_an_error_before_anything_is_read(tmp_path):
    uri = write_recordio(str(tmp_path), bodies("last"))
    with (tmp_path / "train.idx").open("a") as file:
        file.write(f"99\t{storage.size(uri)}\n")
    with pytest.raises(RecordIOError, match=r"train\.idx: line 13: record 99 starts at byte"):
        source(str(tmp_path))


def test_what_looks_like_a_record_within_an_image_is_none_where_records_cannot_start(tmp_path):
    hidden = record_bytes(record_body([5.0], b"hidden"))
    uri = write_recordio(str(tmp_path), {0: record_body([0.0], b"x" + hidden + bytes(40))})
    place = storage.read_bytes(uri).index(hidden)
    assert place % 4 == 1
    (tmp_path / "train.idx").write_text(f"0\t{place}\n")
    with pytest.raises(RecordIOError, match=rf"train\.rec: record 0: no record starts at byte {place}"):
        samples(str(tmp_path))


def test_an_index_without_an_image_that_the_header_announces_is_an_error(tmp_path):
    write_recordio(str(tmp_path), bodies("last"))
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(line for line in lines if not line.startswith("5\t")))
    with pytest.raises(RecordIOError, match=r"the header announces 7 images, the index has 6"):
        source(str(tmp_path))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("part_bytes", [60, 1 << 20])
def test_garbage_between_images_is_noticed(tmp_path, index, part_bytes):
    data = storage.read_bytes(write_recordio(str(tmp_path), bodies("last")))
    lines = [line.split() for line in (tmp_path / "train.idx").read_text().splitlines()]
    place = int(lines[3][1])
    (tmp_path / "train.rec").write_bytes(data[:place] + bytes(8) + data[place:])
    moved = [(key, int(offset) + 8 * (int(offset) >= place)) for key, offset in lines]
    (tmp_path / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in moved))
    if not index:
        (tmp_path / "train.idx").unlink()
    with pytest.raises(RecordIOError, match=rf"no record starts at byte {place}"):
        samples(str(tmp_path), part_bytes)


def test_an_image_without_bytes_is_not_taken_for_an_identity(tmp_path):
    write_recordio(str(tmp_path), {0: record_body([3.0], b""), 1: record_body([4.0], b"", array=True)})
    (tmp_path / "train.idx").unlink()
    assert [(sample.identity, sample.image) for sample in samples(str(tmp_path))] == [("3", b""), ("4", b"")]


def test_a_header_that_announces_less_than_is_there_is_noticed_where_one_part_sees_all(tmp_path):
    write_insightface_pack([(label, b"image") for label in (0, 0, 1)], str(tmp_path), num_identities=2)
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.idx").unlink()
    (tmp_path / "train.rec").write_bytes(record_bytes(record_body([0.0], b"one more", 1)) + data)
    with pytest.raises(RecordIOError, match=r"announces 3 images and 2 identities, the file has 4 and 2"):
        samples(str(tmp_path))


def test_ids_that_are_all_zero_do_not_make_every_identity_a_header(tmp_path):
    plain = {key: record_body([0.0], b"image") for key in (1, 2)} | {3: record_body((1, 3), b"")}
    write_recordio(str(tmp_path), plain | {0: record_body((3, 4), b"")})
    (tmp_path / "train.idx").unlink()
    assert len(samples(str(tmp_path))) == 2
