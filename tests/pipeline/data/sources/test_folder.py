"""Folders of images by person."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest

from pipeline import storage
from pipeline.data.sources import SourceError, detect_format, open_source
from pipeline.data.sources.base import Place, SourceSpec
from pipeline.data.sources.files import Wanted, class_name, extension, is_beside, read_ahead
from pipeline.data.sources.folder import FolderSource
from tests.pipeline.data.sources.reading import opened, pairs, read, uri
from tests.pipeline.data.writers import jpeg

FILES = {
    "anna/1.jpg": b"a1",
    "anna/2.JPEG": b"a2",
    "bert/x.png": b"b1",
    "c/deep/er/1.webp": b"c1",
    "c/deep/er/2.bmp": b"c2",
    "c/1.jpg": b"c0",
}


def write(folder, files):
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def test_every_image_is_read_in_order_with_its_folder_as_identity(tmp_path):
    source = opened("folder", write(tmp_path, FILES))
    assert read(source) == [
        (f"{uri(tmp_path)}/{name}", name.rsplit("/", 1)[0], body) for name, body in sorted(FILES.items())
    ]
    assert [identity for identity, _ in pairs(source)] == ["anna", "anna", "bert", "c", "c/deep/er", "c/deep/er"]


@pytest.mark.parametrize("part_bytes", [1, 700, 3000, 10**9])
def test_parts_are_runs_of_about_the_size_that_is_asked_for(tmp_path, part_bytes):
    files = {f"p{i // 10:02d}/{i:03d}.jpg": jpeg(i)[: 100 + i] for i in range(150)}
    source = opened("folder", write(tmp_path, files))
    parts = source.parts(part_bytes)
    assert [image for _, image in pairs(source, part_bytes)] == list(files.values())
    assert sum(part.num_bytes for part in parts) == sum(map(len, files.values()))
    assert all(part.num_bytes <= max(part_bytes, 250) for part in parts)
    assert all(first.num_bytes + second.num_bytes > part_bytes for first, second in pairwise(parts))


def test_what_lies_beside_images_is_passed_over_and_counted(tmp_path):
    write(tmp_path, FILES)
    beside = ["README", "list.txt", "anna/landmarks.csv", ".git/x.jpg", "anna/.DS_Store", "__MACOSX/anna/2.jpg"]
    write(tmp_path, dict.fromkeys(beside, b"no image"))
    source = opened("folder", tmp_path)
    assert len(pairs(source)) == len(FILES)
    assert source.describe() == {"format": "folder", "num_files": 6, "num_bytes": 12, "num_other_files": len(beside)}


@pytest.mark.parametrize("name", ["anna/1.gif", "anna/video.mp4", "anna/noextension", "data.bin"])
def test_a_file_of_an_unknown_kind_is_refused_by_name(tmp_path, name):
    write(tmp_path, FILES | {name: b"x"})
    with pytest.raises(SourceError, match=rf"{tmp_path}/{name}: neither one of images \(\.bmp, \.jpeg, \.jpg, \.png"):
        opened("folder", tmp_path)


def test_an_image_beside_the_folders_is_refused(tmp_path):
    write(tmp_path, FILES | {"lone.jpg": b"x"})
    with pytest.raises(SourceError, match=rf"{tmp_path}/lone\.jpg: an image beside the folders.*<identity>/<image>"):
        opened("folder", tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    write(tmp_path, {"anna/notes.txt": b"x"})
    with pytest.raises(SourceError, match=rf"{tmp_path}: holds no images"):
        opened("folder", tmp_path)


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(storage.StorageError, match=r"none: does not exist"):
        opened("folder", tmp_path / "none")


def test_an_image_that_went_away_is_named(tmp_path):
    source = opened("folder", write(tmp_path, FILES))
    (tmp_path / "bert/x.png").unlink()
    with pytest.raises(SourceError, match=rf"{tmp_path}/bert/x\.png: does not exist"):
        read(source)


def test_the_version_changes_with_the_contents_and_the_description_not_with_the_place(tmp_path):
    write(tmp_path / "one", FILES)
    source = opened("folder", tmp_path / "one")
    assert source.version() == opened("folder", tmp_path / "one").version()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert opened("folder", tmp_path / "two").version() == source.version()  # copytree keeps the times
    (tmp_path / "one/anna/1.jpg").write_bytes(b"A1")
    assert opened("folder", tmp_path / "one").version() != source.version()
    assert opened("folder", tmp_path / "one").describe() == source.describe()
    (tmp_path / "two/anna/1.jpg").rename(tmp_path / "two/bert/1.jpg")  # of another person, under the same name
    assert opened("folder", tmp_path / "two").version() != source.version()


def test_a_folder_of_an_object_store_is_read(tmp_path):
    for name, body in FILES.items():
        storage.write_bytes(f"memory://folder-source/{name}", body)
    found = read(opened("folder", "memory://folder-source"))
    assert found == [(f"memory://folder-source/{n}", n.rsplit("/", 1)[0], b) for n, b in sorted(FILES.items())]


def test_folders_of_images_are_recognised(tmp_path):
    assert detect_format(str(write(tmp_path / "a", FILES))) == "folder"
    assert detect_format(str(write(tmp_path / "b", {"train/p1/x/1.jpg": b"", "readme.txt": b""}))) == "folder"
    for number, files in enumerate([{"p/1.txt": b""}, {".hidden/1.jpg": b""}, {"p/.1.jpg": b""}, {"1.jpg": b""}]):
        with pytest.raises(storage.StorageError, match=r"no data set that is known"):
            detect_format(str(write(tmp_path / f"none{number}", files)))
    assert not FolderSource.recognises(Place(uri=f"{uri(tmp_path)}/a/anna/1.jpg", is_file=True, files=(), folders=()))


def test_a_few_folders_are_enough_to_recognise_a_large_set(tmp_path, monkeypatch):
    write(tmp_path, {f"p{i:04d}/1.jpg": b"" for i in range(200)})
    place = Place(uri=uri(tmp_path), is_file=False, files=(), folders=tuple(sorted(p.name for p in tmp_path.iterdir())))
    looked, real = [], storage.list_folder
    monkeypatch.setattr(storage, "list_folder", lambda folder: looked.append(folder) or real(folder))
    assert FolderSource.recognises(place)
    assert looked == [f"{uri(tmp_path)}/p0000"]
    shutil.rmtree(tmp_path)
    write(tmp_path, {f"p{i:04d}/1.txt": b"" for i in range(200)})
    looked.clear()
    assert not FolderSource.recognises(place)
    assert len(looked) < 50


# --- reading ahead ---


def test_files_are_read_ahead_in_order_and_in_bounds(tmp_path, monkeypatch):
    files = {f"p/{i:03d}.jpg": str(i).encode() for i in range(300)}
    write(tmp_path, files)
    asked, real = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda place: asked.append(place) or real(place))
    found = []
    for sample in read_ahead(Wanted(f"{uri(tmp_path)}/{name}", "p", name) for name in files):
        found.append((sample.name, sample.image))
        assert len(asked) - len(found) <= 64
    assert found == list(files.items())


def test_reading_ahead_ends_with_its_reader(tmp_path, monkeypatch):
    write(tmp_path, {f"p/{i:03d}.jpg": b"x" for i in range(300)})
    asked, real = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda place: asked.append(place) or real(place))
    samples = read_ahead(Wanted(f"{uri(tmp_path)}/p/{i:03d}.jpg", "p", "") for i in range(300))
    next(samples)
    samples.close()
    assert len(asked) <= 64


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("a/b.JPG", "jpg"),
        ("x.tar.gz", "tar.gz"),
        ("x.gz", "gz"),
        (".jpg", ""),
        ("a.b/c", ""),
        ("a.", ""),
        ("a.b.png", "png"),
    ],
)
def test_extensions(name, end):
    assert extension(name) == end


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("./a/1.jpg", False),
        ("../a/1.jpg", False),
        ("a/.1.jpg", True),
        (".a/1.jpg", True),
        ("x/__MACOSX/1.jpg", True),
        ("a/LICENSE", True),
        ("a/x.json", True),
        ("a/x", False),
        ("a/x.gif", False),
    ],
)
def test_what_lies_beside(name, beside):
    assert is_beside(name) is beside


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" 7\n", "7"),
        ("007", "7"),
        ("3.000000", "3"),
        ("3.", "3"),
        ("+4", "4"),
        ("-0", "0"),
        ("3.5", "3.5"),
        ("n0007", "n0007"),
        ("1_0", "1_0"),
        ("٣", "٣"),
        ("1e3", "1e3"),
        ("Anna Ä", "Anna Ä"),
        ("", ""),
    ],
)
def test_class_numbers_are_plain_decimal_digits(text, name):
    assert class_name(text, "a list") == name


def test_a_negative_class_number_means_nobody_and_is_refused():
    with pytest.raises(SourceError, match=r"a list: line 3: the label is -1: a class number from 0 on"):
        class_name(" -1", "a list: line 3")


def test_links_that_hide_or_multiply_images_are_refused(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg(2))
    (tmp_path / "set" / "a" / "2.jpg").symlink_to(tmp_path / "elsewhere.jpg")  # a link to a file is one
    spec = SourceSpec(format="folder", uri=str(tmp_path / "set"))
    assert len([sample for part in open_source(spec).parts(1 << 30) for sample in part.samples()]) == 2
    (tmp_path / "set" / "b").symlink_to(tmp_path / "set")
    with pytest.raises(SourceError, match=r"set/b: a link to a folder"):
        open_source(spec)
    (tmp_path / "set" / "b").unlink()
    (tmp_path / "set" / "a" / "3.jpg").symlink_to(tmp_path / "nothing.jpg")
    with pytest.raises(SourceError, match=r"a/3\.jpg: neither a file nor a folder, or a link to nothing"):
        open_source(spec)
