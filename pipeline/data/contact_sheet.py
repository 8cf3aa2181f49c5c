"""Sheets of faces: what a data set looks like, and whether the images of a person show that person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.images import decode_rgb, fitted
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Shard, read_shard

COLUMNS: Final = 8
RANDOM_FACES: Final = 64
PEOPLE: Final = 6
# What is read to find people with several images: one shard at a time is in memory.
READ_BYTES: Final = 256 << 20
# Faces are photographs: as PNG a sheet takes 1.5 MB.
QUALITY: Final = 75
_GAP: Final = 4  # pixels between faces
_CAPTION: Final = 24  # pixels of a line of text
_CAPTION_CHARACTERS: Final = 90
_BLANK: Final = 208  # grey of a face that cannot be decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Faces:
    """Encoded images for the sheets.

    Attributes:
        random: The first ones of the set, which packing has shuffled.
        people: Labels with several images each, most first.
    """

    random: list[bytes]
    people: list[tuple[int, list[bytes]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a sheet: up to `COLUMNS` encoded images below a line of text, where there is one."""

    images: Sequence[bytes]
    caption: str = ""


def choose_faces(manifest: Manifest) -> Faces:
    """Take the first faces, and the people that occur most often in the first shards.

    Raises:
        StorageError: A shard cannot be read.
        ShardError: A shard is not what the manifest says.
    """
    random: list[bytes] = []
    places: dict[int, list[tuple[int, int]]] = {}  # label -> (shard, row); in random order, as the samples are
    met: Counter[int] = Counter()
    read = number = 0
    while number < len(manifest.shards) and (read < READ_BYTES or len(random) < RANDOM_FACES):
        shard = _read(manifest, number)
        random += shard.images[: RANDOM_FACES - len(random)]
        for row, label in enumerate(shard.labels.tolist()):
            met[label] += 1
            if met[label] <= COLUMNS:
                places.setdefault(label, []).append((number, row))
        read += manifest.shards[number].num_bytes
        number += 1
        if len(random) == RANDOM_FACES and sum(count >= COLUMNS for count in met.values()) >= PEOPLE:
            break
    chosen = [label for label in sorted(places, key=lambda label: -len(places[label]))[:PEOPLE] if met[label] > 1]
    faces: dict[int, list[bytes]] = {label: [] for label in chosen}
    for number in sorted({number for label in chosen for number, _ in places[label]}):
        shard = _read(manifest, number)
        for label in chosen:
            faces[label] += [shard.images[row] for place, row in places[label] if place == number]
    return Faces(random=random, people=list(faces.items()))


def _read(manifest: Manifest, number: int) -> Shard:
    return read_shard(manifest.shard_uri(number), manifest.shards[number], manifest.num_classes)


def in_rows(images: Sequence[bytes]) -> list[Row]:
    """Images as rows of `COLUMNS`."""
    return [Row(images=images[first : first + COLUMNS]) for first in range(0, len(images), COLUMNS)]


def contact_sheet(rows: Sequence[Row], side: int) -> bytes:
    """Draw rows of faces as a JPEG.

    Args:
        rows: At least one. An image that cannot be decoded is a crossed grey square.
        side: Pixels of each side of a face; images of other sizes are made to fit.
    """
    columns = COLUMNS if any(row.caption for row in rows) else max(len(row.images) for row in rows)
    heights = [side + _GAP + (_CAPTION if row.caption else 0) for row in rows]
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 14)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        if row.caption:
            draw.text((_GAP, top + _CAPTION // 2), _printable(row.caption), fill="black", font=font, anchor="lm")
        for column, encoded in enumerate(row.images):
            left = _GAP + column * (side + _GAP)
            sheet.paste(Image.fromarray(_face(encoded, side)), (left, top + height - side - _GAP))
        top += height
    return bytes(simplejpeg.encode_jpeg(np.asarray(sheet), QUALITY, "RGB", "420"))


def _face(encoded: bytes, side: int) -> np.ndarray:
    try:
        return fitted(decode_rgb(encoded), (side, side), resize=True)
    except ValueError:
        blank = np.full((side, side, 3), _BLANK, np.uint8)
        diagonal = np.arange(side)
        blank[diagonal, diagonal] = blank[diagonal, side - 1 - diagonal] = 0
        return blank


def _printable(text: str) -> str:
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return shown if len(shown) <= _CAPTION_CHARACTERS else shown[: _CAPTION_CHARACTERS - 1] + "…"
