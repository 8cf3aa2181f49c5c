"""Tables: Parquet, Arrow IPC and Feather, read in small pieces and never past damage."""

from __future__ import annotations

import io
import pickle
import re

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.sources import SourceError, detect_format
from tests.pipeline.data.sources.reading import opened, pairs, read, uri
from tests.pipeline.data.writers import jpeg

IMAGES = [jpeg(i) for i in range(100)]
LABELS = [i * 7 % 11 for i in range(100)]


def table(images=IMAGES, labels=LABELS, image="image", label="label", **more):
    return pa.table({"row": list(range(len(images))), image: images, label: labels, **more})


def parquet(path, data, rows=30, **options):
    pq.write_table(data, path, row_group_size=rows, **options)


def arrow_file(path, data, rows=30):
    with pa.ipc.new_file(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=rows)


def arrow_stream(path, data, rows=30):
    with pa.ipc.new_stream(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=rows)


def feather_file(path, data, rows=30):
    feather.write_feather(data, str(path), compression="lz4", chunksize=rows)


WRITERS = {"x.parquet": parquet, "x.arrow": arrow_file, "stream.arrow": arrow_stream, "x.feather": feather_file}


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


def written(tmp_path, name, data, **options):
    WRITERS[name](tmp_path / name, data)
    return opened("tables", tmp_path / name, **options)


@pytest.mark.parametrize("part_bytes", [1, 60_000, 10**9])
def test_every_format_is_read_whole_and_in_order(tmp_path, kind, part_bytes):
    source = written(tmp_path, kind, table())
    assert pairs(source, part_bytes) == [(str(label), image) for label, image in zip(LABELS, IMAGES, strict=True)]


def test_a_sample_is_named_by_its_group_and_row(tmp_path, kind):
    names = [sample.name for sample in read(written(tmp_path, kind, table()))]
    group = "row group" if kind == "x.parquet" else "record batch"
    assert names == [f"{uri(tmp_path)}/{kind}: {group} {i // 30}, row {i % 30}" for i in range(100)]


def test_parts_are_runs_of_groups(tmp_path, kind):
    source = written(tmp_path, kind, table())
    counts = [len(list(part.samples())) for part in source.parts(1)]
    assert counts == ([100] if kind == "stream.arrow" else [30, 30, 30, 10])
    assert len(source.parts(10**9)) == 1
    total = sum(part.num_bytes for part in source.parts(1))
    assert total == pytest.approx((tmp_path / kind).stat().st_size, rel=0.15)


