"""Brightness, contrast and saturation in Pillow's arithmetic, bit for bit, without Pillow.

Pillow (`ImageEnhance`) moves each value x away from a degenerate one d by a factor f: ``d + f * (x - d)`` in float32,
cut off at 0 and 255 and truncated. d is 0 for brightness, the mean grey for contrast, the pixel's grey for saturation.
"""

# Shape legend: H, W = sides of an image, M = images

from __future__ import annotations

import threading
from typing import Final

import cv2
import numpy as np

from pipeline.data.augment.draws import between
from pipeline.data.augment.operation import Operation

FACTOR: Final = (0.5, 1.5)
BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
ORDERS: Final = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

# Pillow's fixed-point grey, (19595 r + 38470 g + 7471 b + 2^15) >> 16. Every sum has at most 24 bits, so float32
# holds it exactly in whichever order it is added up.
_GREY: Final = np.array([[19595, 38470, 7471, 2**15]], np.float32) / 2**16

# OpenCV's addWeighted rounds to nearest where Pillow truncates; a bias of almost -1/2 makes one the other. The float32
# sums of both stay within 2^-14 of the true value for factors below 2. So they agree unless the true value lies less
# than 2^-12 away from a whole number without being one: the bias keeps 2^-13 of that on either side.
_BIAS: Final = 2.0**-13 - 0.5
_TOO_NEAR: Final = 2.0**-12


class _Scratch(threading.local):
    """Buffers of one image, kept: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self.pixels = np.empty((0, 0, 3), np.float32)

    def fit(self, shape: tuple[int, ...]) -> _Scratch:
        if self.pixels.shape != shape:
            self.pixels = np.empty(shape, np.float32)
            self.sums = np.empty(shape[:2], np.float32)
            self.grey = np.empty(shape[:2], np.uint8)
            self.greys = np.empty(shape, np.uint8)
        return self


_scratch = _Scratch()


def grey(image: np.ndarray) -> np.ndarray:
    """Pillow's "L" of an image [H, W, 3], uint8 [H, W]: a buffer of this thread, until the next call."""
    scratch = _scratch.fit(image.shape)
    np.copyto(scratch.pixels, image)
    cv2.transform(scratch.pixels, _GREY, dst=scratch.sums)
    np.copyto(scratch.grey, scratch.sums, casting="unsafe")
    return scratch.grey


def exact_blend(values: np.ndarray, degenerate: np.ndarray, factor: float) -> np.ndarray:
    """Pillow's blend of uint8 arrays as it is written, in float32: what every shorter way has to equal."""
    start = degenerate.astype(np.float32)
    moved = start + np.float32(factor) * (values.astype(np.float32) - start)
    return np.clip(moved, 0, 255).astype(np.uint8)


def can_round(factors: np.ndarray) -> np.ndarray:
    """Whether OpenCV's rounding blend equals Pillow's for float32 factors in [0, 2), whatever the pixels are.

    x - d is a whole number of -255..255, so it depends on 255 products alone.
    """
    products = factors[..., None] * np.arange(1.0, 256.0)
    distance = np.abs(products - np.rint(products))
    return np.asarray(((distance == 0) | (distance > _TOO_NEAR)).all(axis=-1))


def blend_constant(image: np.ndarray, degenerate: int, factor: float, rounding: bool) -> None:
    """Move an image's values away from one value, in place; `rounding` as `can_round` says of the factor."""
    if rounding:
        cv2.addWeighted(image, factor, image, 0.0, degenerate * (1 - factor) + _BIAS, dst=image)
    else:
        table = exact_blend(np.arange(256), np.full(256, degenerate), factor)
        cv2.LUT(image, table, dst=image)


def blend_grey(image: np.ndarray, grey_HW: np.ndarray, factor: float, rounding: bool) -> None:
    """Move an image's pixels away from their grey, in place; `rounding` as `can_round` says of the factor."""
    if rounding:
        greys = cv2.cvtColor(grey_HW, cv2.COLOR_GRAY2RGB, dst=_scratch.fit(image.shape).greys)
        cv2.addWeighted(image, factor, greys, 1 - factor, _BIAS, dst=image)
    else:
        np.copyto(image, exact_blend(image, grey_HW[..., None], factor))


def enhance(image: np.ndarray, which: int, factor: float, rounding: bool) -> None:
    """Brightness, contrast or saturation of an image [H, W, 3] by a float32 factor, in place."""
    if which == BRIGHTNESS:
        blend_constant(image, 0, factor, rounding)
    elif which == CONTRAST:
        mean = cv2.sumElems(grey(image))[0] / (image.shape[0] * image.shape[1])
        blend_constant(image, int(mean + 0.5), factor, rounding)
    else:
        blend_grey(image, grey(image), factor, rounding)


def jitter(image: np.ndarray, changes: tuple[tuple[int, float, bool], ...]) -> None:
    """Apply changes (which, factor, rounding) to an image, in their order and in place."""
    for which, factor, rounding in changes:
        enhance(image, which, factor, rounding)


def plan_jitter(draws_M4: np.ndarray, side: int) -> list[tuple[tuple[tuple[int, float, bool], ...]]]:
    """Three factors in [0.5, 1.5) and one of six orders, as torchvision's ColorJitter draws them."""
    factors_M3 = between(*FACTOR, draws_M4[:, :3]).astype(np.float32).astype(np.float64)
    changes = zip(factors_M3.tolist(), can_round(factors_M3).tolist(), strict=True)
    orders = (draws_M4[:, 3] * len(ORDERS)).astype(np.int64).tolist()
    return [
        (tuple((which, factors[which], rounding[which]) for which in ORDERS[order]),)
        for (factors, rounding), order in zip(changes, orders, strict=True)
    ]


JITTER: Final = Operation(
    name="jitter",
    gate=3,
    columns=(9, 10, 11, 12),
    plan=plan_jitter,
    apply=jitter,
    ranges=f"brightness, contrast, saturation each x {FACTOR[0]:g} to {FACTOR[1]:g}, in random order",
    source="AdaFace (photometric)",
)
