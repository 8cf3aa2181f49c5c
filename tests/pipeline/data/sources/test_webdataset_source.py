"""WebDataset shards of others."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.sources import SourceError, detect_format
from tests.pipeline.data.sources.reading import opened, pairs, read, uri
from tests.pipeline.data.writers import jpeg, label_of, packed_set


def shard_of(samples):
    """By webdataset's own writer: dicts of extension to bytes, with __key__."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return buffer.getvalue()


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, body in files:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def written(tmp_path, data, name="shard.tar"):
    (tmp_path / name).write_bytes(data)
    return opened("webdataset", tmp_path / name)


@given(
    keys=st.lists(
        st.from_regex(r"([abc0/._-]{0,20}/)?[abc0_-]{1,20}", fullmatch=True), min_size=1, max_size=6, unique=True
    ),
    extension=st.sampled_from(["jpg", "jpeg", "png", "webp"]),
)
def test_what_webdataset_writes_is_read(keys, extension):
    samples = [{"__key__": key, extension: b"image %d" % i, "cls": b"%d" % i} for i, key in enumerate(keys)]
    storage.write_bytes("memory://wds-source/shard.tar", shard_of(samples))
    found = read(opened("webdataset", "memory://wds-source"))
    assert found == [
        (f"memory://wds-source/shard.tar: {sample['__key__']}", sample["cls"].decode(), sample[extension])
        for sample in samples
    ]


def test_shards_are_parts_in_the_order_of_their_names(tmp_path):
    for i in (2, 0, 1):
        samples = [{"__key__": f"{j}", "jpg": bytes([i, j]), "cls": b"%d" % i} for j in range(3)]
        (tmp_path / f"shard-{i}.tar").write_bytes(shard_of(samples))
    (tmp_path / "sizes.json").write_text("{}")
    source = opened("webdataset", tmp_path)
    assert len(source.parts(1)) == len(source.parts(10**9)) == 3
    assert pairs(source) == [(str(i), bytes([i, j])) for i in range(3) for j in range(3)]
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert source.describe() == {"format": "webdataset", "num_files": 3, "num_bytes": num_bytes, "num_other_files": 1}
    assert sum(part.num_bytes for part in source.parts(1)) == num_bytes


def test_shards_of_our_own_are_read(tmp_path):
    packed_set(tmp_path, (5, 3))
    assert pairs(opened("webdataset", tmp_path)) == [(str(label_of(i)), jpeg(i)) for i in range(8)]


@pytest.mark.parametrize(
    ("fields", "identity"),
    [
        ({"cls": b"7"}, "7"),
        ({"cls": b" 007\n"}, "7"),
        ({"cls": b"n0007"}, "n0007"),
        ({"json": b'{"label": 12}'}, "12"),
        ({"json": b'{"identity": "Anna \xc3\x84", "age": 3}'}, "Anna Ä"),
        ({"json": b'{"cls": 3.0}'}, "3"),
        ({"json": b'{"identity": "x", "label": 5}'}, "5"),
        ({"txt": b"42\n"}, "42"),
        ({"txt": b"anna"}, "anna"),
        ({"json": b'{"caption": "x"}', "txt": b"6"}, "6"),
        ({"json": b'{"label": 5}', "cls": b"4", "txt": b"a face"}, "4"),
        ({"cls": b"4", "mask.png": b"x", "npy": b"x"}, "4"),
        ({"CLS": b"4"}, "4"),
    ],
)
@pytest.mark.parametrize("image_first", [True, False])
def test_where_the_label_is_found(tmp_path, fields, identity, image_first):
    files = [(f"a.{field}", body) for field, body in fields.items()]
    image = [("a.jpg", b"image")]
    found = pairs(written(tmp_path, tar_of(image + files if image_first else files + image)))
    assert found == [(identity, b"image")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [("b.jpg", b"x")],
            r"b: no label among its members \.jpg; expected: an image \(\.jpg, \.jpeg, \.png, \.webp\)",
        ),
        ([("b.cls", b"1")], r"b: no images among its members \.cls"),
        ([("b.jpg", b"x"), ("c.cls", b"1")], r"b: no label among its members \.jpg"),
        ([("b.jpg", b"x"), ("b.png", b"x"), ("b.cls", b"1")], r"b: 2 images among its members \.jpg, \.png, \.cls"),
        ([("b.jpg", b"x"), ("b.JPG", b"x"), ("b.cls", b"1")], r"the sample 'b' has two members \.jpg"),
        ([("b.jpg", b"x"), ("b.cls", b"1"), ("b.cls", b"1")], r"the sample 'b' has two members \.cls"),
        ([("b.gif", b"x"), ("b.cls", b"1")], r"b: no images among its members \.gif, \.cls"),
        ([("b.jpg", b"x"), ("b.cls", b"")], r"b\.cls: '' is not a class number or a name"),
        ([("b.jpg", b"x"), ("b.cls", b"\xff")], r"b\.cls: b'\\xff' is not UTF-8"),
        ([("b.jpg", b"x"), ("b.txt", b"two\nlines")], r"b\.txt: 'two\\nlines' is not a class number or a name"),
        ([("b.jpg", b"x"), ("b.json", b"{")], r"b\.json: not JSON"),
        ([("b.jpg", b"x"), ("b.json", b'{"age": 3}')], r"b: no label among its members \.jpg, \.json"),
        ([("b.jpg", b"x"), ("b.json", b"[3]")], r"b: no label among its members"),
        (
            [("b.jpg", b"x"), ("b.json", b'{"label": null}')],
            r"b\.json: label is None, expected: a class number or a name",
        ),
        ([("b.jpg", b"x"), ("b.json", b'{"label": true}')], r"b\.json: label is True"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": [1]}')], r"b\.json: label is \[1\]"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": ""}')], r"b\.json: label is ''"),
        ([("noextension", b"x")], r"byte 2048: noextension: no member of a sample; expected: <key>\.<extension>"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path, files, message):
    source = written(tmp_path, tar_of([("a.jpg", b"x"), ("a.cls", b"1"), *files]))
    with pytest.raises(SourceError, match=rf"{tmp_path}/shard\.tar: {message}"):
        read(source)


