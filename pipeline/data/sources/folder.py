"""Folders of images by person: ``<identity>/<image>``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data.sources.base import Part, Place, RawSample, SourceError, SourceSpec, cut
from pipeline.data.sources.files import IMAGE_EXTENSIONS, Wanted, has_image_below, look_through, read_ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    root: str
    names: tuple[str, ...]
    num_bytes: int

    def samples(self) -> Iterator[RawSample]:
        uris = ((storage.join(self.root, name), _identity(name)) for name in self.names)
        return read_ahead(Wanted(uri, identity, uri) for uri, identity in uris)


class FolderSource:
    """Images in folders, at any depth: an identity is the path of the folder, relative to the root."""

    def __init__(self, spec: SourceSpec) -> None:
        self._listing = look_through(spec.uri, IMAGE_EXTENSIONS, "images")
        lone = next((name for name in self._listing.names if not _identity(name)), None)
        if lone is not None:
            raise SourceError(
                f"{self._listing.uri(lone)}: an image beside the folders: whose is it? Expected: <identity>/<image>"
            )

    @staticmethod
    def recognises(place: Place) -> bool:
        """A folder with folders of images."""
        return not place.is_file and has_image_below(place)

    def parts(self, part_bytes: int) -> list[Part]:
        """Runs of files, sorted by path."""
        names, sizes = self._listing.names, self._listing.sizes
        return [
            _Images(
                root=self._listing.root, names=names[run.start : run.stop], num_bytes=sum(sizes[run.start : run.stop])
            )
            for run in cut(list(sizes), part_bytes)
        ]

    def version(self) -> dict[str, Any]:
        """Paths, sizes and times of change of all files."""
        return {"files": self._listing.digest}

    def describe(self) -> dict[str, Any]:
        """Counts and size."""
        return {
            "format": "folder",
            "num_files": len(self._listing.names),
            "num_bytes": sum(self._listing.sizes),
            "num_other_files": self._listing.num_others,
        }


def _identity(name: str) -> str:
    return name.rpartition("/")[0]
