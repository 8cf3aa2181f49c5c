"""InsightFace packs (``train.rec``, with or without ``train.idx``) as a source: contiguous ranges of bytes.

Class numbers are float32 in such a pack: above 16,777,216 only every second number exists, above twice that every
fourth. Whoever wrote such a pack has rounded them, and nothing here can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline import storage
from pipeline.data.recordio import (
    Record,
    RecordIOError,
    image_entries,
    index_uri,
    read_indexed_records,
    read_one_record,
    read_records,
)
from pipeline.data.recordio_index import RecordIndex, read_index
from pipeline.data.sources.base import Part, Place, RawSample, SourceError, SourceSpec, file_versions

USUAL_NAME: Final = "train.rec"
_EXTENSION: Final = ".rec"


class _Images(NamedTuple):
    """The images of a pack with an index, in file order: int64 [n] each."""

    keys: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray


# eq=False: a generated == would compare arrays for truth, which numpy refuses.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _IndexedPart:
    """Images by their places in the index: int64 [n] each, in file order."""

    uri: str
    keys: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray

    @property
    def num_bytes(self) -> int:
        return int((self.ends - self.offsets).sum())

    def samples(self) -> Iterator[RawSample]:
        for key, record in read_indexed_records(self.uri, self.keys, self.offsets, self.ends):
            yield _sample(f"{self.uri}: record {key}", record)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ScannedPart:
    """A range of bytes of a file without an index."""

    uri: str
    start: int
    stop: int
    is_whole_file: bool

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def samples(self) -> Iterator[RawSample]:
        headers: list[tuple[int, Record]] = []
        num_images = num_bookkeeping = 0
        for offset, record in read_records(self.uri, self.start, self.stop):
            if record.is_bookkeeping:
                num_bookkeeping += 1
                if record.id == 0 and len(headers) < 2:
                    headers.append((offset, record))
                continue
            num_images += 1
            yield _sample(f"{self.uri}: record at byte {offset}", record)
        if self.is_whole_file and len(headers) == 1:  # with several, ids do not tell which is the header
            _check_counts(self.uri, *headers[0], num_images, num_bookkeeping)


def _check_counts(uri: str, offset: int, header: Record, num_images: int, num_bookkeeping: int) -> None:
    found = tuple(float(np.float32(number)) for number in (num_images + 1, num_images + num_bookkeeping))
    if header.labels[:2] != found:
        images, identities = header.labels[0] - 1, header.labels[1] - header.labels[0]
        raise RecordIOError(
            f"{uri}: record at byte {offset}: the header announces {images:.0f} images and {identities:.0f} "
            f"identities, the file has {num_images} and {num_bookkeeping - 1}"
        )


def _sample(name: str, record: Record) -> RawSample:
    label = record.labels[0]
    if not label.is_integer() or label < 0:
        raise RecordIOError(f"{name}: the label {label} is not a class number (0, 1, 2 and so on)")
    return RawSample(name, str(int(label)), record.payload)


class RecordIOSource:
    """An InsightFace pack: a folder with ``train.rec`` or one other ``.rec``, or such a file itself.

    With an ``.idx`` beside it the images are those that its header record announces (first, last or absent:
    PROTOCOLS 3(d)), all records where there is none. A file cut short anywhere is noticed: when it is opened, or when
    its last part is read.

    Without one the file is scanned. Records without a payload and with two labels or more (the header, the identities)
    are no images. If the whole file is one part, the header's counts are checked at its end; if it is cut into several,
    no part sees all of it and they are not. A file that was cut off exactly between two records is then a shorter file.

    Args:
        spec: ``uri`` names the place.

    Raises:
        StorageError: There is no such file, or it cannot be read.
        RecordIOError: The index is damaged, or points outside of the file.
        SourceError: A folder with several ``.rec`` files, or no images.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self._uri, names = _find(spec.uri)
        folder = self._uri.rsplit("/", 1)[0]
        index = index_uri(self._uri)
        has_index = index.rsplit("/", 1)[1] in names
        self._property = _text(storage.join(folder, "property")) if "property" in names else None
        self._files = [storage.file_info(uri) for uri in ((self._uri, index) if has_index else (self._uri,))]
        self._num_bytes = self._files[0].num_bytes
        if self._num_bytes % 4 or not self._num_bytes:
            raise RecordIOError(
                f"{self._uri}: it ends within a record at byte {self._num_bytes}: "
                "the size of a whole file is a multiple of 4 and not 0"
            )
        self._images: _Images | None = None
        self._indexed: dict[str, Any] = {}
        if has_index:
            entries = read_index(index)
            self._indexed = {"num_records": len(entries), "index_sha256": entries.sha256}
            self._images = _images(self._uri, self._num_bytes, entries)

    @staticmethod
    def recognises(place: Place) -> bool:
        """A ``.rec`` file, or a folder with one."""
        names = (place.uri,) if place.is_file else place.files
        return any(name.endswith(_EXTENSION) for name in names)

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of the file, in its order; with an index they hold the images of the range by their keys."""
        if self._images is None:
            step = max(4, part_bytes // 4 * 4)
            starts = range(0, self._num_bytes, step)
            return [
                _ScannedPart(
                    uri=self._uri,
                    start=start,
                    stop=min(start + step, self._num_bytes),
                    is_whole_file=len(starts) == 1,
                )
                for start in starts
            ]
        keys, offsets, ends = self._images
        return [
            _IndexedPart(uri=self._uri, keys=keys[run], offsets=offsets[run], ends=ends[run])
            for run in _runs(ends - offsets, part_bytes)
        ]

    def version(self) -> dict[str, Any]:
        """Sizes and times of the files, and what the index says."""
        version: dict[str, Any] = {"files": file_versions(self._files)}
        return version | self._indexed

    def describe(self) -> dict[str, Any]:
        """Size, the index's checksum and number of records, and the text of ``property``, as far as they are there."""
        description: dict[str, Any] = {"format": "recordio", "num_bytes": self._num_bytes} | self._indexed
        return description if self._property is None else description | {"property": self._property}


