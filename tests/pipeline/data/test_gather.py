"""The second pass of packing: buckets of all parts in one order, cut into shards."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import gather
from pipeline.data.gather import DuplicateTask, GatherTask, Spills, extension_of, find_duplicates, is_repeated
from pipeline.data.manifest import ShardInfo
from pipeline.data.pack import shard_runs, sort_identities
from pipeline.data.shards import read_shard
from pipeline.data.spill import PackError, bucket_of, sample_key
from tests.pipeline.data.packing import new_place, part, spill
from tests.pipeline.data.writers import jpeg

NUM_BUCKETS = 8


@pytest.fixture(autouse=True)
def _objects_at_hand(monkeypatch):
    """Tasks get what they share through Ray's object store; here they are given it."""
    monkeypatch.setattr(gather.ray, "get", lambda value: value)


def spilled(folder: Path | str, parts: list[list[tuple[str, bytes]]], **options: Any) -> Spills:
    """The first pass over some parts of (identity, image)."""
    found, first = [], 0
    for number, rows in enumerate(parts):
        uri = storage.join(str(folder), f"part-{number:06d}")
        found += spill(part(rows, first), uri, num_buckets=NUM_BUCKETS, **options)
        first += len(rows)
    return Spills.of(found)


def task(folder: Path | str, spills: Spills, **fields: Any) -> GatherTask:
    """Everything into shards of two samples."""
    samples = spills.read(0, NUM_BUCKETS)
    number = len(samples)
    defaults: dict[str, Any] = {
        "spills": spills,
        "identities": pa.array(sort_identities({sample.identity for sample in samples}), pa.string()),
        "buckets": (0, NUM_BUCKETS),
        "skip": 0,
        "shards": [(start // 2, min(2, number - start)) for start in range(0, number, 2)],
        "first_sample": 0,
        "output": storage.join(str(folder), "out"),
        "staging": storage.join(str(folder), "notes"),
        "drop_duplicates": False,
    }
    return GatherTask(**defaults | fields)


def images(folder: Path | str, infos: list[ShardInfo], num_classes: int = 100) -> list[bytes]:
    return [
        image
        for info in infos
        for image in read_shard(storage.join(str(folder), "out", info.name), info, num_classes).images
    ]


# --- buckets of all parts ---


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.binary(min_size=1, max_size=2)), max_size=30),
    owners=st.lists(st.integers(0, 3), min_size=30, max_size=30),
    memory=st.sampled_from([1, 5, 1000]),
)
def test_samples_come_in_the_order_of_their_keys_however_the_source_is_cut(rows, owners, memory):
    owners = sorted(owners[: len(rows)])  # parts are stretches of the source
    parts = [[row for row, owner in zip(rows, owners, strict=True) if owner == number] for number in range(4)]
    spills = spilled(new_place(), parts, memory_bytes=memory)
    expected = sorted(enumerate(rows), key=lambda item: (sample_key(item[1][1], 0), item[0]))
    found = spills.read(0, NUM_BUCKETS)
    assert [sample.name for sample in found] == [f"row {i}" for i, _ in expected]
    assert [(sample.identity, sample.image) for sample in found] == [row for _, row in expected]
    assert [sample.key for sample in found] == [sample_key(row[1], 0) for _, row in expected]
    assert [s for bucket in range(NUM_BUCKETS) for s in spills.read(bucket, bucket + 1)] == found
    # Equal images are neighbours, and all but the first are told.
    repeated = is_repeated(found)
    firsts = {row[1]: f"row {i}" for i, row in reversed(list(enumerate(rows)))}
    kept = [sample for sample, again in zip(found, repeated, strict=True) if not again]
    assert {sample.image: sample.name for sample in kept} == firsts
    assert len(kept) == len(firsts)


def test_keys_with_zero_bytes_are_ordered_as_bytes(tmp_path, monkeypatch):
    keys = {bytes([i]): bytes(15 - i) + bytes([i]) * (1 + i) for i in range(15)}
    monkeypatch.setattr("pipeline.data.spill.sample_key", lambda image, seed: keys[image])
    spills = spilled(tmp_path, [[("ann", image)] for image in keys])
    assert [sample.image for sample in spills.read(0, 1)] == sorted(keys, key=lambda image: keys[image])


@pytest.mark.parametrize("where", ["first", "identity", "image", "last", "short"])
def test_a_byte_that_was_altered_between_the_passes_is_an_error_and_its_part_is_read_anew(tmp_path, where):
    rows = [("ann", b"picture of ann"), ("bob", b"picture of bob")]
    spills = spilled(tmp_path, [rows, [("cem", b"picture of cem")]])
    place = storage.local_path(spills.uris[0])
    data = bytearray(place.read_bytes())
    found = {"first": 0, "identity": data.index(b"bob"), "image": data.index(b"picture"), "last": len(data) - 1}
    if where == "short":
        del data[-1]
    else:
        data[found[where]] ^= 1
    place.write_bytes(data)
    with pytest.raises(PackError, match=r"part-000000-0000: bytes 0 to \d+ were altered between the two passes"):
        spills.read(0, NUM_BUCKETS)
    assert not (tmp_path / "part-000000.json").exists()
    assert (tmp_path / "part-000001.json").exists()
    again = spilled(tmp_path, [rows, [("cem", b"picture of cem")]])
    assert sorted(sample.image for sample in again.read(0, NUM_BUCKETS)) == [
        f"picture of {n}".encode() for n in ("ann", "bob", "cem")
    ]


