"""Packing, first pass: a part of a source, checked and sorted by key, into files of buckets.

The key of a sample is a hash of the seed and of its bytes. All samples in the order of their keys are a random
permutation that depends on nothing else: not on the kind of source, its order, or how it was cut into parts. Equal
images have equal keys, and so meet in the same bucket, in the order of the source.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.checks import BadImageError, ImageStatistics, PackChecks, checked_image
from pipeline.data.sources.base import Part

KEY_BYTES: Final = 16
SCHEMA: Final = pa.schema(
    [("key", pa.binary(KEY_BYTES)), ("identity", pa.string()), ("name", pa.string()), ("image", pa.large_binary())]
)


_ROW_BYTES: Final = KEY_BYTES + 3 * 8  # besides its texts and image: the key, and where they start
_STREAM_BYTES: Final = 4096  # at most, of a stream of no rows: schema, headers, padding


class PackError(ValueError):
    """A sample that cannot be packed, or a data set that cannot; the message names it."""


class Sample(NamedTuple):
    """One sample on its way between the passes; the fields are those of `SCHEMA`."""

    key: bytes
    identity: str
    name: str
    image: bytes


class Dropped(NamedTuple):
    """A sample that is left out: its name in the source, the reason in one word, and in full."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SpillTask:
    """One part to read.

    Attributes:
        part: Of the source.
        uri: What the names of the files of buckets start with; their description (``.json``) is written last.
        memory_bytes: Images to hold; a part of more (a tar, which cannot be cut) becomes several files.
        num_buckets: A power of two.
        seed: Of the shuffle.
        image_side: Pixels of each side.
        checks: What to look at.
    """

    part: Part
    uri: str
    memory_bytes: int
    num_buckets: int
    seed: int
    image_side: int
    checks: PackChecks


@dataclass(frozen=True, kw_only=True, slots=True)
class Spill:
    """A part, or a stretch of it, as the second pass finds it.

    Attributes:
        uri: The file of buckets.
        description: The file that says that its part is finished.
        offsets: First byte of each bucket, and the end.
        crc32: Of each bucket.
        rows: Samples of each bucket.
        identities: Samples of each person.
        dropped: Samples that were left out.
        statistics: `ImageStatistics` as a dict.
    """

    uri: str
    description: str
    offsets: list[int]
    crc32: list[int]
    rows: list[int]
    identities: dict[str, int]
    dropped: list[Dropped]
    statistics: dict[str, Any]


def sample_key(image: bytes, seed: int) -> bytes:
    """Where a sample comes in the packed order: 16 bytes, by their order."""
    return hashlib.blake2b(image, digest_size=KEY_BYTES, key=seed.to_bytes(16, "little", signed=True)).digest()


def bucket_of(key: bytes, num_buckets: int) -> int:
    """The bucket of a key; buckets are in the order of keys."""
    return int.from_bytes(key[:4], "big") * num_buckets >> 32


def spill_part(task: SpillTask) -> list[Spill]:
    """Read a part, check its images, and write it as buckets; a part that was finished before is not read again.

    Memory: the images of one file of buckets, twice.

    Raises:
        PackError: A bad image where none is allowed; the message names it.
    """
    description = f"{task.uri}.json"
    finished = _finished(task, description)
    if finished is not None:
        return finished
    spills: list[Spill] = []
    stretch, num_bad = _Stretch(), 0
    for name, identity, image in task.part.samples():
        if stretch.num_bytes >= task.memory_bytes:
            spills.append(stretch.write(task, len(spills)))
            stretch = _Stretch()
        try:
            kept = checked_image(image, task.image_side, task.checks, stretch.statistics)
        except BadImageError as error:
            stretch.dropped.append(Dropped(name, error.kind, str(error)))
            num_bad += 1
            check_budget(stretch.dropped, num_bad, task.checks)
            continue
        stretch.add(name, identity, kept, task.seed)
    spills.append(stretch.write(task, len(spills)))
    pa.default_memory_pool().release_unused()  # the process goes on, with other tasks
    storage.write_json(description, [asdict(spill) for spill in spills])
    return spills


def _finished(task: SpillTask, description: str) -> list[Spill] | None:
    """What an earlier attempt made of the part, if its files are there."""
    if not storage.exists(description):
        return None
    spills = [
        Spill(
            **found
            | {
                "uri": _file_uri(task, number),
                "description": description,
                "dropped": [Dropped(*one) for one in found["dropped"]],
            }
        )
        for number, found in enumerate(storage.read_json(description))
    ]
    whole = all(storage.exists(spill.uri) and storage.size(spill.uri) == spill.offsets[-1] for spill in spills)
    return spills if whole else None


def _file_uri(task: SpillTask, number: int) -> str:
    return f"{task.uri}-{number:04d}"


class _Stretch:
    """Samples in memory, until they are written as one file of buckets."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.num_bytes = 0
        self.identities: Counter[str] = Counter()
        self.dropped: list[Dropped] = []
        self.statistics = ImageStatistics()

    def add(self, name: str, identity: str, image: bytes, seed: int) -> None:
        self.samples.append(Sample(sample_key(image, seed), identity, name, image))
        self.num_bytes += len(image)
        self.identities[identity] += 1

    def write(self, task: SpillTask, number: int) -> Spill:
        self.samples.sort(key=lambda sample: sample.key)  # stable: equal images stay in the order of the source
        data, offsets, rows = _buckets(self.samples, task.num_buckets)
        view = memoryview(data)
        spill = Spill(
            uri=_file_uri(task, number),
            description=f"{task.uri}.json",
            offsets=offsets,
            crc32=[zlib.crc32(view[start:stop]) for start, stop in itertools.pairwise(offsets)],
            rows=rows,
            identities=dict(self.identities),
            dropped=self.dropped,
            statistics=asdict(self.statistics),
        )
        storage.write_bytes(spill.uri, data)
        return spill


def check_budget(latest: list[Dropped], count: int, checks: PackChecks) -> None:
    """Raise `PackError`, naming the last of ``latest``, if ``count`` bad images are too many."""
    if checks.bad_images == "error" and latest:
        raise PackError(f"{latest[0].name}: {latest[0].reason} (--checks.bad-images drop leaves such images out)")
    if count > checks.max_bad_images:
        raise PackError(
            f"{latest[-1].name}: {latest[-1].reason}: this is bad image {count}, "
            f"checks.max_bad_images={checks.max_bad_images} may be left out"
        )


def _buckets(samples: list[Sample], num_buckets: int) -> tuple[pa.Buffer, list[int], list[int]]:
    """Sorted samples as Arrow streams one behind the other, one a bucket; an empty bucket takes no bytes."""
    owners = np.fromiter((bucket_of(sample.key, num_buckets) for sample in samples), np.int64, len(samples))
    edges = np.searchsorted(owners, np.arange(num_buckets + 1))
    # A buffer that grew would take its size three times.
    room = pa.allocate_buffer(
        sum(len(sample.image) + 4 * (len(sample.identity) + len(sample.name)) + _ROW_BYTES for sample in samples)
        + _STREAM_BYTES * num_buckets
    )
    sink = pa.FixedSizeBufferWriter(room)
    offsets = [0]
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if start < stop:
            columns = zip(*samples[start:stop], strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            with pa.ipc.new_stream(sink, SCHEMA) as writer:
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        offsets.append(sink.tell())
    return room.slice(0, offsets[-1]), offsets, np.diff(edges).tolist()
