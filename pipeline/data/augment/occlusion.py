"""Operations that hide a part of the face.

Places on the face are of the 112x112 template that aligned crops follow (ArcFace's: eyes at (38, 52) and (74, 52), nose
at (56, 72), mouth corners at (42, 92) and (71, 92)), and scale with the side.
"""

# Shape legend: M = images, K = draws per image

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np

from pipeline.data.augment.draws import TILE_MARGIN, between, noise_tile, whole
from pipeline.data.augment.operation import Operation, rows

ERASED_AREA: Final = (0.02, 0.4)
ERASED_RATIO: Final = (0.3, 1 / 0.3)
HOLES: Final = (12, 20)
HOLE_SIDE: Final = 16
TEMPLATE_SIDE: Final = 112
MASK_TOP: Final = (62.0, 78.0)
MASK_SINK: Final = (2.0, 14.0)
MASK_EDGE: Final = (6.0, 22.0)
LENS_WIDTH: Final = (12.0, 19.0)
LENS_HEIGHT: Final = (8.0, 15.0)
LENS_SHIFT: Final = (-4.0, 4.0)
LENS_BRIGHTNESS: Final = (0, 80)
_LENS_CENTRES: Final = ((38.0, 52.0), (74.0, 52.0))
_SUBPIXEL_BITS: Final = 4

Colour = tuple[int, int, int]


def _colours(draws_M3: np.ndarray) -> list[Colour]:
    return [(r, g, b) for r, g, b in whole(0, 255, draws_M3).tolist()]


def erase(image: np.ndarray, box: tuple[int, int, int, int], noise: tuple[int, int] | None, colour: Colour) -> None:
    """Cover a box (top, left, height, width) by one colour, or by noise around it, taken at an offset of the tile."""
    top, left, height, width = box
    if noise is None:
        image[top : top + height, left : left + width] = colour
        return
    tile = noise_tile(image.shape[0])
    patch = tile[top + noise[0] : top + noise[0] + height, left + noise[1] : left + noise[1] + width]
    image[top : top + height, left : left + width] = np.clip(patch * 64 + np.array(colour, np.float32), 0, 255)


def plan_erase(draws_M9: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Boxes by area and ratio, cut to the image's side; half are filled by a colour, half by noise."""
    area = between(*ERASED_AREA, draws_M9[:, 0]) * side * side
    ratio = np.exp(between(np.log(ERASED_RATIO[0]), np.log(ERASED_RATIO[1]), draws_M9[:, 1]))
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, side)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, side)
    top = np.floor(draws_M9[:, 2] * (side - height + 1))
    left = np.floor(draws_M9[:, 3] * (side - width + 1))
    boxes = np.stack([top, left, height, width], axis=1).astype(np.int64).tolist()
    # One draw decides between the fills and, stretched, gives the first offset.
    noisy = draws_M9[:, 4] < 0.5
    offsets = np.stack([draws_M9[:, 4] * 2 % 1, draws_M9[:, 5]], axis=1)
    places = (offsets * TILE_MARGIN).astype(np.int64).tolist()
    noise = [tuple(place) if use else None for place, use in zip(places, noisy, strict=True)]
    return rows([tuple(box) for box in boxes], noise, _colours(draws_M9[:, 6:9]))


def cut_holes(image: np.ndarray, places: np.ndarray, hole: int) -> None:
    """Blacken squares of `hole` pixels whose corners (top, left) are the places [.., 2]."""
    for top, left in places.tolist():
        image[top : top + hole, left : left + hole] = 0


def plan_holes(draws_MK: np.ndarray, side: int) -> list[tuple[np.ndarray, int]]:
    """12 to 20 squares of a seventh of the side, anywhere inside the image."""
    hole = max(round(HOLE_SIDE * side / TEMPLATE_SIDE), 1)
    counts = whole(*HOLES, draws_MK[:, 0]).tolist()
    places = np.floor(draws_MK[:, 1:].reshape(len(draws_MK), HOLES[1], 2) * (side - hole + 1)).astype(np.int64)
    return [(of_image[:count], hole) for of_image, count in zip(places, counts, strict=True)]


