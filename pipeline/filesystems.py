"""The filesystems behind `pipeline.storage`, and the few operations in which pyarrow's and fsspec's differ.

S3 and local files go through pyarrow's own filesystems, all others through fsspec's. Nothing is retried here and errors
are those of the libraries; `pipeline.storage` does both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlparse

import pyarrow.fs as pafs

# What fsspec needs for a scheme, and the extra of this project that brings it.
PACKAGES: Final = {"gs": ("gcsfs", "gs"), "az": ("adlfs", "az"), "abfs": ("adlfs", "az")}
BUCKET_SCHEMES: Final = ("s3", *PACKAGES)
SCHEMES: Final = ("file", *BUCKET_SCHEMES, "memory")
ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
CONNECT_TIMEOUT_S: Final = 10.0
# Where fsspec's filesystems say when a file changed: gcsfs, adlfs, memory.
MODIFIED_KEYS: Final = ("mtime", "updated", "last_modified", "created")


class Entry(NamedTuple):
    """One file or folder of a listing: ``modified_ns`` is 0 where unknown."""

    path: str
    is_file: bool
    num_bytes: int
    modified_ns: int


class RangeReader(Protocol):
    """An open file of known size."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        ...

    def read_at(self, start: int, num_bytes: int) -> bytes:
        """Read a range that lies within it, in one request; a shorter answer is a cut one."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def open_filesystem(scheme: str, *, timeout_s: float, attempts: int) -> pafs.FileSystem:
    """Give the filesystem of a scheme; clients are kept for the life of the process.

    Args:
        scheme: One of `SCHEMES`.
        timeout_s: Of S3: how long a connection may be silent. pyarrow hands it to curl in whole seconds, and curl looks
            at the mean of about 5 s: silence before the first byte ends an attempt after ``timeout_s``, silence in the
            middle of a body about 5 s later. A slow link is not silent.
        attempts: Of S3: how often the SDK itself tries one request.

    Raises:
        ModuleNotFoundError: The scheme's package is not installed; the message says how to.
    """
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "s3":
        endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
        return _s3(endpoint, timeout_s, attempts)
    filesystem = _fsspec(scheme)
    filesystem.handler.fs.invalidate_cache()  # its memory of listings would hide what others have written
    return filesystem


@functools.lru_cache(maxsize=16)
def _s3(endpoint: str | None, timeout_s: float, attempts: int) -> pafs.FileSystem:
    options: dict[str, Any] = {
        "request_timeout": timeout_s,
        "connect_timeout": min(CONNECT_TIMEOUT_S, timeout_s),
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        "allow_delayed_open": True,  # a small object is one PUT, not a multipart upload of three requests
    }
    if endpoint:
        parsed = urlparse(endpoint)
        options |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme}
        options["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return pafs.S3FileSystem(**options)


@functools.lru_cache(maxsize=16)
def _fsspec(scheme: str) -> pafs.FileSystem:
    import fsspec

    try:
        filesystem = fsspec.filesystem(scheme)
    except ImportError as error:
        package, extra = PACKAGES.get(scheme, (scheme, scheme))
        if importlib.util.find_spec(package):  # it is there but does not load: its own message says why
            raise
        raise ModuleNotFoundError(
            f'{scheme}:// needs the package {package}, which is not installed: pip install "lgaf-on-ray[{extra}]"'
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))


class _ArrowFile:
    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._file = filesystem.open_input_file(path)
        self.num_bytes = int(self._file.size())

    def read_at(self, start: int, num_bytes: int) -> bytes:
        data: bytes = self._file.read_at(num_bytes, start)
        return data

    def close(self) -> None:
        self._file.close()


class _FsspecFile:
    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        info = filesystem.info(path)
        if info["type"] != "file":
            raise IsADirectoryError(f"{path!r} is a folder")
        self.num_bytes = int(info["size"])

    def read_at(self, start: int, num_bytes: int) -> bytes:
        data: bytes = self._filesystem.cat_file(self._path, start=start, end=start + num_bytes)
        return data

    def close(self) -> None:
        pass


def open_ranges(filesystem: pafs.FileSystem, path: str) -> RangeReader:
    """Open one file for ranged reads: one request for its size now, one for each range."""
    if isinstance(filesystem, pafs.PyFileSystem):  # not fsspec's file objects: they read ahead what nobody asked for
        return _FsspecFile(filesystem.handler.fs, path)
    return _ArrowFile(filesystem, path)


def put(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write one object of an object store: whole or not at all."""
    if isinstance(filesystem, pafs.PyFileSystem):  # closing fsspec's file after an error would keep half of it
        filesystem.handler.fs.pipe_file(path, data)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def entries(filesystem: pafs.FileSystem, path: str, *, recursive: bool) -> list[Entry]:
    """List a folder.

    Raises:
        FileNotFoundError: It is not there.
        NotADirectoryError: It is a file.
    """
    if isinstance(filesystem, pafs.PyFileSystem):
        return _fsspec_entries(filesystem.handler.fs, path, recursive)
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=recursive))
    return [Entry(info.path, info.type == pafs.FileType.File, info.size or 0, info.mtime_ns or 0) for info in infos]


def _fsspec_entries(filesystem: Any, path: str, recursive: bool) -> list[Entry]:
    if not filesystem.isdir(path):
        raise (NotADirectoryError if filesystem.exists(path) else FileNotFoundError)(path)
    found = filesystem.find(path, maxdepth=None if recursive else 1, withdirs=True, detail=True)
    return [
        Entry(name.strip("/"), info["type"] == "file", int(info["size"] or 0), modified_ns(info))
        for name, info in found.items()
        if name.strip("/") != path.strip("/")
    ]


def modified_ns(info: Mapping[str, Any]) -> int:
    """When a file changed, in nanoseconds since 1970, from what fsspec says of it; 0 where it does not."""
    value = next((info[key] for key in MODIFIED_KEYS if info.get(key)), None)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return 0
    if isinstance(value, datetime):
        value = value.timestamp()
    return int(value * 1_000_000_000) if isinstance(value, (int, float)) else 0
