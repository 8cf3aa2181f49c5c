"""Tables with a column of encoded images and one that says who it is: Parquet, Arrow IPC and Feather files.

A Hugging Face data set is one: its image column is a struct whose field ``bytes`` is the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.sources.base import Part, Place, RawSample, SourceError, SourceSpec, cut
from pipeline.data.sources.files import class_name, files_at, look_through
from pipeline.data.sources.list_form import LABEL_COLUMNS, WEAK_LABEL_COLUMNS

EXTENSIONS: Final = frozenset({"parquet", "arrow", "feather"})
IMAGE_COLUMNS: Final = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes")
PARQUET, ARROW_FILE, ARROW_STREAM = "Parquet", "Arrow IPC", "Arrow stream"

_ROWS_AT_ONCE: Final = 16
_NUM_THREADS: Final = 8
_END_OF_STREAM: Final = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """What the footer of one file says.

    Attributes:
        uri: The file.
        kind: `PARQUET`, `ARROW_FILE` or `ARROW_STREAM`.
        schema: Its columns.
        sizes: About how many bytes its row groups (record batches) take; a stream is read as one.
    """

    uri: str
    kind: str
    schema: Any
    sizes: tuple[int, ...]


@contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except (storage.StorageError, SourceError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{place}: damaged, or not what its name says: {error}") from error


def _look_at(uri: str) -> _Table:
    num_bytes = storage.size(uri)
    with storage.open_read(uri) as stream, _naming(uri):
        start = stream.read(6)
        stream.seek(0)
        if start[:4] == b"PAR1":
            with _parquet(stream) as file:
                groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
                sizes = tuple(group.total_byte_size for group in groups)
                return _Table(uri=uri, kind=PARQUET, schema=file.schema_arrow, sizes=sizes)
        if start == b"ARROW1":
            with pa.ipc.open_file(stream) as reader:
                batches = reader.num_record_batches
                return _Table(
                    uri=uri, kind=ARROW_FILE, schema=reader.schema, sizes=(num_bytes // max(batches, 1),) * batches
                )
        if start[:4] != _END_OF_STREAM[:4]:
            raise SourceError(
                f"{uri}: starts with {start!r}: neither Parquet nor Arrow IPC (Feather's version 1 is not)"
            )
        with pa.ipc.open_stream(stream) as reader:
            return _Table(uri=uri, kind=ARROW_STREAM, schema=reader.schema, sizes=(num_bytes,))


def _parquet(stream: Any) -> Any:
    # Columns are read as they are needed: 77 MiB of memory for a row group of 340, which pre_buffer would hold whole.
    return pq.ParquetFile(
        stream, buffer_size=storage.READ_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type))
    return _is_bytes(kind)


def _is_label(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(is_text or pa.types.is_integer(kind))


def _find_column(table: _Table, option: str, wanted: str, usual: Sequence[str], fits: Callable[[Any], bool]) -> str:
    """The name of a column: the one that is asked for, or the only one that has a usual name.

    Raises:
        SourceError: There is none, or more than one, or it holds something else.
    """
    names: list[str] = table.schema.names
    found = [name for name in names if (name == wanted if wanted else name.lower() in usual)]
    if len(found) != 1:
        what = f"named {wanted!r}" if wanted else f"with one of the usual names ({', '.join(usual)})"
        raise SourceError(
            f"{table.uri}: {len(found) or 'no'} columns {what}; there are: {', '.join(names)}; "
            f"{option} says which it is"
        )
    kind = table.schema.field(found[0]).type
    if not fits(kind):
        expected = "bytes, or a struct with a field 'bytes'" if fits is _is_image else "integers or strings"
        raise SourceError(f"{table.uri}: column {found[0]!r} ({option}) holds {kind}; expected: {expected}")
    return found[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Row groups (record batches) of one file."""

    uri: str
    kind: str
    groups: range
    image: str
    label: str
    num_bytes: int

    def samples(self) -> Iterator[RawSample]:
        with storage.open_read(self.uri) as stream:
            for group, batches in self._groups(stream):
                place, row = f"{self.uri}: {_GROUP_NAMES[self.kind]} {group}", 0
                while True:
                    with _naming(place):
                        batch = next(batches, None)
                        if batch is None:
                            break
                        images, labels = batch.column(self.image).to_pylist(), batch.column(self.label).to_pylist()
                    for image, label in zip(images, labels, strict=True):
                        name = f"{place}, row {row}"
                        yield RawSample(name, self._identity(label, name), self._image(image, name))
                        row += 1

    def _groups(self, stream: Any) -> Iterator[tuple[int, Iterator[Any]]]:
        """Number of each row group (record batch), and its rows in small batches."""
        if self.kind == ARROW_STREAM:
            yield from self._stream(stream)
        elif self.kind == ARROW_FILE:
            with _naming(self.uri):
                # The system can take mapped memory back. To choose fields (included_fields) would hold all twice.
                mapped = pa.memory_map(str(storage.local_path(self.uri))) if storage.is_local(self.uri) else stream
                reader = pa.ipc.open_file(mapped)
            for group in self.groups:
                yield group, _read_slices(reader, group)
        else:
            with _naming(self.uri):
                file = _parquet(stream)
            for group in self.groups:
                yield group, file.iter_batches(_ROWS_AT_ONCE, [group], [self.image, self.label], use_threads=False)

    def _stream(self, stream: Any) -> Iterator[tuple[int, Iterator[Any]]]:
        with _naming(self.uri):
            reader = pa.ipc.open_stream(stream)
        for group in count():
            with _naming(f"{self.uri}: {_GROUP_NAMES[self.kind]} {group}"):
                batch = next(reader, None)
            if batch is None:
                break
            yield group, _slices(batch)
        # Arrow takes the end of a truncated file for the end of the stream.
        end = stream.tell()
        stream.seek(-len(_END_OF_STREAM), 2)
        if stream.read() != _END_OF_STREAM or stream.tell() != end:
            raise SourceError(f"{self.uri}: byte {end}: truncated: the stream ends without its end mark")

    def _image(self, value: Any, place: str) -> bytes:
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise SourceError(f"{place}: column {self.image!r} has no image (null)")
        return bytes(value)

    def _identity(self, value: Any, place: str) -> str:
        identity = "" if value is None else class_name(str(value), place)
        if not identity:
            raise SourceError(f"{place}: column {self.label!r} has no label ({'null' if value is None else 'empty'})")
        return identity


