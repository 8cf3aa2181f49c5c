"""The manifest of a packed data set: which shards it has, what is in them, and a fingerprint of it all."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from pipeline import storage

NAME: Final = "manifest.json"
FORMAT_VERSION: Final = 2
DEFAULT_SAMPLES_PER_SHARD: Final = 2048


class ManifestError(ValueError):
    """A packed data set that is absent, incomplete or altered; the message names the URI and the field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One WebDataset shard.

    Attributes:
        name: File name beside the manifest.
        num_samples: Samples in it.
        num_bytes: Size of the file.
        sha256: Of the file, hex.
        crc32: Of each MiB of the file, eight hex digits each: says where a damaged one is damaged.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    crc32: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A packed data set. Sample i is row (i - offset of its shard) of its shard, in shard order.

    Attributes:
        uri: The folder of the manifest and its shards.
        shards: In sample order; all but the last have equal numbers of samples.
        num_classes: Labels are 0 .. num_classes - 1.
        image_side: Pixels of each side of the square images.
        seed: Of the global shuffle at packing.
        source: Where the samples came from.
        identities: Original name of each class, by label.
    """

    uri: str
    shards: tuple[ShardInfo, ...]
    num_classes: int
    image_side: int
    seed: int
    source: dict[str, Any]
    identities: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.offsets[-1])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """First global sample index of each shard, and the total behind: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards])]).astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything but the place: equal data has equal fingerprints wherever it lies."""
        return storage.fingerprint(self._content())

    @property
    def members(self) -> tuple[tuple[int, float], ...]:
        """One data set, seen once an epoch (see `pipeline.data.order.DataSet`)."""
        return ((len(self.shards), 1.0),)

    def shard_uri(self, shard: int) -> str:
        """URI of one shard."""
        return storage.join(self.uri, self.shards[shard].name)

    def label_range(self, shard: int) -> range:
        """Labels that the samples of a shard may have."""
        return range(self.num_classes)

    def without_identities(self) -> Manifest:
        """The same data without the names, which are long and which data workers do not need."""
        return replace(self, identities=())

    def save(self) -> None:
        """Write the manifest (atomically); a data set without one is not complete."""
        storage.write_json(storage.join(self.uri, NAME), self._content() | {"fingerprint": self.fingerprint})

    def _content(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "num_classes": self.num_classes,
            "image_side": self.image_side,
            "seed": self.seed,
            "source": self.source,
            "identities": list(self.identities),
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def load(cls, uri: str) -> Manifest:
        """Read and check the manifest of a packed data set.

        Raises:
            ManifestError: There is none, or it does not say what it must; the message names the URI.
        """
        place = storage.join(uri, NAME)
        if not storage.exists(place):
            hint = "pack the data first (jobs/pack_dataset.py)" if storage.exists(uri) else "the folder does not exist"
            raise ManifestError(f"{place}: there is no manifest here: {hint}")
        content = storage.read_json(place)
        try:
            if content["format_version"] != FORMAT_VERSION:
                raise ManifestError(
                    f"{place}: format_version is {content['format_version']}, this version reads {FORMAT_VERSION}: "
                    "pack the data again (jobs/pack_dataset.py)"
                )
            manifest = cls(
                uri=storage.normalise(uri),
                shards=tuple(ShardInfo(**shard) for shard in content["shards"]),
                num_classes=content["num_classes"],
                image_side=content["image_side"],
                seed=content["seed"],
                source=content["source"],
                identities=tuple(content["identities"]),
            )
            expected = content["fingerprint"]
            found = manifest.fingerprint
            samples = content["num_samples"]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ManifestError):  # it is a ValueError too
                raise
            raise ManifestError(f"{place}: not a manifest: field {error} is missing or of the wrong kind") from error
        if found != expected or samples != manifest.num_samples:
            raise ManifestError(f"{place}: altered: its fingerprint is {manifest.fingerprint}, it says {expected}")
        return manifest
