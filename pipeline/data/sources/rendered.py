"""Synthetic faces as a source: rendered while they are packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.sources.base import Part, Place, RawSample, SourceSpec, cut
from pipeline.data.synthetic import RENDERER_VERSION, SyntheticFaces

_ABOUT_BYTES = 4000


@dataclass(frozen=True, slots=True)
class _Faces:
    spec: SourceSpec
    indices: range

    @property
    def num_bytes(self) -> int:
        return len(self.indices) * _ABOUT_BYTES

    def samples(self) -> Iterator[RawSample]:
        size, seed = self.spec.synthetic, self.spec.seed
        faces = SyntheticFaces(
            num_identities=size.num_identities, images_per_identity=size.images_per_identity, seed=seed
        )
        for index in self.indices:
            yield RawSample(f"synthetic face {index}", f"synthetic-{seed}-{faces.label(index)}", faces.encoded(index))


class SyntheticSource:
    """Rendered faces (`pipeline.data.synthetic`)."""

    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec

    @staticmethod
    def recognises(place: Place) -> bool:
        """No place is synthetic: the word alone is."""
        return False

    def parts(self, part_bytes: int) -> list[Part]:
        """Runs of faces; many small ones, because rendering is slow."""
        size = self._spec.synthetic
        count = size.num_identities * size.images_per_identity
        about = min(part_bytes, 250 * _ABOUT_BYTES)
        return [_Faces(self._spec, run) for run in cut([_ABOUT_BYTES] * count, about)]

    def version(self) -> dict[str, Any]:
        """Size and seed say it all."""
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """Size and seed say it all."""
        size = self._spec.synthetic
        return {
            "format": "synthetic",
            "renderer": RENDERER_VERSION,
            "seed": self._spec.seed,
            "num_identities": size.num_identities,
            "images_per_identity": size.images_per_identity,
        }
