"""The damage that Ray's own WebDataset reader passes over in silence (RAY.md 2.2): ours loses no image unseen.

Each kind is tried twice: with the manifest of the whole shard, and with one made for the damaged bytes, so that no
checksum helps and the tar reader alone must notice; and as a foreign shard that is to be packed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.quarantine import BadImage, Quarantine
from pipeline.data.shards import ShardError, read_shard
from pipeline.data.sources import SourceError, SourceSpec, open_source
from pipeline.data.stream_plan import StreamConfig, StreamPlan
from pipeline.data.ustar import TarError, members
from tests.pipeline.data.writers import jpeg, label_of, packed_set, shard_info

NUM = 20
BLOCK = 512


def header_places(data: bytes) -> list[int]:
    import io

    return [member.offset for member in members(io.BytesIO(data), "shard")]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damages(data: bytes) -> dict[str, bytes]:
    headers = header_places(data)
    middle = headers[len(headers) // 2]
    return {
        "truncated within a body": data[: middle + BLOCK + 700],
        "truncated at a header": data[:middle],
        "truncated within a header": data[: middle + 100],
        "header checksum broken": flipped(data, middle + 5),
        "empty": b"",
        "end mark missing": data[: headers[-1] + 2 * BLOCK],
    }


KINDS = (
    "truncated within a body",
    "truncated at a header",
    "truncated within a header",
    "header checksum broken",
    "empty",
    "end mark missing",
)


@pytest.fixture
def whole(tmp_path) -> tuple[Manifest, bytes]:
    manifest = packed_set(tmp_path / "set", (NUM,))
    return manifest, storage.read_bytes(manifest.shard_uri(0))


def test_a_whole_shard_gives_all_its_samples(whole):
    manifest, data = whole
    shard = read_shard(manifest.shard_uri(0), manifest.shards[0], manifest.num_classes)
    assert [bytes(image) for image in shard.images] == [jpeg(i) for i in range(NUM)]
    assert shard.labels.tolist() == [label_of(i) for i in range(NUM)]
    assert tuple(damages(data)) == KINDS


@pytest.mark.parametrize("checksum", ["of the whole shard", "of the damaged bytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_is_an_error_that_names_it(whole, kind, checksum):
    manifest, data = whole
    damaged, uri = damages(data)[kind], manifest.shard_uri(0)
    storage.write_bytes(uri, damaged)
    info = manifest.shards[0] if checksum == "of the whole shard" else shard_info("shard-000000.tar", damaged, NUM)
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        read_shard(uri, info, manifest.num_classes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_foreign_shard_is_an_error_that_names_it(tmp_path, whole, kind):
    _, data = whole
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.tar").write_bytes(damages(data)[kind])
    spec = SourceSpec(format="webdataset", uri=str(tmp_path / "foreign"))
    with pytest.raises((SourceError, TarError), match=r"a\.tar"):
        [list(part.samples()) for part in open_source(spec).parts(1 << 30)]


@pytest.mark.ray
def test_one_bad_jpeg_costs_one_image_and_not_its_shard(tmp_path, ray_cluster):
    from pipeline.data.decoding import Decoder
    from pipeline.data.reading import PlanReader

    manifest = packed_set(tmp_path / "set", (NUM,), images={7: jpeg(7)[:200]})
    plan = StreamPlan(
        data=manifest, config=StreamConfig(num_streams=1, augmentation="none"), seed=0, batch=NUM, total_steps=1
    )
    (table,) = PlanReader(plan, 1, 0, 0)({"chunk": np.arange(1)})
    quarantine = Quarantine(f"{tmp_path}/quarantine.jsonl", budget=1)
    block = Decoder(plan, quarantine)(table)
    assert sorted(block["index"].tolist()) == sorted([i for i in range(NUM) if i != 7] + [8])
    assert block["label"].tolist() == [label_of(i) for i in block["index"].tolist()]
    assert quarantine.count() == 1
    with pytest.raises(ShardError, match=r"shard-000000\.tar: 000000007: not a readable image"):
        Decoder(plan)(table)  # without a quarantine the first is an error


@pytest.mark.ray
def test_a_shard_without_one_readable_image_is_an_error(tmp_path, ray_cluster):
    from pipeline.data.decoding import Decoder
    from pipeline.data.reading import PlanReader

    manifest = packed_set(tmp_path / "set", (3,), images=dict.fromkeys(range(3), b"nothing"))
    plan = StreamPlan(data=manifest, config=StreamConfig(num_streams=1), seed=0, batch=3, total_steps=1)
    (table,) = PlanReader(plan, 1, 0, 0)({"chunk": np.arange(1)})
    with pytest.raises(ShardError, match=r"shard-000000\.tar: none of its 3 images can be decoded"):
        Decoder(plan, Quarantine(f"{tmp_path}/quarantine.jsonl", budget=100))(table)


def test_a_fault_on_the_way_is_read_again_and_one_on_the_disk_is_not_believed(whole, monkeypatch):
    manifest, data = whole
    uri, info = manifest.shard_uri(0), manifest.shards[0]
    answers = [flipped(data, 9000), data]
    monkeypatch.setattr(storage, "read_whole", lambda uri, num_bytes: answers.pop(0))
    assert len(read_shard(uri, info, manifest.num_classes).images) == NUM
    assert answers == []
    big = data + bytes(3 << 20)
    info = replace(shard_info("shard-000000.tar", big, NUM))
    asked = []

    def always_bad(uri, num_bytes):
        asked.append(uri)
        return flipped(big, (1 << 20) + 5)

    monkeypatch.setattr(storage, "read_whole", always_bad)
    with pytest.raises(
        ShardError, match=rf"{uri}: corrupt, bytes 1048576 to 2097152: sha256 is \w+, .* says {info.sha256}"
    ):
        read_shard(uri, info, manifest.num_classes)
    assert len(asked) == 3


def test_the_list_of_bad_images_survives_a_restart(tmp_path, ray_cluster):
    uri = f"{tmp_path}/quarantine.jsonl"
    first = Quarantine(uri, budget=1)
    bad = BadImage(shard="s3://b/shard-000000.tar", key="000000001", index=1, reason="half a file")
    first.report(bad)
    first.report(bad)  # another epoch meets it again
    again = Quarantine(uri, budget=1)
    assert again.count() == 1
    with pytest.raises(
        ValueError, match=r"shard-000000\.tar: 000000002: grey.*bad image 2, stream\.max_bad_images=1 .*jsonl"
    ):
        again.report(replace(bad, key="000000002", index=2, reason="grey"))
