"""What the sources that are many files share: looking through a folder, and reading files ahead."""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

from pipeline import storage
from pipeline.data.sources.base import Place, RawSample, SourceError

IMAGE_EXTENSIONS: Final = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
# What people leave beside images: lists, notes, landmarks, checksums. Anything else is an error, for it may be data.
_TEXTS: Final = ("txt", "lst", "csv", "tsv", "json", "jsonl", "yaml", "yml", "xml", "md", "rst", "html", "log", "ini")
_OTHERS: Final = ("pdf", "db", "npy", "npz", "mat", "pts", "idx", "md5", "sha1", "sha256", "py")
BESIDE_EXTENSIONS: Final = frozenset((*_TEXTS, *_OTHERS))
BESIDE_NAMES: Final = frozenset({"readme", "license", "licence", "notice", "copying"})

# Each remote file is a request of tens of milliseconds; a local one takes less than handing it to a thread, hence runs.
# Of the Mac, and what our own packing leaves beside its shards.
_BESIDE_FOLDERS: Final = ("__MACOSX", "data_card")
_NUM_THREADS: Final = 16
_FILES_PER_RUN: Final = 4
_MAX_LOOKS: Final = 32
_CLASS_NUMBER: Final = re.compile(r"([+-]?[0-9]+)(\.0*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of one kind at a place.

    Attributes:
        root: The folder they lie below.
        names: Their paths below it, sorted by character.
        sizes: In bytes.
        num_others: Files beside them that are passed over: hidden ones, notes, lists.
        digest: SHA-256 (hex) of names, sizes and times of change.
    """

    root: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    num_others: int
    digest: str

    def uri(self, name: str) -> str:
        """Of one of its files."""
        return storage.join(self.root, name)


def look_through(uri: str, extensions: Collection[str], what: str) -> Listing:
    """List the files with some extensions below a folder, or the one file that a URI names.

    Args:
        uri: A folder or a file.
        extensions: Lower case, without the dot.
        what: Their name in messages, in the plural.

    Raises:
        StorageError: The place is not there.
        SourceError: There are none, or a file is neither one of them nor of those that people leave beside data.
    """
    place = storage.normalise(uri)
    if storage.list_folder(place)[0] is None:
        infos, root = [storage.file_info(place)], place.rpartition("/")[0]
    else:
        infos, root = storage.list_files(place), place
        if storage.is_local(place):
            _refuse_odd_entries(str(storage.local_path(place)))
    names, sizes, num_others, digest = [], [], 0, hashlib.sha256()
    for info in infos:
        name = info.uri.removeprefix(root).lstrip("/")
        if is_beside(name):
            num_others += 1
        elif extension(name) in extensions:
            names.append(name)
            sizes.append(info.num_bytes)
            digest.update(f"{name}\0{info.num_bytes}\0{info.modified_ns}\0".encode(errors="surrogatepass"))
        else:
            raise SourceError(
                f"{info.uri}: neither one of {what} ({_listed(extensions)}) nor a note or list beside them"
            )
    if not names:
        raise SourceError(f"{place}: holds no {what} ({_listed(extensions)})")
    return Listing(root=root, names=tuple(names), sizes=tuple(sizes), num_others=num_others, digest=digest.hexdigest())


def _refuse_odd_entries(folder: str) -> None:
    """Raise `SourceError` for what a listing leaves out in silence (a link to nothing) or sees twice (to a folder)."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_dir():
                    raise SourceError(f"{entry.path}: a link to a folder, which would be read twice: name that folder")
                elif not entry.is_file():
                    raise SourceError(f"{entry.path}: neither a file nor a folder, or a link to nothing")


def _listed(extensions: Collection[str]) -> str:
    return ", ".join(f".{name}" for name in sorted(extensions))


def extension(name: str) -> str:
    """Of a path, lower case, without the dot (``tar.gz`` is one); empty if there is none."""
    stem, dot, end = name.rpartition("/")[2].lower().rpartition(".")
    if end == "gz" and stem.endswith(".tar"):
        return "tar.gz"
    return end if dot and stem else ""


def is_beside(name: str) -> bool:
    """Whether a path is a hidden file's (or below a hidden folder), or of a kind that people leave beside images."""
    if any(part in _BESIDE_FOLDERS or (part.startswith(".") and part not in (".", "..")) for part in name.split("/")):
        return True
    end = extension(name)
    return end in BESIDE_EXTENSIONS or (not end and name.rpartition("/")[2].lower() in BESIDE_NAMES)


def folder_of(name: str) -> str:
    """The last folder of a path; empty if there is none."""
    return name.rpartition("/")[0].rpartition("/")[2]


def class_name(text: str, place: str) -> str:
    """An identity as its source writes it, without blanks around it; a class number as plain decimal digits.

    Raises:
        SourceError: A negative number, which names ``place``: it stands for "not labelled" (Hugging Face's test sets).
    """
    text = text.strip()
    number = _CLASS_NUMBER.fullmatch(text)
    if number is None:
        return text
    if int(number[1]) < 0:
        raise SourceError(f"{place}: the label is {text}: a class number from 0 on, or a name, is expected")
    return str(int(number[1]))


def files_at(place: Place, extensions: Collection[str]) -> list[str]:
    """URIs of the files with some extensions directly at a place; itself, if it is one."""
    uris = [place.uri] if place.is_file else [storage.join(place.uri, name) for name in place.files]
    return [uri for uri in uris if extension(uri) in extensions and not is_beside(uri.rpartition("/")[2])]


def has_image_below(place: Place) -> bool:
    """Whether a folder of a place holds an image, at any depth; a few folders are looked into."""
    waiting = deque(storage.join(place.uri, name) for name in place.folders if not name.startswith("."))
    for _ in range(_MAX_LOOKS):
        if not waiting:
            break
        folder = waiting.popleft()
        files, folders = storage.list_folder(folder)
        if any(extension(name) in IMAGE_EXTENSIONS and not is_beside(name) for name in files or ()):
            return True
        waiting.extendleft(storage.join(folder, name) for name in reversed(folders) if not name.startswith("."))
    return False


class Wanted(NamedTuple):
    """An image file to read: its URI, whose it is, and what messages call it."""

    uri: str
    identity: str
    name: str


def read_ahead(files: Iterable[Wanted]) -> Iterator[RawSample]:
    """Read image files, some ahead of their turn by a few threads; the order is kept.

    Raises:
        StorageError: One cannot be read.
        SourceError: One is not there.
    """
    coming = iter(files)
    pending: deque[tuple[list[Wanted], Future[list[bytes]]]] = deque()
    threads = ThreadPoolExecutor(_NUM_THREADS, "read-ahead")
    try:
        while True:
            while len(pending) < _NUM_THREADS and (run := list(islice(coming, _FILES_PER_RUN))):
                pending.append((run, threads.submit(_read_run, run)))
            if not pending:
                return
            run, images = pending.popleft()
            for wanted, image in zip(run, images.result(), strict=True):
                yield RawSample(wanted.name, wanted.identity, image)
    finally:
        threads.shutdown(cancel_futures=True)


def _read_run(run: list[Wanted]) -> list[bytes]:
    images = []
    for wanted in run:
        try:
            images.append(storage.read_bytes(wanted.uri))
        except storage.MissingError as error:
            raise SourceError(f"{wanted.name}: does not exist") from error
    return images
