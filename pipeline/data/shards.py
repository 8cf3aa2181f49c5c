"""Reading one WebDataset shard: whole, verified, parsed.

A shard is checked against the manifest before a byte of it is used: `tarfile` and Ray's own reader return half of a
truncated shard without an error.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline import storage
from pipeline.data.cache import ShardCache
from pipeline.data.manifest import ShardInfo
from pipeline.data.ustar import TarError, members

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION: Final = "cls"
MIB: Final = 1 << 20
# A byte that flips on its way is read right the next time; one that lies flipped is not.
FETCHES: Final = 3


class ShardError(ValueError):
    """A shard that is not what the manifest says; the message names the shard, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The samples of one shard, in file order: keys, encoded images and labels int64 [n]."""

    keys: list[str]
    images: list[bytes]
    labels: np.ndarray


def read_shard(uri: str, info: ShardInfo, num_classes: int, cache: ShardCache | None = None) -> Shard:
    """Read and verify one shard.

    Args:
        uri: The shard.
        info: What the manifest says of it.
        num_classes: Of the data set.
        cache: Keeps the bytes on local disk, if given.

    Raises:
        StorageError: It cannot be read.
        ShardError: Its size, checksum or contents differ from the manifest's.
    """
    if cache is None:
        data = fetch_verified(uri, info)
    else:
        data = cache.get(info.sha256, info.num_bytes, lambda: fetch_verified(uri, info))
        if hashlib.sha256(data).hexdigest() != info.sha256:  # the disk lies: the store is asked again
            cache.discard(info.sha256)
            data = fetch_verified(uri, info)
    samples = parse_shard(data, uri)
    if len(samples.images) != info.num_samples:
        raise ShardError(f"{uri}: {len(samples.images)} samples, the manifest says {info.num_samples}")
    if samples.labels.min() < 0 or samples.labels.max() >= num_classes:
        found = f"{samples.labels.min()} to {samples.labels.max()}"
        raise ShardError(f"{uri}: labels go from {found}, the data set has {num_classes} classes")
    return samples


def fetch_verified(uri: str, info: ShardInfo) -> bytes:
    """The bytes of a shard as the manifest knows them; what arrives wrong is asked for again.

    Raises:
        StorageError: It cannot be read.
        ShardError: Its size or checksum differ from the manifest's, each time.
    """
    for _ in range(FETCHES):
        try:
            data = storage.read_whole(uri, info.num_bytes)
        except storage.SizeError as error:
            raise ShardError(
                f"{uri}: truncated or altered: {error.found} bytes, the manifest says {info.num_bytes}"
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        if digest == info.sha256:
            return data
    raise ShardError(
        f"{uri}: corrupt{_damaged_bytes(data, info)}: sha256 is {digest}, the manifest says {info.sha256} "
        f"(of the whole file; read {FETCHES} times)"
    )


def block_crc32(data: bytes) -> str:
    """CRC-32 of each MiB, eight hex digits each."""
    view = memoryview(data)
    return "".join(f"{zlib.crc32(view[start : start + MIB]):08x}" for start in range(0, len(data), MIB))


def _damaged_bytes(data: bytes, info: ShardInfo) -> str:
    """Where data differ from what the manifest says, to the MiB."""
    found = block_crc32(data)
    if len(found) != len(info.crc32):
        return ""
    wrong = [
        place // 8 for place in range(0, len(found), 8) if found[place : place + 8] != info.crc32[place : place + 8]
    ]
    return "".join(f", bytes {block * MIB} to {min((block + 1) * MIB, len(data))}" for block in wrong[:3])


def parse_shard(data: bytes, uri: str) -> Shard:
    """Split the bytes of a shard into samples.

    A sample is an image (``<key>.jpg``, ``.jpeg``, ``.png`` or ``.webp``) and its class number (``<key>.cls``). As in
    WebDataset, the key is a member's name up to the first dot behind its last slash.

    Raises:
        ShardError: It is not a whole tar, or a sample has not exactly one image and one label.
    """
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    try:
        for name, body, offset in members(io.BytesIO(data), uri):
            key, extension = split_key(name)
            if extension in IMAGE_EXTENSIONS:
                if key in images:
                    raise ShardError(f"{uri}: byte {offset}: {name}: a second image of the sample {key!r}")
                images[key] = body
            elif extension == LABEL_EXTENSION:
                if key in labels:
                    raise ShardError(f"{uri}: byte {offset}: {name}: a second label of the sample {key!r}")
                labels[key] = _class_number(body, name, uri)
    except TarError as error:
        raise ShardError(str(error)) from error
    if images.keys() != labels.keys() or not images:
        lone = sorted(images.keys() ^ labels.keys())[:3]
        raise ShardError(
            f"{uri}: samples need both an image and a .cls member; incomplete: {lone or 'no samples at all'}"
        )
    numbers = np.array([labels[key] for key in images], np.int64)
    return Shard(keys=list(images), images=list(images.values()), labels=numbers)


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's key and extension (lower case) of a member: parted at the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return (folder + slash + key, extension.lower()) if key else (name, "")


def _class_number(body: bytes, name: str, uri: str) -> int:
    try:
        number = int(body)
    except ValueError as error:
        raise ShardError(f"{uri}: {name}: {body[:20]!r} is not a class number") from error
    if not -(2**63) <= number < 2**63:
        raise ShardError(f"{uri}: {name}: {number} is not a class number")
    return number
