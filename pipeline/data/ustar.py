"""Reading tar archives from front to back, checked.

`tarfile` ends without a word where an archive is damaged or cut short, and is many times slower. This reader takes
plain ustar with GNU's long names and PAX's path and size, verifies the checksum of every header and wants the end mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, NamedTuple
from zlib import adler32

BLOCK: Final = 512
# Bodies are held in memory whole; no image or label is larger, so a larger one is a mistake or an attack.
MAX_MEMBER_BYTES: Final = 1 << 30

_PIECE_BYTES: Final = 1 << 24
_FILES: Final = frozenset(b"0\x007")
_LINKS: Final = frozenset(b"12")
_WITHOUT_BODY: Final = frozenset(b"123456")  # links, devices, folders: whatever their size field says
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"LKxg"


class TarError(ValueError):
    """An archive that is damaged or cut short; the message names the archive and the byte."""


class Member(NamedTuple):
    """One regular file of an archive: its name, its contents and the byte at which its header starts."""

    name: str
    body: bytes
    offset: int


def members(stream: BinaryIO, uri: str, on_link: Callable[[str], None] | None = None) -> Iterator[Member]:
    """Read an archive's regular files in order; folders, devices and links are passed over.

    Args:
        stream: Gives as many bytes as it is asked for, fewer only at its end.
        uri: For messages.
        on_link: Told the name of every hard or symbolic link.

    Raises:
        TarError: A header is damaged; the archive ends before its end mark; something else than zeros follows the mark;
            there is no member; a member is of a kind that is not read (sparse, in several volumes) or too large.
    """
    read, offset, name, size = stream.read, 0, "", -1  # name and size: what GNU or PAX say of the next file
    header = read(BLOCK)
    while _is_header(header):
        kind = header[156]
        num_bytes = 0 if kind in _WITHOUT_BODY else size if size >= 0 and kind in _FILES else _number(header[124:136])
        if not 0 <= num_bytes <= MAX_MEMBER_BYTES:
            raise TarError(
                f"{uri}: byte {offset}: {_name(header)!r} has a size of {header[124:136]!r}"
                f"{f' or {size} bytes' if size >= 0 else ''}; up to {MAX_MEMBER_BYTES} bytes are read"
            )
        padded = (num_bytes + BLOCK - 1) & -BLOCK
        data = read(padded + BLOCK) if padded < _PIECE_BYTES else _read_large(stream, padded + BLOCK)
        if len(data) < padded:
            end = offset + BLOCK + len(data)
            raise TarError(f"{uri}: byte {end}: truncated: it ends inside the member at byte {offset}")
        if kind in _FILES:
            yield Member(name or _name(header), data[:num_bytes], offset)
            name, size = "", -1
        elif kind in _WITHOUT_BODY:
            if on_link is not None and kind in _LINKS:
                on_link(name or _name(header))
            name, size = "", -1
        else:
            said_name, said_size = _announced(kind, data[:num_bytes], f"{uri}: byte {offset}")
            name, size = said_name or name, size if said_size < 0 else said_size
        offset += BLOCK + padded
        header = data[padded:]
    _check_end(stream, header, offset, uri)
    if name or size >= 0:
        raise TarError(f"{uri}: byte {offset}: truncated: a name or size is announced, and no member follows")


def _is_header(header: bytes) -> bool:
    # The lower 16 bits of Adler's sum of half a header are the exact sum of its bytes, plus 1: half a header sums up to
    # less than Adler's modulus. Python's own sum() takes as long as all the rest. The checksum counts itself as blanks.
    field = header[148:156]
    found = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - (adler32(field) & 0xFFFF) - 1
    return _number(field) == found + 8 * 32 and header[257:262] == b"ustar" and len(header) == BLOCK


def _check_end(stream: BinaryIO, header: bytes, offset: int, uri: str) -> None:
    """Raise a `TarError` unless the block at ``offset`` is an end mark, and nothing but zeros follows it."""
    if not header:
        raise TarError(f"{uri}: byte {offset}: truncated: it ends without its end mark" if offset else f"{uri}: empty")
    if len(header) < BLOCK:
        raise TarError(f"{uri}: byte {offset + len(header)}: truncated: it ends inside the header at byte {offset}")
    if header[257:262] == b"ustar":
        raise TarError(f"{uri}: byte {offset}: damaged header: its checksum {header[148:156]!r} does not fit it")
    if any(header):
        raise TarError(f"{uri}: byte {offset}: not a tar header")
    if not offset:
        raise TarError(f"{uri}: an archive without members")
    position = offset + BLOCK
    while rest := stream.read(1 << 20):
        if found := rest.lstrip(b"\0"):
            position += len(rest) - len(found)
            raise TarError(f"{uri}: byte {position}: {found[:16]!r} after the end mark at byte {offset}")
        position += len(rest)


def _read_large(stream: BinaryIO, num_bytes: int) -> bytes:
    # In pieces: a damaged size must not reserve memory that the archive cannot fill.
    pieces = []
    while num_bytes and (piece := stream.read(min(num_bytes, _PIECE_BYTES))):
        pieces.append(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)


def _number(field: bytes) -> int:
    """The number in a header's field: octal digits, or base 256 as GNU writes large ones; -1 if it is none."""
    digits = field.strip(b" \0")
    try:
        return int(digits, 8)
    except ValueError:
        if field[:1] == b"\x80":
            return int.from_bytes(field[1:], "big")
        return -1 if digits else 0


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[262] == 0:  # where GNU's own format has times, POSIX has the start of a long name
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    # What is not UTF-8 keeps its bytes in readable form: two names stay two, and any file can hold them.
    return name.decode(errors="backslashreplace")


def _announced(kind: int, body: bytes, place: str) -> tuple[str, int]:
    """What a member that is no file says of the next one: its name ("": nothing) and its size (-1: nothing)."""
    if kind == _LONG_NAME:
        return _text(body.partition(b"\0")[0]), -1
    if kind == _LONG_LINK:
        return "", -1
    if kind not in (_PAX, _PAX_OF_ALL):
        raise TarError(
            f"{place}: a member of type {chr(kind)!r}; files, folders, links, GNU's and PAX's names are read"
        )
    records = _pax_records(body, place)
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise TarError(f"{place}: a sparse file, which is not read")
    if kind == _PAX_OF_ALL and records.keys() & {b"path", b"size"}:
        raise TarError(f"{place}: a PAX header that gives all members one path or size")
    size = records.get(b"size", b"")
    if size and not size.isdigit():
        raise TarError(f"{place}: a damaged PAX header: {size[:20]!r} is not a size")
    return _text(records.get(b"path", b"")), int(size or -1)


def _pax_records(body: bytes, place: str) -> dict[bytes, bytes]:
    """Split "length key=value" lines, where the length counts the whole line."""
    records, start = {}, 0
    while start < len(body):
        digits = body[start : start + 20].partition(b" ")[0]
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = body[start + len(digits) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(body):
            raise TarError(f"{place}: a damaged PAX header: {body[start : start + 40]!r}")
        records[key] = value[:-1]
        start = end
    return records
