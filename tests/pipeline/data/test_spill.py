"""The first pass of packing: the order of keys, buckets, and going on where a part was left."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.checks import ImageStatistics, PackChecks
from pipeline.data.sources.base import RawSample
from pipeline.data.spill import Dropped, PackError, Spill, bucket_of, check_budget, sample_key
from tests.pipeline.data.packing import ListedPart, new_place, part, spill
from tests.pipeline.data.writers import jpeg

PEOPLE = st.sampled_from(["ann", "bob", "7", "é"])
ROWS = st.lists(st.tuples(PEOPLE, st.binary(min_size=1, max_size=12)), max_size=40)


def uri_of(tmp_path: Path) -> str:
    return storage.normalise(tmp_path / "part-000000")


def rows(spill: Spill) -> list[list[dict[str, Any]]]:
    """What each bucket of a file holds."""
    data = storage.read_bytes(spill.uri)
    assert len(data) == spill.offsets[-1]
    bodies = [data[start:stop] for start, stop in itertools.pairwise(spill.offsets)]
    return [pa.ipc.open_stream(body).read_all().to_pylist() if body else [] for body in bodies]


# --- keys ---


@given(image=st.binary(), seed=st.integers(-(2**127), 2**127 - 1))
def test_a_key_is_a_keyed_hash_of_the_image_alone(image, seed):
    key = sample_key(image, seed)
    assert key == hashlib.blake2b(image, digest_size=16, key=seed.to_bytes(16, "little", signed=True)).digest()
    assert key != sample_key(image, seed ^ 1)
    assert key != sample_key(image + b"\0", seed)


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=2, max_size=50), st.integers(0, 12))
def test_buckets_are_in_the_order_of_keys(keys, power):
    owners = [bucket_of(key, 1 << power) for key in sorted(keys)]
    assert owners == sorted(owners)
    assert 0 <= owners[0] <= owners[-1] < 1 << power


def test_keys_fill_all_buckets_evenly():
    counts = np.bincount([bucket_of(sample_key(str(i).encode(), 3), 64) for i in range(20_000)], minlength=64)
    # Chi-squared with 63 degrees of freedom is above 120 once in 20,000 draws.
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 120


# --- a part ---


@given(rows_=ROWS, power=st.integers(0, 5), memory=st.integers(1, 200), seed=st.integers(0, 3))
def test_every_sample_is_in_its_bucket_once_sorted_and_described(rows_, power, memory, seed):
    uri = new_place()
    spills = spill(part(rows_), uri, num_buckets=1 << power, memory_bytes=memory, seed=seed)
    found = Counter()
    for file in spills:
        buckets = rows(file)
        assert [len(bucket) for bucket in buckets] == file.rows
        assert len(file.rows) == len(file.crc32) == 1 << power
        for number, bucket in enumerate(buckets):
            assert [row["key"] for row in bucket] == sorted(row["key"] for row in bucket)
            for row in bucket:
                assert row["key"] == sample_key(row["image"], seed)
                assert bucket_of(row["key"], 1 << power) == number
        held = [row for bucket in buckets for row in bucket]
        assert sum(len(row["image"]) for row in held) < memory + 12  # the largest image
        assert Counter(row["identity"] for row in held) == file.identities
        assert file.statistics["total_bytes"] == sum(len(row["image"]) for row in held)
        data = storage.read_bytes(file.uri)
        assert file.crc32 == [zlib.crc32(data[a:b]) for a, b in itertools.pairwise(file.offsets)]
        found.update((row["name"], row["identity"], row["image"]) for row in held)
    assert found == Counter((f"row {i}", *row) for i, row in enumerate(rows_))


def test_equal_images_stay_in_the_order_of_the_source(tmp_path):
    people = [("ann", "bob", "cem")[i % 3] for i in range(24)]
    images = [b"other" if i % 5 == 0 else b"same" for i in range(24)]
    (file,) = spill(part(list(zip(people, images, strict=True))), uri_of(tmp_path), num_buckets=1)
    found = [row["name"] for row in rows(file)[0] if row["image"] == b"same"]
    assert found == [f"row {i}" for i in range(24) if i % 5]


def test_a_part_larger_than_memory_becomes_several_files_and_is_read_once(tmp_path):
    source = part([("ann", bytes([i]) * 100) for i in range(10)])
    spills = spill(source, uri_of(tmp_path), memory_bytes=350)
    assert [sum(file.rows) for file in spills] == [4, 4, 2]
    assert len({file.uri for file in spills}) == 3
    assert source.readings == [1]


def test_a_finished_part_is_not_read_again_and_reads_the_same(tmp_path):
    checks = PackChecks(bad_images="drop")
    source = part([("ann", jpeg(1)), ("bob", b"broken"), ("ann", jpeg(2))])
    first = spill(source, uri_of(tmp_path), checks=checks)
    again = spill(source, uri_of(tmp_path), checks=checks)
    assert again == first
    assert source.readings == [1]
    assert first[0].dropped == [Dropped("row 1", "undecodable", first[0].dropped[0].reason)]
    assert isinstance(again[0].dropped[0], Dropped)


def test_a_part_reads_the_same_where_its_folder_was_moved_to(tmp_path):
    source = part([("ann", b"a"), ("bob", b"b")])
    spill(source, uri_of(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "two")
    (file,) = spill(source, uri_of(tmp_path / "two"))
    assert source.readings == [1]
    assert storage.exists(file.uri)
    assert "/two/" in file.description


@pytest.mark.parametrize("damage", ["absent", "short", "long"])
def test_a_part_whose_file_is_not_whole_is_read_anew(tmp_path, damage):
    source = part([("ann", bytes([i])) for i in range(9)])
    first = spill(source, uri_of(tmp_path), memory_bytes=4)
    place = storage.local_path(first[1].uri)
    whole = place.read_bytes()
    place.unlink()
    if damage != "absent":
        place.write_bytes(whole[:-1] if damage == "short" else whole + b"x")
    assert spill(source, uri_of(tmp_path), memory_bytes=4) == first
    assert source.readings == [1, 1]
    assert place.read_bytes() == whole


def test_an_interrupted_part_leaves_no_description(tmp_path):
    class Torn(ListedPart):
        def samples(self):
            yield from self.rows
            raise OSError("the cable was pulled")

    with pytest.raises(OSError, match=r"cable"):
        spill(Torn(part([("ann", bytes([i])) for i in range(9)]).rows), uri_of(tmp_path), memory_bytes=4)
    assert not list(tmp_path.glob("*.json"))


def test_a_part_of_bad_images_alone_is_an_empty_file(tmp_path):
    (file,) = spill(part([("ann", b"x"), ("bob", b"y")]), uri_of(tmp_path), checks=PackChecks(bad_images="drop"))
    assert (file.offsets, file.rows, file.identities) == ([0] * 9, [0] * 8, {})
    assert [bad.name for bad in file.dropped] == ["row 0", "row 1"]
    assert spill(part([]), uri_of(tmp_path), checks=PackChecks(bad_images="drop")) == [file]


def test_what_is_kept_is_what_was_checked(tmp_path):
    checks = PackChecks(wrong_size="resize")
    (file,) = spill(part([("ann", jpeg(1, side=96)), ("ann", jpeg(2))]), uri_of(tmp_path), checks=checks, num_buckets=1)
    images = {row["name"]: row["image"] for row in rows(file)[0]}
    assert images["row 1"] == jpeg(2)
    assert images["row 0"] != jpeg(1, side=96)
    assert {row["key"] for row in rows(file)[0]} == {sample_key(image, 0) for image in images.values()}
    statistics = ImageStatistics(**file.statistics)
    assert statistics.sizes == {"96x96": 1, "112x112": 1}


# --- bad images ---


def test_the_first_bad_image_ends_packing_where_none_is_allowed(tmp_path):
    source = part([("ann", jpeg(1)), ("bob", b"broken"), ("cem", b"")])
    with pytest.raises(PackError, match=r"^row 1: not a readable image \(6 bytes\)"):
        spill(source, uri_of(tmp_path), checks=PackChecks())
    assert not list(tmp_path.iterdir())


def test_the_budget_of_bad_images_counts_across_the_files_of_a_part(tmp_path):
    source = part([("ann", jpeg(1)), ("ann", b"x"), ("ann", jpeg(2)), ("ann", b"y"), ("ann", jpeg(3)), ("ann", b"z")])
    options = {"memory_bytes": len(jpeg(1))}
    allowed = PackChecks(bad_images="drop", max_bad_images=3)
    spills = spill(source, uri_of(tmp_path), checks=allowed, **options)
    assert [bad.name for file in spills for bad in file.dropped] == ["row 1", "row 3", "row 5"]
    with pytest.raises(PackError, match=r"^row 5: .*: this is bad image 3, checks\.max_bad_images=2 may be left out$"):
        spill(source, f"{uri_of(tmp_path)}-b", checks=PackChecks(bad_images="drop", max_bad_images=2), **options)


def test_the_budget_is_checked_over_all_parts():
    bad = [Dropped(f"row {i}", "undecodable", "why") for i in range(3)]
    check_budget(bad, 3, PackChecks(bad_images="drop", max_bad_images=3))
    check_budget([], 0, PackChecks())
    with pytest.raises(PackError, match=r"^row 2: why: this is bad image 3"):
        check_budget(bad, 3, PackChecks(bad_images="drop", max_bad_images=2))
    with pytest.raises(PackError, match=r"^row 0: why \(--checks\.bad-images drop leaves such images out\)$"):
        check_budget(bad, 3, PackChecks())


def test_the_description_is_json_and_has_no_image(tmp_path):
    spill(ListedPart((RawSample("row", "ann", b"\xff" * 5000),)), uri_of(tmp_path))
    text = (tmp_path / "part-000000.json").read_text()
    assert json.loads(text)[0]["identities"] == {"ann": 1}
    assert len(text) < 2500
