"""Zips and tars of folders: read whole, and never past damage."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import warnings
import zipfile

import pytest

from pipeline import storage
from pipeline.data.sources import SourceError, detect_format
from tests.pipeline.data.sources.reading import opened, pairs, read, uri
from tests.pipeline.data.writers import jpeg, tar_bytes

FILES = {f"web/{person}/{i}.jpg": jpeg(i) for i in range(6) for person in (f"id_{i % 3}",)}
EXPECTED = [(name.split("/")[1], body) for name, body in FILES.items()]


def tar_of(files, mode="w", prefix=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def zip_of(files, method=zipfile.ZIP_DEFLATED, folders=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for folder in folders:
            archive.writestr(folder + "/", b"")
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()


ARCHIVES = {
    "faces.tar": tar_of(FILES),
    "faces.tar.gz": tar_of(FILES, "w:gz"),
    "faces.tgz": tar_of(FILES, "w:gz"),
    "faces.zip": zip_of(FILES),
    "stored.zip": zip_of(FILES, zipfile.ZIP_STORED),
    "FACES.ZIP": zip_of(FILES),
}


def written(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return opened("archives", tmp_path / name)


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("part_bytes", [1, 12_000, 10**9])
def test_every_kind_of_archive_is_read_whole_and_in_order(tmp_path, name, part_bytes):
    source = written(tmp_path, name, ARCHIVES[name])
    assert pairs(source, part_bytes) == EXPECTED
    assert [sample.name for sample in read(source)] == [f"{uri(tmp_path)}/{name}: {member}" for member in FILES]


def test_a_folder_of_archives_is_read_archive_by_archive(tmp_path):
    for i in range(3):
        files = {f"p{i}/{j}.jpg": bytes([i, j]) for j in range(4)}
        (tmp_path / f"{i}.{('zip', 'tar', 'tar.gz')[i]}").write_bytes(
            (zip_of(files), tar_of(files), tar_of(files, "w:gz"))[i]
        )
    (tmp_path / "readme.md").write_text("notes")
    source = opened("archives", tmp_path)
    assert pairs(source) == [(f"p{i}", bytes([i, j])) for i in range(3) for j in range(4)]
    sizes = [path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".md"]
    expected = {"format": "archives", "num_files": 3, "num_bytes": sum(sizes), "num_other_files": 1}
    assert source.describe() == expected


def test_a_zip_is_cut_into_runs_of_members_and_a_tar_is_not(tmp_path):
    parts = written(tmp_path, "faces.zip", ARCHIVES["faces.zip"]).parts(2 * max(map(len, FILES.values())))
    assert [len(list(part.samples())) for part in parts] == [2, 2, 2]
    assert sum(part.num_bytes for part in parts) == sum(map(len, FILES.values()))
    assert len(written(tmp_path, "faces.tar", ARCHIVES["faces.tar"]).parts(1)) == 1


@pytest.mark.parametrize("prefix", ["./", "a/b/c/", ""])
def test_the_identity_is_the_folder_directly_above_the_image(tmp_path, prefix):
    assert pairs(written(tmp_path, "x.tar", tar_of(FILES, prefix=prefix))) == EXPECTED
    assert pairs(written(tmp_path, "x.zip", zip_of({prefix + name: body for name, body in FILES.items()}))) == EXPECTED


@pytest.mark.parametrize("name", ["lone.jpg", "./lone.jpg"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_image_in_no_folder_is_refused(tmp_path, name, kind):
    data = {"zip": zip_of, "tar": tar_of}[kind](FILES | {name: b"x"})
    with pytest.raises(SourceError, match=rf"{tmp_path}/x\.{kind}: {name}: an image in no folder"):
        read(written(tmp_path, f"x.{kind}", data))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_notes_are_passed_over_and_unknown_members_refused(tmp_path, kind):
    write = {"zip": zip_of, "tar": tar_of}[kind]
    notes = {"web/list.txt": b"x", "web/id_1/._1.jpg": b"x", "__MACOSX/web/id_1/1.jpg": b"x", "README": b"x"}
    assert pairs(written(tmp_path, f"x.{kind}", write(FILES | notes))) == EXPECTED
    with pytest.raises(SourceError, match=rf"{tmp_path}/x\.{kind}: web/id_1/1\.gif: neither an image"):
        read(written(tmp_path, f"x.{kind}", write(FILES | {"web/id_1/1.gif": b"x"})))
    with pytest.raises(SourceError, match=rf"{tmp_path}/x\.{kind}: holds no images"):
        read(written(tmp_path, f"x.{kind}", write(notes)))


def test_folder_entries_of_a_zip_are_no_data(tmp_path):
    assert pairs(written(tmp_path, "x.zip", zip_of(FILES, folders=["web", "web/id_0"]))) == EXPECTED


def test_names_outside_ascii_are_identities(tmp_path):
    files = {"gesichter/Änne 顔/1.jpg": b"1", "gesichter/bob/1.jpg": b"2"}
    assert pairs(written(tmp_path, "x.zip", zip_of(files))) == [("Änne 顔", b"1"), ("bob", b"2")]
    assert pairs(written(tmp_path, "x.tar", tar_of(files))) == [("Änne 顔", b"1"), ("bob", b"2")]


@pytest.mark.parametrize("name", ["faces.tar", "faces.tar.gz", "faces.zip", "stored.zip"])
def test_an_archive_cut_short_is_refused_by_name(tmp_path, name):
    data = ARCHIVES[name]
    end = len(data) if name != "faces.tar" else data.rindex(b"\xff\xd9") + 512
    for cut in [0, 1, 100, 511, 512, *range(600, end - 1, 977), end - 1]:
        with pytest.raises(SourceError, match=rf"{tmp_path}/{name}: "):
            read(written(tmp_path, name, data[:cut]))


def test_no_flipped_byte_of_a_zip_gives_other_samples(tmp_path):
    whole = zip_of({f"web/p{i}/{i}.jpg": b"image %d" % i * 5 for i in range(3)})
    expected = read(written(tmp_path, "x.zip", whole))
    refused = 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x41
        try:
            found = read(written(tmp_path, "x.zip", bytes(data)))
        except SourceError as error:
            refused += str(error).startswith(f"{uri(tmp_path)}/x.zip")
            continue
        assert found == expected  # a time or an attribute
    assert refused > len(whole) / 2


@pytest.mark.parametrize("count", [3, pytest.param(65_537, marks=pytest.mark.slow)])
def test_members_that_a_damaged_directory_hides_are_missed(tmp_path, count):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(count):
            archive.writestr(zipfile.ZipInfo(f"p/{i}.jpg"), b"")
    assert len(written(tmp_path, "x.zip", buffer.getvalue()).parts(1)[0].entries) == count
    data = bytearray(buffer.getvalue())
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    data[first + 32 : first + 34] = (second - first).to_bytes(2, "little")  # its comment swallows the next member
    source = written(tmp_path, "x.zip", bytes(data))
    with pytest.raises(SourceError, match=rf"x\.zip: damaged: {count - 1} members found, {count} are announced"):
        source.parts(1)


def test_no_flipped_byte_of_a_compressed_tar_gives_other_samples(tmp_path):
    whole = tar_of({f"web/p{i}/{i}.jpg": b"image %d" % i * 5 for i in range(3)}, "w:gz")
    expected = read(written(tmp_path, "x.tgz", whole))
    refused = 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x41
        try:
            found = read(written(tmp_path, "x.tgz", bytes(data)))
        except SourceError as error:
            refused += str(error).startswith(f"{uri(tmp_path)}/x.tgz")
            continue
        assert found == expected
    assert refused > len(whole) * 0.8


def test_a_damaged_body_names_archive_member_and_byte(tmp_path):
    data = bytearray(ARCHIVES["stored.zip"])
    at = data.index(jpeg(2))
    data[at + 50] ^= 1
    with pytest.raises(
        SourceError, match=rf"x\.zip: web/id_2/2\.jpg: byte {at - 30 - 14}: damaged: crc32 is [0-9a-f]{{8}}"
    ):
        read(written(tmp_path, "x.zip", bytes(data)))
    data = bytearray(gzip.decompress(ARCHIVES["faces.tgz"]))
    data[512 + (len(jpeg(0)) + 511) // 512 * 512 + 3] ^= 1
    with pytest.raises(SourceError, match=r"x\.tgz: byte \d+: damaged header"):
        read(written(tmp_path, "x.tgz", gzip.compress(bytes(data))))
    with pytest.raises(SourceError, match=r"x\.tgz: before byte \d+: damaged gzip: Compressed file ended"):
        read(written(tmp_path, "x.tgz", ARCHIVES["faces.tgz"][:-9]))


def test_a_member_that_swells_beyond_its_size_is_refused(tmp_path):
    bomb = bytearray(zip_of({"a/1.jpg": bytes(50_000_000)}))
    directory = bomb.rindex(b"PK\x01\x02")
    bomb[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")
    with pytest.raises(SourceError, match=r"x\.zip: a/1\.jpg: byte 0: damaged: 1001 bytes, the directory says 1000"):
        read(written(tmp_path, "x.zip", bytes(bomb)))


def test_an_encrypted_member_is_refused(tmp_path):
    data = bytearray(zip_of(FILES))
    directory = data.index(b"PK\x01\x02")
    data[directory + 8] |= 1
    with pytest.raises(SourceError, match=r"x\.zip: web/id_0/0\.jpg: encrypted"):
        read(written(tmp_path, "x.zip", bytes(data)))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_compression_is_refused(tmp_path, method):
    with pytest.raises(SourceError, match=rf"x\.zip: web/id_0/0\.jpg: compressed by method {method}"):
        read(written(tmp_path, "x.zip", zip_of(FILES, method)))


def test_a_link_to_an_image_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("a/1.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, b"../b/1.jpg")
    with pytest.raises(SourceError, match=r"x\.zip: a/1\.jpg: a link, not an image"):
        read(written(tmp_path, "x.zip", buffer.getvalue()))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("a/readme", "a/1.jpg"):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "b/1.jpg"
                archive.addfile(member)
        with pytest.raises(SourceError, match=r"x\.tar: a/1\.jpg: a link, not an image"):
            read(written(tmp_path, "x.tar", buffer.getvalue()))


def test_members_of_one_name_are_both_read(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a/1.jpg", b"first")
        archive.writestr("a/1.jpg", b"second")
    assert pairs(written(tmp_path, "x.zip", buffer.getvalue())) == [("a", b"first"), ("a", b"second")]


def test_a_zip_is_read_from_front_to_back_whatever_the_order_of_its_directory(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in FILES.items():
            archive.writestr(name, body)
        archive.filelist.reverse()
    assert pairs(written(tmp_path, "x.zip", buffer.getvalue())) == EXPECTED


def test_an_image_that_damage_made_a_folder_is_refused(tmp_path):
    data = bytearray(zip_of(FILES))
    at = data.rindex(b"web/id_1/1.jpg")
    data[at + 13] = ord("/")
    with pytest.raises(SourceError, match=rf"x\.zip: web/id_1/1\.jp/: damaged: a folder of {len(jpeg(1))} bytes"):
        read(written(tmp_path, "x.zip", bytes(data)))


def test_a_zip_behind_other_bytes_is_read(tmp_path):
    assert pairs(written(tmp_path, "x.zip", b"#!/bin/sh\n" * 7 + zip_of(FILES))) == EXPECTED


def test_archives_of_an_object_store_are_read():
    storage.write_bytes("memory://archive-source/x.zip", zip_of(FILES))
    storage.write_bytes("memory://archive-source/y.tar.gz", tar_of(FILES, "w:gz"))
    assert pairs(opened("archives", "memory://archive-source")) == EXPECTED * 2


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"x\.rar: neither one of archives \(\.tar, \.tar\.gz, \.tgz, \.zip\)"):
        opened("archives", tmp_path)


def test_archives_are_recognised_and_webdataset_shards_told_apart(tmp_path):
    for name, data in ARCHIVES.items():
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_bytes(data)
        assert detect_format(str(folder)) == detect_format(str(folder / name)) == "archives"
    (tmp_path / "wds.tar").write_bytes(tar_bytes([("a", b"x", b"1")]))
    assert detect_format(str(tmp_path / "wds.tar")) == "webdataset"


def test_the_version_changes_with_an_archive(tmp_path):
    before = written(tmp_path, "x.zip", ARCHIVES["faces.zip"]).version()
    assert opened("archives", tmp_path / "x.zip").version() == before
    assert written(tmp_path, "x.zip", ARCHIVES["stored.zip"]).version() != before