def _images(uri: str, num_bytes: int, index: RecordIndex) -> _Images:
    """The images of a pack by its index."""

    def read(key: int) -> Record:
        entry = index.entry(key)
        assert entry is not None
        return read_one_record(uri, int(index.offsets[entry]), key)

    outside = np.flatnonzero((index.offsets < 0) | (index.offsets >= num_bytes))
    if len(outside):
        entry = int(outside[0])
        raise RecordIOError(
            f"{index.uri}: line {entry + 1}: record {index.keys[entry]} starts at byte {index.offsets[entry]}, "
            f"{uri} has {num_bytes} bytes"
        )
    order = np.argsort(index.offsets, kind="stable")
    ends = np.empty_like(index.offsets)
    ends[order] = np.append(index.offsets[order][1:], num_bytes)
    is_image = np.zeros(len(index), np.bool_)
    is_image[image_entries(index, read, uri)] = True
    images = order[is_image[order]]
    if not len(images):
        raise SourceError(f"{uri}: it holds no images")
    if not is_image[order[-1]]:  # no part reads the file's end
        read(int(index.keys[order[-1]]))
    return _Images(index.keys[images], index.offsets[images], ends[images])


def _runs(sizes: np.ndarray, part_bytes: int) -> list[slice]:
    """`base.cut` for the millions of records of a pack: runs of about ``part_bytes``, one record at least."""
    totals = np.cumsum(sizes)
    runs, start, before = [], 0, 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(totals, before + part_bytes, side="right")))
        runs.append(slice(start, stop))
        start, before = stop, int(totals[stop - 1])
    return runs


def _find(uri: str) -> tuple[str, tuple[str, ...]]:
    """The ``.rec`` file of a place, and the names of the files in its folder."""
    place = storage.normalise(uri)
    files, _ = storage.list_folder(place)
    if files is None:
        folder = place.rsplit("/", 1)[0]
        return place, storage.list_folder(folder)[0] or ()
    records = [name for name in files if name.endswith(_EXTENSION)]
    if USUAL_NAME in records:
        records = [USUAL_NAME]
    if not records:
        raise storage.MissingError(f"{storage.join(place, USUAL_NAME)}: does not exist")
    if len(records) > 1:
        found = ", ".join(records[:5])
        raise SourceError(f"{place}: holds {len(records)} RecordIO files ({found}); name the one to read")
    return storage.join(place, records[0]), files


def _text(uri: str) -> str:
    return storage.read_bytes(uri).decode("utf-8", "replace").strip()
