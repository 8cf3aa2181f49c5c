"""Writing MXNet RecordIO files, and whole InsightFace packs, as mxnet writes them: byte for byte.

A local file is written beside its final name and renamed. For a remote one the whole file is first written to this
machine's temporary folder (``TMPDIR``) and then uploaded, because a store takes no half of an object.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import uuid
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from lgaf.config import require_positive
from pipeline import storage
from pipeline.data.recordio import index_uri
from pipeline.data.recordio_format import Record, RecordIOError, encode_record

PACK_NAME: Final = "train.rec"
PROPERTY_NAME: Final = "property"
_BUFFER_BYTES: Final = 1024 * 1024


class RecordIOWriter:
    """Write a ``.rec`` file and its ``.idx``; a context manager.

    Nothing is under the final names until the block ends without an error; then an older file goes, the index comes,
    and the records come last. If the process is killed, files named ``.<name>.<random>.partial`` may stay behind.

    Args:
        uri: The ``.rec`` file.
        index: Whether to write the ``.idx`` beside it.

    Raises:
        StorageError: The place cannot be written.
    """

    def __init__(self, uri: str, *, index: bool = True) -> None:
        self.uri = storage.normalise(uri)
        self.num_bytes = 0
        self._has_index = index
        self._keys = array("q")
        self._beside: dict[str, bytes] = {}
        self._cleaning = ExitStack()

    def __enter__(self) -> RecordIOWriter:
        try:
            self._staged = self._stage(self.uri)
            self._file = self._cleaning.enter_context(self._staged.open("xb", buffering=_BUFFER_BYTES))
            if self._has_index:
                self._staged_index = self._stage(index_uri(self.uri))
                self._index = self._cleaning.enter_context(self._staged_index.open("xb", buffering=_BUFFER_BYTES))
        except OSError as error:
            self._cleaning.close()
            raise storage.StorageError(f"{self.uri}: cannot be written: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._cleaning:
            if error is None:
                self._publish()

    def _stage(self, uri: str) -> Path:
        """Where to write what will be at ``uri``; deleted at the end, unless it has been renamed."""
        if not storage.is_local(uri):
            folder = Path(self._cleaning.enter_context(tempfile.TemporaryDirectory(prefix="lgaf-recordio-")))
            return folder / uri.rsplit("/", 1)[1]
        target = storage.local_path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        self._cleaning.callback(partial.unlink, missing_ok=True)
        return partial

    def write(self, record: Record, key: int | None = None) -> int:
        """Append one record.

        Args:
            record: Written with its labels as an array if it says so, or if they are not exactly one.
            key: In the index; None: the record's id.

        Returns:
            The byte at which it starts.

        Raises:
            RecordIOError: The format cannot hold it: too large, without a label, or with a label that is a whole number
                but not one of float32.
            StorageError: It cannot be written: the disk is full.
        """
        key = record.id if key is None else key
        offset, data = self.num_bytes, encode_record(record, f"{self.uri}: record {key}")
        try:
            self._file.write(data)
            if self._has_index:
                self._index.write(b"%d\t%d\n" % (key, offset))
                self._keys.append(key)
        except OSError as error:
            raise storage.StorageError(f"{self.uri}: cannot be written: {error}") from error
        self.num_bytes += len(data)
        return offset

    def put_beside(self, name: str, data: bytes) -> None:
        """Have a small file come to the same folder with the records, in place of an older one."""
        self._beside[name] = data

    def _publish(self) -> None:
        keys, counts = np.unique(np.frombuffer(self._keys, np.int64), return_counts=True)
        if len(twice := keys[counts > 1]):
            raise RecordIOError(f"{self.uri}: {counts.max()} records have the key {twice[0]}; an index has each once")
        self._file.close()
        index = index_uri(self.uri)
        storage.delete_file(self.uri)  # no moment has old records beside a new index
        try:
            if self._has_index:
                self._index.close()
                _move(self._staged_index, index)
            else:
                storage.delete_file(index)
            for name, data in self._beside.items():
                storage.write_bytes(storage.join(self.uri.rsplit("/", 1)[0], name), data)
            _move(self._staged, self.uri)
        except BaseException:
            for name in (index.rsplit("/", 1)[1], *self._beside):
                storage.delete_file(storage.join(self.uri.rsplit("/", 1)[0], name))
            raise


def _move(staged: Path, uri: str) -> None:
    try:
        if storage.is_local(uri):
            staged.replace(storage.local_path(uri))
            return
        _upload(staged, uri)
    except storage.StorageError:
        raise
    except OSError as error:
        raise storage.StorageError(f"{uri}: cannot be written: {error}") from error


def _upload(staged: Path, uri: str) -> None:
    filesystem, path = storage.resolve(uri)
    try:
        with staged.open("rb") as source, filesystem.open_output_stream(path) as target:
            shutil.copyfileobj(source, target, storage.READ_BUFFER_BYTES)
    except BaseException:
        # pyarrow closes a stream that is given up, and closing is what puts half an object under the name.
        storage.delete_file(uri)
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class InsightFacePack:
    """What `write_insightface_pack` wrote: place, images, identities, and bytes of ``train.rec``."""

    uri: str
    num_images: int
    num_identities: int
    num_bytes: int


def write_insightface_pack(
    samples: Iterable[tuple[int, bytes]],
    folder_uri: str,
    *,
    num_identities: int,
    image_side: int = 112,
    header: bool = True,
) -> InsightFacePack:
    """Write ``train.rec``, ``train.idx`` and ``property`` as InsightFace's ``rec_builder.py`` does.

    Images have the keys 1 to N, in the order given; the identity records N+1 to N+C follow, each with the first key of
    its images and the one behind the last; the header is last, with key 0 (PROTOCOLS 3(d)). Keys in these records are
    float32: identity records are rounded above 16,777,216 as InsightFace's are, but a header that would be is refused.

    Args:
        samples: (class number, encoded image), all of a class together, classes ascending.
        folder_uri: Where; what is there is replaced.
        num_identities: Class numbers are below it; one without images gets an identity record of none.
        image_side: Pixels of each side, for ``property``.
        header: False: images alone, with the keys 0 to N-1, as ``im2rec`` writes them.

    Raises:
        RecordIOError: Samples out of order, none, or what the format cannot hold; nothing is left under the names.
        StorageError: The place cannot be written.
    """
    require_positive("num_identities", num_identities)
    require_positive("image_side", image_side)
    uri = storage.join(folder_uri, PACK_NAME)
    first_key = 1 if header else 0
    counts = np.zeros(num_identities, np.int64)
    with RecordIOWriter(uri) as writer:
        last = 0
        for key, (label, image) in enumerate(samples, first_key):
            if not last <= label < num_identities:
                expected = f"{last} to {num_identities - 1}, in ascending order"
                raise RecordIOError(f"{uri}: record {key}: the class number {label} is not expected here: {expected}")
            writer.write(Record(labels=(float(label),), payload=image, id=key))
            counts[label] += 1
            last = label
        num_images = int(counts.sum())
        if not num_images:
            raise RecordIOError(f"{uri}: there are no images to write")
        if header:
            _write_bookkeeping(writer, counts)
        writer.put_beside(PROPERTY_NAME, f"{num_identities},{image_side},{image_side}\n".encode())
    return InsightFacePack(
        uri=storage.normalise(folder_uri),
        num_images=num_images,
        num_identities=num_identities,
        num_bytes=writer.num_bytes,
    )


def _write_bookkeeping(writer: RecordIOWriter, counts: np.ndarray) -> None:
    bounds = np.concatenate([[1], 1 + np.cumsum(counts)])
    end = int(bounds[-1])  # the key behind the last image
    if float(np.float32(end)) != end:
        raise RecordIOError(
            f"{writer.uri}: record 0: the header cannot say that {end - 1:,} images end before key {end:,}: float32 "
            "has no such number; leave an image out, or write without a header"
        )
    for identity, (first, behind) in enumerate(itertools.pairwise(bounds.tolist())):
        labels = (float(np.float32(first)), float(np.float32(behind)))
        writer.write(Record(labels=labels, payload=b"", id=end + identity, is_array=True))
    labels = (float(end), float(np.float32(end + len(counts))))
    writer.write(Record(labels=labels, payload=b"", id=0, id2=1, is_array=True))
