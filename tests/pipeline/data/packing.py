"""What the tests of packing share: sources of known images, and looking at what was packed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import storage
from pipeline.data import gather
from pipeline.data import pack as packing
from pipeline.data.checks import PackChecks
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_shard
from pipeline.data.sources import SourceSpec
from pipeline.data.sources.base import RawSample
from pipeline.data.spill import Spill, SpillTask, spill_part
from tests.pipeline.data.writers import jpeg, record_body, write_recordio

_PLACES = itertools.count()


def new_place() -> str:
    """A fresh folder in memory: quicker than disks, where every write is flushed."""
    return f"memory://packing-{next(_PLACES)}/part-000000"


@dataclass(frozen=True, slots=True)
class ListedPart:
    """A part of given samples that counts how often it is read."""

    rows: tuple[RawSample, ...]
    readings: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(row.image) for row in self.rows)

    def samples(self) -> Iterator[RawSample]:
        self.readings.append(1)
        yield from self.rows


def part(rows: Sequence[tuple[str, bytes]], first: int = 0) -> ListedPart:
    """Of (identity, image); sample i is called ``row i``."""
    return ListedPart(tuple(RawSample(f"row {first + i}", *row) for i, row in enumerate(rows)))


def spill(source: ListedPart, uri: str, **options: Any) -> list[Spill]:
    """Run the first pass on a part, with decoding off unless ``checks`` says otherwise."""
    defaults: dict[str, Any] = {
        "memory_bytes": 1 << 30,
        "num_buckets": 8,
        "seed": 0,
        "image_side": 112,
        "checks": PackChecks(decode=False),
    }
    return spill_part(SpillTask(part=source, uri=uri, **defaults | options))


@contextmanager
def in_process(num_cpus: int = 2, min_task_bytes: int = 1 << 14) -> Iterator[None]:
    """Run packing's tasks one after the other in this process, of small parts, and without the card's pictures."""
    ray = SimpleNamespace(put=lambda value: value, get=lambda value: value)
    ray.cluster_resources = lambda: {"CPU": float(num_cpus)}

    def map_tasks(function: Any, arguments: Sequence[Any], on_done: Any) -> list[Any]:
        results = []
        for argument in arguments:
            results.append(function(argument))
            on_done(len(results))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ray", ray)
        patch.setattr(gather, "ray", ray)
        patch.setattr(packing, "map_tasks", map_tasks)
        patch.setattr(packing, "MIN_TASK_BYTES", min_task_bytes)
        patch.setattr(packing, "write_card", lambda manifest, report: None)
        yield


def recordio(folder: Path | str, labels: Sequence[float], images: dict[int, bytes] | None = None) -> SourceSpec:
    """A pack without header: record i shows ``jpeg(i)`` unless ``images`` says otherwise."""
    bodies = {i: record_body([label], (images or {}).get(i, jpeg(i)), i) for i, label in enumerate(labels)}
    write_recordio(str(folder), bodies)
    return SourceSpec(format="recordio", uri=str(folder))


def samples(manifest: Manifest) -> list[tuple[bytes, str]]:
    """Image and original identity of all samples in packed order, each shard verified."""
    found = []
    for number, info in enumerate(manifest.shards):
        shard = read_shard(manifest.shard_uri(number), info, manifest.num_classes)
        assert shard.keys == [f"{int(manifest.offsets[number]) + i:09d}" for i in range(info.num_samples)]
        found += [(image, manifest.identities[label]) for image, label in zip(shard.images, shard.labels, strict=True)]
    return found


def shard_bytes(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of the shards that lie in the folder of a packed data set, by name; those it does not name too."""
    names = [info.uri.rpartition("/")[2] for info in storage.list_files(manifest.uri)]
    return {
        name: hashlib.sha256(storage.read_bytes(storage.join(manifest.uri, name))).hexdigest()
        for name in names
        if name.endswith(".tar")
    }


def assert_complete(manifest: Manifest) -> None:
    """A finished packing: the shards are what the manifest says, and nothing of the way there is left."""
    assert Manifest.load(manifest.uri) == manifest
    assert shard_bytes(manifest) == {shard.name: shard.sha256 for shard in manifest.shards}
    found = {info.uri.removeprefix(manifest.uri).lstrip("/") for info in storage.list_files(manifest.uri)}
    expected = {"manifest.json", "report.json", "quarantine.jsonl", *(shard.name for shard in manifest.shards)}
    assert {name for name in found if "card" not in name} - {".lock"} == expected