def test_a_byte_that_flips_on_its_way_is_read_again(tmp_path, monkeypatch):
    spills = spilled(tmp_path, [[("ann", b"picture")]])
    answers = iter([b"x" * int(spills.offsets[0, -1])])
    read = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *place: next(answers, None) or read(*place))
    assert [sample.image for sample in spills.read(0, NUM_BUCKETS)] == [b"picture"]


# --- duplicates ---


def test_duplicates_are_counted_by_person_and_wrong_labels_are_named(tmp_path):
    parts = [
        [("ann", b"one"), ("bob", b"two"), ("ann", b"one")],
        [("cem", b"one"), ("bob", b"two"), ("cem", b"three"), ("dan", b"one")],
    ]
    spills = spilled(tmp_path, parts)
    found = [find_duplicates(DuplicateTask(spills=spills, buckets=run)) for run in (range(3), range(3, NUM_BUCKETS))]
    kept = [count for one in found for count in one.kept]
    firsts = [bucket_of(sample_key(image, 0), NUM_BUCKETS) for image in (b"one", b"two", b"three")]
    assert kept == [firsts.count(bucket) for bucket in range(NUM_BUCKETS)]
    removed: Counter[str] = Counter()
    for one in found:
        removed.update(one.removed)
    assert removed == {"ann": 1, "cem": 1, "dan": 1, "bob": 1}
    assert sum(one.across for one in found) == 2
    assert [pair for one in found for pair in one.examples] == [("row 3", "row 0"), ("row 6", "row 0")]


def test_examples_of_wrong_labels_are_few(tmp_path):
    spills = spilled(tmp_path, [[(f"p{i:02d}", b"same") for i in range(50)]])
    found = [find_duplicates(DuplicateTask(spills=spills, buckets=run)) for run in (range(3), range(3, NUM_BUCKETS))]
    assert sum(one.across for one in found) == 49
    assert sum(len(one.examples) for one in found) == gather.EXAMPLES


# --- names and labels ---


def test_people_are_sorted_by_number_where_all_are_numbers_else_as_text():
    assert sort_identities({"10", "9", "0", "100"}) == ["0", "9", "10", "100"]
    assert sort_identities({"10", "9", "ann"}) == ["10", "9", "ann"]
    assert sort_identities({"9", "²"}) == ["9", "²"]
    assert (
        sort_identities(["7", "07", "007", "1"]) == sort_identities(["007", "7", "1", "07"]) == ["1", "007", "07", "7"]
    )
    assert sort_identities([]) == []


@pytest.mark.parametrize(
    ("start", "extension"),
    [
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"\x89PNG\r\n", "png"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "webp"),
        (b"RIFF\0\0\0\0WAVE", "jpg"),
    ],
)
def test_an_image_is_called_by_what_it_is(start, extension):
    assert extension_of(start + bytes(20)) == extension


# --- shards ---


def test_shards_hold_the_samples_in_order_with_labels_and_are_noted(tmp_path):
    rows = [(str(100 - i), jpeg(i)) for i in range(7)]
    spills = spilled(tmp_path, [rows[:3], rows[3:]])
    infos = gather.write_shards(task(tmp_path, spills))
    assert [(info.name, info.num_samples) for info in infos] == [
        ("shard-000000.tar", 2),
        ("shard-000001.tar", 2),
        ("shard-000002.tar", 2),
        ("shard-000003.tar", 1),
    ]
    expected = sorted(rows, key=lambda row: sample_key(row[1], 0))
    assert images(tmp_path, infos) == [image for _, image in expected]
    labels = [
        int(label)
        for info in infos
        for label in read_shard(storage.join(str(tmp_path), "out", info.name), info, 7).labels
    ]
    assert [str(94 + label) for label in labels] == [name for name, _ in expected]
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == [f"{info.name}.json" for info in infos]


def test_finished_shards_are_not_written_again_and_damaged_or_absent_ones_are(tmp_path):
    spills = spilled(tmp_path, [[("ann", jpeg(i)) for i in range(8)]])
    work = task(tmp_path, spills)
    infos = gather.write_shards(work)
    shards = sorted((tmp_path / "out").iterdir())
    data = [path.read_bytes() for path in shards]
    inodes = [path.stat().st_ino for path in shards]
    shards[1].write_bytes(data[1][:700] + b"?" + data[1][701:])
    shards[2].unlink()
    (tmp_path / "notes" / "shard-000003.tar.json").unlink()
    before = [path.stat() for path in shards[:1]]
    assert gather.write_shards(work) == infos
    assert [path.read_bytes() for path in shards] == data
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in shards[:1]] == [
        (one.st_ino, one.st_mtime_ns) for one in before
    ]
    assert shards[3].stat().st_ino != inodes[3]


