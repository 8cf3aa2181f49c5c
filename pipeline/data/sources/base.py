"""What a source of training faces is to packing: a list of parts, each read from front to back by one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lgaf.config import require_positive
from pipeline import storage


class SourceError(ValueError):
    """A source that is damaged or not what its format says; the message names the file and the place in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Size of the synthetic training set that the embedded default uses."""

    num_identities: int = 100
    images_per_identity: int = 30

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("synthetic.num_identities", self.num_identities)
        require_positive("synthetic.images_per_identity", self.images_per_identity)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """What to open.

    Attributes:
        format: A name of `pipeline.data.sources.FORMATS`.
        uri: Place of the source (a folder or a file); ``synthetic`` has none.
        image_column: Of tables (Parquet, Arrow): the column of encoded images; empty: found by its usual names.
        label_column: Of tables: the column that says who it is; empty: found by its usual names.
        root: Of list files: what their paths are relative to; empty: the folder of the list.
        seed: Of a synthetic source.
        synthetic: Size of a synthetic source.
    """

    format: str
    uri: str = ""
    image_column: str = ""
    label_column: str = ""
    root: str = ""
    seed: int = 0
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


class RawSample(NamedTuple):
    """One sample as its source has it.

    Attributes:
        name: What the source calls it, for messages: the file and the key, member or row in it.
        identity: The source's own name of the person; class numbers as plain decimal digits.
        image: The encoded image, unchanged.
    """

    name: str
    identity: str
    image: bytes


class Part(Protocol):
    """A stretch of a source that one task reads from front to back; small, and travels to the task by pickle."""

    @property
    def num_bytes(self) -> int:
        """About how many bytes of images it holds."""
        ...

    def samples(self) -> Iterator[RawSample]:
        """Read it, holding little more than a few samples or one large read buffer in memory.

        Raises:
            StorageError: It cannot be read.
            SourceError: It is damaged; nothing is skipped in silence.
        """
        ...


class Source(Protocol):
    """A data set in its own format.

    Opening one (its constructor takes a `SourceSpec`) reads an index or a listing, never the images.
    """

    def parts(self, part_bytes: int) -> list[Part]:
        """Cut it into parts of about ``part_bytes``; the same source gives the same samples in the same order."""
        ...

    def version(self) -> dict[str, Any]:
        """What changes when its contents do (sizes, times, checksums of small files); JSON."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: equal for equal contents, wherever and whenever they lie; JSON."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A place that may hold a source, as `detect_format` shows it to each format.

    Attributes:
        uri: Normalised.
        is_file: Whether it is one file; then ``files`` and ``folders`` are empty.
        files: Names of the files directly in the folder.
        folders: Names of the folders directly in it.
    """

    uri: str
    is_file: bool
    files: tuple[str, ...]
    folders: tuple[str, ...]


def cut(sizes: list[int], part_bytes: int) -> list[range]:
    """Cut items of known sizes into runs of about ``part_bytes``, one item at least."""
    runs, start, total = [], 0, 0
    for item, size in enumerate(sizes):
        if item > start and total + size > part_bytes:
            runs.append(range(start, item))
            start, total = item, 0
        total += size
    return [*runs, range(start, len(sizes))] if sizes else []


def file_versions(infos: list[storage.FileInfo]) -> list[list[Any]]:
    """Name, size and time of change of files: a cheap sign of their contents."""
    return [[info.uri.rsplit("/", 1)[1], info.num_bytes, info.modified_ns] for info in infos]
