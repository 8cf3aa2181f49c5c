"""The tables of a data set say what is in it, from packing's report or from a survey."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.card_figures import BRIGHTNESS_EDGES, BYTES_EDGES
from pipeline.data.checks import BRIGHTNESS_BINS, ImageStatistics
from pipeline.data.pack_report import PackReport
from pipeline.data.summary import QUANTILES, Name, Section, quantiles, sections, size_text
from pipeline.data.survey import Survey
from tests.pipeline.data.writers import plain_manifest

MANIFEST = plain_manifest([8, 8, 4])


def seen(images: int, *, value: int = 100, decoded: bool = True) -> ImageStatistics:
    found = ImageStatistics()
    rng = np.random.default_rng(0)
    for _ in range(images):
        noise = rng.integers(-60, 60, (16, 16, 3))
        found.add(2000, np.clip(value + noise, 0, 255).astype(np.uint8) if decoded else None, "colour")
    return found


def report(**changes: object) -> PackReport:
    values = {
        "num_read": 20,
        "dropped": {},
        "duplicates_across": 0,
        "duplicate_examples": [],
        "samples_per_identity": [4, 9, 1, 2, 4],
        "fewer_than": 2,
        "num_few": 0,
        "few_examples": [],
        "statistics": seen(20),
    }
    return PackReport(**values | changes)


def by_title(found: PackReport | Survey) -> dict[str, Section]:
    return {section.title: section for section in sections(MANIFEST, found)}


def rows(section: Section) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in section.rows}


@given(values=st.lists(st.floats(0, 255.99), min_size=1, max_size=300))
def test_quantiles_of_a_histogram_are_within_a_bin_of_those_of_the_values(values):
    counts = np.histogram(values, BRIGHTNESS_EDGES)[0].tolist()
    exact = np.quantile(values, QUANTILES, method="inverted_cdf")
    found = quantiles(counts, BRIGHTNESS_EDGES)
    assert np.abs(np.array(found) - exact).max() <= 256 / BRIGHTNESS_BINS
    assert found == sorted(found)


def test_quantiles_on_a_log_axis_lie_evenly_there():
    counts = [0] * (len(BYTES_EDGES) - 1)
    counts[20] = 7  # from 1024 bytes on, half an octave
    found = quantiles(counts, BYTES_EDGES, is_log=True)
    assert found[3] == pytest.approx(1024 * 2**0.25)
    assert 1024 < found[0] < found[-1] < 1024 * 2**0.5


def test_the_set_is_described_by_its_manifest():
    values = rows(by_title(report())["Data set"])
    assert values["samples"] == ("20",)
    assert values["people"] == ("5",)
    assert values["samples of a shard"] == ("8, the last one 4",)
    assert values["fingerprint"] == (MANIFEST.fingerprint,)
    assert values["source: format"] == ("test",)
    even = sections(plain_manifest([8, 8]), report())[0]
    assert rows(even)["samples of a shard"] == ("8",)


def test_what_was_left_out_is_told_by_reason():
    found = by_title(report(num_read=30, dropped={"duplicate": 6, "undecodable": 4}))
    section = found["From the source to the shards"]
    assert section.rows == (
        ("in the source", "30", "100.0 %"),
        ("left out: duplicate", "6", "20.0 %"),
        ("left out: undecodable", "4", "13.3 %"),
        ("packed", "20", "66.7 %"),
    )
    assert "quarantine.jsonl" in section.notes[0]
    assert "Images that were left out are counted too." in found["Images"].notes
    section = by_title(report(num_read=26, dropped={"duplicate": 6}))["From the source to the shards"]
    assert section.notes == (), "duplicates are not in the quarantine"
    section = by_title(report())["From the source to the shards"]
    assert section.notes == ("Every image of the source is in the shards.",)


def test_people_are_summed_up_in_quantiles():
    (row,) = by_title(report(samples_per_identity=list(range(1, 101))))["Images of a person"].rows
    assert row == ("images", "1", "1", "5", "25", "50", "75", "95", "99", "100", "50.5")


def test_people_with_few_images_and_images_of_two_people_have_their_tables():
    assert not {"People with few images", "One image, two people"} & by_title(report()).keys()
    found = by_title(
        report(
            num_few=30,
            few_examples=["ann", "bob"],
            fewer_than=3,
            duplicates_across=1,
            duplicate_examples=[("ann/1.jpg", "bob/2.jpg")],
        )
    )
    few = found["People with few images"]
    assert few.rows == (("ann",), ("bob",))
    assert few.notes == ("30 people have fewer than 3 images.", "The table has 2 of them.")
    across = found["One image, two people"]
    assert across.rows == (("ann/1.jpg", "bob/2.jpg"),)
    assert len(across.notes) == 1
    assert all(isinstance(cell, Name) for row in (*few.rows, *across.rows) for cell in row)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, ["20 (100.0 %) are very dark", "below 24"]),
        (255, ["20 (100.0 %) are very bright", "from 232 on"]),
        (100, []),
    ],
)
def test_odd_images_are_told(value, words):
    flat = ImageStatistics()
    for _ in range(20):
        flat.add(2000, np.full((8, 8, 3), value, np.uint8), "grey")
    notes = " ".join(by_title(report(statistics=flat))["Images"].notes)
    for word in [*words, "20 (100.0 %) are nearly empty (contrast below 8)"]:
        assert word in notes
    assert ("very" in notes) == bool(words)
    assert "nearly empty" not in " ".join(by_title(report())["Images"].notes)


def test_images_that_were_not_decoded_have_a_size_in_bytes_alone():
    found = by_title(report(statistics=seen(20, decoded=False)))
    assert "Sizes and colours found" not in found
    assert list(rows(found["Images"])) == ["bytes"]
    assert any("not decoded" in note and "not known" in note for note in found["Images"].notes)


def test_sizes_and_colours_are_listed_most_frequent_first():
    statistics = replace(seen(20), sizes={"112x112": 15, "96x112": 3, "20x20": 2}, colours={"grey": 1, "colour": 19})
    found = by_title(report(statistics=statistics))["Sizes and colours found"]
    assert [row[0] for row in found.rows] == ["112x112", "96x112", "20x20", "colour", "grey"]
    assert found.rows[1] == ("96x112", "3", "15.0 %")
    many = replace(statistics, sizes={f"{side}x{side}": 1 for side in range(1, 21)})
    found = by_title(report(statistics=many))["Sizes and colours found"]
    assert ("8 other sizes", "8", "40.0 %") in found.rows


def test_a_survey_says_what_was_looked_at():
    survey = Survey(
        shards=(0, 2),
        num_shards=3,
        samples_per_identity=[3, 0, 9, 0, 0],
        num_unreadable=1,
        unreadable_examples=[("shard-000002.tar", "000000017", "not a readable image (3 bytes)")],
        statistics=seen(12),
    )
    found = by_title(survey)
    looked = found["What was looked at"]
    assert looked.rows[0] == ("shards", "2 of 3", "66.7 %")
    assert looked.rows[2] == ("images that cannot be decoded", "1", "8.3 %")
    assert looked.notes[0] == "All that follows is about these 2 shards."
    assert looked.notes[1] == "shard-000002.tar: 000000017: not a readable image (3 bytes)"
    people = found["Images of a person"]
    assert people.rows[0][1] == "3", "people that were not met do not count"
    assert people.notes == ("2 of the 5 people occur in the shards that were looked at.",)
    whole = by_title(replace(survey, shards=(0, 1, 2), unreadable_examples=[]))["What was looked at"]
    assert whole.notes == ()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(7, "7 bytes"), (1500, "1.5 kB (1,500 bytes)"), (43_171_840, "43.2 MB (43,171,840 bytes)"), (0, "0 bytes")],
)
def test_bytes_are_told_in_a_unit_that_fits(num_bytes, text):
    assert size_text(num_bytes) == text