def test_a_run_of_finished_shards_does_not_read_the_parts(tmp_path):
    spills = spilled(tmp_path, [[("ann", jpeg(i)) for i in range(4)]])
    work = task(tmp_path, spills)
    infos = gather.write_shards(work)
    storage.delete_file(spills.uris[0])
    assert gather.write_shards(work) == infos


def test_a_shard_that_does_not_read_back_as_written_is_an_error(tmp_path, monkeypatch):
    spills = spilled(tmp_path, [[("ann", jpeg(0))]])
    work = task(tmp_path, spills)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: b"something else")
    with pytest.raises(PackError, match=r"shard-000000\.tar: what was written is not what is read back$"):
        gather.write_shards(work)
    assert not (tmp_path / "notes").exists()


def test_the_same_samples_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    rows = [("ann", jpeg(1)), ("bob", jpeg(2))]
    now = time.time()
    first = gather.write_shards(task(tmp_path / "a", spilled(tmp_path / "a", [rows])))
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert gather.write_shards(task(tmp_path / "b", spilled(tmp_path / "b", [rows]))) == first


def test_a_place_in_memory_takes_shards_too():
    spills = spilled("memory://gather-test", [[("ann", jpeg(1)), ("bob", jpeg(2))]])
    infos = gather.write_shards(task("memory://gather-test", spills))
    assert sorted(images("memory://gather-test", infos)) == sorted([jpeg(1), jpeg(2)])


# --- cutting the order into runs ---

BUCKETS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1, max_size=40)


@given(buckets=BUCKETS, samples_per_shard=st.integers(1, 50), memory=st.integers(1, 500))
def test_every_shard_is_in_one_run_that_reads_its_samples(buckets, samples_per_shard, memory):
    kept, sizes = [count for count, _ in buckets], [size for _, size in buckets]
    total, starts = sum(kept), np.concatenate([[0], np.cumsum(kept)]).tolist()
    runs = shard_runs(kept, sizes, samples_per_shard, memory)
    numbers = [number for run in runs for number, _ in run.shards]
    assert numbers == list(range(-(-total // samples_per_shard)))
    counts = [count for run in runs for _, count in run.shards]
    assert all(count == samples_per_shard for count in counts[:-1])
    assert sum(counts) == total
    assert all(count > 0 for count in counts)
    for run in runs:
        first, behind = run.buckets
        assert 0 <= first < behind <= len(kept)
        begin = starts[first] + run.skip
        end = begin + sum(count for _, count in run.shards)
        assert begin == run.shards[0][0] * samples_per_shard
        assert run.skip >= 0
        assert starts[behind] >= end > starts[behind - 1]  # enough buckets, and none too many


@given(buckets=BUCKETS, samples_per_shard=st.integers(1, 50), memory=st.integers(1, 500))
def test_a_run_reads_no_more_than_memory_and_what_its_last_shard_needs(buckets, samples_per_shard, memory):
    kept, sizes = [count for count, _ in buckets], [size for _, size in buckets]
    for run in shard_runs(kept, sizes, samples_per_shard, memory):
        first, behind = run.buckets
        own = first + 1
        while own < behind and sum(sizes[first : own + 1]) <= memory:
            own += 1
        # Buckets behind its own hold samples of its last shard alone.
        assert sum(kept[own : behind - 1]) < samples_per_shard


@settings(max_examples=30)
@given(
    num_samples=st.integers(1, 25),
    samples_per_shard=st.integers(1, 9),
    memory=st.integers(1, 60),
    drop=st.booleans(),
)
def test_runs_write_what_one_task_would(num_samples, samples_per_shard, memory, drop):
    folder = new_place()
    rows = [("ann", bytes([i % 11 + 1]) * 8) for i in range(num_samples)]  # duplicates from 11 on
    spills = spilled(folder, [rows[::2], rows[1::2]])
    found = [find_duplicates(DuplicateTask(spills=spills, buckets=run)) for run in (range(3), range(3, NUM_BUCKETS))]
    everything = [len(spills.read(bucket, bucket + 1)) for bucket in range(NUM_BUCKETS)]
    kept = [count for one in found for count in one.kept] if drop else everything
    sizes = np.diff(spills.offsets).sum(axis=0).tolist()
    whole = task(f"{folder}/whole", spills, drop_duplicates=drop)
    total = sum(kept)
    cut = [(n, min(samples_per_shard, total - n * samples_per_shard)) for n in range(-(-total // samples_per_shard))]
    expected = gather.write_shards(replace(whole, shards=cut))
    infos = []
    for run in shard_runs(kept, sizes, samples_per_shard, memory):
        work = task(
            f"{folder}/runs", spills, buckets=run.buckets, skip=run.skip, shards=run.shards, drop_duplicates=drop
        )
        infos += gather.write_shards(replace(work, first_sample=run.shards[0][0] * samples_per_shard))
    assert infos == expected
