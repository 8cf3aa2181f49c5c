"""List files: every usual form is told from its first lines, and no line that does not fit it passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.sources import SourceError, detect_format
from pipeline.data.sources.list_form import find_form
from tests.pipeline.data.sources.reading import opened, pairs, read, uri
from tests.pipeline.data.writers import jpeg

PEOPLE = ["7", "12", "7", "3"]


@pytest.fixture
def images(tmp_path):
    for i in range(4):
        (tmp_path / f"faces/p{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"faces/p{i % 2}/{i}.jpg").write_bytes(b"image %d" % i)
    return [f"faces/p{i % 2}/{i}.jpg" for i in range(4)]


def listed(tmp_path, lines, name="list.txt", **options):
    (tmp_path / name).write_bytes(lines if isinstance(lines, bytes) else "".join(f"{x}\n" for x in lines).encode())
    return opened("list", tmp_path / name, **options)


FORMS = {
    "path label": lambda i, path, label: f"{path} {label}",
    "several blanks": lambda i, path, label: f"  {path}   {label} ",
    "tab": lambda i, path, label: f"{path}\t{label}",
    "comma": lambda i, path, label: f"{path},{label}",
    "comma and blank": lambda i, path, label: f"{path}, {label}",
    "quotes": lambda i, path, label: f'"{path}","{label}"',
    "insightface": lambda i, path, label: f"1\t{path}\t{label}",
    "insightface by blanks": lambda i, path, label: f"1 {path} {label}",
    "im2rec": lambda i, path, label: f"{i}\t{label}.000000\t{path}",
    "im2rec whole labels": lambda i, path, label: f"{i}\t{label}\t{path}",
    "padded": lambda i, path, label: f"{path} {label:0>7}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_form_is_told_from_its_lines(tmp_path, images, form, ending):
    lines = [FORMS[form](i, path, label) for i, (path, label) in enumerate(zip(images, PEOPLE, strict=True))]
    source = listed(tmp_path, (ending.join(lines) + (ending if form != "tab" else "")).encode())
    assert read(source) == [
        (f"{uri(tmp_path)}/list.txt: line {i + 1}: {uri(tmp_path)}/{path}", PEOPLE[i], b"image %d" % i)
        for i, path in enumerate(images)
    ]


@pytest.mark.parametrize(
    "header", ["path,label", "Image,Identity", "file,id", "number,path,label,id", "x,filename,class"]
)
@pytest.mark.parametrize("separator", [",", "\t", " "])
def test_a_header_names_the_columns(tmp_path, images, header, separator):
    columns = header.lower().split(",")
    lines = [header]
    for i, path in enumerate(images):
        person = PEOPLE[i]
        values = {"number": "0", "x": "x", "path": path, "image": path, "file": path, "filename": path}
        values |= {"label": person, "identity": person, "class": person}
        values["id"] = person if "label" not in columns else "99"
        lines.append(",".join(values[column] for column in columns))
    source = listed(tmp_path, [line.replace(",", separator) for line in lines], "list.csv")
    assert pairs(source) == [(PEOPLE[i], b"image %d" % i) for i in range(4)]


def test_names_are_identities_as_they_are(tmp_path, images):
    source = listed(tmp_path, [f"{images[0]}\tAnna Ä", f"{images[1]}\tn0007"])
    assert [identity for identity, _ in pairs(source)] == ["Anna Ä", "n0007"]


def test_paths_with_blanks_and_commas(tmp_path):
    (tmp_path / "a b, c.jpg").write_bytes(b"x")
    assert pairs(listed(tmp_path, ["a b, c.jpg\t1"])) == [("1", b"x")]
    assert pairs(listed(tmp_path, ['"a b, c.jpg",1'])) == [("1", b"x")]
    (tmp_path / "a,b.jpg").write_bytes(b"y")
    assert pairs(listed(tmp_path, ["a,b.jpg 1"])) == [("1", b"y")]
    with pytest.raises(SourceError, match=r"list\.txt: line 1: 'a b\.jpg 1'; expected: 'path label'.*blanks"):
        listed(tmp_path, ["a b.jpg 1"])


def test_a_byte_order_mark_and_blank_lines_are_no_data(tmp_path, images):
    text = "\ufeff\n\n" + "\n\n".join(f"{path} 5" for path in images) + "\n\n \n"
    source = listed(tmp_path, text.encode())
    assert [sample.name.split(": ")[1] for sample in read(source)] == ["line 3", "line 5", "line 7", "line 9"]
    assert source.describe()["num_files"] == 4


def test_where_paths_are_taken_from(tmp_path, images):
    storage.write_bytes("memory://list-source/far.jpg", b"far")
    lines = [f"{tmp_path}/{images[0]} 0", f"file://{tmp_path}/{images[1]} 1", "memory://list-source/far.jpg 2"]
    assert pairs(listed(tmp_path, lines)) == [("0", b"image 0"), ("1", b"image 1"), ("2", b"far")]
    lines = [path.removeprefix("faces/") + " 1" for path in images]
    assert len(pairs(listed(tmp_path, lines, root=str(tmp_path / "faces")))) == 4
    with pytest.raises(
        SourceError, match=rf"list\.txt: line 1: file://{tmp_path}/p0/0\.jpg: does not exist; paths are"
    ):
        listed(tmp_path, lines).parts(100)


@pytest.mark.parametrize(
    ("good", "bad", "what"),
    [
        ("a.jpg 1", "b.jpg", r"1 fields, 2 are expected \(paths with blanks need tabs or commas\)"),
        ("a.jpg 1", "b c.jpg 1", r"3 fields, 2 are expected"),
        ("a.jpg\t1", "b c.jpg 1", r"1 fields, 2 are expected"),
        ("a.jpg\t1", "b.jpg\t", r"it has no label"),
        ("a.jpg\t1", "b.gif\t1", r"'b\.gif' is no path of an image"),
        ("a.jpg 1", "1 b.jpg", r"'1' is no path of an image"),
        ("1\ta.jpg\t1", "0\tb.jpg\t1", r"starts with '0'; 1 says that the face is aligned"),
        ("1\ta.jpg\t1", "1\tb.jpg\tanna", r"'anna' is not a class number"),
        ("1\ta.jpg\t1", "1\tb.jpg\t1.5", r"'1\.5' is not a class number"),
        ("0\t1.0\ta.jpg", "x\t1.0\tb.jpg", r"'x' is not an index"),
        ("0\t1.0\ta.jpg", "1\t1.0\t0.0\tb.jpg", r"4 fields, 3 are expected"),
        ("path,label\na.jpg,1", "b.jpg", r"1 fields, 2 are expected"),
        ("a.jpg,1", '"b.jpg,1', r"unexpected end of data"),
        ("a.jpg,1", "b.jpg,\udc80", r"not UTF-8"),
        ("a.jpg,1", "b\0.jpg,1", r"not a line of text"),
        ("a.jpg,1", "b" * 70_000 + ".jpg,1", r"not a line of text"),
    ],
)
@pytest.mark.parametrize("before", [1, 99, 1000])
def test_a_line_that_does_not_fit_is_named(tmp_path, good, bad, what, before):
    repeated = good.partition("\n")[2] or good
    lines = "\n".join([good, *[repeated] * (before - 1), bad, repeated]).encode(errors="surrogateescape")
    number = before + 1 + good.count("\n")
    with pytest.raises(SourceError, match=rf"{tmp_path}/list\.txt: line {number}: .*{what}"):
        listed(tmp_path, lines)


def test_a_message_says_what_was_expected(tmp_path):
    with pytest.raises(SourceError, match=r"line 2: 'x': 1 fields.*expected, as before: '1<TAB>path<TAB>label'"):
        listed(tmp_path, ["1\ta.jpg\t1", "x"])
    with pytest.raises(SourceError, match=r"line 1: 'what is this'; expected: 'path label', '1<TAB>path<TAB>label'"):
        listed(tmp_path, ["what is this"])


@pytest.mark.parametrize("header", ["path,image,label", "path,label,identity", "path,path,label"])
def test_a_header_that_leaves_the_columns_open_is_refused(tmp_path, header):
    with pytest.raises(SourceError, match=rf"line 1: the columns {', '.join(header.split(','))} leave open"):
        listed(tmp_path, [header, "a.jpg,a.jpg,a.jpg"])


@pytest.mark.parametrize("text", [b"", b"\n\n", b"path,label\n"])
def test_a_list_without_images_is_refused(tmp_path, text):
    with pytest.raises(SourceError, match=r"list\.txt: names no image; expected on each line"):
        listed(tmp_path, text)


def test_a_missing_image_names_the_line(tmp_path, images):
    source = listed(tmp_path, [f"{path} 1" for path in images])
    (tmp_path / images[2]).unlink()
    with pytest.raises(SourceError, match=rf"list\.txt: line 3: file://{tmp_path}/{images[2]}: does not exist"):
        read(source)


def test_a_missing_list_is_a_storage_error(tmp_path):
    with pytest.raises(storage.StorageError, match=r"none\.txt: does not exist"):
        opened("list", tmp_path / "none.txt")


@settings(max_examples=25)
@given(
    count=st.integers(1, 700),
    part_bytes=st.integers(1, 20_000),
    blanks=st.lists(st.integers(0, 699), max_size=20),
    header=st.booleans(),
)
def test_parts_are_ranges_of_the_list_and_hold_each_line_once(count, part_bytes, blanks, header):
    storage.write_bytes("memory://list-parts/a.jpg", b"x" * 20)
    lines = ["path,label"] * header
    for i in range(count):
        lines += ["", " "] * (i in blanks) + [f"a.jpg,name{i}"]
    storage.write_bytes("memory://list-parts/list.csv", "\n".join(lines).encode())
    source = opened("list", "memory://list-parts/list.csv")
    assert [identity for identity, _ in pairs(source, part_bytes)] == [f"name{i}" for i in range(count)]
    parts = source.parts(part_bytes)
    assert sum(part.num_bytes for part in parts) == 20 * count
    assert all(part.num_bytes <= max(part_bytes, 64 * 20) for part in parts)
    numbers = [int(sample.name.split(": ")[1].removeprefix("line ")) for sample in read(source, part_bytes)]
    assert [lines[number - 1] for number in numbers] == [f"a.jpg,name{i}" for i in range(count)]


def test_version_and_description_are_those_of_the_list(tmp_path, images):
    source = listed(tmp_path, [f"{path} 1" for path in images])
    again = listed(tmp_path, [f"{path} 1" for path in images], "other.lst")
    changed = listed(tmp_path, [f"{path} 2" for path in images])
    assert source.version() == again.version() != changed.version()
    assert source.describe() == again.describe() != changed.describe()
    assert source.describe()["format"] == "list"


def test_an_equal_list_over_other_images_is_another_version(tmp_path):
    lists = []
    for name, shift in (("v1", 0), ("v2", 100)):
        for i in range(3):
            storage.write_bytes(f"{tmp_path}/{name}/{i}.jpg", jpeg(i + shift))
        storage.write_bytes(f"{tmp_path}/{name}/list.txt", b"0.jpg a\n1.jpg a\n2.jpg b\n")
        lists.append(opened("list", f"{tmp_path}/{name}/list.txt"))
    assert lists[0].describe() == lists[1].describe()
    assert lists[0].version() != lists[1].version()
    before = lists[0].version()
    storage.write_bytes(f"{tmp_path}/v1/0.jpg", jpeg(7))  # aligned anew, in place
    assert opened("list", f"{tmp_path}/v1/list.txt").version() != before


def test_lists_are_recognised_by_their_names(tmp_path, images):
    for name in ("a.txt", "a.lst", "a.csv", "a.TSV"):
        listed(tmp_path, [f"{images[0]} 1"], name)
        assert detect_format(str(tmp_path / name)) == "list"
    assert detect_format(str(tmp_path)) == "folder"


def test_the_form_that_fits_all_first_lines_is_taken():
    assert find_form(["a,1.jpg 5", "b,2.jpg 6"]).columns == ("path", "label")
    assert find_form(["a 1.jpg\t5", "b.jpg\t6"]).separator == "\t"
    # The first line alone could be parted by commas or by blanks.
    assert find_form(["a.jpg,b.jpg 5", "c.jpg,7"]).separator == ","
    assert find_form(["a.jpg,b.jpg 5", "c.jpg 7"]).separator == ""
    assert find_form(["a.jpg five six"]) is None
