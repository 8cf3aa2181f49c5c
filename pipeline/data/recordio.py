"""Reading MXNet RecordIO packs (``train.rec`` and ``train.idx``) without mxnet: by key, by byte ranges, by scanning.

The format itself is in `pipeline.data.recordio_format`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final

import numpy as np

from pipeline import storage
from pipeline.data.recordio_format import (
    FIRST,
    HEADER,
    LAST,
    LENGTH_BITS,
    MAGIC,
    MAGIC_BYTES,
    MIDDLE,
    WHOLE,
    Bytes,
    Record,
    RecordIOError,
    decode_record,
    head_kind,
)
from pipeline.data.recordio_index import RecordIndex, read_index

__all__ = [
    "FIRST",
    "HEADER",
    "LAST",
    "LENGTH_BITS",
    "MAGIC",
    "MAGIC_BYTES",
    "MIDDLE",
    "WHOLE",
    "Record",
    "RecordIOError",
    "RecordIOReader",
    "image_entries",
    "image_keys",
    "index_uri",
    "read_indexed_records",
    "read_one_record",
    "read_records",
]

_SEARCH_BYTES: Final = 64 * 1024
# What a scan reads beyond its range at once: enough for the rest of most records that cross its end.
_SLACK_BYTES: Final = 64 * 1024


class _MappedFile:
    """A local file by memory map: nothing is read that is not asked for."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if storage.size(uri) == 0:
            raise RecordIOError(f"{uri}: the file is empty")
        with storage.local_path(uri).open("rb") as file:
            self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self._map)

    def read(self, start: int, num_bytes: int) -> memoryview:
        return self._map[start : start + num_bytes]


class _WindowedFile:
    """A file read in large windows, in requests of `storage.read_range` where it is remote.

    Args:
        uri: The file.
        limit: Byte up to which windows reach of their own; what is asked for beyond it is read alone.
    """

    WINDOW_BYTES = storage.READ_BUFFER_BYTES

    def __init__(self, uri: str, limit: int | None = None) -> None:
        self.uri, self._size = uri, storage.size(uri)
        if self._size == 0:
            raise RecordIOError(f"{uri}: the file is empty")
        self._limit = self._size if limit is None else min(limit, self._size)
        self._start, self._window = 0, memoryview(b"")
        # One open file: what it holds stays the same if another takes its name.
        self._file = storage.local_path(uri).open("rb", buffering=0) if storage.is_local(uri) else None

    def __enter__(self) -> _WindowedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, num_bytes: int) -> memoryview:
        inside = start - self._start
        if inside < 0 or inside + num_bytes > len(self._window):
            length = max(num_bytes, min(self.WINDOW_BYTES, self._limit - start))
            self._window = memoryview(b"")  # let go of the old window before the next is there
            self._start, self._window, inside = start, memoryview(self._fetch(start, length)), 0
        return self._window[inside : inside + num_bytes]

    def _fetch(self, start: int, length: int) -> bytes:
        if self._file is None:
            data = storage.read_range(self.uri, start, length)
        else:
            self._file.seek(start)
            data = self._file.read(length)
        if len(data) != length:
            raise RecordIOError(
                f"{self.uri}: {len(data)} of {length} bytes are there from byte {start}: it changed while it was read"
            )
        return data


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
        self.index = read_index(index_uri(self.uri))
        self._data: Bytes = _MappedFile(self.uri) if storage.is_local(self.uri) else _WindowedFile(self.uri)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def keys(self) -> Sequence[int]:
        """The keys, in the order of the index."""
        keys: list[int] = self.index.keys.tolist()
        return keys

    def __getitem__(self, key: int) -> Record:
        """One record.

        Raises:
            KeyError: The index has no such key.
            RecordIOError: The record is damaged.
        """
        entry = self.index.entry(key)
        if entry is None:
            raise KeyError(f"{self.uri}: no record with key {key}")
        return decode_record(self._data, int(self.index.offsets[entry]), key)[0]


def index_uri(uri: str) -> str:
    """Where the index of a ``.rec`` file lies."""
    return uri.removesuffix(".rec") + ".idx"


def read_one_record(uri: str, offset: int, key: int | None = None) -> Record:
    """One record by its place, reading nothing but it.

    Raises:
        StorageError: The file cannot be read.
        RecordIOError: No whole record starts there.
    """
    with _WindowedFile(uri, limit=0) as data:
        return decode_record(data, offset, key)[0]


