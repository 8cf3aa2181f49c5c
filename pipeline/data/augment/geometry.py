"""Operations on where pixels are: mirror, crop in place, loss of resolution, rotation with scale and shift."""

# Shape legend: M = images, K = draws per image

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np

from pipeline.data.augment.draws import between
from pipeline.data.augment.operation import Operation, rows

CROP_SCALE: Final = (0.2, 1.0)
CROP_RATIO: Final = (3 / 4, 4 / 3)
CROP_ATTEMPTS: Final = 10
SIDE_RATIO: Final = (0.2, 1.0)
INTERPOLATIONS: Final = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)

WARP_SCALE: Final = (0.8, 1.2)
WARP_EXTRA_SHIFT: Final = 0.1
WARP_ROTATED: Final = 0.2
WARP_DEGREES: Final = 20.0


def mirror(image: np.ndarray) -> None:
    """Left to right."""
    cv2.flip(image, 1, dst=image)


def crop_boxes(draws_MK: np.ndarray, side: int) -> np.ndarray:
    """Boxes (top, left, height, width) [M, 4] as torchvision's RandomResizedCrop.get_params draws them.

    Columns: position down and across, then (area, ratio) of ten attempts.
    """
    sizes = draws_MK[:, 2:].reshape(len(draws_MK), CROP_ATTEMPTS, 2)
    area = side * side * between(*CROP_SCALE, sizes[..., 0])
    ratio = np.exp(between(np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1]), sizes[..., 1]))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first, attempt = fits.argmax(axis=1), np.arange(len(draws_MK))
    # Ten misses fall back to the whole image: its ratio of 1 lies within the bounds.
    height = np.where(fits.any(axis=1), height[attempt, first], side)
    width = np.where(fits.any(axis=1), width[attempt, first], side)
    top = np.floor(draws_MK[:, 0] * (side - height + 1))
    left = np.floor(draws_MK[:, 1] * (side - width + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.int64)


def keep_box(image: np.ndarray, top: int, left: int, height: int, width: int) -> None:
    """Keep a box at its place; everything outside becomes black."""
    image[:top] = 0
    image[top + height :] = 0
    image[top : top + height, :left] = 0
    image[top : top + height, left + width :] = 0


def lower_resolution(image: np.ndarray, small: int, down: int, up: int) -> None:
    """Shrink to `small` pixels a side and enlarge back, each with its own interpolation."""
    shrunk = cv2.resize(image, (small, small), interpolation=down)
    cv2.resize(shrunk, (image.shape[1], image.shape[0]), dst=image, interpolation=up)


def plan_resolution(draws_M3: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Sides (22..111 of 112) and two of five interpolations."""
    small = np.maximum((between(*SIDE_RATIO, draws_M3[:, 0]) * side).astype(np.int64), 1)
    which = (draws_M3[:, 1:] * len(INTERPOLATIONS)).astype(np.int64)
    methods = np.array(INTERPOLATIONS)[which]
    return rows(small, methods[:, 0], methods[:, 1])


def warp(image: np.ndarray, matrix: np.ndarray) -> None:
    """Resample once, bilinear, by a matrix [2, 3] from old to new coordinates; black comes in from outside."""
    np.copyto(image, cv2.warpAffine(image, matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR))


def plan_warp(draws_M6: np.ndarray, side: int) -> list[tuple[np.ndarray]]:
    """Scale and rotation about the centre, then a shift, in one matrix [2, 3] for each image.

    A shrunk image may lie anywhere in the frame and an enlarged one may show any part of itself; the extra shift takes
    up to a tenth of the half side more.
    """
    scale, extra = between(*WARP_SCALE, draws_M6[:, 0]), draws_M6[:, 1] * WARP_EXTRA_SHIFT
    room = (1 - scale + scale * extra) * side / 2
    shift_M2 = between(-1.0, 1.0, draws_M6[:, 2:4]) * room[:, None]
    degrees = np.where(draws_M6[:, 4] < WARP_ROTATED, between(-WARP_DEGREES, WARP_DEGREES, draws_M6[:, 5]), 0.0)
    cos, sin = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    centre = (side - 1) / 2
    turn = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)
    offset = centre + shift_M2 - turn.sum(axis=2) * centre
    return [(matrix,) for matrix in np.concatenate([turn, offset[..., None]], axis=2)]


FLIP: Final = Operation(
    name="flip",
    gate=0,
    columns=(),
    plan=lambda draws, side: [()] * len(draws),
    apply=mirror,
    ranges="left to right",
    source="AdaFace",
)
CROP: Final = Operation(
    name="crop",
    gate=1,
    columns=(4, 5, *range(13, 33)),
    plan=lambda draws, side: crop_boxes(draws, side).tolist(),
    apply=keep_box,
    ranges=f"keeps {CROP_SCALE[0]:.0%} to {CROP_SCALE[1]:.0%} of the area, sides 3:4 to 4:3, at its place on black",
    source="AdaFace (crop)",
)
LOW_RESOLUTION: Final = Operation(
    name="low resolution",
    gate=2,
    columns=(6, 7, 8),
    plan=plan_resolution,
    apply=lower_resolution,
    ranges=f"to {SIDE_RATIO[0]:g} to {SIDE_RATIO[1]:g} of the side and back, each by one of five interpolations",
    source="AdaFace (low-res)",
)
WARP: Final = Operation(
    name="warp",
    gate=33,
    columns=tuple(range(34, 40)),
    plan=plan_warp,
    apply=warp,
    ranges=(
        f"scale {WARP_SCALE[0]:g} to {WARP_SCALE[1]:g}; {WARP_ROTATED:.0%} of the images rotated by up to "
        f"{WARP_DEGREES:g} degrees; shifted within the room that the scale leaves and up to {WARP_EXTRA_SHIFT:.0%} of "
        "the half side more"
    ),
    source="CVLface gridsample_v1",
)
