"""Packing: the same bytes from the same images, every sample once, and a report of what was found."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.checks import PackChecks
from pipeline.data.images import decode_into
from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.pack import OnProgress, PackSettings, pack
from pipeline.data.pack_report import load_report
from pipeline.data.recordio import RecordIOError, RecordIOReader, image_keys
from pipeline.data.shards import read_shard
from pipeline.data.sources import SourceError, SourceSpec, SyntheticConfig
from pipeline.data.spill import PackError, sample_key
from pipeline.errors import message, user_error
from tests.pipeline.data.packing import assert_complete, in_process, new_place, recordio, samples, shard_bytes
from tests.pipeline.data.writers import jpeg, record_body, write_recordio

SYNTHETIC = SourceSpec(format="synthetic", seed=3, synthetic=SyntheticConfig(num_identities=4, images_per_identity=3))
LABELS = [float(7 * i % 11) for i in range(60)]


def packed(
    source: SourceSpec,
    output: str | None = None,
    checks: PackChecks | None = None,
    on_progress: OnProgress | None = None,
    **settings: int,
) -> Manifest:
    return pack(source, output or new_place(), PackSettings(**{"samples_per_shard": 8} | settings), checks, on_progress)


@pytest.fixture
def local():
    with in_process():
        yield


# --- what is packed ---


def test_every_sample_is_packed_once_in_the_order_of_its_key_with_its_own_name(local):
    manifest = packed(recordio(new_place(), LABELS))
    found = samples(manifest)
    assert found == sorted(
        ((jpeg(i), str(int(label))) for i, label in enumerate(LABELS)), key=lambda sample: sample_key(sample[0], 0)
    )
    assert [shard.num_samples for shard in manifest.shards] == [8] * 7 + [4]
    assert manifest.num_samples == 60
    assert_complete(manifest)


@pytest.mark.parametrize("seed", [0, -1, 2**40])
@pytest.mark.parametrize("options", [{}, {"duplicates": "drop"}], ids=["keep", "drop"])
def test_the_bytes_do_not_depend_on_memory_parts_or_processors(seed, options):
    images = {i: jpeg(i % 50) for i in range(60)}
    source = recordio(new_place(), LABELS, images)
    found, num_parts = set(), []
    for memory_mib, num_cpus, min_task_bytes in ((1, 1, 1), (256, 3, 1), (256, 64, 1 << 30)):
        progress: list[tuple[str, int, int]] = []
        with in_process(num_cpus, min_task_bytes):
            manifest = packed(
                source,
                checks=PackChecks(**options),
                on_progress=lambda *now, seen=progress: seen.append(now),
                memory_mib=memory_mib,
                seed=seed,
            )
        assert_complete(manifest)
        num_parts.append(sum(what == "parts read" for what, *_ in progress))
        found.add((manifest.fingerprint, *shard_bytes(manifest).values()))
    assert len(set(num_parts)) == 3
    assert min(num_parts) == 1
    assert len(found) == 1


def test_another_seed_gives_another_order_of_the_same_samples(local):
    source = recordio(new_place(), LABELS)
    one, same, other = (packed(source, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert samples(one) != samples(other)
    assert Counter(samples(one)) == Counter(samples(other))


def test_the_order_of_a_packed_set_is_a_fair_shuffle(local):
    count = 400
    manifest = packed(recordio(new_place(), [i // 20 for i in range(count)]), samples_per_shard=64)
    places = {image: place for place, (image, _) in enumerate(samples(manifest))}
    order = np.array([places[jpeg(i)] for i in range(count)])
    # Of a random permutation: no correlation with the source, and neighbours of one person as rare as chance has it.
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 4 / count**0.5
    people = [label for _, label in samples(manifest)]
    assert sum(a == b for a, b in itertools.pairwise(people)) < 2.5 * count / 20


def test_labels_are_contiguous_sorted_by_number_and_keep_their_names(local):
    raw = [70.0, 5.0, 5.0, 900.0, 70.0, 0.0, 16_777_216.0]
    manifest = packed(recordio(new_place(), raw))
    assert manifest.identities == ("0", "5", "70", "900", "16777216")
    assert manifest.num_classes == 5
    assert dict(samples(manifest)) == {jpeg(i): str(int(label)) for i, label in enumerate(raw)}
    report = load_report(manifest.uri)
    assert report.samples_per_identity == [1, 2, 2, 1, 1]


def test_a_set_of_one_sample_and_shards_larger_than_the_set(local):
    manifest = packed(recordio(new_place(), [3.0]), samples_per_shard=1000)
    assert samples(manifest) == [(jpeg(0), "3")]
    assert len(manifest.shards) == 1


def test_one_sample_a_shard(local):
    manifest = packed(recordio(new_place(), LABELS[:9]), samples_per_shard=1)
    assert len(manifest.shards) == len(samples(manifest)) == 9
    assert_complete(manifest)


# --- what it is packed from, and where to ---


def test_a_source_without_images_is_refused_and_nothing_is_written(tmp_path, local):
    write_recordio(str(tmp_path / "source"), {0: record_body((1, 1), b"")})
    with pytest.raises((RecordIOError, SourceError), match=r"train\.rec.*no images"):
        packed(SourceSpec(format="recordio", uri=str(tmp_path / "source")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_source_that_does_not_exist_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(storage.StorageError, match=r"none: does not exist"):
        pack(SourceSpec(format="recordio", uri=str(tmp_path / "none")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("samples_per_shard", 0), ("memory_mib", -1)])
def test_settings_must_be_positive(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        PackSettings(**{field: value})


@pytest.mark.parametrize("output", [".", "inner", ".."])
def test_an_output_in_its_source_or_around_it_is_refused_and_the_source_stays(tmp_path, local, output):
    source = recordio(tmp_path / "source", [0, 1])
    (tmp_path / "source" / "shard-000000.tar").write_bytes(b"the user's own")
    with pytest.raises(PackError, match=r"the output must not lie in the source .*source"):
        packed(source, str(tmp_path / "source" / output))
    assert (tmp_path / "source" / "shard-000000.tar").read_bytes() == b"the user's own"
    packed(source, str(tmp_path / "source-packed"))


def test_shards_that_others_put_there_are_not_deleted(tmp_path, local):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"the user's own")
    with pytest.raises(PackError, match=r"out: holds shard-000000\.tar without manifest\.json.*another folder"):
        packed(recordio(tmp_path / "source", [0, 1]), str(tmp_path / "out"))
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == b"the user's own"
    assert not (tmp_path / "out" / ".packing").exists()


def test_two_packers_do_not_work_on_one_folder(tmp_path, local):
    source, out = recordio(tmp_path / "source", [0, 1] * 9), str(tmp_path / "out")
    refused = []

    def pack_at_once(what: str, done: int, total: int) -> None:
        with pytest.raises(storage.StorageError, match=r"out: another process is packing here$"):
            packed(source, out)
        refused.append(what)

    manifest = packed(source, out, on_progress=pack_at_once)
    assert len(refused) > 2
    assert_complete(manifest)
    assert packed(source, out) == manifest


# --- duplicates ---


def test_duplicates_are_kept_as_neighbours_or_dropped_and_reported(local):
    # Person 3 has nothing but copies of others' images.
    labels = [0.0, 1.0, 0.0, 3.0, 2.0, 3.0, 1.0]
    images = {0: jpeg(0), 1: jpeg(1), 2: jpeg(0), 3: jpeg(0), 4: jpeg(4), 5: jpeg(1), 6: jpeg(6)}
    source = recordio(new_place(), labels, images)
    kept = packed(source, samples_per_shard=2)
    assert Counter(samples(kept)) == Counter((images[i], str(int(label))) for i, label in enumerate(labels))
    runs = [image for image, _ in samples(kept)]
    assert [runs[i] for i in range(len(runs)) if i == 0 or runs[i] != runs[i - 1]] == list(dict.fromkeys(runs))
    assert load_report(kept.uri).dropped == {}
    dropped = packed(source, checks=PackChecks(duplicates="drop"), samples_per_shard=2)
    assert Counter(samples(dropped)) == Counter([(jpeg(0), "0"), (jpeg(1), "1"), (jpeg(4), "2"), (jpeg(6), "1")])
    assert dropped.identities == ("0", "1", "2")
    assert_complete(dropped)
    report = load_report(dropped.uri)
    assert (report.num_read, report.num_packed, report.dropped) == (7, 4, {"duplicate": 3})
    assert report.duplicates_across == 2
    rec = f"{source.uri}/train.rec"
    assert sorted(report.duplicate_examples) == [
        (f"{rec}: record 3", f"{rec}: record 0"),
        (f"{rec}: record 5", f"{rec}: record 1"),
    ]
    assert report.samples_per_identity == [1, 2, 1]


def test_the_first_of_equal_images_is_kept_wherever_the_parts_are_cut(local):
    labels = [float(i) for i in range(40)]
    source = recordio(new_place(), labels, {i: jpeg(i % 4) for i in range(40)})
    manifest = packed(source, checks=PackChecks(duplicates="drop"))
    assert Counter(samples(manifest)) == Counter((jpeg(i), str(i)) for i in range(4))


# --- bad images ---


def bad_source(folder: str) -> tuple[SourceSpec, dict[int, str]]:
    """60 records, four of which are bad; gives how each is."""
    images = {7: b"broken", 20: jpeg(20, side=96), 33: b"", 59: jpeg(59)[:900]}
    return recordio(folder, LABELS, images), {7: "undecodable", 20: "wrong-size", 33: "undecodable", 59: "undecodable"}


def test_a_bad_image_ends_packing_with_its_name_and_leaves_no_manifest(local):
    source, _ = bad_source(new_place())
    out = new_place()
    with pytest.raises(PackError, match=r"train\.rec: record 7: not a readable image \(6 bytes\)"):
        packed(source, out)
    with pytest.raises(ManifestError, match=r"there is no manifest here"):
        Manifest.load(out)


def test_bad_images_are_left_out_and_listed(local):
    source, kinds = bad_source(new_place())
    manifest = packed(source, checks=PackChecks(bad_images="drop", max_bad_images=4))
    assert Counter(samples(manifest)) == Counter(
        (jpeg(i), str(int(label))) for i, label in enumerate(LABELS) if i not in kinds
    )
    report = load_report(manifest.uri)
    assert (report.num_read, report.num_packed) == (60, 56)
    assert report.dropped == {"undecodable": 3, "wrong-size": 1}
    lines = [json.loads(line) for line in storage.read_bytes(f"{manifest.uri}/quarantine.jsonl").splitlines()]
    assert [line["name"] for line in lines] == [f"{source.uri}/train.rec: record {i}" for i in kinds]
    assert lines[1]["reason"] == "the image is 96x96, 112x112 is expected"
    assert all(line["reason"].startswith("not a readable image") for i, line in enumerate(lines) if i != 1)
    assert report.statistics.count == 57  # those that could be decoded
    assert report.statistics.sizes == {"112x112": 56, "96x96": 1}


def test_more_bad_images_than_allowed_in_all_parts_together_end_packing(local):
    source, _ = bad_source(new_place())
    out = new_place()
    with pytest.raises(
        PackError, match=r"record 59: .*: this is bad image 4, checks\.max_bad_images=3 may be left out"
    ):
        packed(source, out, PackChecks(bad_images="drop", max_bad_images=3))
    assert not storage.exists(f"{out}/manifest.json")


def test_a_source_of_bad_images_alone_is_an_error(local):
    source = recordio(new_place(), [0.0, 1.0], {0: b"x", 1: b"y"})
    with pytest.raises(PackError, match=r"no image is left to pack"):
        packed(source, checks=PackChecks(bad_images="drop"))


def test_people_without_good_images_have_no_label(local):
    source = recordio(new_place(), [0.0, 1.0, 2.0], {1: b"broken"})
    manifest = packed(source, checks=PackChecks(bad_images="drop"))
    assert manifest.identities == ("0", "2")
    assert dict(samples(manifest)) == {jpeg(0): "0", jpeg(2): "2"}


def test_people_with_few_images_are_reported(local):
    source = recordio(new_place(), [0.0] * 3 + [1.0] + [2.0] * 2 + [3.0])
    report = load_report(packed(source).uri)
    assert (report.fewer_than, report.num_few, report.few_examples) == (2, 2, ["1", "3"])
    report = load_report(packed(source, checks=PackChecks(fewer_than=3)).uri)
    assert (report.num_few, report.few_examples) == (3, ["1", "2", "3"])
    assert load_report(packed(source, checks=PackChecks(fewer_than=0)).uri).num_few == 0


# --- by Ray tasks ---


@pytest.mark.ray
def test_ray_tasks_write_what_one_process_writes(tmp_path, ray_cluster):
    source = recordio(tmp_path / "source", LABELS)
    progress: list[tuple[str, int, int]] = []
    by_ray = packed(source, str(tmp_path / "ray"), on_progress=lambda *now: progress.append(now))
    with in_process():
        alone = packed(source, str(tmp_path / "alone"))
    assert replace(by_ray, uri="") == replace(alone, uri="")
    assert shard_bytes(by_ray) == shard_bytes(alone)
    assert_complete(by_ray)
    for what in dict.fromkeys(what for what, *_ in progress):
        seen = [(done, total) for name, done, total in progress if name == what]
        assert seen == [(done + 1, len(seen)) for done in range(len(seen))]


@pytest.mark.ray
def test_a_failing_task_is_told_in_one_line(tmp_path, ray_cluster):
    source, _ = bad_source(str(tmp_path / "source"))
    with pytest.raises(Exception, match=r"record 7") as caught:
        packed(source, str(tmp_path / "out"))
    cause = user_error(caught.value)
    assert isinstance(cause, PackError)
    assert message(cause).startswith(f"file://{tmp_path}/source/train.rec: record 7: not a readable image (6 bytes)")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.ray
def test_synthetic_faces_are_packed(tmp_path, ray_cluster):
    manifest = packed(SYNTHETIC, str(tmp_path), samples_per_shard=5)
    assert [shard.num_samples for shard in manifest.shards] == [5, 5, 2]
    assert manifest.identities == tuple(f"synthetic-3-{i}" for i in range(4))
    assert Counter(identity for _, identity in samples(manifest)) == dict.fromkeys(manifest.identities, 3)


@pytest.mark.ray
@pytest.mark.data
def test_the_real_pack_keeps_every_record(shared_data, tmp_path, ray_cluster):
    folder = shared_data / "faces_celeb299"
    manifest = packed(SourceSpec(format="recordio", uri=str(folder)), str(tmp_path), samples_per_shard=1000)
    assert [shard.num_samples for shard in manifest.shards] == [1000] * 6 + [288]
    assert manifest.num_classes == 299
    reader = RecordIOReader(str(folder / "train.rec"))
    records = [reader[key] for key in image_keys(reader)]
    assert len(records) == 6288
    assert Counter(samples(manifest)) == Counter((record.payload, str(int(record.labels[0]))) for record in records)
    assert load_report(manifest.uri).statistics.sizes == {"112x112": 6288}
    assert_complete(manifest)


@pytest.mark.ray
@pytest.mark.data
def test_the_real_images_decode_as_pil_decodes_those_of_the_source(shared_data, tmp_path, ray_cluster):
    folder = shared_data / "faces_celeb299"
    reader = RecordIOReader(str(folder / "train.rec"))
    labels: dict[bytes, set[float]] = {}  # a few of these images belong to two people
    for record in (reader[key] for key in image_keys(reader)):
        labels.setdefault(record.payload, set()).add(record.labels[0])
    manifest = packed(SourceSpec(format="recordio", uri=str(folder)), str(tmp_path), samples_per_shard=3000)
    pixels = np.empty((112, 112, 3), np.uint8)
    for number, info in enumerate(manifest.shards):
        shard = read_shard(manifest.shard_uri(number), info, manifest.num_classes)
        for image, label in zip(shard.images, shard.labels.tolist(), strict=True):
            decode_into(image, pixels, resize=False)
            with Image.open(io.BytesIO(image)) as expected:
                assert np.array_equal(pixels, np.asarray(expected.convert("RGB")))
            assert float(manifest.identities[label]) in labels[image]
