"""Operations of the lens and of movement: motion blur, defocus, Gaussian and box blur."""

# Shape legend: M = images, K = draws per image

from __future__ import annotations

import functools
from typing import Any, Final

import cv2
import numpy as np

from pipeline.data.augment.draws import between, whole
from pipeline.data.augment.operation import Operation, rows

MOTION_PX: Final = (3.0, 18.0)
DEFOCUS_PX: Final = (1.0, 4.0)
GAUSSIAN_SIGMA_PX: Final = (0.0, 4.0)
BOX_PX: Final = (1, 9)
# Steps of the drawn parameters, so that few kernels are made and each is made once.
_MOTION_STEPS: Final = 30
_DIRECTIONS: Final = 36
_DEFOCUS_STEPS: Final = 24
# OpenCV filters kernels above 11x11 by a Fourier transform, 50 times slower for one as thin as a line.
_RADIUS: Final = 5


def _splat(offsets: np.ndarray, direction: float) -> np.ndarray:
    """Equal weights at offsets along a direction (radians), each spread over its four neighbours: [11, 11], sum 1."""
    kernel = np.zeros((2 * _RADIUS + 1, 2 * _RADIUS + 1), np.float64)
    for x, y in zip(_RADIUS + offsets * np.cos(direction), _RADIUS + offsets * np.sin(direction), strict=True):
        column, row = min(int(x), 2 * _RADIUS - 1), min(int(y), 2 * _RADIUS - 1)
        across, down = np.array([1 - (x - column), x - column]), np.array([1 - (y - row), y - row])
        kernel[row : row + 2, column : column + 2] += np.outer(down, across)
    return np.asarray(kernel / kernel.sum(), np.float32)


@functools.cache
def motion_kernels(step: int, direction: int) -> tuple[np.ndarray, np.ndarray]:
    """Two kernels [11, 11] that one after the other average along a line: half the line, and two points half apart."""
    length = between(*MOTION_PX, np.array(step / (_MOTION_STEPS - 1))).item()
    radians = np.pi * direction / _DIRECTIONS
    half = np.linspace(-length / 4, length / 4, 41)
    return _splat(half, radians), _splat(np.array([-length / 4, length / 4]), radians)


def blur_motion(image: np.ndarray, step: int, direction: int) -> None:
    """The average along a line, as of a camera that moves during the exposure."""
    half, pair = motion_kernels(step, direction)
    moved = cv2.filter2D(image, -1, half, borderType=cv2.BORDER_REPLICATE)
    cv2.filter2D(moved, -1, pair, dst=image, borderType=cv2.BORDER_REPLICATE)


def plan_motion(draws_M2: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """One of 30 lengths and one of 36 directions."""
    del side  # lengths are in pixels, as the paper's motion blur is
    return rows(whole(0, _MOTION_STEPS - 1, draws_M2[:, 0]), whole(0, _DIRECTIONS - 1, draws_M2[:, 1]))


@functools.cache
def disc_kernel(step: int) -> np.ndarray:
    """A disc [11, 11] with a soft edge, sum 1."""
    radius = between(*DEFOCUS_PX, np.array(step / (_DEFOCUS_STEPS - 1)))
    axis = np.arange(-_RADIUS, _RADIUS + 1)
    inside = np.clip(radius + 0.5 - np.hypot(axis[:, None], axis[None]), 0, 1)
    return np.asarray(inside / inside.sum(), np.float32)


def blur_defocus(image: np.ndarray, step: int) -> None:
    """The average over a disc, as of a lens out of focus."""
    cv2.filter2D(image.copy(), -1, disc_kernel(step), dst=image, borderType=cv2.BORDER_REPLICATE)


def plan_defocus(draws_M1: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """One of 24 radii."""
    del side  # in pixels
    return rows(whole(0, _DEFOCUS_STEPS - 1, draws_M1[:, 0]))


def blur_gaussian(image: np.ndarray, sigma: float) -> None:
    """Gaussian blur; a deviation too small to reach a neighbour leaves the image."""
    reach = round(3 * sigma)
    if reach:
        cv2.GaussianBlur(image, (2 * reach + 1,) * 2, sigma, dst=image)


def blur_box(image: np.ndarray, width: int) -> None:
    """The average over a square of `width` pixels a side."""
    cv2.blur(image, (width, width), dst=image)


MOTION: Final = Operation(
    name="motion blur",
    gate=105,
    columns=(106, 107),
    plan=plan_motion,
    apply=blur_motion,
    ranges=f"{MOTION_PX[0]:g} to {MOTION_PX[1]:g} pixels, any direction",
    source="this project; lengths cover the paper's 6, 12, 18",
)
DEFOCUS: Final = Operation(
    name="defocus",
    gate=108,
    columns=(109,),
    plan=plan_defocus,
    apply=blur_defocus,
    ranges=f"a disc of radius {DEFOCUS_PX[0]:g} to {DEFOCUS_PX[1]:g} pixels",
    source="this project",
)
GAUSSIAN: Final = Operation(
    name="Gaussian blur",
    gate=110,
    columns=(111,),
    plan=lambda draws, side: rows(between(*GAUSSIAN_SIGMA_PX, draws[:, 0])),
    apply=blur_gaussian,
    ranges=f"deviation {GAUSSIAN_SIGMA_PX[0]:g} to {GAUSSIAN_SIGMA_PX[1]:g} pixels",
    source="CVLface gridsample_v1 (blur)",
)
BOX: Final = Operation(
    name="box blur",
    gate=112,
    columns=(113,),
    plan=lambda draws, side: rows(whole(*BOX_PX, draws[:, 0])),
    apply=blur_box,
    ranges=f"a square of {BOX_PX[0]} to {BOX_PX[1]} pixels",
    source="CVLface gridsample_v1 (blur)",
)
