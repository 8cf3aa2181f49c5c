"""Where training faces come from before they are packed: one small protocol, one entry per kind of source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from lgaf.config import require_choice, require_positive
from pipeline import storage
from pipeline.data import manifest
from pipeline.data.recordio import RecordIOError, RecordIOReader, image_keys
from pipeline.data.synthetic import RENDERER_VERSION, SyntheticFaces

SYNTHETIC: Final = "synthetic"
RECORDIO_FILE: Final = "train.rec"
FORMATS: Final = (SYNTHETIC, "recordio")  # those of SOURCES below


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
    """What to open: travels to the tasks, each of which opens it for itself.

    Attributes:
        format: One of `FORMATS`.
        uri: Place of the source; ``synthetic`` has none.
        seed: Of a synthetic source.
        synthetic: Size of a synthetic source.
    """

    format: str
    uri: str = ""
    seed: int = 0
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        """Check the fields."""
        require_choice("format", self.format, FORMATS)


class Source(Protocol):
    """Samples by index, with contiguous labels."""

    labels: np.ndarray  # int64 [n], 0 .. len(identities) - 1
    identities: tuple[str, ...]  # the source's own name of each class

    def encoded(self, index: int) -> bytes:
        """The encoded image of one sample."""
        ...

    def name(self, index: int) -> str:
        """What the source calls this sample, for error messages."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: equal for equal contents, wherever they lie."""
        ...


class SyntheticSource:
    """Rendered faces (`pipeline.data.synthetic`)."""

    def __init__(self, spec: SourceSpec) -> None:
        size = spec.synthetic
        self._faces = SyntheticFaces(
            num_identities=size.num_identities, images_per_identity=size.images_per_identity, seed=spec.seed
        )
        self.labels = np.array([self._faces.label(i) for i in range(len(self._faces))], np.int64)
        self.identities = tuple(f"synthetic-{spec.seed}-{identity}" for identity in range(size.num_identities))
        self._spec = spec

    def encoded(self, index: int) -> bytes:
        """Render and encode one face."""
        return self._faces.encoded(index)

    def name(self, index: int) -> str:
        """The sample's number."""
        return f"synthetic face {index}"

    def describe(self) -> dict[str, Any]:
        """Size and seed say it all."""
        size = self._spec.synthetic
        return {
            "format": SYNTHETIC,
            "renderer": RENDERER_VERSION,
            "seed": self._spec.seed,
            "num_identities": size.num_identities,
            "images_per_identity": size.images_per_identity,
        }


class RecordIOSource:
    """An InsightFace pack: ``train.rec`` and ``train.idx`` in one folder. An image's label is its first one."""

    def __init__(self, spec: SourceSpec) -> None:
        self._reader = RecordIOReader(storage.join(spec.uri, RECORDIO_FILE))
        self._keys = image_keys(self._reader)
        if not self._keys:
            raise RecordIOError(f"{self._reader.uri}: it holds no images")
        raw = np.array([self._label(key) for key in self._keys])
        names, self.labels = np.unique(raw, return_inverse=True)
        self.identities = tuple(str(int(name)) for name in names)
        self._bytes = storage.size(storage.join(spec.uri, RECORDIO_FILE))
        # Two versions of a pack may differ in nothing but labels, which have a fixed size.
        self._labels_sha256 = hashlib.sha256(raw.astype("<f8").tobytes()).hexdigest()

    def _label(self, key: int) -> float:
        label = self._reader[key].labels[0]
        if not label.is_integer() or label < 0:
            raise RecordIOError(f"{self._reader.uri}: record {key}: the label {label} is not a class number")
        return label

    def encoded(self, index: int) -> bytes:
        """The image bytes of one record."""
        return self._reader[self._keys[index]].payload

    def name(self, index: int) -> str:
        """File and record key."""
        return f"{self._reader.uri}: record {self._keys[index]}"

    def describe(self) -> dict[str, Any]:
        """Counts, size and labels: enough to tell two packs apart without reading every image."""
        return {
            "format": "recordio",
            "num_bytes": self._bytes,
            "num_records": len(self._reader),
            "labels_sha256": self._labels_sha256,
        }


SOURCES: Final[dict[str, type[SyntheticSource] | type[RecordIOSource]]] = {
    SYNTHETIC: SyntheticSource,
    "recordio": RecordIOSource,
}


def open_source(spec: SourceSpec) -> Source:
    """Open a source.

    Raises:
        StorageError: It is not there.
        RecordIOError: It is damaged.
    """
    source: Source = SOURCES[spec.format](spec)
    return source


def detect_format(uri: str) -> str:
    """Say what lies at a place: ``packed`` (shards with a manifest), or one of `FORMATS`.

    Raises:
        StorageError: The place does not exist, or holds nothing that is known.
    """
    if uri == SYNTHETIC:
        return SYNTHETIC
    if not storage.exists(uri):
        raise storage.StorageError(f"{storage.normalise(uri)}: does not exist")
    if storage.exists(storage.join(uri, manifest.NAME)):
        return "packed"
    if storage.exists(storage.join(uri, RECORDIO_FILE)):
        return "recordio"
    raise storage.StorageError(
        f"{storage.normalise(uri)}: holds no data set: neither {manifest.NAME} (packed shards) nor {RECORDIO_FILE} "
        f"(an InsightFace pack); shards without a manifest are incomplete and must be packed again"
    )
