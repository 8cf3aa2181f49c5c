"""Reading the index of a RecordIO file (``.idx``): one line ``key<TAB>byte offset`` for each record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline import storage
from pipeline.data.recordio_format import RecordIOError

READ_BYTES: Final = 32 * 1024 * 1024
_DIGITS: Final = b"0123456789"
_LARGEST: Final = np.iinfo(np.int64).max


# eq=False: a generated == would compare arrays for truth, which numpy refuses.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RecordIndex:
    """An index: entry i is its line i + 1.

    Attributes:
        uri: Of the file.
        keys: int64 [n], each once.
        offsets: int64 [n], each once: the bytes at which the records start.
        sha256: Of the file (hex).
    """

    uri: str
    keys: np.ndarray
    offsets: np.ndarray
    sha256: str
    _by_key: np.ndarray | None  # the entries in the order of their keys; None: they are

    def __len__(self) -> int:
        return len(self.keys)

    def entry(self, key: int) -> int | None:
        """The entry of a key, None if there is none."""
        guess = key - int(self.keys[0])  # keys mostly follow each other
        if 0 <= guess < len(self.keys) and self.keys[guess] == key:
            return guess
        place = int(np.searchsorted(self.keys, key, sorter=self._by_key))
        if place == len(self.keys):
            return None
        entry = place if self._by_key is None else int(self._by_key[place])
        return entry if self.keys[entry] == key else None


def read_index(uri: str) -> RecordIndex:
    """Read an index in pieces, with 32 bytes of memory for each line, 16 to 24 of which stay.

    Raises:
        StorageError: It cannot be read.
        RecordIOError: It is empty, a line is damaged (its number is named), or a key or an offset occurs twice.
    """
    digest = hashlib.sha256()
    pieces: list[np.ndarray] = []
    num_lines, rest = 0, b""
    with storage.open_read(uri) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            lines, newline, rest = (rest + piece).rpartition(b"\n")
            if newline:
                pieces.append(_parse(lines + newline, uri, num_lines))
                num_lines += len(pieces[-1])
    if rest:  # the last line may lack its end
        pieces.append(_parse(rest + b"\n", uri, num_lines))
    if not pieces:
        raise RecordIOError(f"{uri}: the index is empty")
    keys, offsets = (np.concatenate([piece[:, column] for piece in pieces]) for column in (0, 1))
    by_key = _order(keys, uri, "key")
    _order(offsets, uri, "offset")
    return RecordIndex(uri=uri, keys=keys, offsets=offsets, sha256=digest.hexdigest(), _by_key=by_key)


def _parse(text: bytes, uri: str, lines_before: int) -> np.ndarray:
    """Whole lines as int64 [lines, 2]."""
    num_lines = text.count(b"\n")
    # With tabs and line ends in turn and nothing but digits beside them, 2 numbers a line leave no field empty.
    if text.translate(None, _DIGITS) == b"\t\n" * num_lines:
        numbers = np.fromstring(text, np.int64, sep=" ")  # any white space separates
        if len(numbers) == 2 * num_lines and numbers.max() < _LARGEST:  # it stops at the largest without a word
            return numbers.reshape(num_lines, 2)
    return _parse_slowly(text, uri, lines_before)


def _parse_slowly(text: bytes, uri: str, lines_before: int) -> np.ndarray:
    """Line by line: what other programs write (spaces, carriage returns, signs), and the number of a damaged line."""
    entries = []
    for number, line in enumerate(text.decode("ascii", "replace").removesuffix("\n").split("\n"), lines_before + 1):
        try:
            key, offset = line.split()
            entries.append(np.array([int(key), int(offset)], np.int64))
        except (ValueError, OverflowError) as error:
            raise RecordIOError(f"{uri}: line {number}: {line!r} is not 'key<TAB>byte offset'") from error
    return np.stack(entries)


def _order(numbers: np.ndarray, uri: str, what: str) -> np.ndarray | None:
    """Which order sorts them, None if they are sorted; each must occur once."""
    if bool(np.all(numbers[1:] > numbers[:-1])):
        return None
    order = np.argsort(numbers, kind="stable")
    twice = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        raise RecordIOError(f"{uri}: lines {first + 1} and {second + 1} have the same {what} {numbers[first]}")
    return order
