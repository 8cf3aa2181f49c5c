"""One URI layer for everything that the pipeline reads and writes.

``file://`` (or a plain path), ``s3://`` and ``memory://`` name places; pyarrow's filesystems do the work (``memory://``
through fsspec, inside one process only). Writes are atomic: a reader sees the whole object or none.
An S3 endpoint other than AWS comes from ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or ``MLFLOW_S3_ENDPOINT_URL``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow.fs as pafs

# Small buffers turn one object into many ranged requests: 8 MiB measured 6 times faster than pyarrow's default.
READ_BUFFER_BYTES = 8 * 1024 * 1024
SCHEMES = ("file", "s3", "memory")


class StorageError(OSError):
    """A place that cannot be read or written; the message names its URI."""


class MissingError(StorageError):
    """A place that does not exist: trying again does not help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """One object found by `list_files`: its URI and size in bytes."""

    uri: str
    num_bytes: int


def normalise(uri: str | os.PathLike[str]) -> str:
    """Give the canonical URI: plain paths become absolute ``file://`` ones, trailing slashes go.

    Raises:
        StorageError: An unknown scheme, or no bucket.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return "file://" + os.path.abspath(os.path.expanduser(text))
    parsed = urlparse(text)
    if parsed.scheme not in SCHEMES:
        raise StorageError(f"{text}: unknown scheme {parsed.scheme!r}; use one of {', '.join(SCHEMES)} or a plain path")
    if parsed.scheme == "s3" and not parsed.netloc:
        raise StorageError(f"{text}: an s3 URI names a bucket: s3://bucket/prefix")
    scheme, path = text.split("://", 1)
    return f"{scheme.lower()}://" + (path.rstrip("/") or ("/" if parsed.scheme == "file" else ""))


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    base = normalise(uri)
    return base + ("" if base.endswith("/") else "/") + "/".join(part.strip("/") for part in parts)


def is_local(uri: str) -> bool:
    """Whether the URI is on this machine's file system."""
    return normalise(uri).startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a ``file://`` URI.

    Raises:
        StorageError: The URI is not local.
    """
    if not is_local(uri):
        raise StorageError(f"{uri}: not a local path")
    return Path(normalise(uri).removeprefix("file://"))


@functools.lru_cache(maxsize=16)
def _filesystem(scheme: str, endpoint: str | None) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "memory":
        import fsspec

        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
    options: dict[str, Any] = {"request_timeout": 30, "connect_timeout": 10}
    if endpoint:
        parsed = urlparse(endpoint)
        options |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme}
        options["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return pafs.S3FileSystem(**options)


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Give the pyarrow filesystem of a URI and the path in it."""
    text = normalise(uri)
    scheme, path = text.split("://", 1)
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    return _filesystem(scheme, endpoint if scheme == "s3" else None), path


@contextmanager
def _naming(uri: str, action: str) -> Iterator[None]:
    """Turn every low-level failure into a `StorageError` that names the URI."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if action == "write":  # it is the folder that is not there and cannot be made
            raise StorageError(f"{uri}: cannot be written: {error}") from error
        raise MissingError(f"{uri}: does not exist") from error
    except OSError as error:
        raise StorageError(f"{uri}: cannot {action}: {error}") from error


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    with _naming(uri, "look up"):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def size(uri: str) -> int:
    """Bytes of one file.

    Raises:
        StorageError: It does not exist or is a folder.
    """
    filesystem, path = resolve(uri)
    with _naming(uri, "look up"):
        info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise StorageError(f"{uri}: {'is a folder, a file was expected' if info.type else 'does not exist'}")
    return int(info.size)


def read_bytes(uri: str) -> bytes:
    """Read one whole file in large requests.

    Raises:
        StorageError: It does not exist or cannot be read.
    """
    filesystem, path = resolve(uri)
    with _naming(uri, "read"), filesystem.open_input_stream(path, buffer_size=READ_BUFFER_BYTES) as stream:
        return bytes(stream.readall())


def read_range(uri: str, start: int, num_bytes: int) -> bytes:
    """Read ``num_bytes`` from byte ``start`` of one file."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read"), filesystem.open_input_file(path) as file:
        return bytes(file.read_at(num_bytes, start))


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file atomically: on a file system by rename, on S3 a put is atomic by itself.

    Raises:
        StorageError: It cannot be written; nothing is left under the name.
    """
    filesystem, path = resolve(uri)
    with _naming(uri, "write"):
        if not is_local(uri):
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
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


def list_files(uri: str) -> list[FileInfo]:
    """All files below a folder, sorted by URI; an absent folder has none."""
    filesystem, path = resolve(uri)
    scheme = normalise(uri).split("://", 1)[0]
    with _naming(uri, "list"):
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    found = [
        FileInfo(uri=f"{scheme}://{info.path if scheme != 'memory' else info.path.lstrip('/')}", num_bytes=info.size)
        for info in infos
        if info.type == pafs.FileType.File
    ]
    return sorted(found, key=lambda info: info.uri)


def delete_tree(uri: str) -> None:
    """Delete a folder and all below it; an absent one is fine."""
    filesystem, path = resolve(uri)
    with _naming(uri, "delete"):
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)


def delete_file(uri: str) -> None:
    """Delete one file; an absent one is fine."""
    filesystem, path = resolve(uri)
    with _naming(uri, "delete"):
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_file(path)


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
    with _naming(uri, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{uri}: {message}") from None
        yield


def plain_json(value: Any) -> Any:
    """A value as it comes back from JSON (tuples become lists)."""
    return json.loads(json.dumps(value))
