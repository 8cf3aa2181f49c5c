"""A cache of whole shards on this machine's disk: bounded, least recently used first out, shared by all processes.

An entry is a file named by its sha256, put there by rename. An exclusive file lock covers the short moments in which
space is given out and names change, never a download or a write: whoever puts an entry first takes the space it needs
(old entries go, then a file of the full size is there), and fills it afterwards. So the files never add up to more than
the bound, whatever several processes do at once. A reader has its file open: it gets whole bytes also of an entry that
is being removed. What a killed writer leaves is swept by the next one, which sees that nobody holds its lock any more.

Bytes are not checked here, nor forced to the disk: after a power cut an entry may be wrong. The caller, who checks
every shard anyway, calls `ShardCache.discard` for one whose sum is wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

_logger = logging.getLogger(__name__)

LOCK: Final = ".lock"
PARTIAL: Final = ".partial"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Folders that could not be written to, by this process. Of the module and not of the object: Ray's tasks get each a
# copy of the object, and the warning shall come once.
_refused: set[str] = set()


class CacheError(ValueError):
    """A cache that cannot do its work as it is configured."""


class _Entry(NamedTuple):
    used_ns: int
    num_bytes: int
    path: Path


class ShardCache:
    """Whole shards on local disk, at most ``max_bytes`` of them.

    Cheap to make and to send to other processes; all that name the same folder share it, and shall give it the same
    bound. A disk that is full or cannot be written to is a warning once in a process, which then goes on without
    putting anything.

    Attributes:
        folder: Its folder, made at the first use; nothing else shall be in there.
        max_bytes: Bound of all files in it, those being written included.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if max_bytes < 1:
            raise CacheError(f"max_bytes={max_bytes!r} of the shard cache {folder} must be at least 1")
        self.folder, self.max_bytes = Path(folder).expanduser().absolute(), max_bytes

    def get(self, sha256: str, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """Give a shard: from the disk, else from ``fetch``, whose bytes are then put.

        Args:
            sha256: Its name here, 64 hexadecimal digits.
            num_bytes: Its size; an entry of another size is not used, bytes of another size are not put.
            fetch: Gets it from where it is kept; its errors are the caller's.

        Raises:
            CacheError: The bound is smaller than this one shard, or ``sha256`` is none.
        """
        path = self._path(sha256)
        if num_bytes > self.max_bytes:
            raise CacheError(
                f"max_bytes={self.max_bytes} of the shard cache {self.folder} is smaller than one shard of {num_bytes} "
                "bytes; give it room for several shards, or leave the cache out"
            )
        data = self._read(path, num_bytes)
        if data is not None:
            return data
        data = fetch()
        if len(data) == num_bytes and str(self.folder) not in _refused:
            try:
                self._put(path, data)
            except OSError as error:
                _refused.add(str(self.folder))
                _logger.warning("the shard cache %s takes nothing more from this process: %s", self.folder, error)
        return data

    def discard(self, sha256: str) -> None:
        """Remove an entry whose bytes were found wrong; none is fine."""
        with contextlib.suppress(OSError):
            self._path(sha256).unlink()

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise CacheError(f"sha256={sha256!r} must be 64 lower-case hexadecimal digits")
        return self.folder / sha256

    def _read(self, path: Path, num_bytes: int) -> bytes | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != num_bytes:
            return None
        with contextlib.suppress(OSError):  # gone by now, or a disk that cannot be written to
            os.utime(path, ns=(time.time_ns(),) * 2)
        return data

    def _put(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            partial = self._take_space(path, len(data))
        if partial is None:
            return
        number, name = partial
        try:
            with open(number, "wb") as file:
                file.write(data)
                file.flush()
                os.utime(file.fileno(), ns=(time.time_ns(),) * 2)
                with self._lock():  # nobody counts the files while one changes its name
                    os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _take_space(self, path: Path, num_bytes: int) -> tuple[int, Path] | None:
        """Make room and a partial file of the full size, under the lock; None if others are using the room.

        Returns:
            Its open, locked file descriptor and its path.
        """
        entries, written = self._scan()
        if any(entry.path == path and entry.num_bytes == num_bytes for entry in entries):
            return None  # another process was quicker
        used = written + sum(entry.num_bytes for entry in entries)
        for entry in sorted(entries):
            if used + num_bytes <= self.max_bytes:
                break
            entry.path.unlink(missing_ok=True)
            used -= entry.num_bytes
        if used + num_bytes > self.max_bytes:
            return None
        partial = self.folder / f"{path.name}.{uuid.uuid4().hex}{PARTIAL}"
        number = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            if num_bytes:
                os.posix_fallocate(number, 0, num_bytes)  # a full disk says so here
        except BaseException:
            os.close(number)
            partial.unlink(missing_ok=True)
            raise
        return number, partial

    def _scan(self) -> tuple[list[_Entry], int]:
        """The entries, and the bytes that other writers have taken; sweeps what dead writers left."""
        entries, written = [], 0
        for item in os.scandir(self.folder):
            try:
                if item.name.endswith(PARTIAL):
                    written += _sweep(Path(item.path))
                elif _SHA256.fullmatch(item.name):
                    state = item.stat(follow_symlinks=False)
                    entries.append(_Entry(state.st_mtime_ns, state.st_size, Path(item.path)))
            except FileNotFoundError:  # put, or discarded, in this moment
                continue
        return entries, written


def _sweep(partial: Path) -> int:
    """Remove a partial file if its writer is dead; the bytes it holds if it lives."""
    with partial.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(file.fileno()).st_size
        partial.unlink(missing_ok=True)
        return 0