def read_records(uri: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Record]]:
    """All records that start within a range of bytes, in file order; no index is needed.

    The ranges of any cut of a file give every record exactly once, and together they notice all damage: a record is
    read to its end, wherever that is, and behind the last one of a range there must be a record or the file's end. What
    cannot be noticed is a file cut off exactly between two records.

    Memory: one window (`storage.READ_BUFFER_BYTES`) and one record; a record larger than that is its own window.

    Args:
        uri: The ``.rec`` file.
        start: First byte of the range.
        stop: The byte behind it; None: to the end of the file.

    Yields:
        The byte at which a record starts, and the record.

    Raises:
        StorageError: The file cannot be read.
        RecordIOError: It is empty or damaged, or shorter than the range.
        ValueError: The range is none.
    """
    with _WindowedFile(uri, None if stop is None else stop + _SLACK_BYTES) as data:
        end = len(data) if stop is None else stop
        if not 0 <= start <= end:
            raise ValueError(f"{uri}: bytes {start} to {end} are no range")
        if end > len(data):
            raise RecordIOError(f"{uri}: the file ends at byte {len(data)}, {end} are expected")
        position = _first_record(data, start, end)
        if position is None:
            return
        while position < end:
            record, behind = decode_record(data, position)
            yield position, record
            position = behind
        # The next range begins with a search, which would pass over damage here.
        _check_behind(data, position)


def _first_record(data: Bytes, start: int, stop: int) -> int | None:
    """Where the first record at or behind ``start`` begins; None, or a place behind ``stop``, if none does before it.

    An aligned magic is always a head: `recordio_format` says why.
    """
    if start == 0:
        return 0 if stop > 0 else None  # nothing may come before the first record: reading it says so if it does
    position = start + -start % 4
    while position < stop:
        length = min(_SEARCH_BYTES, len(data) - position)
        words = np.frombuffer(data.read(position, length), "<u4", length // 4)
        for word in np.flatnonzero(words == MAGIC).tolist():
            head = position + 4 * word
            kind = head_kind(data, head)
            if kind is None:
                raise RecordIOError(f"{data.uri}: byte {head}: a magic number that is no head")
            if kind in (WHOLE, FIRST):
                return head
        position += length
    return None


def _check_behind(data: Bytes, position: int) -> None:
    if position < len(data) and head_kind(data, position) not in (WHOLE, FIRST):
        raise RecordIOError(f"{data.uri}: no record starts at byte {position}, where the one before it ends")


def read_indexed_records(
    uri: str, keys: np.ndarray, offsets: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[int, Record]]:
    """Records by their places in the index, read in large windows.

    Args:
        uri: The ``.rec`` file.
        keys: int64 [n].
        offsets: int64 [n], ascending: where the records start.
        ends: int64 [n]: where the next record of the index starts, or the file ends.

    Yields:
        Key and record.

    Raises:
        StorageError: The file cannot be read.
        RecordIOError: A record is damaged, does not start where the index says, or what lies behind it is no record.
    """
    with _WindowedFile(uri, int(ends[-1]) if len(ends) else 0) as data:
        for key, offset, end in zip(keys.tolist(), offsets.tolist(), ends.tolist(), strict=True):
            record, behind = decode_record(data, offset, key)
            if behind != end:  # an index may leave records out; then another one starts here
                _check_behind(data, behind)
            yield key, record


def image_keys(reader: RecordIOReader) -> list[int]:
    """Keys of the images, ascending: see `image_entries`."""
    keys: list[int] = np.sort(reader.index.keys[image_entries(reader.index, reader.__getitem__, reader.uri)]).tolist()
    return keys


def image_entries(index: RecordIndex, read: Callable[[int], Record], uri: str) -> np.ndarray:
    """Which entries of an index are images: int64, in the order of the index.

    An InsightFace pack's record 0 is a header that says at which key the images end (and the identity records begin);
    other packs have none and hold images alone. A header has no payload; a pack whose record 0 is an image with several
    labels is thereby told apart.

    Args:
        index: The index.
        read: Gives the record of a key; asked for key 0 and, above 16,777,216 images, for a few behind the last.
        uri: The ``.rec`` file, for messages.

    Raises:
        RecordIOError: The header is damaged, or announces images that are not in the index.
    """
    header = read(0) if index.entry(0) is not None else None
    if header is None or not header.is_bookkeeping:
        return np.arange(len(index))
    announced = header.labels[0]
    if not announced.is_integer() or announced < 1:
        raise RecordIOError(f"{uri}: record 0: the header's first label is {announced}, it must be a key above 0")
    end = _first_identity_key(int(announced), index, read)
    entries = np.flatnonzero((index.keys >= 1) & (index.keys < end))
    if len(entries) != end - 1:  # each key occurs once
        raise RecordIOError(f"{uri}: the header announces {end - 1} images, the index has {len(entries)}")
    return entries


def _first_identity_key(announced: int, index: RecordIndex, read: Callable[[int], Record]) -> int:
    """The key behind the last image. The header's float32 rounds it above 16,777,216; the records there tell."""
    slack = int(np.spacing(np.float32(announced))) // 2
    for key in range(announced - slack, announced + slack + 1 if slack else announced):
        if index.entry(key) is not None and read(key).is_bookkeeping:
            return key
    return announced
