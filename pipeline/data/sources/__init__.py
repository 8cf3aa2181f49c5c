"""Where training faces come from before they are packed: one protocol (`base.Source`), one file per kind of source.

A new kind is a file beside these and a line in `SOURCES`.
"""

from __future__ import annotations

from typing import Any, Final

from lgaf.config import require_choice
from pipeline import storage
from pipeline.data import manifest
from pipeline.data.sources.archives import ArchiveSource
from pipeline.data.sources.base import Place, Source, SourceError, SourceSpec, SyntheticConfig
from pipeline.data.sources.folder import FolderSource
from pipeline.data.sources.list_file import ListSource
from pipeline.data.sources.recordio import RecordIOSource
from pipeline.data.sources.rendered import SyntheticSource
from pipeline.data.sources.tables import TableSource
from pipeline.data.sources.webdataset import WebDatasetSource

__all__ = ["FORMATS", "PACKED", "SOURCES", "SYNTHETIC", "Source", "SourceError", "SourceSpec", "SyntheticConfig"]

SYNTHETIC: Final = "synthetic"
PACKED: Final = "packed"

# In the order in which `detect_format` asks them.
SOURCES: Final[dict[str, type[Any]]] = {
    SYNTHETIC: SyntheticSource,
    "recordio": RecordIOSource,
    "webdataset": WebDatasetSource,
    "archives": ArchiveSource,
    "tables": TableSource,
    "list": ListSource,
    "folder": FolderSource,
}
FORMATS: Final = tuple(SOURCES)


def open_source(spec: SourceSpec) -> Source:
    """Open a source.

    Raises:
        StorageError: It is not there.
        SourceError: It is damaged, or holds no images.
        ValueError: ``spec.format`` is none of `FORMATS`.
    """
    require_choice("format", spec.format, FORMATS)
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
        raise storage.MissingError(f"{storage.normalise(uri)}: does not exist")
    place = _look_at(uri)
    if manifest.NAME in place.files:
        return PACKED
    for name, source in SOURCES.items():
        if source.recognises(place):
            return name
    raise storage.StorageError(
        f"{place.uri}: holds no data set that is known: neither {manifest.NAME} (packed shards) nor one of: train.rec "
        "(an InsightFace pack), tars of <key>.jpg and <key>.cls (WebDataset), zips or tars of folders, Parquet or "
        "Arrow files, a list file, folders of images by person. Where names do not say it, jobs/pack_dataset.py "
        "has --format"
    )


def _look_at(uri: str) -> Place:
    place = storage.normalise(uri)
    files, folders = storage.list_folder(place)
    if files is None:
        return Place(uri=place, is_file=True, files=(), folders=())
    return Place(uri=place, is_file=False, files=files, folders=folders)
