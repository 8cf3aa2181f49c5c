"""The data card: it is whole for any set, says and shows what is in it, and links to nothing but its own pictures."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.card import NAME, card_files, code_span, write_card
from pipeline.data.checks import ImageStatistics, colour_of
from pipeline.data.images import decode_rgb
from pipeline.data.manifest import Manifest
from pipeline.data.pack_report import PackReport
from pipeline.data.recordio import RecordIOReader, image_keys
from pipeline.data.shards import read_shard
from tests.pipeline.data.test_verify import remade, samples
from tests.pipeline.data.writers import packed_set, shard_info, tar_bytes

PICTURES = {f"data_card/{name}" for name in ("samples_per_person.png", "images.png", "faces.jpg", "people.jpg")}


def report_of(manifest: Manifest, *, decode: bool = True) -> PackReport:
    """What packing would note of a set."""
    statistics, labels = ImageStatistics(), []
    for number, info in enumerate(manifest.shards):
        shard = read_shard(manifest.shard_uri(number), info, manifest.num_classes)
        labels += shard.labels.tolist()
        for image in shard.images:
            if decode:
                statistics.add(len(image), decode_rgb(image), colour_of(image))
            else:
                statistics.add(len(image))
    return PackReport(
        num_read=len(labels),
        dropped={},
        duplicates_across=0,
        duplicate_examples=[],
        samples_per_identity=np.bincount(labels, minlength=manifest.num_classes).tolist(),
        fewer_than=2,
        num_few=0,
        few_examples=[],
        statistics=statistics,
    )


def text_of(files: dict[str, bytes]) -> str:
    text = files[NAME].decode()
    linked = re.findall(r"!?\[[^\]]*\]\(([^)]*)\)", text)
    assert sorted(linked) == sorted(files.keys() - {NAME}), "each picture is shown once, and nothing else is linked"
    return text


def test_a_card_has_words_and_pictures(tmp_path):
    manifest = packed_set(tmp_path, [20, 20, 10])
    files = card_files(manifest, report_of(manifest))
    assert files.keys() == {NAME, *PICTURES}
    text = text_of(files)
    assert text.startswith("# Data card: 50 faces of 5 people\n")
    assert f"| fingerprint | `{manifest.fingerprint}` |" in text
    assert "| images | 10 | 10 | 10 | 10 | 10 | 10 | 10 | 10 | 10 | 10.0 |" in text
    assert "Each row shows images of one person" in text
    for name in PICTURES:
        assert files[name].startswith(b"\x89PNG" if name.endswith("png") else b"\xff\xd8\xff")


def test_equal_sets_have_equal_cards_wherever_they_lie(tmp_path):
    here, there = packed_set(tmp_path, [6, 4]), packed_set("memory://card-elsewhere", [6, 4])
    assert card_files(here, report_of(here)) == card_files(there, report_of(there))


def test_a_card_is_written_before_there_is_a_manifest_and_old_pictures_go(tmp_path):
    manifest = packed_set(tmp_path, [6, 4])
    storage.delete_file(storage.join(manifest.uri, "manifest.json"))
    write_card(manifest, report_of(manifest))
    found = {info.uri.removeprefix(f"{manifest.uri}/") for info in storage.list_files(manifest.uri)}
    assert found == {NAME, *PICTURES, "shard-000000.tar", "shard-000001.tar"}
    small = packed_set(tmp_path, [1])
    write_card(small, report_of(small))
    assert not (tmp_path / "data_card" / "people.jpg").exists()
    text_of({NAME: (tmp_path / NAME).read_bytes()} | dict.fromkeys(PICTURES - {"data_card/people.jpg"}, b""))


def test_a_card_is_written_to_any_storage():
    manifest = packed_set("memory://card", [3])
    write_card(manifest, report_of(manifest))
    assert storage.read_bytes("memory://card/data_card/faces.jpg").startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1]])
def test_tiny_sets_have_cards(tmp_path, sizes):
    content = [(f"{i:09d}", sample[1], b"0") for i, sample in enumerate(samples(0, sum(sizes)))]
    manifest = replace(remade(tmp_path, [content]), num_classes=1, identities=("one",))
    text = text_of(card_files(manifest, report_of(manifest)))
    assert f"{sum(sizes)} faces of 1 people" in text
    assert ("No person occurs twice" in text) == (sum(sizes) == 1)


def test_a_set_that_was_packed_unseen_has_a_card_that_says_so(tmp_path):
    content = samples(0, 10)
    for place in (0, 5, 7):
        content[place] = (content[place][0], b"no image", content[place][2])
    manifest = remade(tmp_path, [content])
    files = card_files(manifest, report_of(manifest, decode=False))
    assert files.keys() == {NAME, *PICTURES}
    text = text_of(files)
    assert "They were not decoded: brightness, contrast, sizes in pixels and colours are not known." in text
    assert "| brightness |" not in text


NASTY = [
    "a|b",
    "`tick` ``two``",
    "[x](http://evil.example)",
    "![x](y.png)",
    "https://evil.example",
    "<img src=x>",
    "line\nbreak\r\n# head",
    "*_~#\\",
    "`",
    "",
    " ",
    "\ud800",
    "\x00\x1b[31m",
]


def test_names_out_of_the_data_cannot_change_the_card(tmp_path):
    manifest = replace(packed_set(tmp_path, [10]), identities=tuple(NASTY[:5]), source=dict(enumerate(NASTY)))
    manifest = replace(manifest, source={f"key{i}": name for i, name in enumerate(NASTY[:-2])})
    report = replace(
        report_of(manifest),
        num_few=len(NASTY),
        few_examples=NASTY,
        duplicates_across=1,
        duplicate_examples=[(name, name) for name in NASTY],
    )
    text = card_files(manifest, report)[NAME].decode()
    bare = re.sub(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)  # without code spans, as CommonMark finds them
    assert "evil" in text
    assert "evil" not in bare
    assert "<img" not in bare
    assert "y.png" not in bare
    plain = card_files(manifest, replace(report, few_examples=["x"] * len(NASTY), duplicate_examples=[]))[NAME].decode()
    table = text.split("## People with few images")[1].split("##")[0]
    assert table.count("\n") == plain.split("## People with few images")[1].split("##")[0].count("\n")


@given(st.text(max_size=40))
def test_a_code_span_is_one_cell_that_ends_where_it_began(text):
    span = code_span(text)
    assert span.isprintable()
    assert not re.search(r"(?<!\\)\|", span)
    if span:
        fence = re.match("`+", span)[0]
        inner = span[len(fence) : -len(fence)]
        assert span.endswith(fence)
        assert fence not in re.findall("`+", inner)
        assert inner.replace(r"\|", "|").strip() == "".join(c if c.isprintable() else " " for c in text).strip()


@pytest.mark.data
def test_pictures_of_real_faces_are_small_and_show_the_people_they_name(tmp_path, shared_data):
    content, labels = [], []
    reader = RecordIOReader(str(shared_data / "faces_celeb299" / "train.rec"))
    keys = image_keys(reader)
    for place, key in enumerate(keys[:: len(keys) // 500][:500]):
        record = reader[key]
        labels.append(int(record.labels[0]) // 10)
        content.append((f"{place:09d}", record.payload, str(labels[-1]).encode()))
    data = tar_bytes(content)
    storage.write_bytes(f"{tmp_path}/shard-000000.tar", data)
    manifest = Manifest(
        uri=storage.normalise(tmp_path),
        shards=(shard_info("shard-000000.tar", data, len(content)),),
        num_classes=30,
        image_side=112,
        seed=0,
        source={"format": "recordio"},
        identities=tuple(f"people {i * 10} to {i * 10 + 9}" for i in range(30)),
    )
    files = card_files(manifest, report_of(manifest))
    assert files.keys() == {NAME, *PICTURES}
    for name in PICTURES:
        assert 10_000 < len(files[name]) < 200_000, name
    assert simplejpeg.decode_jpeg(files["data_card/faces.jpg"]).shape == (8 * 116 + 4, 8 * 116 + 4, 3)
    assert simplejpeg.decode_jpeg(files["data_card/people.jpg"]).shape == (6 * (116 + 24) + 4, 8 * 116 + 4, 3)
