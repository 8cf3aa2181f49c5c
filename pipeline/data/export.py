"""A packed data set back to an InsightFace pack, for tools that read RecordIO.

Shards are shuffled, and a pack has the images of one identity together. So the images are first dealt to files on this
machine's disk by ranges of class numbers (buckets), then each bucket is written in the order of its class numbers.

Bounds, however large the set is. Memory: one shard and its images, up to `MAX_BUCKETS` file buffers of 128 KiB, and 20
bytes for each image of one bucket, of which its images are not held. Disk in the temporary folder (``TMPDIR``): the
images once, and for a remote output the new pack beside them.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from lgaf.config import require_positive
from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.recordio_writer import InsightFacePack, write_insightface_pack
from pipeline.data.shards import read_shard

# Small enough to stay in the page cache while it is read in another order.
DEFAULT_BUCKET_BYTES: Final = 256 * 1024 * 1024
# Two open files each, and systems allow a process 1,024 and no fewer.
MAX_BUCKETS: Final = 128
_BUFFER_BYTES: Final = 64 * 1024
_ENTRY: Final = struct.Struct("<qqI")
_ENTRY_DTYPE: Final = np.dtype([("label", "<i8"), ("offset", "<i8"), ("length", "<u4")])

Progress = Callable[[str, int, int], None]


def export_recordio(
    manifest_uri: str,
    output: str,
    *,
    header: bool = True,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    on_progress: Progress | None = None,
) -> InsightFacePack:
    """Write a packed data set as ``train.rec``, ``train.idx`` and ``property``.

    Labels are those of the packed set (0 to C-1). Images are unchanged, those of an identity in the order of the set.
    The original names of the identities stay in the manifest: RecordIO has no place for them.

    Args:
        manifest_uri: Folder of the shards and their manifest.
        output: Folder for the pack; an older pack there is replaced once the new one is complete.
        header: Whether the pack has InsightFace's header and identity records.
        bucket_bytes: About how many bytes of images one bucket gets; more where `MAX_BUCKETS` are too few.
        on_progress: Told ("read", shards read, shards in all) and ("write", images written, images in all).

    Raises:
        ManifestError: There is no packed data set.
        ShardError: A shard is not what the manifest says; nothing is left under the pack's names.
        StorageError: A shard cannot be read, the pack cannot be written, or the temporary folder is too small.
        RecordIOError: The format cannot hold the set: see `write_insightface_pack`.
    """
    require_positive("bucket_bytes", bucket_bytes)
    report = on_progress or _no_report
    manifest = Manifest.load(manifest_uri)
    with tempfile.TemporaryDirectory(prefix="lgaf-export-") as name:
        folder = Path(name)
        _check_space(folder, manifest)
        try:
            num_buckets = _deal(manifest, folder, bucket_bytes, report)
        except storage.StorageError:
            raise
        except OSError as error:
            raise storage.StorageError(f"{folder}: images cannot be sorted there: {error}") from error
        return write_insightface_pack(
            _in_order(folder, num_buckets, manifest.num_samples, report),
            output,
            num_identities=manifest.num_classes,
            image_side=manifest.image_side,
            header=header,
        )


def _no_report(phase: str, done: int, total: int) -> None:
    pass


def _check_space(folder: Path, manifest: Manifest) -> None:
    needed = sum(shard.num_bytes for shard in manifest.shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise storage.StorageError(
            f"{folder.parent}: {free:,} bytes are free, up to {needed:,} are needed to sort the images; "
            "TMPDIR names another folder"
        )


def _deal(manifest: Manifest, folder: Path, bucket_bytes: int, report: Progress) -> int:
    """Put every image into the bucket of its class; gives the number of buckets."""
    total_bytes = sum(shard.num_bytes for shard in manifest.shards)
    num_buckets = min(-(-total_bytes // bucket_bytes), MAX_BUCKETS, manifest.num_classes)
    with ExitStack() as stack:
        images, entries = (
            [stack.enter_context(path(folder, bucket).open("wb", _BUFFER_BYTES)) for bucket in range(num_buckets)]
            for path in (_images_path, _entries_path)
        )
        filled = [0] * num_buckets
        report("read", 0, len(manifest.shards))
        for number, info in enumerate(manifest.shards):
            shard = read_shard(manifest.shard_uri(number), info, manifest.num_classes)
            for label, image in zip(shard.labels.tolist(), shard.images, strict=True):
                bucket = label * num_buckets // manifest.num_classes
                images[bucket].write(image)
                entries[bucket].write(_ENTRY.pack(label, filled[bucket], len(image)))
                filled[bucket] += len(image)
            report("read", number + 1, len(manifest.shards))
    return num_buckets


def _in_order(folder: Path, num_buckets: int, num_samples: int, report: Progress) -> Iterator[tuple[int, bytes]]:
    """All images by class number, and within a class in the order of the set; finished buckets are deleted."""
    done = 0
    report("write", done, num_samples)
    for bucket in range(num_buckets):
        entries = np.fromfile(_entries_path(folder, bucket), _ENTRY_DTYPE)
        with _images_path(folder, bucket).open("rb") as file:
            for entry in np.argsort(entries["label"], kind="stable"):
                label, offset, length = entries[entry].item()
                yield label, os.pread(file.fileno(), length, offset)
                done += 1
                if done % 1000 == 0:
                    report("write", done, num_samples)
        _entries_path(folder, bucket).unlink()
        _images_path(folder, bucket).unlink()
    report("write", done, num_samples)


def _images_path(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket}.images"


def _entries_path(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket}.entries"
