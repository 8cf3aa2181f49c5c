"""Packing, second pass: a run of buckets of all parts into shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import webdataset

from pipeline import storage
from pipeline.data.manifest import ShardInfo
from pipeline.data.shards import FETCHES, block_crc32
from pipeline.data.spill import PackError, Sample, Spill, bucket_of

READ_THREADS: Final = 8
EXAMPLES: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Spills:
    """All parts of a source as the second pass reads them: shared by its tasks through Ray's object store."""

    uris: list[str]
    descriptions: list[str]
    offsets: np.ndarray  # int64 [files, buckets + 1]
    crc32: np.ndarray  # uint32 [files, buckets]

    @classmethod
    def of(cls, spills: list[Spill]) -> Spills:
        """Of what the first pass gave."""
        return cls(
            uris=[spill.uri for spill in spills],
            descriptions=[spill.description for spill in spills],
            offsets=np.array([spill.offsets for spill in spills], np.int64),
            crc32=np.array([spill.crc32 for spill in spills], np.uint32),
        )

    def read(self, first: int, stop: int) -> list[Sample]:
        """The samples of buckets ``first`` to before ``stop``, in the order of their keys.

        Raises:
            PackError: A file of buckets is not what the first pass wrote.
        """
        merged: list[Sample] = []
        with ThreadPoolExecutor(READ_THREADS) as threads:
            # A few files at a time, and no sample made in a thread: malloc keeps what is freed for each by itself.
            for start in range(0, len(self.uris), READ_THREADS):
                files = range(start, min(start + READ_THREADS, len(self.uris)))
                for bodies in threads.map(lambda file: self._read_file(file, first, stop), files):
                    for body in bodies:
                        merged += _samples(body)
        pa.default_memory_pool().release_unused()  # the files' bytes: shards are made beside the samples now
        # Stable by file: among equal images the first one of the source stays the first.
        merged.sort(key=lambda sample: sample.key)
        return merged

    def _read_file(self, file: int, first: int, stop: int) -> list[memoryview]:
        """The buckets that are not empty."""
        start, end = int(self.offsets[file, first]), int(self.offsets[file, stop])
        if start == end:
            return []
        for _ in range(FETCHES):
            view = memoryview(storage.read_range(self.uris[file], start, end - start))
            edges = (self.offsets[file, first : stop + 1] - start).tolist()
            bodies = [view[a:b] for a, b in itertools.pairwise(edges)]
            if [zlib.crc32(body) for body in bodies] == self.crc32[file, first:stop].tolist():
                return [body for body in bodies if len(body)]
        storage.delete_file(self.descriptions[file])  # or the next attempt would find it again
        raise PackError(
            f"{self.uris[file]}: bytes {start} to {end} were altered between the two passes of packing: run it again, "
            "that part of the source will be read anew"
        )


def _samples(stream: memoryview) -> Iterator[Sample]:
    table = pa.ipc.open_stream(stream).read_all()
    return map(Sample, *(column.to_pylist() for column in table.columns))