_GROUP_NAMES: Final = {PARQUET: "row group", ARROW_FILE: "record batch", ARROW_STREAM: "record batch"}


def _read_slices(reader: Any, group: int) -> Iterator[Any]:
    yield from _slices(reader.get_batch(group))


def _slices(batch: Any) -> Iterator[Any]:
    batch.validate(full=True)  # damaged offsets would read beyond their buffers
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        yield batch.slice(start, _ROWS_AT_ONCE)


class TableSource:
    """A folder of Parquet, Arrow IPC or Feather files, or one such file."""

    def __init__(self, spec: SourceSpec) -> None:
        self._listing = look_through(spec.uri, EXTENSIONS, "tables")
        uris = [self._listing.uri(name) for name in self._listing.names]
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            self._tables = list(threads.map(_look_at, uris))
        self._columns = {_find_columns(table, spec) for table in self._tables}
        if len(self._columns) > 1:
            found = " and ".join(sorted(f"{image!r} with {label!r}" for image, label in self._columns))
            raise SourceError(f"{storage.normalise(spec.uri)}: the files differ in their columns: {found}")

    @staticmethod
    def recognises(place: Place) -> bool:
        """Tables, by their names."""
        return bool(files_at(place, EXTENSIONS))

    def parts(self, part_bytes: int) -> list[Part]:
        """Runs of row groups (record batches) of one file."""
        ((image, label),) = self._columns
        return [
            _Rows(
                uri=table.uri,
                kind=table.kind,
                groups=run,
                image=image,
                label=label,
                num_bytes=sum(table.sizes[run.start : run.stop]),
            )
            for table in self._tables
            for run in cut(list(table.sizes), part_bytes)
        ]

    def version(self) -> dict[str, Any]:
        """Names, sizes and times of change of the files, and the columns."""
        return {"files": self._listing.digest, "columns": sorted(map(list, self._columns))}

    def describe(self) -> dict[str, Any]:
        """Number and size of the files, and the columns."""
        ((image, label),) = self._columns
        return {
            "format": "tables",
            "num_files": len(self._listing.names),
            "num_bytes": sum(self._listing.sizes),
            "num_other_files": self._listing.num_others,
            "image_column": image,
            "label_column": label,
        }


def _find_columns(table: _Table, spec: SourceSpec) -> tuple[str, str]:
    usual = LABEL_COLUMNS if {name.lower() for name in table.schema.names} & set(LABEL_COLUMNS) else WEAK_LABEL_COLUMNS
    return (
        _find_column(table, "image_column", spec.image_column, IMAGE_COLUMNS, _is_image),
        _find_column(table, "label_column", spec.label_column, usual, _is_label),
    )
