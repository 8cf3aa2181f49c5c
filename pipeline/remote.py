"""Reading and working on places with every failure named, and on object stores tried again where it may pass."""

# ruff: noqa: D102  (the public methods are those of io.RawIOBase)

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import pyarrow.fs as pafs

from pipeline import filesystems, retries
from pipeline.places import MissingError, SizeError, StorageError, is_local, normalise

T = TypeVar("T")


def open_filesystem(uri: str, sdk_attempts: int = 1) -> tuple[pafs.FileSystem, str]:
    """Give the filesystem of a URI and the path in it; of S3, with so many attempts of the SDK itself at one request.

    Raises:
        StorageError: An unknown scheme, or one whose package is not installed.
        ValueError: A setting in the environment is out of range.
    """
    scheme, path = normalise(uri).split("://", 1)
    timeout_s = retries.from_environment().timeout_s
    try:
        return filesystems.open_filesystem(scheme, timeout_s=timeout_s, attempts=sdk_attempts), path
    except ImportError as error:
        raise StorageError(f"{uri}: {error}") from error


def attempt(uri: str, action: str, work: Callable[[], T]) -> T:
    """Do some work on a place, on object stores again while its errors may pass.

    Raises:
        StorageError: It failed; the message has the URI, the last reason and, of an object store, the attempts made.
    """
    try:
        if is_local(uri):
            return work()
        return retries.call(work, retries.from_environment(), uri)
    except retries.FailedError as failed:
        count, error = failed.attempts, failed.__cause__
        after = f" after {count} attempt{'s' if count > 1 else ''}"
    except OSError as local_error:
        error, after = local_error, ""
    if error is not None and retries.is_missing(error) and action != "write":  # a write misses its folder or bucket
        raise MissingError(f"{uri}: does not exist") from error
    raise StorageError(f"{uri}: cannot {action}{after}: {error}") from error


def read(uri: str, start: int, num_bytes: int | None, expected_size: int | None = None) -> bytes:
    """Read a range, to the end if ``num_bytes`` is None: one request for the size, one for the bytes.

    Raises:
        MissingError: It does not exist.
        SizeError: It is not of ``expected_size``; nothing is read then.
        StorageError: It cannot be read.
    """
    filesystem, path = open_filesystem(uri)

    def work() -> tuple[int, bytes]:
        with closing(filesystems.open_ranges(filesystem, path)) as file:
            if expected_size is not None and file.num_bytes != expected_size:
                return file.num_bytes, b""
            return file.num_bytes, _read_at(file, start, file.num_bytes if num_bytes is None else num_bytes)

    found, data = attempt(uri, "read", work)
    if expected_size is not None and found != expected_size:
        raise SizeError(uri, found, expected_size)
    return data


def _read_at(file: filesystems.RangeReader, start: int, num_bytes: int) -> bytes:
    wanted = max(0, min(num_bytes, file.num_bytes - start))
    data = file.read_at(start, wanted) if wanted else b""
    if len(data) < wanted:
        raise retries.TruncatedError(f"the body ended after {len(data)} of {wanted} bytes")
    return data


class RemoteFile(io.RawIOBase):
    """One remote file as a seekable raw stream of ranged reads, each tried again by itself."""

    def __init__(self, uri: str) -> None:
        self._uri, self._position = uri, 0
        self._filesystem, self._path = open_filesystem(uri)
        self._file: filesystems.RangeReader | None = None
        self._num_bytes = attempt(uri, "read", lambda: self._open().num_bytes)

    def _open(self) -> filesystems.RangeReader:
        if self._file is None:
            self._file = filesystems.open_ranges(self._filesystem, self._path)
        return self._file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence] + offset
        if position < 0:
            raise ValueError(f"{self._uri}: byte {position} is before the start of the file")
        self._position = position
        return position

    def _read(self, num_bytes: int) -> bytes:
        data = attempt(self._uri, "read", lambda: _read_at(self._open(), self._position, num_bytes))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:  # the inherited one asks for 8 KiB at a time
        return self._read(max(0, self._num_bytes - self._position))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()
