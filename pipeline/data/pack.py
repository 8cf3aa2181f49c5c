"""Packing a source into WebDataset shards with a manifest.

All samples are shuffled once (a permutation by the seed), cut into shards of equal size and written by Ray tasks. The
same input and seed give the same bytes. The manifest is written last: a folder without one is not a data set.
"""

from __future__ import annotations

import functools
import hashlib
import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import webdataset

from lgaf.config import require_positive
from pipeline import storage
from pipeline.data.images import decode_rgb
from pipeline.data.manifest import NAME as MANIFEST_NAME
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.sources import Source, SourceSpec, open_source
from pipeline.runtime import map_tasks

DEFAULT_SAMPLES_PER_SHARD: Final = 2048
IMAGE_SIDE: Final = 112


@functools.lru_cache(maxsize=2)
def _open_source_once(spec: SourceSpec, contents: str) -> Source:
    return open_source(spec)


class PackError(ValueError):
    """A sample that cannot be packed; the message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShardTask:
    spec: SourceSpec
    contents: str = ""
    uri: str
    first: int
    indices: np.ndarray


def pack(
    spec: SourceSpec,
    output: str,
    *,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a source as shards and a manifest.

    Args:
        spec: The source.
        output: Folder URI; a manifest that is there is deleted first, so that no failure leaves it beside other shards.
        samples_per_shard: Of every shard but the last.
        seed: Of the shuffle.
        on_progress: Told (shards written, shards in all).

    Raises:
        StorageError: Source or output cannot be reached.
        PackError: An image that cannot be decoded or has the wrong size; the message names the record.
    """
    require_positive("samples_per_shard", samples_per_shard)
    source = open_source(spec)
    permutation = np.random.default_rng(seed).permutation(len(source.labels))
    contents = uuid.uuid4().hex  # a later call must not meet the source that this one opened
    starts = range(0, len(permutation), samples_per_shard)
    tasks = [
        _ShardTask(
            spec=spec,
            contents=contents,
            uri=storage.join(output, f"shard-{number:06d}.tar"),
            first=start,
            indices=permutation[start : start + samples_per_shard],
        )
        for number, start in enumerate(starts)
    ]
    report = None if on_progress is None else functools.partial(_report, on_progress, len(tasks))
    storage.delete_file(storage.join(output, MANIFEST_NAME))
    shards = map_tasks(_write_shard, tasks, report)
    manifest = Manifest(
        uri=storage.normalise(output),
        shards=tuple(shards),
        num_classes=len(source.identities),
        image_side=IMAGE_SIDE,
        seed=seed,
        source=source.describe(),
        identities=source.identities,
    )
    manifest.save()
    return manifest


def _report(on_progress: Callable[[int, int], None], total: int, done: int) -> None:
    on_progress(done, total)


def _write_shard(task: _ShardTask) -> ShardInfo:
    source = _open_source_once(task.spec, task.contents)
    buffer = io.BytesIO()
    # A fixed time and owner: the same samples give the same bytes, hence the same checksum.
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="lgaf", group="lgaf") as writer:
        for position, index in enumerate(task.indices.tolist(), start=task.first):
            label = str(source.labels[index]).encode()
            writer.write({"__key__": f"{position:09d}", "jpg": _checked_image(source, index), "cls": label})
    data = buffer.getvalue()
    storage.write_bytes(task.uri, data)
    return ShardInfo(
        name=task.uri.rsplit("/", 1)[1],
        num_samples=len(task.indices),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _checked_image(source: Source, index: int) -> bytes:
    encoded, name = source.encoded(index), source.name(index)
    try:
        shape = decode_rgb(encoded).shape
    except ValueError as error:
        raise PackError(f"{name}: {error}") from error
    if shape != (IMAGE_SIDE, IMAGE_SIDE, 3):
        raise PackError(f"{name}: the image is {shape[1]}x{shape[0]}, {IMAGE_SIDE}x{IMAGE_SIDE} is expected")
    return encoded
