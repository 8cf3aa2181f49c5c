"""Several packed data sets trained on as one: labels one after another, shares of an epoch by weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.data.manifest import Manifest, ManifestError, ShardInfo


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Packed data sets in one order; looks like a `Manifest` to all that trains on it.

    The classes of a set follow those of the sets before it, and so do its sample indices. People are not matched: one
    who is in two sets has two classes.

    Attributes:
        manifests: The sets, at least one.
        weights: How often an epoch sees each sample of a set: 1 once, 0.5 every second epoch, 2 twice.
    """

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that the sets go together."""
        for manifest, weight in zip(self.manifests, self.weights, strict=True):
            if not 0 < weight <= 1000:
                raise ValueError(f"weight={weight!r} of {manifest.uri} must be above 0 and at most 1000")
            if manifest.image_side != self.image_side:
                raise ManifestError(
                    f"{manifest.uri}: images of {manifest.image_side} pixels, those of {self.manifests[0].uri} have "
                    f"{self.image_side}"
                )

    @classmethod
    def load(cls, weights: Mapping[str, float]) -> Manifest | Mixture:
        """Load sets by URI; one alone with weight 1 stays the manifest that it is."""
        manifests = tuple(Manifest.load(uri) for uri in weights)
        if len(manifests) == 1 and set(weights.values()) == {1.0}:
            return manifests[0]
        return cls(manifests=manifests, weights=tuple(float(weight) for weight in weights.values()))

    @property
    def uri(self) -> str:
        """The places of all sets."""
        return " + ".join(manifest.uri for manifest in self.manifests)

    @functools.cached_property
    def shards(self) -> tuple[ShardInfo, ...]:
        """All shards, set after set."""
        return tuple(shard for manifest in self.manifests for shard in manifest.shards)

    @property
    def members(self) -> tuple[tuple[int, float], ...]:
        """Number of shards and weight of each set."""
        return tuple((len(m.shards), weight) for m, weight in zip(self.manifests, self.weights, strict=True))

    @property
    def num_samples(self) -> int:
        """Distinct samples of all sets."""
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def num_classes(self) -> int:
        """Classes of all sets."""
        return sum(manifest.num_classes for manifest in self.manifests)

    @property
    def image_side(self) -> int:
        """Pixels of each side of the images."""
        return self.manifests[0].image_side

    @property
    def identities(self) -> tuple[str, ...]:
        """Original name of each class, by label."""
        return tuple(name for manifest in self.manifests for name in manifest.identities)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """First global sample index of each shard, and the total behind: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards])]).astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sets' fingerprints and weights."""
        return storage.fingerprint([[m.fingerprint, w] for m, w in zip(self.manifests, self.weights, strict=True)])

    def shard_uri(self, shard: int) -> str:
        """URI of one shard."""
        member, own = self._find(shard)
        return self.manifests[member].shard_uri(own)

    def label_range(self, shard: int) -> range:
        """Labels that the samples of a shard may have, in the mixture's numbering."""
        member, _ = self._find(shard)
        first = sum(manifest.num_classes for manifest in self.manifests[:member])
        return range(first, first + self.manifests[member].num_classes)

    def without_identities(self) -> Mixture:
        """The same data without the names, which are long and which data workers do not need."""
        return Mixture(manifests=tuple(m.without_identities() for m in self.manifests), weights=self.weights)

    def _find(self, shard: int) -> tuple[int, int]:
        for member, manifest in enumerate(self.manifests):
            if shard < len(manifest.shards):
                return member, shard
            shard -= len(manifest.shards)
        raise IndexError(f"shard {shard} is not one of {len(self.shards)}")
