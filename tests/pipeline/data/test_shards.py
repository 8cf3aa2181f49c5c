"""Shards and manifests: what is whole parses as `tarfile` parses it, and nothing damaged passes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.cache import ShardCache
from pipeline.data.manifest import Manifest, ManifestError, ShardInfo
from pipeline.data.shards import ShardError, parse_shard, read_shard
from tests.pipeline.data.writers import label_of, packed_set, shard_info, tar_bytes

NUM_CLASSES = 5
URI = "memory://shards/shard-000000.tar"


def by_tarfile(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}


def member_offsets(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member.offset for member in archive]


def assert_as_tarfile(data: bytes) -> None:
    members, shard = by_tarfile(data), parse_shard(data, URI)
    assert [f"{key}.jpg" for key in shard.keys] == [name for name in members if name.endswith(".jpg")]
    for key, image, label in zip(shard.keys, shard.images, shard.labels, strict=True):
        assert members[f"{key}.jpg"] == image
        assert int(members[f"{key}.cls"]) == label
    assert shard.labels.dtype == np.int64


def tar_of(members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, body in members:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


@given(
    images=st.lists(st.binary(max_size=1200), min_size=1, max_size=6),
    label=st.integers(0, 2**40),
    prefix=st.text("abc/_-", max_size=30),
)
def test_a_shard_by_webdataset_parses_as_by_tarfile(images, label, prefix):
    data = tar_bytes([(f"x{prefix}{i:04d}", image, str(label + i).encode()) for i, image in enumerate(images)])
    assert_as_tarfile(data)
    assert parse_shard(data, URI).images == images
    assert parse_shard(data, URI).labels.tolist() == [label + i for i in range(len(images))]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("length", [90, 96, 97, 150, 230])
def test_long_names_of_every_tar_format(tar_format, length):
    folder = "/".join(["d" * 19] * (length // 20))
    members = []
    for i in range(3):
        key = f"{folder}/{i}".rjust(length, "k")
        members += [(f"{key}.jpg", bytes([i]) * 700), (f"{key}.cls", str(i).encode())]
        members += [(f"s{i}.jpg", b"short"), (f"s{i}.cls", b"4")]  # a long name is the next member's alone
    data = tar_of(members, tar_format)
    assert_as_tarfile(data)
    assert parse_shard(data, URI).keys[0] == members[0][0].removesuffix(".jpg")
    assert "s1" in parse_shard(data, URI).keys


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_outside_ascii(tar_format):
    name = "gesichter-äöü-顔" * 8
    data = tar_of([(f"{name}.jpg", b"x"), (f"{name}.cls", b"1")], tar_format)
    assert_as_tarfile(data)
    assert parse_shard(data, URI).keys == [name]


def test_long_keys_by_webdatasets_own_writer():
    data = tar_bytes([("k" * 140 + str(i), bytes([i]) * 800, str(i).encode()) for i in range(3)])
    assert_as_tarfile(data)
    assert [len(key) for key in parse_shard(data, URI).keys] == [141] * 3


def test_folders_and_other_members_are_passed_over():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, body in (("d/1.jpg", b"image"), ("d/1.json", b"{}"), ("d/1.cls", b"2")):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    shard = parse_shard(buffer.getvalue(), URI)
    assert (shard.keys, shard.images, shard.labels.tolist()) == (["d/1"], [b"image"], [2])


@pytest.fixture(scope="module")
def stored():
    samples = [(f"{i:09d}", bytes([i]) * (300 * i), str(i % NUM_CLASSES).encode()) for i in range(1, 9)]
    data = tar_bytes(samples)
    return data, shard_info("shard-000000.tar", data, len(samples))


def read(data: bytes, info: ShardInfo):
    storage.write_bytes(URI, data)
    return read_shard(URI, info, NUM_CLASSES)


def assert_refused(data: bytes, info: ShardInfo, message: str) -> None:
    with pytest.raises(ShardError, match=message) as caught:
        read(data, info)
    assert str(caught.value).startswith(f"{URI}: ")


def test_a_whole_shard_reads(stored):
    data, info = stored
    shard = read(data, info)
    assert shard.labels.tolist() == [i % NUM_CLASSES for i in range(1, 9)]
    assert [len(image) for image in shard.images] == [300 * i for i in range(1, 9)]


def test_every_truncation_is_refused(stored):
    data, info = stored
    boundary = member_offsets(data)[8]
    assert len(by_tarfile(data[:boundary])) == 8  # tarfile takes half of it for the whole
    for cut in sorted({*range(0, len(data), 256), *range(1024, 2100), len(data) - 1}):
        assert_refused(data[:cut], info, rf"truncated or altered: {cut} bytes, the manifest says {len(data)}")
    assert_refused(data + b"\0", info, r"truncated or altered")


@pytest.mark.parametrize("place", ["mid-member", "in header", "at boundary"])
def test_a_truncation_that_the_manifest_knows_nothing_of_is_refused_by_its_contents(stored, place):
    # Even if size and checksum were taken from the damaged file itself.
    data, info = stored
    offsets = member_offsets(data)
    cut = {"mid-member": offsets[9] + 512 + 700, "in header": offsets[9] + 100, "at boundary": offsets[8]}[place]
    part = data[:cut]
    own = dataclasses.replace(info, num_bytes=len(part), sha256=hashlib.sha256(part).hexdigest())
    where = {"mid-member": "inside the member", "in header": "inside the header", "at boundary": "without its end mark"}
    assert_refused(part, own, rf"byte {cut}: truncated: it ends {where[place]}")


@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(stored, position, bit):
    data, info = stored
    altered = bytearray(data)
    altered[position % len(data)] ^= 1 << bit
    assert_refused(bytes(altered), info, r"corrupt, bytes 0 to \d+: sha256 is [0-9a-f]{64}, the manifest says")


def test_a_wrong_number_of_samples_is_refused(stored):
    data, info = stored
    for wrong in (7, 9, 0):
        assert_refused(data, dataclasses.replace(info, num_samples=wrong), rf"8 samples, the manifest says {wrong}")


@pytest.mark.parametrize("label", [NUM_CLASSES, 10**6, -1, 2**62])
def test_a_label_out_of_range_is_refused(label):
    data = tar_bytes([("a", b"1", b"0"), ("b", b"2", str(label).encode()), ("c", b"3", b"4")])
    assert_refused(data, shard_info("x", data, 3), rf"{label}.*the data set has 5 classes")


@pytest.mark.parametrize("label", [b"", b"x", b"1.0", b"\xff", str(2**70).encode()])
def test_a_label_that_is_no_class_number_is_refused(label):
    data = tar_bytes([("a", b"1", label)])
    assert_refused(data, shard_info("x", data, 1), r"a\.cls|class")


def test_a_missing_member_is_named():
    whole = [("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"2"), ("b.cls", b"2")]
    for missing in range(4):
        data = tar_of([member for i, member in enumerate(whole) if i != missing])
        key = whole[missing][0][0]
        assert_refused(data, shard_info("x", data, 2), rf"both an image and a \.cls member; incomplete: \['{key}'\]")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty"),
        (b"\0" * 10240, r"without members"),
        (b"\0" * 100, r"truncated"),
        (tar_of([("readme.txt", b"x")]), r"no samples at all"),
    ],
    ids=["nothing", "end mark", "half an end mark", "no sample"],
)
def test_a_shard_without_samples_is_refused(data, message):
    assert_refused(data, shard_info("x", data, 0), message)


@pytest.mark.parametrize("data", [b"x" * 2000, b"PK\x03\x04" + b"\0" * 600, b"<html>" * 300])
def test_what_is_no_tar_is_refused(data):
    assert_refused(data, shard_info("x", data, 1), r"byte 0: not a tar header")


def test_a_missing_shard_is_named(stored):
    with pytest.raises(storage.StorageError, match=r"memory://shards/none\.tar: does not exist"):
        read_shard("memory://shards/none.tar", stored[1], NUM_CLASSES)


@given(position=st.integers(0, 10**9), value=st.binary(min_size=1, max_size=12))
def test_the_parser_itself_fails_by_a_shard_error_only(position, value):
    # The checksum stands before it, yet it says what it raises.
    long = "k" * 120
    data = bytearray(
        tar_of([("a.jpg", b"1"), ("a.cls", b"1"), (f"{long}.jpg", b"1"), (f"{long}.cls", b"1")], tarfile.GNU_FORMAT)
    )
    position %= 8 * 512
    data[position : position + len(value)] = value
    try:
        shard = parse_shard(bytes(data), URI)
    except ShardError as error:
        message = str(error)
    else:
        message = URI
        assert len(shard.keys) == len(shard.images) == len(shard.labels)
    assert message.startswith(URI)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_images_of_every_kind_are_read(extension):
    shard = parse_shard(tar_of([(f"a.{extension}", b"image"), ("a.cls", b"3")]), URI)
    assert (shard.keys, shard.images, shard.labels.tolist()) == (["a"], [b"image"], [3])


def test_a_key_ends_at_the_first_dot_of_the_last_name_as_webdataset_has_it():
    files = [("v1.0/a.jpg", b"1"), ("v1.0/a.cls", b"1"), ("v1.1/a.jpg", b"2"), ("v1.1/a.cls", b"2")]
    files += [("b.mask.jpg", b"m"), ("b.jpg", b"3"), ("b.cls", b"3")]
    shard = parse_shard(tar_of(files), URI)
    keys = [webdataset.tariterators.base_plus_ext(name) for name, _ in files]
    assert shard.keys == [key for key, extension in keys if extension == "jpg"]
    assert (shard.images, shard.labels.tolist()) == ([b"1", b"2", b"3"], [1, 2, 3])


@pytest.mark.parametrize("second", ["a.jpg", "a.png", "a.cls"])
def test_a_sample_with_two_images_or_labels_is_refused(second):
    data = tar_of([("a.jpg", b"1"), ("a.cls", b"1"), (second, b"1")])
    with pytest.raises(ShardError, match=rf"byte 2048: {second}: a second (image|label) of the sample 'a'"):
        parse_shard(data, URI)


# --- manifest ---


@pytest.fixture
def packed(tmp_path):
    return packed_set(tmp_path / "set", (5, 5, 2))


def edit(manifest: Manifest, change) -> None:
    place = f"{manifest.uri}/manifest.json"
    content = storage.read_json(place)
    change(content)
    storage.write_json(place, content)


def test_a_manifest_round_trips_and_moves(packed, tmp_path):
    loaded = Manifest.load(packed.uri)
    assert loaded == packed
    assert loaded.offsets.tolist() == [0, 5, 10, 12]
    assert loaded.num_samples == 12
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = Manifest.load(str(tmp_path / "moved"))
    assert moved.fingerprint == packed.fingerprint  # equal data wherever it lies
    shard = read_shard(moved.shard_uri(1), moved.shards[1], moved.num_classes)
    assert shard.labels.tolist() == [label_of(i) for i in range(5, 10)]


def test_a_missing_manifest_says_what_to_do(tmp_path):
    with pytest.raises(
        ManifestError, match=r"none/manifest\.json: there is no manifest here: the folder does not exist"
    ):
        Manifest.load(str(tmp_path / "none"))
    with pytest.raises(ManifestError, match=r"there is no manifest here: pack the data first"):
        Manifest.load(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(num_classes=6),
        lambda content: content.update(image_side=96),
        lambda content: content.update(seed=1),
        lambda content: content["source"].update(format="other"),
        lambda content: content["identities"].reverse(),
        lambda content: content["shards"].reverse(),
        lambda content: content["shards"].pop(),
        lambda content: content["shards"][0].update(num_samples=4),
        lambda content: content["shards"][0].update(num_bytes=4),
        lambda content: content["shards"][0].update(sha256="0" * 64),
        lambda content: content["shards"][0].update(name="shard-000001.tar"),
        lambda content: content.update(fingerprint="0" * 64),
    ],
)
def test_every_altered_field_is_found(packed, change):
    edit(packed, change)
    with pytest.raises(ManifestError, match=r"manifest\.json: altered: its fingerprint is"):
        Manifest.load(packed.uri)


def test_another_format_version_is_refused(packed):
    edit(packed, lambda content: content.update(format_version=1))
    with pytest.raises(ManifestError, match=r"manifest\.json: format_version is 1, this version reads 2: pack"):
        Manifest.load(packed.uri)


@pytest.mark.parametrize(
    "field",
    ["format_version", "num_classes", "image_side", "seed", "source", "identities", "shards", "fingerprint"],
)
def test_a_missing_field_is_named(packed, field):
    edit(packed, lambda content: content.pop(field))
    with pytest.raises(ManifestError, match=rf"manifest\.json: not a manifest: .*{field}"):
        Manifest.load(packed.uri)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(shards=None),
        lambda content: content.update(shards=[1]),
        lambda content: content.update(shards=["abc"]),
        lambda content: content["shards"][0].pop("sha256"),
        lambda content: content["shards"][0].update(extra=1),
        lambda content: content["shards"][0].update(num_samples="five"),
        lambda content: content["shards"][0].update(num_samples=None),
        lambda content: content.update(identities=3),
        lambda content: content.update(num_samples=99),
    ],
)
def test_a_field_of_the_wrong_kind_is_a_manifest_error(packed, change):
    edit(packed, change)
    with pytest.raises(ManifestError, match=r"manifest\.json: "):
        Manifest.load(packed.uri)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_json_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(text)))
    with pytest.raises(ManifestError, match=r"manifest\.json: not a manifest"):
        Manifest.load(str(tmp_path))


def test_a_manifest_that_is_no_json_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(storage.StorageError, match=r"manifest\.json: is not valid JSON"):
        Manifest.load(str(tmp_path))


def test_a_cached_shard_that_the_disk_altered_is_read_again_and_never_used(packed, tmp_path):
    info = packed.shards[0]
    cache = ShardCache(str(tmp_path / "cache"), 1 << 24)
    whole = read_shard(packed.shard_uri(0), info, packed.num_classes, cache)
    (entry,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and info.sha256 in path.name]
    good = entry.read_bytes()
    entry.chmod(0o644)
    entry.write_bytes(good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
    again = read_shard(packed.shard_uri(0), info, packed.num_classes, cache)
    assert again.images == whole.images
    storage.delete_file(packed.shard_uri(0))  # the bad entry is gone too, so now there is nothing
    with pytest.raises(storage.MissingError):
        read_shard(packed.shard_uri(0), info, packed.num_classes, cache)
