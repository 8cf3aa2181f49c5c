"""Names of places and what is raised about them: URIs of files and folders, here or in object stores."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlparse

from pipeline.filesystems import BUCKET_SCHEMES, SCHEMES


class StorageError(OSError):
    """A place that cannot be read or written; the message names its URI."""


class MissingError(StorageError):
    """A place that does not exist: trying again does not help."""


class SizeError(StorageError):
    """A file of another size than expected; told before its body is read.

    Attributes:
        found: Its bytes.
        expected: The bytes that were expected.
    """

    def __init__(self, uri: str, found: int, expected: int) -> None:
        super().__init__(f"{uri}: has {found} bytes, {expected} were expected")
        self.uri, self.found, self.expected = uri, found, expected

    def __reduce__(self) -> tuple[type[SizeError], tuple[str, int, int]]:
        """Pickle by its arguments: Ray sends errors between processes."""
        return type(self), (self.uri, self.found, self.expected)


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
    if parsed.scheme in BUCKET_SCHEMES and not parsed.netloc:
        raise StorageError(f"{text}: a URI of {parsed.scheme} names a bucket: {parsed.scheme}://bucket/prefix")
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