def test_a_folder_of_tables_is_read_file_by_file(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        parquet(tmp_path / f"data/train-{i}.parquet", table(IMAGES[i * 5 : i * 5 + 5], [i] * 5))
    (tmp_path / "README.md").write_text("card")
    source = opened("tables", tmp_path)
    assert pairs(source) == [(str(i // 5), IMAGES[i]) for i in range(15)]
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("data/*"))
    expected = {"format": "tables", "num_files": 3, "num_bytes": num_bytes, "num_other_files": 1}
    assert source.describe() == expected | {"image_column": "image", "label_column": "label"}


@pytest.mark.parametrize(
    "images",
    [
        pa.array(IMAGES[:8], pa.binary()),
        pa.array(IMAGES[:8], pa.large_binary()),
        pa.array([{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES[:8])]),
        pa.array([{"path": None, "bytes": image} for image in IMAGES[:8]]),
    ],
    ids=["binary", "large binary", "Hugging Face", "without path"],
)
@pytest.mark.parametrize(
    ("labels", "identities"),
    [
        (pa.array([3, 5] * 4, pa.int64()), ["3", "5"]),
        (pa.array([3, 5] * 4, pa.uint8()), ["3", "5"]),
        (pa.array(["anna", "bert"] * 4), ["anna", "bert"]),
        (pa.array(["007", " 8 "] * 4, pa.large_string()), ["7", "8"]),
        (pa.array(["anna", "bert"] * 4).dictionary_encode(), ["anna", "bert"]),
        (pa.array([3, 5] * 4).dictionary_encode(), ["3", "5"]),
    ],
    ids=["int64", "uint8", "string", "large string", "dictionary of strings", "dictionary of ints"],
)
def test_columns_of_every_kind(tmp_path, kind, images, labels, identities):
    source = written(tmp_path, kind, pa.table({"image": images, "label": labels}))
    assert pairs(source) == [(identities[i % 2], IMAGES[i]) for i in range(8)]


@pytest.mark.parametrize(
    ("image", "label"), [("image", "label"), ("img", "identity"), ("JPG", "Cls"), ("image_bytes", "id")]
)
def test_columns_are_found_by_their_usual_names(tmp_path, kind, image, label):
    assert pairs(written(tmp_path, kind, table(image=image, label=label)))[1] == ("7", IMAGES[1])


def test_a_column_of_row_numbers_is_no_label_beside_one(tmp_path, kind):
    assert pairs(written(tmp_path, kind, table(id=list(range(100)))))[1] == ("7", IMAGES[1])


def test_columns_may_be_named(tmp_path, kind):
    data = table(image="photo", label="who", label_2=[1] * 100)
    source = written(tmp_path, kind, data, image_column="photo", label_column="who")
    assert pairs(source)[1] == ("7", IMAGES[1])
    assert source.describe()["label_column"] == "who"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, r"no columns named 'photo'; there are: row, image, label, text; image_column says"),
        ({"label_column": "Label"}, r"no columns named 'Label'; there are: row, image, label, text; label_column says"),
        ({"image_column": "text"}, r"column 'text' \(image_column\) holds string; expected: bytes, or a struct"),
        ({"label_column": "image"}, r"column 'image' \(label_column\) holds binary; expected: integers or strings"),
    ],
)
def test_a_wrong_column_is_refused_and_the_others_listed(tmp_path, kind, options, message):
    with pytest.raises(SourceError, match=rf"{tmp_path}/{kind}: {message}"):
        written(tmp_path, kind, table(text=["x"] * 100), **options)


def test_columns_that_cannot_be_told_are_refused(tmp_path, kind):
    with pytest.raises(
        SourceError, match=r"no columns with one of the usual names \(image, img, .*; there are: row, photo"
    ):
        written(tmp_path, kind, table(image="photo"))
    with pytest.raises(SourceError, match=r"no columns with one of the usual names .*; label_column says which it is"):
        written(tmp_path, kind, table(label="who"))
    with pytest.raises(
        SourceError, match=r"2 columns with one of the usual names \(label, identity.*label_column says"
    ):
        written(tmp_path, kind, table(identity=["x"] * 100))
    for wrong in ([1.5] * 100, [True] * 100, [[1]] * 100):
        with pytest.raises(
            SourceError, match=r"column 'label' \(label_column\) holds (double|bool|list<.*>); expected: int"
        ):
            written(tmp_path, kind, table(labels=wrong))


def test_files_whose_columns_differ_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", table())
    parquet(tmp_path / "b.parquet", table(label="identity"))
    with pytest.raises(SourceError, match=r"differ in their columns: 'image' with 'identity' and 'image' with 'label'"):
        opened("tables", tmp_path)


@pytest.mark.parametrize("bad", [None, ""])
def test_a_row_without_a_label_is_named(tmp_path, kind, bad):
    labels = ["x"] * 70 + [bad] + ["x"] * 29
    group = "row group" if kind == "x.parquet" else "record batch"
    what = "null" if bad is None else "empty"
    with pytest.raises(SourceError, match=rf"{kind}: {group} 2, row 10: column 'label' has no label \({what}\)"):
        read(written(tmp_path, kind, table(labels=labels)))


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": "1.jpg"}])
def test_a_row_without_an_image_is_named(tmp_path, kind, nothing):
    images = pa.array([*({"bytes": image, "path": ""} for image in IMAGES[:40]), nothing])
    with pytest.raises(SourceError, match=rf"{kind}: (row group|record batch) 1, row 10: column 'image' has no image"):
        read(written(tmp_path, kind, table(images, LABELS[:41])))


