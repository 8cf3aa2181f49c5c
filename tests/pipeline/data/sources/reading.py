"""Reading a source as packing does: in parts, each of which has travelled by pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.data.sources import Source, SourceSpec, open_source
from pipeline.data.sources.base import RawSample


def opened(source_format: str, place: Path | str, **options: Any) -> Source:
    return open_source(SourceSpec(format=source_format, uri=str(place), **options))


def read(source: Source, part_bytes: int = 10_000) -> list[RawSample]:
    return [sample for part in pickle.loads(pickle.dumps(source.parts(part_bytes))) for sample in part.samples()]


def pairs(source: Source, part_bytes: int = 10_000) -> list[tuple[str, bytes]]:
    """Identity and image of each sample."""
    return [(sample.identity, sample.image) for sample in read(source, part_bytes)]


def uri(path: Path) -> str:
    return storage.normalise(path)
