"""One URI layer for everything that the pipeline reads and writes.

``file://`` (or a plain path), ``s3://``, ``gs://``, ``az://`` (also ``abfs://``) and ``memory://`` name places; the
last one lives inside one process. Writes are atomic: a reader sees the whole object or none. On object stores, what may
pass (5xx, throttling, broken or silent connections, cut bodies) is tried again, as `pipeline.retries` says; what will
not (403, 404) is an error at once. Every error names the URI.

An S3 endpoint other than AWS comes from ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or ``MLFLOW_S3_ENDPOINT_URL``.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.fs as pafs

from pipeline import filesystems
from pipeline.places import MissingError, SizeError, StorageError, is_local, join, local_path, normalise
from pipeline.remote import RemoteFile, attempt, open_filesystem, read

__all__ = [
    "READ_BUFFER_BYTES",
    "FileInfo",
    "MissingError",
    "SizeError",
    "StorageError",
    "delete_file",
    "delete_tree",
    "exists",
    "fingerprint",
    "is_local",
    "join",
    "list_files",
    "list_folder",
    "local_path",
    "lock",
    "normalise",
    "open_read",
    "plain_json",
    "read_bytes",
    "read_json",
    "read_range",
    "read_whole",
    "resolve",
    "size",
    "write_bytes",
    "write_json",
]

# Small buffers turn one object into many ranged requests: 8 MiB measured 6 times faster than pyarrow's default.
READ_BUFFER_BYTES: Final = 8 * 1024 * 1024
# Of one request, by the SDK itself. Reads have none, so that `retries` alone decides. A part of a multipart upload is
# better sent again by the SDK than the whole object by us.
WRITE_SDK_ATTEMPTS: Final = 3
# Of a folder that others delete from.
LISTINGS: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """One object found by `list_files`: its URI, size in bytes and time of change (nanoseconds; 0: unknown)."""

    uri: str
    num_bytes: int
    modified_ns: int = 0


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Give the pyarrow filesystem of a URI and the path in it, for code that has its own way with files.

    Raises:
        StorageError: An unknown scheme, or one whose package is not installed.
    """
    return open_filesystem(uri, WRITE_SDK_ATTEMPTS)


def _look_up(uri: str) -> pafs.FileInfo:
    filesystem, path = open_filesystem(uri)
    return attempt(uri, "look up", lambda: filesystem.get_file_info(path))


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    return bool(_look_up(uri).type != pafs.FileType.NotFound)


def file_info(uri: str) -> FileInfo:
    """Size and time of change of one file.

    Raises:
        MissingError: It does not exist.
        StorageError: It is a folder, or cannot be looked up.
    """
    info = _look_up(uri)
    if info.type == pafs.FileType.NotFound:
        raise MissingError(f"{uri}: does not exist")
    if info.type != pafs.FileType.File:
        raise StorageError(f"{uri}: is a folder, a file was expected")
    return FileInfo(uri=uri, num_bytes=int(info.size), modified_ns=info.mtime_ns or 0)


def size(uri: str) -> int:
    """Bytes of one file; raises as `file_info`."""
    return file_info(uri).num_bytes


def read_bytes(uri: str) -> bytes:
    """Read one whole file in one request.

    Raises:
        MissingError: It does not exist.
        StorageError: It cannot be read.
    """
    return read(uri, 0, None)


def read_whole(uri: str, num_bytes: int) -> bytes:
    """Read one whole file of known size in one request, without a copy on the way.

    Raises:
        MissingError: It does not exist.
        SizeError: It has another size; its body is not read then.
        StorageError: It cannot be read.
    """
    return read(uri, 0, num_bytes, expected_size=num_bytes)


def read_range(uri: str, start: int, num_bytes: int) -> bytes:
    """Read ``num_bytes`` from byte ``start`` of one file, less where it ends before.

    Raises:
        MissingError: It does not exist.
        StorageError: It cannot be read.
    """
    return read(uri, start, num_bytes)


def open_read(uri: str) -> io.BufferedReader:
    """Open one file as a seekable, buffered binary stream; a remote one is read in ranges of `READ_BUFFER_BYTES`.

    Raises:
        MissingError: It does not exist.
        StorageError: It is a folder or cannot be read (also from the stream's own methods).
    """
    if is_local(uri):
        return attempt(uri, "read", lambda: local_path(uri).open("rb"))
    return io.BufferedReader(RemoteFile(uri), READ_BUFFER_BYTES)


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file atomically: on a file system by rename, on object stores a put is atomic by itself.

    Raises:
        StorageError: It cannot be written; nothing is left under the name.
    """
    filesystem, path = resolve(uri)
    if is_local(uri):
        attempt(uri, "write", lambda: _write_local(Path(path), data))
    else:
        attempt(uri, "write", lambda: filesystems.put(filesystem, path, data))


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    """Read one JSON file.

    Raises:
        StorageError: It is absent, unreadable or not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    """Write one JSON file atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def list_folder(uri: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The sorted names of the files and of the folders directly in a folder; a file has None for its files.

    Raises:
        MissingError: There is neither a file nor a folder.
        StorageError: It cannot be listed.
    """
    if _look_up(uri).type == pafs.FileType.File:
        return None, ()
    filesystem, path = open_filesystem(uri)
    found = attempt(uri, "list", lambda: filesystems.entries(filesystem, path, recursive=False))
    names = sorted((entry.path.rsplit("/", 1)[-1], entry.is_file) for entry in found)
    return tuple(name for name, is_file in names if is_file), tuple(name for name, is_file in names if not is_file)


def list_files(uri: str) -> list[FileInfo]:
    """All files below a folder, sorted by URI; an absent folder has none."""
    filesystem, path = open_filesystem(uri)
    scheme = normalise(uri).split("://", 1)[0]
    for _ in range(LISTINGS):
        try:
            found = attempt(uri, "list", lambda: filesystems.entries(filesystem, path, recursive=True))
            break
        except MissingError:  # it, or a folder in it that someone deletes meanwhile
            if not exists(uri):
                return []
    else:
        raise StorageError(f"{uri}: cannot be listed: folders in it vanish")
    infos = [
        FileInfo(uri=f"{scheme}://{entry.path}", num_bytes=entry.num_bytes, modified_ns=entry.modified_ns)
        for entry in found
        if entry.is_file
    ]
    return sorted(infos, key=lambda info: info.uri)


def delete_tree(uri: str) -> None:
    """Delete a folder and all below it; an absent one is fine."""
    filesystem, path = open_filesystem(uri)

    def work() -> None:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)

    attempt(uri, "delete", work)


def delete_file(uri: str) -> None:
    """Delete one file; an absent one is fine."""
    filesystem, path = open_filesystem(uri)

    def work() -> None:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_file(path)

    attempt(uri, "delete", work)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def lock(uri: str, message: str) -> Iterator[None]:
    """Hold a local folder for this process alone; the system lets go when it dies. Remote places are not locked.

    Raises:
        StorageError: With ``message``, if another process holds it.
    """
    if not is_local(uri):
        yield
        return
    folder = local_path(uri)

    def open_lock() -> io.TextIOWrapper:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ".lock").open("w")

    with attempt(uri, "write", open_lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{uri}: {message}") from None
        yield


def plain_json(value: Any) -> Any:
    """A value as it comes back from JSON (tuples become lists)."""
    return json.loads(json.dumps(value))
