"""Packing: the same bytes from the same input, every sample once, and no manifest of what is not complete."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter

import numpy as np
import pytest

from pipeline import storage
from pipeline.data import pack as packing
from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.pack import PackError, pack
from pipeline.data.recordio import RecordIOError, RecordIOReader, image_keys
from pipeline.data.shards import read_shard
from pipeline.data.sources import SourceSpec, SyntheticConfig, detect_format, open_source
from pipeline.errors import message, user_error
from tests.pipeline.data.writers import jpeg, record_body, write_recordio

SYNTHETIC = SourceSpec(format="synthetic", seed=3, synthetic=SyntheticConfig(num_identities=4, images_per_identity=3))


def recordio(folder, labels: list[float], images: dict[int, bytes] | None = None) -> SourceSpec:
    """A pack without header: record i shows `jpeg(i)` unless `images` says otherwise."""
    bodies = {i: record_body([label], (images or {}).get(i, jpeg(i)), i) for i, label in enumerate(labels)}
    write_recordio(str(folder), bodies)
    return SourceSpec(format="recordio", uri=str(folder))


def samples(manifest: Manifest) -> list[tuple[bytes, int]]:
    """All samples in packed order, each shard verified."""
    found = []
    for number, info in enumerate(manifest.shards):
        shard = read_shard(manifest.shard_uri(number), info, manifest.num_classes)
        assert shard.keys == [f"{int(manifest.offsets[number]) + i:09d}" for i in range(info.num_samples)]
        found += list(zip(shard.images, shard.labels.tolist(), strict=True))
    return found


def written(task_spec: SourceSpec, uri: str, indices: list[int], first: int = 0):
    return packing._write_shard(packing._ShardTask(spec=task_spec, uri=uri, first=first, indices=np.array(indices)))


# --- one shard, without Ray ---


def test_a_shard_is_the_same_bytes_wherever_it_is_written_and_says_what_is_in_it(tmp_path):
    infos = [written(SYNTHETIC, uri, [5, 0, 11]) for uri in (f"{tmp_path}/a/s.tar", "memory://elsewhere/s.tar")]
    assert infos[0] == infos[1]
    data = (tmp_path / "a" / "s.tar").read_bytes()
    assert storage.read_bytes("memory://elsewhere/s.tar") == data
    assert infos[0].sha256 == hashlib.sha256(data).hexdigest()
    assert (infos[0].name, infos[0].num_samples, infos[0].num_bytes) == ("s.tar", 3, len(data))
    source = open_source(SYNTHETIC)
    shard = read_shard(f"{tmp_path}/a/s.tar", infos[0], 4)
    assert shard.images == [source.encoded(i) for i in (5, 0, 11)]
    assert shard.labels.tolist() == [1, 0, 3]
    with tarfile.open(tmp_path / "a" / "s.tar") as archive:
        assert {member.mtime for member in archive} == {0}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no image at all", r"not a readable image \(15 bytes\)"),
        (b"", r"not a readable image \(0 bytes\)"),
        (jpeg(1)[: len(jpeg(1)) // 2], r"not a readable image"),
        (jpeg(1, side=96), r"the image is 96x96, 112x112 is expected"),
    ],
    ids=["garbage", "empty", "half", "small"],
)
def test_an_image_that_cannot_be_packed_is_named_by_its_record(tmp_path, image, message):
    spec = recordio(tmp_path / "source", [0, 1, 0, 1], {2: image})
    assert written(spec, str(tmp_path / "out" / "good.tar"), [0, 1, 3]).num_samples == 3
    with pytest.raises(PackError, match=rf"train\.rec: record 2: {message}"):
        written(spec, str(tmp_path / "out" / "bad.tar"), [0, 1, 2, 3])
    assert not (tmp_path / "out" / "bad.tar").exists()


# --- sources ---


def test_labels_become_contiguous_and_keep_their_names(tmp_path):
    raw = [70.0, 5.0, 5.0, 16_777_216.0, 70.0, 0.0]
    source = open_source(recordio(tmp_path, raw))
    assert source.identities == ("0", "5", "70", "16777216")
    assert source.labels.tolist() == [2, 1, 1, 3, 2, 0]
    assert [float(source.identities[label]) for label in source.labels] == raw


@pytest.mark.parametrize("label", [0.5, -1.0, float("nan"), float("inf")])
def test_a_label_that_is_no_class_number_is_named(tmp_path, label):
    with pytest.raises(RecordIOError, match=r"train\.rec: record 1: the label .* is not a class number"):
        open_source(recordio(tmp_path, [0.0, label]))


def test_a_source_without_images_is_refused(tmp_path):
    write_recordio(str(tmp_path), {0: record_body((1, 1), b"")})
    with pytest.raises((RecordIOError, storage.StorageError), match=r"train\.rec.*no images"):
        open_source(SourceSpec(format="recordio", uri=str(tmp_path)))


def test_the_description_tells_sources_apart_and_not_places(tmp_path):
    one, same, other = (
        open_source(recordio(tmp_path / name, labels)).describe()
        for name, labels in (("a", [0, 1]), ("b", [0, 1]), ("c", [0, 1, 1]))
    )
    assert one == same
    assert one != other


def test_formats_are_detected(tmp_path):
    recordio(tmp_path / "rec", [0, 1])
    storage.write_bytes(str(tmp_path / "packed" / "manifest.json"), b"{}")
    storage.write_bytes(str(tmp_path / "shards" / "shard-000000.tar"), b"")
    assert detect_format("synthetic") == "synthetic"
    assert detect_format(str(tmp_path / "rec")) == "recordio"
    assert detect_format(str(tmp_path / "packed")) == "packed"
    with pytest.raises(storage.StorageError, match=r"shards: holds no data set.*must be packed again"):
        detect_format(str(tmp_path / "shards"))
    with pytest.raises(storage.StorageError, match=r"none: does not exist"):
        detect_format(str(tmp_path / "none"))


def test_a_source_that_does_not_exist_is_named_before_ray_is_asked(tmp_path):
    with pytest.raises(storage.StorageError, match=r"none/train\.idx: does not exist"):
        pack(SourceSpec(format="recordio", uri=str(tmp_path / "none")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"format"):
        SourceSpec(format="lmdb")


@pytest.mark.parametrize("size", [0, -1])
def test_samples_per_shard_must_be_positive(tmp_path, size):
    with pytest.raises(ValueError, match=r"samples_per_shard"):
        pack(SYNTHETIC, str(tmp_path), samples_per_shard=size)


# --- whole packs, by Ray tasks ---


@pytest.mark.ray
def test_the_same_input_and_seed_give_the_same_bytes_and_another_seed_another_order(tmp_path, ray_cluster):
    progress: list[tuple[int, int]] = []
    first = pack(
        SYNTHETIC, str(tmp_path / "a"), samples_per_shard=5, seed=1, on_progress=lambda *now: progress.append(now)
    )
    again = pack(SYNTHETIC, str(tmp_path / "b"), samples_per_shard=5, seed=1)
    other = pack(SYNTHETIC, str(tmp_path / "c"), samples_per_shard=5, seed=2)
    assert [shard.num_samples for shard in first.shards] == [5, 5, 2]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for shard in first.shards:
        assert (tmp_path / "a" / shard.name).read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    assert Manifest.load(str(tmp_path / "a")) == first
    one, two = samples(first), samples(other)
    assert one != two
    assert Counter(one) == Counter(two)  # the same samples, each once
    source = open_source(SYNTHETIC)
    assert Counter(one) == Counter((source.encoded(i), int(source.labels[i])) for i in range(12))
    assert first.identities == tuple(f"synthetic-3-{i}" for i in range(4))
    assert first.num_classes == 4


@pytest.mark.ray
def test_a_recordio_pack_keeps_bytes_and_maps_labels(tmp_path, ray_cluster):
    raw = [70.0, 5.0, 5.0, 900.0, 70.0, 0.0, 5.0]
    manifest = pack(recordio(tmp_path / "source", raw), str(tmp_path / "out"), samples_per_shard=3)
    assert manifest.identities == ("0", "5", "70", "900")
    found = {image: manifest.identities[label] for image, label in samples(manifest)}
    assert found == {jpeg(i): str(int(label)) for i, label in enumerate(raw)}


@pytest.mark.ray
def test_a_failing_pack_leaves_no_manifest(tmp_path, ray_cluster):
    spec = recordio(tmp_path / "source", [0, 1] * 5, {7: b"broken"})
    with pytest.raises(Exception, match=r"record 7") as caught:
        pack(spec, str(tmp_path / "out"), samples_per_shard=1)
    cause = user_error(caught.value)
    assert isinstance(cause, PackError)
    assert message(cause).endswith("train.rec: record 7: " + message(cause).rsplit("record 7: ", 1)[1])
    assert not storage.exists(str(tmp_path / "out" / "manifest.json"))
    with pytest.raises(ManifestError, match=r"there is no manifest here"):
        Manifest.load(str(tmp_path / "out"))


@pytest.mark.ray
def test_a_pack_that_fails_over_an_older_one_leaves_no_manifest_of_shards_that_are_gone(tmp_path, ray_cluster):
    out = str(tmp_path / "out")
    pack(recordio(tmp_path / "good", [0, 1] * 5), out, samples_per_shard=2)
    bad = recordio(tmp_path / "bad", [1, 0] * 5, {int(np.random.default_rng(0).permutation(10)[-1]): b"broken"})
    with pytest.raises(Exception, match=r"not a readable image"):
        pack(bad, out, samples_per_shard=2)
    if storage.exists(f"{out}/manifest.json"):  # an older manifest may stay only if its data set is still whole
        assert len(samples(Manifest.load(out))) == 10


@pytest.mark.ray
def test_a_source_that_changed_is_read_anew(tmp_path, ray_cluster):
    spec = recordio(tmp_path / "source", [0, 1])
    pack(spec, str(tmp_path / "one"))
    assert recordio(tmp_path / "source", [4, 5, 6]) == spec
    manifest = pack(spec, str(tmp_path / "two"))
    assert manifest.identities == ("4", "5", "6")
    assert len(samples(manifest)) == 3


@pytest.mark.ray
@pytest.mark.data
def test_the_real_pack_keeps_every_record(shared_data, tmp_path, ray_cluster):
    folder = shared_data / "faces_celeb299"
    manifest = pack(SourceSpec(format="recordio", uri=str(folder)), str(tmp_path), samples_per_shard=1000)
    assert [shard.num_samples for shard in manifest.shards] == [1000] * 6 + [288]
    assert manifest.num_classes == 299
    reader = RecordIOReader(str(folder / "train.rec"))
    records = [reader[key] for key in image_keys(reader)]
    found = samples(manifest)
    order = np.random.default_rng(0).permutation(len(records))
    for (image, label), index in zip(found, order.tolist(), strict=True):
        assert image == records[index].payload
        assert float(manifest.identities[label]) == records[index].labels[0]