def test_members_of_a_sample_that_lie_apart_are_refused(tmp_path):
    # As WebDataset itself groups them: neighbours.
    files = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"1"), ("b.cls", b"2")]
    with pytest.raises(SourceError, match=r"shard\.tar: a: no label"):
        read(written(tmp_path, tar_of(files)))


def test_hidden_members_and_readmes_are_passed_over(tmp_path):
    files = [("README", b"x"), (".hidden", b"x"), ("a.jpg", b"1"), ("a.cls", b"1")]
    assert pairs(written(tmp_path, tar_of(files))) == [("1", b"1")]


def test_a_shard_without_samples_is_refused(tmp_path):
    with pytest.raises(SourceError, match=rf"{tmp_path}/shard\.tar: holds no samples"):
        read(written(tmp_path, tar_of([("README", b"x")])))


def test_a_shard_cut_short_is_refused_wherever_it_ends(tmp_path):
    data = shard_of([{"__key__": f"{i}", "jpg": jpeg(i), "cls": b"1"} for i in range(5)])
    end = (len(data.rstrip(b"\0")) + 511) // 512 * 512
    for cut in [*range(0, end, 509), *range(0, end + 512, 512)]:
        with pytest.raises(SourceError, match=rf"{tmp_path}/shard\.tar: (byte \d+: truncated|empty)"):
            read(written(tmp_path, data[:cut]))


def test_shards_are_recognised_by_their_first_members(tmp_path):
    shards = {
        "cls": shard_of([{"__key__": "a", "jpg": b"x", "cls": b"1"}]),
        "json": shard_of([{"__key__": "a", "webp": b"x", "json": json.dumps({"label": 1}).encode()}]),
        "txt": shard_of([{"__key__": "a", "png": b"x", "txt": b"17"}]),
        "many": tar_of([("a.jpg", b"x"), *((f"a.{i}.npy", b"x") for i in range(9)), ("a.cls", b"1")]),
    }
    for name, data in shards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(data)
        assert detect_format(str(tmp_path / name)) == "webdataset"
        assert detect_format(str(tmp_path / name / "0.tar")) == "webdataset"
    others = {
        "folders": tar_of([("p/1.jpg", b"x"), ("p/2.jpg", b"x")]),
        "captions": tar_of([("p/1.jpg", b"x"), ("p/1.txt", b"a face of somebody")]),
        "landmarks": tar_of([("p/1.jpg", b"x"), ("p/1.json", b'{"eyes": [1, 2]}')]),
        "damaged": b"x" * 3000,
        "empty": b"",
    }
    for name, data in others.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        assert detect_format(str(tmp_path / f"{name}.tar")) == "archives"


def test_a_long_shard_is_not_read_to_be_recognised(tmp_path):
    whole = shard_of([{"__key__": f"{i}", "jpg": b"x", "cls": b"1"} for i in range(50)])
    (tmp_path / "cut.tar").write_bytes(whole[:-15_000])
    assert detect_format(str(tmp_path / "cut.tar")) == "webdataset"  # packing finds that it is cut short


def test_the_version_changes_with_a_shard(tmp_path):
    source = written(tmp_path, shard_of([{"__key__": "a", "jpg": b"x", "cls": b"1"}]))
    assert opened("webdataset", tmp_path / "shard.tar").version() == source.version()
    changed = written(tmp_path, shard_of([{"__key__": "a", "jpg": b"y", "cls": b"1"}]))
    assert changed.version() != source.version()
    assert changed.describe() == source.describe()
    assert uri(tmp_path) not in str(source.describe())


def test_a_set_that_we_packed_is_a_source_again_with_all_that_lies_beside_its_shards(tmp_path):
    packed_set(tmp_path / "set", (4, 3))
    for name in ("data_card.md", "data_card/faces.jpg", "quarantine.jsonl", "report.json"):
        storage.write_bytes(f"{tmp_path}/set/{name}", b"beside")
    source = opened("webdataset", f"{tmp_path}/set")
    assert [sample.image for part in source.parts(1) for sample in part.samples()] == [jpeg(i) for i in range(7)]
