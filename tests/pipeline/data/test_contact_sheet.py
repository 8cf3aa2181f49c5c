"""Contact sheets: which faces are chosen, and that each is drawn where it belongs."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data import contact_sheet as sheets
from pipeline.data.contact_sheet import Row, choose_faces, contact_sheet, in_rows
from tests.pipeline.data.writers import jpeg, label_of, packed_set

SIDE = 32


def flat(red: int, green: int, blue: int, side: int = SIDE) -> bytes:
    pixels = np.full((side, side, 3), (red, green, blue), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, 95, "RGB", "444"))


def pixels(sheet: bytes) -> np.ndarray:
    return np.asarray(simplejpeg.decode_jpeg(sheet)).astype(int)


def test_the_random_faces_are_the_first_ones_of_the_set(tmp_path):
    manifest = packed_set(tmp_path, [30, 30, 30])
    assert choose_faces(manifest).random == [jpeg(i) for i in range(64)]


def test_people_are_those_with_most_images_and_all_images_are_theirs(tmp_path):
    manifest = packed_set(tmp_path, [40, 40, 20], num_classes=11)
    people = choose_faces(manifest).people
    owners = {jpeg(i): label_of(i, 11) for i in range(100)}
    assert len(people) == sheets.PEOPLE
    assert len({label for label, _ in people}) == sheets.PEOPLE
    for label, images in people:
        assert len(images) == len(set(images)) == sheets.COLUMNS
        assert {owners[image] for image in images} == {label}


@pytest.mark.parametrize(
    ("sizes", "num_classes", "expected"), [([4, 4, 3], 4, [3, 3, 3, 2]), ([3, 3, 1], 6, [2]), ([8], 9, [])]
)
def test_people_with_fewer_images_come_later_and_those_with_one_do_not_come(tmp_path, sizes, num_classes, expected):
    manifest = packed_set(tmp_path, sizes, num_classes)
    counts = Counter(label_of(i, num_classes) for i in range(sum(sizes)))
    people = choose_faces(manifest).people
    assert [len(images) for _, images in people] == expected
    assert {label: len(images) for label, images in people} == {k: n for k, n in counts.items() if n > 1}


def test_nobody_occurs_twice_in_a_set_of_one_image(tmp_path):
    faces = choose_faces(packed_set(tmp_path, [1]))
    assert faces.random == [jpeg(0)]
    assert faces.people == []


def test_no_more_is_read_than_the_bound(tmp_path, monkeypatch):
    manifest = packed_set(tmp_path, [64, 64, 64], num_classes=100)
    monkeypatch.setattr(sheets, "READ_BYTES", manifest.shards[0].num_bytes + 1)
    (tmp_path / "shard-000002.tar").unlink()
    shown = [image for _, images in choose_faces(manifest).people for image in images]
    assert shown
    assert set(shown) <= {jpeg(i) for i in range(128)}


def test_faces_stand_in_rows_of_eight():
    images = [bytes([i]) for i in range(19)]
    rows = in_rows(images)
    assert [len(row.images) for row in rows] == [8, 8, 3]
    assert [image for row in rows for image in row.images] == images


def test_each_face_is_drawn_in_its_place():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    rows = [Row(images=[flat(*c) for c in colours[:3]]), Row(images=[flat(*c) for c in colours[3:]])]
    sheet = pixels(contact_sheet(rows, SIDE))
    assert sheet.shape == (2 * 36 + 4, 3 * 36 + 4, 3)
    for place, colour in enumerate(colours):
        row, column = divmod(place, 3)
        centre = sheet[4 + row * 36 + 16, 4 + column * 36 + 16]
        assert np.abs(centre - colour).max() < 12, colour
    assert sheet[4 + 36 + 16, 4 + 2 * 36 + 16].min() > 240, "the last place of the second row is empty"


def test_a_caption_stands_above_its_row_and_changes_with_its_text():
    image = flat(0, 0, 250)
    first, second = (pixels(contact_sheet([Row(images=[image], caption=text)], SIDE)) for text in ("Ann", "Bob"))
    assert first.shape == (4 + 24 + 36, 8 * 36 + 4, 3)
    assert np.abs(first[4:28] - second[4:28]).max() > 100
    assert np.abs(first[32:] - second[32:]).max() < 12
    assert np.abs(first[4 + 24 + 16, 4 + 16] - (0, 0, 250)).max() < 12
    assert first[4:28].min() < 100
    assert pixels(contact_sheet([Row(images=[image])], SIDE)).shape == (4 + 36, 36 + 4, 3)


@pytest.mark.parametrize("text", ["a\nb\tc", "\x00", "張三", "x" * 5000, "\N{ZERO WIDTH SPACE}", "é" * 91])
def test_any_name_can_be_a_caption(text):
    assert pixels(contact_sheet([Row(images=[flat(9, 9, 9)], caption=text)], SIDE)).shape[0] == 64


def test_an_undecodable_face_is_grey_and_another_size_is_made_to_fit():
    png = io.BytesIO()
    Image.fromarray(np.full((20, 50), 30, np.uint8)).save(png, "PNG")
    rows = [Row(images=[b"nothing", png.getvalue(), flat(0, 250, 0, side=112)])]
    sheet = pixels(contact_sheet(rows, SIDE))
    assert np.abs(sheet[4 + 4, 4 + 16] - 208).max() < 25
    assert sheet[4 + 16, 4 + 16].max() < 150, "crossed out"
    assert np.abs(sheet[20, 36 + 20] - 30).max() < 12
    assert np.abs(sheet[20, 72 + 20] - (0, 250, 0)).max() < 12


def test_a_caption_is_one_line_that_is_cut_where_it_is_too_long():
    def sheet(text: str) -> bytes:
        return contact_sheet([Row(images=[flat(9, 9, 9)], caption=text)], 112)

    assert sheet("a\nb") == sheet("a\N{REPLACEMENT CHARACTER}b") != sheet("ab")
    assert sheet("i" * 200) == sheet("i" * 89 + "…") != sheet("i" * 90)