def test_a_file_without_rows_adds_nothing(tmp_path, kind):
    WRITERS[kind](tmp_path / kind, table().slice(0, 0))
    parquet(tmp_path / "y.parquet", table())
    assert [image for _, image in pairs(opened("tables", tmp_path))] == IMAGES


def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, kind):
    WRITERS[kind](tmp_path / kind, table(IMAGES[:12], LABELS[:12]), rows=3)
    whole = (tmp_path / kind).read_bytes()
    ends = {0, 1, 4, 7, 8, 12, len(whole) - 1, len(whole) - 4, len(whole) - 8, len(whole) - 9}
    ends |= set(range(16, len(whole), 631)) | {at.start() for at in re.finditer(rb"\xff{4}", whole)} - {0}
    for end in sorted(ends):
        (tmp_path / kind).write_bytes(whole[:end])
        with pytest.raises(SourceError, match=rf"{tmp_path}/{kind}: "):
            read(opened("tables", tmp_path / kind))


@pytest.mark.parametrize("row", [30, 40, 59])
def test_a_page_that_differs_from_its_checksum_is_refused(tmp_path, row):
    parquet(tmp_path / "x.parquet", table(), write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[data.index(IMAGES[row]) + 100] ^= 1
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(SourceError, match=r"x\.parquet: row group 1: damaged, or not what its name says: .*checksum"):
        read(opened("tables", tmp_path / "x.parquet"))


@pytest.mark.parametrize("name", ["x.arrow", "stream.arrow"])
def test_damaged_offsets_are_refused(tmp_path, name):
    images = pa.array(IMAGES[:3])
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 10, 2**30, 20)))
    bad = pa.Array.from_buffers(pa.binary(), 3, [None, offsets, images.buffers()[2]])
    write = {"x.arrow": pa.ipc.new_file, "stream.arrow": pa.ipc.new_stream}[name]
    with write(str(tmp_path / name), table().select(["image", "label"]).schema) as writer:
        for column in (images, bad):
            writer.write_batch(pa.record_batch({"image": column, "label": [1, 2, 3]}))
    with pytest.raises(SourceError, match=rf"{name}: record batch 1: damaged"):
        read(opened("tables", tmp_path / name))


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"FEA1" + b"\0" * 100, b"PAR1" + b"\0" * 50, b"ARROW1\0\0" * 20])
def test_what_is_no_table_is_refused(tmp_path, data):
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(SourceError, match=rf"{tmp_path}/x\.parquet: "):
        opened("tables", tmp_path / "x.parquet")


def test_tables_of_an_object_store_are_read():
    buffer = io.BytesIO()
    pq.write_table(table(), buffer, row_group_size=30)
    storage.write_bytes("memory://table-source/x.parquet", buffer.getvalue())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=30)
    storage.write_bytes("memory://table-source/y.arrow", sink.getvalue().to_pybytes())
    assert [image for _, image in pairs(opened("tables", "memory://table-source"))] == IMAGES * 2


def test_an_unreachable_store_is_a_storage_error(tmp_path, monkeypatch):
    source = written(tmp_path, "x.parquet", table())

    class Failing(io.FileIO):
        def readinto(self, buffer):
            raise storage.StorageError("s3://b/x.parquet: cannot read: the connection was reset")

    monkeypatch.setattr(storage, "open_read", lambda place: io.BufferedReader(Failing(tmp_path / "x.parquet")))
    with pytest.raises(storage.StorageError, match=r"the connection was reset"):
        read(source)


def test_a_part_is_small(tmp_path, kind):
    assert all(len(pickle.dumps(part)) < 1000 for part in written(tmp_path, kind, table()).parts(1))


def test_tables_are_recognised_by_their_names(tmp_path, kind):
    written(tmp_path, kind, table())
    assert detect_format(str(tmp_path)) == detect_format(str(tmp_path / kind)) == "tables"