def _fill(image: np.ndarray, corners: np.ndarray, colour: Colour) -> None:
    points = np.rint(corners * (image.shape[0] / TEMPLATE_SIDE * 2**_SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(image, [points], colour, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)


def cover_mouth(image: np.ndarray, top: float, sink: float, left: float, right: float, colour: Colour) -> None:
    """A mask from the nose down: its upper edge is highest at the nose and sinks towards the cheeks."""
    centre, end = TEMPLATE_SIDE / 2, TEMPLATE_SIDE
    corners = np.array(
        [
            (left, top + sink),
            (centre, top),
            (end - right, top + sink),
            (end - right - 2, end - 16),
            (centre + 18, end),
            (centre - 18, end),
            (left + 2, end - 16),
        ]
    )
    _fill(image, corners, colour)


def plan_mask(draws_M7: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Upper edge, how far it sinks, both side edges, colour."""
    del side  # the edges are in pixels of the template
    ranges = (MASK_TOP, MASK_SINK, MASK_EDGE, MASK_EDGE)
    edges = [between(low, high, draws_M7[:, column]) for column, (low, high) in enumerate(ranges)]
    return rows(*edges, _colours(draws_M7[:, 4:7]))


def cover_eyes(image: np.ndarray, width: float, height: float, shift: float, brightness: int) -> None:
    """Sunglasses: two lenses of half axes (width, height) and a bridge, all of one grey."""
    scale = image.shape[0] / TEMPLATE_SIDE * 2**_SUBPIXEL_BITS
    colour = (brightness,) * 3
    for x, y in _LENS_CENTRES:
        centre = (round(x * scale), round((y + shift) * scale))
        axes = (round(width * scale), round(height * scale))
        cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    (x0, y0), (x1, y1) = _LENS_CENTRES
    bridge = np.array([(x0, y0 - 3), (x1, y1 - 3), (x1, y1 + 1), (x0, y0 + 1)])
    _fill(image, bridge + np.array([0, shift]), colour)


def plan_sunglasses(draws_M4: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Half axes and height of the lenses, and how dark they are."""
    del side  # in pixels of the template
    ranges = (LENS_WIDTH, LENS_HEIGHT, LENS_SHIFT)
    sizes = [between(low, high, draws_M4[:, column]) for column, (low, high) in enumerate(ranges)]
    return rows(*sizes, whole(*LENS_BRIGHTNESS, draws_M4[:, 3]))


ERASE: Final = Operation(
    name="erase",
    gate=40,
    columns=tuple(range(41, 50)),
    plan=plan_erase,
    apply=erase,
    ranges=(
        f"a box of {ERASED_AREA[0]:.0%} to {ERASED_AREA[1]:.0%} of the area, height to width {ERASED_RATIO[0]:.1f} to "
        f"{ERASED_RATIO[1]:.1f}, cut to the image; a random colour or noise"
    ),
    source="random erasing, arXiv 1708.04896",
)
HOLES_CUT: Final = Operation(
    name="holes",
    gate=50,
    columns=tuple(range(51, 52 + 2 * HOLES[1])),
    plan=plan_holes,
    apply=cut_holes,
    ranges=f"{HOLES[0]} to {HOLES[1]} black squares of {HOLE_SIDE} pixels",
    source="CVLface gridsample_v1 (cutout)",
)
MASK: Final = Operation(
    name="mask",
    gate=92,
    columns=tuple(range(93, 100)),
    plan=plan_mask,
    apply=cover_mouth,
    ranges=f"from row {MASK_TOP[0]:g} to {MASK_TOP[1]:g} of 112 down to the chin, any colour",
    source="this project",
)
SUNGLASSES: Final = Operation(
    name="sunglasses",
    gate=100,
    columns=tuple(range(101, 105)),
    plan=plan_sunglasses,
    apply=cover_eyes,
    ranges=(
        f"lenses of {2 * LENS_WIDTH[0]:g} to {2 * LENS_WIDTH[1]:g} by {2 * LENS_HEIGHT[0]:g} to "
        f"{2 * LENS_HEIGHT[1]:g} pixels of 112, grey {LENS_BRIGHTNESS[0]} to {LENS_BRIGHTNESS[1]}"
    ),
    source="this project",
)