def is_repeated(samples: list[Sample]) -> list[bool]:
    """Which of some samples in key order have the same image as the one before."""
    return [place > 0 and sample.key == samples[place - 1].key for place, sample in enumerate(samples)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """Equal images of consecutive buckets.

    Attributes:
        kept: Samples of each bucket that stay when duplicates are dropped.
        removed: Samples that would go, by person.
        across: Those of them whose first copy is another person's: wrong labels.
        examples: Some of those: (name, name of the first copy).
    """

    kept: list[int]
    removed: dict[str, int]
    across: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateTask:
    """Consecutive buckets to look through."""

    spills: Any  # ray.ObjectRef of Spills
    buckets: range


def find_duplicates(task: DuplicateTask) -> Duplicates:
    """Count equal images of some buckets. Memory: their images."""
    spills: Spills = ray.get(task.spills)
    samples = spills.read(task.buckets.start, task.buckets.stop)
    removed: Counter[str] = Counter()
    kept: Counter[int] = Counter()
    across, examples = 0, []
    for sample, repeated in zip(samples, is_repeated(samples), strict=True):
        if not repeated:
            first = sample
            kept[bucket_of(sample.key, spills.crc32.shape[1])] += 1
            continue
        removed[sample.identity] += 1
        if sample.identity != first.identity:
            across += 1
            examples.append((sample.name, first.name))
    return Duplicates(
        kept=[kept[bucket] for bucket in task.buckets],
        removed=dict(removed),
        across=across,
        examples=sorted(examples)[:EXAMPLES],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherTask:
    """Consecutive shards to write.

    Attributes:
        spills: Reference to `Spills`.
        identities: Reference to the names of all classes in label order (Arrow array).
        buckets: That hold the samples, as (first, behind the last).
        skip: Samples at the head of the first bucket that belong to the shard before.
        shards: Number, and samples, of each shard.
        first_sample: Global index of the first sample.
        output: Folder of the shards.
        staging: Folder of what remembers finished ones.
        drop_duplicates: Whether equal images are left out.
    """

    spills: Any
    identities: Any
    buckets: tuple[int, int]
    skip: int
    shards: list[tuple[int, int]]
    first_sample: int
    output: str
    staging: str
    drop_duplicates: bool


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def write_shards(task: GatherTask) -> list[ShardInfo]:
    """Write shards and read each back; those that were finished before are only read.

    Memory: the images of the buckets, and a few shards.

    Raises:
        PackError: What was written is not what is read.
    """
    found = [_finished(task, number) for number, _ in task.shards]
    if all(found):
        return [info for info in found if info is not None]
    spills: Spills = ray.get(task.spills)
    samples: list[Any] = spills.read(*task.buckets)
    if task.drop_duplicates:
        samples = [sample for sample, repeated in zip(samples, is_repeated(samples), strict=True) if not repeated]
    del samples[: task.skip]
    # Once for the whole run: looking names up among millions begins by hashing them all.
    names = pa.array([sample.identity for sample in samples], pa.string())
    labels = pc.index_in(names, value_set=ray.get(task.identities)).to_pylist()
    written, start = [], 0
    for (number, size), info in zip(task.shards, found, strict=True):
        if info is None:
            images = [sample.image for sample in samples[start : start + size]]
            info = _put(task, number, images, labels[start : start + size], task.first_sample + start)
            del images
        # What is in a shard need not be held any longer.
        samples[start : start + size] = [None] * len(samples[start : start + size])
        written.append(info)
        start += size
    return written


def _shard_bytes(images: list[bytes], labels: list[int], first: int) -> bytes:
    buffer = io.BytesIO()
    # A fixed time and owner: the same samples give the same bytes, hence the same checksum.
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="lgaf", group="lgaf") as writer:
        for position, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
            writer.write({"__key__": f"{position:09d}", extension_of(image): image, "cls": str(label).encode()})
    return buffer.getvalue()


def extension_of(image: bytes) -> str:
    """The usual file extension of an encoded image."""
    if image[:4] == b"\x89PNG":
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else "jpg"


def _put(task: GatherTask, number: int, images: list[bytes], labels: list[int], first: int) -> ShardInfo:
    """Write a shard and read it back."""
    uri, data = storage.join(task.output, shard_name(number)), _shard_bytes(images, labels, first)
    storage.write_bytes(uri, data)
    digest, crc32, num_bytes = hashlib.sha256(data).hexdigest(), block_crc32(data), len(data)
    del data  # before as much is read
    if hashlib.sha256(storage.read_bytes(uri)).hexdigest() != digest:
        raise PackError(f"{uri}: what was written is not what is read back")
    info = ShardInfo(name=shard_name(number), num_samples=len(images), num_bytes=num_bytes, sha256=digest, crc32=crc32)
    storage.write_json(_note(task, number), asdict(info))
    return info


def _finished(task: GatherTask, number: int) -> ShardInfo | None:
    """What is known of a shard that an earlier attempt wrote, if it is still what it was."""
    note, uri = _note(task, number), storage.join(task.output, shard_name(number))
    if not storage.exists(note) or not storage.exists(uri):
        return None
    info = ShardInfo(**storage.read_json(note))
    return info if hashlib.sha256(storage.read_bytes(uri)).hexdigest() == info.sha256 else None


def _note(task: GatherTask, number: int) -> str:
    return storage.join(task.staging, f"{shard_name(number)}.json")
