"""Small real data sets for tests: RecordIO packs by a writer of our own, and packed shards without Ray."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import webdataset

from pipeline import storage
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.shards import block_crc32

MAGIC = b"\x0a\x23\xd7\xce"


def record_bytes(body: bytes) -> bytes:
    """One RecordIO record as dmlc's writer lays it out: split at every aligned magic, which is dropped."""
    parts, begin, position = [], 0, 0
    while position + 4 <= len(body):
        if body[position : position + 4] == MAGIC:
            parts.append(body[begin:position])
            begin = position + 4
        position += 4
    parts.append(body[begin:])
    written = b""
    for number, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        written += MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
    return written


def record_body(
    labels: Sequence[float], payload: bytes, identifier: int = 0, *, second: int = 0, array: bool = False
) -> bytes:
    """mxnet's IRHeader, its labels (one in the header, or an array) and the payload."""
    if array or len(labels) != 1:
        return struct.pack("<IfQQ", len(labels), 0, identifier, second) + np.array(labels, "<f4").tobytes() + payload
    return struct.pack("<IfQQ", 0, labels[0], identifier, second) + payload


def write_recordio(base: str, bodies: dict[int, bytes], name: str = "train") -> str:
    """Write ``<name>.rec`` and ``<name>.idx`` below a URI; gives the URI of the former."""
    data, index = b"", ""
    for key, body in bodies.items():
        index += f"{key}\t{len(data)}\n"
        data += record_bytes(body)
    storage.write_bytes(storage.join(base, f"{name}.idx"), index.encode())
    storage.write_bytes(storage.join(base, f"{name}.rec"), data)
    return storage.join(base, f"{name}.rec")


@functools.lru_cache(maxsize=512)
def jpeg(number: int, side: int = 112) -> bytes:
    """A JPEG that differs from every other number's."""
    rng = np.random.default_rng((7, number))
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((side // 8, side // 8, 1), np.uint8))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, "RGB", "444"))


def tar_bytes(samples: Sequence[tuple[str, bytes, bytes]]) -> bytes:
    """A shard of (key, image, label as text), by webdataset's own writer."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for key, image, label in samples:
            writer.write({"__key__": key, "jpg": image, "cls": label})
    return buffer.getvalue()


def shard_info(name: str, data: bytes, num_samples: int) -> ShardInfo:
    return ShardInfo(
        name=name,
        num_samples=num_samples,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        crc32=block_crc32(data),
    )


def plain_manifest(sizes: Sequence[int], uri: str = "memory://none", num_classes: int = 5) -> Manifest:
    """A manifest without shards behind it: enough to plan an order."""
    shards = tuple(
        ShardInfo(name=f"shard-{i:06d}.tar", num_samples=size, num_bytes=0, sha256="") for i, size in enumerate(sizes)
    )
    return Manifest(
        uri=uri,
        shards=shards,
        num_classes=num_classes,
        image_side=112,
        seed=0,
        source={"format": "test"},
        identities=tuple(f"p{i}" for i in range(num_classes)),
    )


def label_of(index: int, num_classes: int = 5) -> int:
    return (index * 7 + 3) % num_classes


def packed_set(
    folder: Path | str, sizes: Sequence[int], num_classes: int = 5, images: dict[int, bytes] | None = None
) -> Manifest:
    """A packed data set: sample i is `jpeg(i)`, or what ``images`` says, and has the label `label_of(i)`."""
    images = images or {}
    base, first, shards = storage.normalise(folder), 0, []
    for number, size in enumerate(sizes):
        name = f"shard-{number:06d}.tar"
        samples = [
            (f"{i:09d}", images.get(i, jpeg(i)), str(label_of(i, num_classes)).encode())
            for i in range(first, first + size)
        ]
        data = tar_bytes(samples)
        storage.write_bytes(storage.join(base, name), data)
        shards.append(shard_info(name, data, size))
        first += size
    manifest = Manifest(
        uri=base,
        shards=tuple(shards),
        num_classes=num_classes,
        image_side=112,
        seed=0,
        source={"format": "test"},
        identities=tuple(f"p{i}" for i in range(num_classes)),
    )
    manifest.save()
    return manifest
