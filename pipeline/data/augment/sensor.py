"""Operations of the sensor and of storage: noise and JPEG."""

# Shape legend: M = images, K = draws per image

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np
import simplejpeg

from pipeline.data.augment.draws import TILE_MARGIN, between, noise_tile, whole
from pipeline.data.augment.operation import Operation, rows

NOISE_DEVIATION: Final = (2.0, 20.0)
QUALITY: Final = (20, 90)
CHAIN_SIDE: Final = (0.3, 0.8)
CHAIN_QUALITY: Final = (5, 40)


def add_noise(image: np.ndarray, deviation: float, down: int, right: int) -> None:
    """Add near-normal noise, a part of the fixed tile from (down, right) on."""
    height, width = image.shape[:2]
    noise = noise_tile(image.shape[0])[down : down + height, right : right + width]
    np.copyto(image, np.clip(np.rint(image + noise * np.float32(deviation)), 0, 255), casting="unsafe")


def plan_noise(draws_M3: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Deviation, and one of 1,024 offsets in the tile."""
    del side  # the tile is larger than any image by its margin
    offsets = whole(0, TILE_MARGIN - 1, draws_M3[:, 1:])
    return rows(between(*NOISE_DEVIATION, draws_M3[:, 0]), offsets[:, 0], offsets[:, 1])


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    encoded = simplejpeg.encode_jpeg(image, quality, "RGB", "420", fastdct=False)
    return np.asarray(simplejpeg.decode_jpeg(encoded, "RGB"))


def recompress(image: np.ndarray, quality: int) -> None:
    """Through JPEG with halved colour resolution (4:2:0), as most cameras and web sites store it."""
    np.copyto(image, _through_jpeg(image, quality))


def degrade(image: np.ndarray, small: int, quality: int) -> None:
    """Shrink, compress hard, enlarge: a small face cut from a poor recording."""
    shrunk = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
    restored = _through_jpeg(shrunk, quality)
    cv2.resize(restored, (image.shape[1], image.shape[0]), dst=image, interpolation=cv2.INTER_LINEAR)


def plan_chain(draws_M2: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Sides and qualities."""
    small = np.maximum((between(*CHAIN_SIDE, draws_M2[:, 0]) * side).astype(np.int64), 1)
    return rows(small, whole(*CHAIN_QUALITY, draws_M2[:, 1]))


NOISE: Final = Operation(
    name="noise",
    gate=114,
    columns=(115, 116, 117),
    plan=plan_noise,
    apply=add_noise,
    ranges=f"deviation {NOISE_DEVIATION[0]:g} to {NOISE_DEVIATION[1]:g} of 255",
    source="this project",
)
RECOMPRESS: Final = Operation(
    name="JPEG",
    gate=118,
    columns=(119,),
    plan=lambda draws, side: rows(whole(*QUALITY, draws[:, 0])),
    apply=recompress,
    ranges=f"quality {QUALITY[0]} to {QUALITY[1]}, 4:2:0",
    source="this project",
)
LOW_QUALITY: Final = Operation(
    name="low quality",
    gate=120,
    columns=(121, 122),
    plan=plan_chain,
    apply=degrade,
    ranges=(
        f"to {CHAIN_SIDE[0]:g} to {CHAIN_SIDE[1]:g} of the side, JPEG of quality {CHAIN_QUALITY[0]} to "
        f"{CHAIN_QUALITY[1]}, back"
    ),
    source="this project",
)
