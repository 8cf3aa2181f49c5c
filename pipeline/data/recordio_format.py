"""The RecordIO format of MXNet, record by record: bytes to `Record` and back. Nothing else knows it.

A file is a sequence of heads, each followed by a part of a record and zeros up to a multiple of 4 bytes. All of it is
little-endian. A head is the magic number and a word of 3 bits of kind and 29 bits of length. A record is one WHOLE
part, or, where the magic occurs in it at a multiple of 4 bytes, a FIRST, any MIDDLE and a LAST part with those four
bytes left out between them. It holds mxnet's IRHeader, labels where that says so, and the payload.

An aligned magic in a file is therefore always a head, and reading may start at any of them. Heads and parts start at
multiples of 4 bytes, since parts are padded. So an aligned word is one of four things. The first word of a head. Its
second word: the top 3 bits are a kind up to 3, where the magic has 6. A word of a record: these are aligned in the
record and in the file alike, and the writer cuts where one is the magic. A record's last bytes with their padding: this
ends in a zero byte, which the magic does not.

Source: mxnet 1.9.1, byte by byte (PROTOCOLS 3(d)); dmlc-core, ``recordio.h``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

MAGIC: Final = 0xCED7230A
MAGIC_BYTES: Final = struct.pack("<I", MAGIC)
LENGTH_BITS: Final = 29
MAX_RECORD_BYTES: Final = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
HEADER: Final = struct.Struct("<IfQQ")  # IRHeader: number of labels in an array (or 0), the one label, two ids
HEAD_BYTES: Final = 8
_HEAD: Final = struct.Struct("<II")
_FLOAT: Final = struct.Struct("<f")


class RecordIOError(ValueError):
    """A RecordIO file that is damaged, or a record that it cannot hold; the message names file, record and byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record.

    Attributes:
        labels: One in most packs; float32 in the file, so whole numbers above 16,777,216 may not be exact.
        payload: What follows the labels: an encoded image.
        id: mxnet's first id.
        id2: mxnet's second id.
        is_array: Whether the labels are an array behind the header, as several are and a single one may be.
    """

    labels: tuple[float, ...]
    payload: bytes
    id: int
    id2: int = 0
    is_array: bool = False

    @property
    def is_bookkeeping(self) -> bool:
        """Whether it is a header or an identity record of an InsightFace pack: two labels at least, no image."""
        return not self.payload and self.is_array and len(self.labels) >= 2


class Bytes(Protocol):
    """A file that is read by ranges."""

    uri: str

    def __len__(self) -> int:
        """Bytes of the file."""
        ...

    def read(self, start: int, num_bytes: int) -> memoryview:
        """A range, which must lie within the file."""
        ...


def padded(num_bytes: int) -> int:
    """A length with the zeros behind it: the next multiple of 4."""
    return (num_bytes + 3) & ~3


def head_kind(data: Bytes, offset: int) -> int | None:
    """The kind of the part whose head is at a byte of the file (WHOLE to LAST), None if no head is there."""
    if offset < 0 or offset % 4 or offset + HEAD_BYTES > len(data):
        return None
    magic, word = _HEAD.unpack_from(data.read(offset, HEAD_BYTES))
    kind: int = word >> LENGTH_BITS
    return kind if magic == MAGIC and kind <= LAST else None


def decode_record(data: Bytes, offset: int, key: int | None = None) -> tuple[Record, int]:
    """Read the record that starts at a byte of the file.

    Args:
        data: The file.
        offset: Where the record starts.
        key: The record's key in the index, for messages; None: its place names it.

    Returns:
        The record, and the byte behind it and its padding.

    Raises:
        RecordIOError: No record starts there, or the file ends within it.
    """
    body, end = _join_parts(data, offset, key)
    if len(body) < HEADER.size:
        raise _damaged(data, offset, key, f"{len(body)} bytes are too few for a record header of {HEADER.size}")
    flag, label, record_id, second = HEADER.unpack_from(body)
    begin = HEADER.size + 4 * flag
    if len(body) < begin:
        raise _damaged(data, offset, key, f"it announces {flag} labels and has {len(body)} bytes")
    labels = tuple(np.frombuffer(body, "<f4", flag, HEADER.size).tolist()) if flag else (label,)
    record = Record(labels=labels, payload=bytes(body[begin:]), id=record_id, id2=second, is_array=flag > 0)
    return record, end


def _join_parts(data: Bytes, offset: int, key: int | None) -> tuple[memoryview, int]:
    parts: list[memoryview] = []
    expected, position, file_bytes = (WHOLE, FIRST), offset, len(data)
    while True:
        if position % 4 or position < 0:
            raise _damaged(data, offset, key, f"no record starts at byte {position}")
        if position + HEAD_BYTES > file_bytes:
            raise _cut_short(data, offset, key, position)
        magic, word = _HEAD.unpack_from(data.read(position, HEAD_BYTES))
        kind, length = word >> LENGTH_BITS, word & MAX_RECORD_BYTES
        if magic != MAGIC or kind not in expected:
            what = "no record starts" if position == offset else "no later part of the record starts"
            raise _damaged(data, offset, key, f"{what} at byte {position}")
        begin = position + HEAD_BYTES
        position = begin + padded(length)
        if position > file_bytes:
            raise _cut_short(data, offset, key, begin - HEAD_BYTES)
        part = data.read(begin, length)
        if kind == WHOLE:
            return part, position
        # A copy: the view would keep the window that it came from.
        parts.append(memoryview(bytes(part)))
        if kind == LAST:
            return memoryview(MAGIC_BYTES.join(parts)), position
        expected = (MIDDLE, LAST)


def _cut_short(data: Bytes, offset: int, key: int | None, position: int) -> RecordIOError:
    return _damaged(data, offset, key, f"the file ends at byte {len(data)}, within the record at byte {position}")


def _damaged(data: Bytes, offset: int, key: int | None, what: str) -> RecordIOError:
    name = f"record at byte {offset}" if key is None else f"record {key}"
    return RecordIOError(f"{data.uri}: {name}: {what}")


def encode_record(record: Record, name: str) -> bytes:
    """The bytes of one record in a file, as mxnet writes them.

    Args:
        record: The record.
        name: Of the record, for messages.

    Raises:
        RecordIOError: It is too large, has no label, or a label or id that the format does not hold.
    """
    is_array = record.is_array or len(record.labels) != 1
    if not record.labels:
        raise RecordIOError(f"{name}: it has no label; RecordIO needs one or more")
    count, single = (len(record.labels), 0.0) if is_array else (0, _exact(record.labels[0], name))
    try:
        header = HEADER.pack(count, single, record.id, record.id2)
    except struct.error as error:
        raise RecordIOError(f"{name}: ids are {record.id} and {record.id2}; they are 0 to 2**64 - 1") from error
    labels = b"".join(_FLOAT.pack(_exact(label, name)) for label in record.labels) if is_array else b""
    num_bytes = len(header) + len(labels) + len(record.payload)
    if num_bytes > MAX_RECORD_BYTES:
        raise RecordIOError(f"{name}: {num_bytes:,} bytes with its header; RecordIO holds at most {MAX_RECORD_BYTES:,}")
    body = b"".join((header, labels, record.payload))
    if MAGIC_BYTES not in body:  # nearly always
        return b"".join((_HEAD.pack(MAGIC, num_bytes), body, bytes(-num_bytes % 4)))
    return _split(body)


def _exact(label: float, name: str) -> float:
    try:
        (stored,) = _FLOAT.unpack(_FLOAT.pack(label))
    except OverflowError:
        stored = float("inf")
    # A fraction may be rounded; a class number or a key that changes is another one.
    if stored != label and float(label).is_integer():
        raise RecordIOError(f"{name}: the label {label:.0f} is not exact in float32; all up to 16,777,216 are")
    return label


def _split(body: bytes) -> bytes:
    # dmlc's writer looks at whole words alone, so the padded last one is never taken for the magic.
    words = np.frombuffer(body, "<u4", len(body) // 4)
    begins = [0, *(4 * int(word) + 4 for word in np.flatnonzero(words == MAGIC))]
    ends = [begin - 4 for begin in begins[1:]] + [len(body)]
    last = len(begins) - 1
    written = []
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        kind = WHOLE if last == 0 else FIRST if number == 0 else LAST if number == last else MIDDLE
        written += [_HEAD.pack(MAGIC, kind << LENGTH_BITS | end - begin), body[begin:end]]
    return b"".join((*written, bytes(-len(body) % 4)))
