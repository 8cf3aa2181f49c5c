"""Reading MXNet RecordIO packs (``train.rec`` and ``train.idx``) without mxnet.

The format, byte by byte, as mxnet 1.9.1 writes it: PROTOCOLS 3(d).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from pipeline import storage

MAGIC: Final = 0xCED7230A
MAGIC_BYTES: Final = struct.pack("<I", MAGIC)
LENGTH_BITS: Final = 29
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
HEADER: Final = struct.Struct("<IfQQ")


class RecordIOError(ValueError):
    """A RecordIO file that is damaged; the message names the file, the record and the byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record: its labels (one in most packs), what follows them (an encoded image), and mxnet's id."""

    labels: tuple[float, ...]
    payload: bytes
    id: int


class _Bytes(Protocol):
    def __len__(self) -> int: ...
    def read(self, start: int, num_bytes: int) -> bytes: ...


class _MappedFile:
    """A local file by memory map: nothing is read that is not asked for."""

    def __init__(self, uri: str) -> None:
        if storage.size(uri) == 0:
            raise RecordIOError(f"{uri}: the file is empty")
        with storage.local_path(uri).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._map)

    def read(self, start: int, num_bytes: int) -> bytes:
        return self._map[start : start + num_bytes]


class _RemoteFile:
    """An object in a store by ranged reads; a window keeps neighbouring records in one request."""

    WINDOW_BYTES = storage.READ_BUFFER_BYTES

    def __init__(self, uri: str) -> None:
        self._uri, self._size = uri, storage.size(uri)
        self._start, self._window = 0, b""

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, num_bytes: int) -> bytes:
        inside = start - self._start
        if inside < 0 or inside + num_bytes > len(self._window):
            length = min(max(num_bytes, self.WINDOW_BYTES), self._size - start)
            self._start, self._window = start, storage.read_range(self._uri, start, length)
            inside = 0
        return self._window[inside : inside + num_bytes]


class RecordIOReader:
    """Random access to the records of a ``.rec`` file by the keys of its ``.idx``.

    Args:
        path_or_uri: The ``.rec`` file; the ``.idx`` lies beside it.

    Raises:
        StorageError: One of the two is missing.
        RecordIOError: The index is damaged.
    """

    def __init__(self, path_or_uri: str) -> None:
        self.uri = storage.normalise(path_or_uri)
        self._offsets = _read_index(self.uri.removesuffix(".rec") + ".idx")
        self._data: _Bytes = _MappedFile(self.uri) if storage.is_local(self.uri) else _RemoteFile(self.uri)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def keys(self) -> Sequence[int]:
        """The keys, in the order of the index."""
        return list(self._offsets)

    def __getitem__(self, key: int) -> Record:
        """One record.

        Raises:
            KeyError: The index has no such key.
            RecordIOError: The record is damaged.
        """
        if key not in self._offsets:
            raise KeyError(f"{self.uri}: no record with key {key}")
        body = self._read_parts(self._offsets[key], key)
        if len(body) < HEADER.size:
            raise self._damaged(key, f"{len(body)} bytes are too few for a record header of {HEADER.size}")
        flag, label, record_id, _ = HEADER.unpack_from(body)
        end = HEADER.size + 4 * flag
        if len(body) < end:
            raise self._damaged(key, f"it announces {flag} labels and has {len(body)} bytes")
        labels = np.frombuffer(body, "<f4", flag, HEADER.size).tolist() if flag else [label]
        return Record(labels=tuple(labels), payload=body[end:], id=record_id)

    def _read_parts(self, offset: int, key: int) -> bytes:
        parts = []
        expected = (WHOLE, FIRST)
        while True:
            head = self._data.read(offset, 8) if 0 <= offset < len(self._data) else b""
            if len(head) < 8:
                raise self._damaged(key, f"the file ends at byte {len(self._data)}, within the record at byte {offset}")
            magic, packed = struct.unpack("<II", head)
            kind, length = packed >> LENGTH_BITS, packed & ((1 << LENGTH_BITS) - 1)
            if magic != MAGIC or kind not in expected:
                raise self._damaged(key, f"no record starts at byte {offset}")
            part = self._data.read(offset + 8, length) if length and offset + 8 < len(self._data) else b""
            if len(part) < length:
                raise self._damaged(key, f"the file ends at byte {len(self._data)}, within the record at byte {offset}")
            parts.append(part)
            if kind in (WHOLE, LAST):
                # The writer splits a payload where the magic occurs in it and drops those four bytes.
                return MAGIC_BYTES.join(parts)
            expected = (MIDDLE, LAST)
            offset += 8 + -(-length // 4) * 4

    def _damaged(self, key: int, what: str) -> RecordIOError:
        return RecordIOError(f"{self.uri}: record {key}: {what}")


def _read_index(uri: str) -> dict[int, int]:
    offsets: dict[int, int] = {}
    for number, line in enumerate(storage.read_bytes(uri).decode("ascii", "replace").splitlines(), start=1):
        try:
            key, offset = line.split()
            offsets[int(key)] = int(offset)
        except ValueError as error:
            raise RecordIOError(f"{uri}: line {number}: {line!r} is not 'key<TAB>byte offset'") from error
    if not offsets:
        raise RecordIOError(f"{uri}: the index is empty")
    return offsets


def image_keys(reader: RecordIOReader) -> list[int]:
    """Keys of the images: an InsightFace pack's record 0 is a header that says where they end; others have none.

    A header has no payload; a pack whose record 0 is an image with several labels is thereby told apart.
    """
    keys = reader.keys
    if 0 not in keys:
        return sorted(keys)
    header = reader[0]
    if header.payload or len(header.labels) < 2:
        return sorted(keys)
    end = int(header.labels[0])
    images = [key for key in range(1, end) if key in reader._offsets]
    if len(images) != end - 1:
        raise RecordIOError(f"{reader.uri}: the header announces {end - 1} images, the index has {len(images)}")
    return images
