"""Training augmentations, drawn from (seed, epoch, sample index): not from workers, batches or order.

`adaface` is the AdaFace repository's, which the paper uses: three independent draws of 0.2 (crop pasted back at its
place on black, down and up in resolution, photometric), then a horizontal flip of 0.5.
"""

# Shape legend: N = samples of a block, H, W = 112, K = draws per sample

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import cv2
import numpy as np
from PIL import Image, ImageEnhance

PROBABILITY: Final = 0.2
CROP_SCALE: Final = (0.2, 1.0)
CROP_LOG_RATIO: Final = (np.log(3 / 4), np.log(4 / 3))
CROP_ATTEMPTS: Final = 10
SIDE_RATIO: Final = (0.2, 1.0)
FACTOR: Final = (0.5, 1.5)
INTERPOLATIONS: Final = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
ENHANCERS: Final = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
ORDERS: Final = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

# Columns of the table of draws
FLIP, CROP, LOW_RES, PHOTOMETRIC = 0, 1, 2, 3
CROP_POSITION, SIDE, INTERPOLATION, FACTORS, ORDER, CROP_SIZE = 4, 6, 7, 9, 12, 13
NUM_DRAWS: Final = CROP_SIZE + 2 * CROP_ATTEMPTS

Augmentation = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]


def uniform_draws(seed: int, epoch_N: np.ndarray, index_N: np.ndarray) -> np.ndarray:
    """Numbers [N, K] in [0, 1), a pure function of (seed, epoch, index, column): SplitMix64 as a counter hash."""
    with np.errstate(over="ignore"):
        key_1 = _mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        key_N = _mix(_mix(key_1 ^ epoch_N.astype(np.uint64)) ^ index_N.astype(np.uint64))
        columns_K = np.arange(1, NUM_DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits_NK = _mix(key_N[:, None] + columns_K[None])
    return (bits_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))


def crop_boxes(draws_NK: np.ndarray, side: int) -> np.ndarray:
    """Boxes (top, left, height, width) [N, 4] as torchvision's RandomResizedCrop.get_params draws them."""
    sizes = draws_NK[:, CROP_SIZE:].reshape(len(draws_NK), CROP_ATTEMPTS, 2)
    area = side * side * (CROP_SCALE[0] + sizes[..., 0] * (CROP_SCALE[1] - CROP_SCALE[0]))
    ratio = np.exp(CROP_LOG_RATIO[0] + sizes[..., 1] * (CROP_LOG_RATIO[1] - CROP_LOG_RATIO[0]))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.argmax(axis=1)
    rows = np.arange(len(draws_NK))
    # Ten misses fall back to the whole image: its ratio of 1 lies within the bounds.
    height = np.where(fits.any(axis=1), height[rows, first], side)
    width = np.where(fits.any(axis=1), width[rows, first], side)
    top = np.floor(draws_NK[:, CROP_POSITION] * (side - height + 1))
    left = np.floor(draws_NK[:, CROP_POSITION + 1] * (side - width + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.int64)


def paste_crop(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Keep the box of an image [H, W, 3] at its place; everything outside becomes black."""
    top, left, height, width = box
    kept = np.zeros_like(image)
    kept[top : top + height, left : left + width] = image[top : top + height, left : left + width]
    return kept


def lower_resolution(image: np.ndarray, side_draw: float, interpolation_draws: np.ndarray) -> np.ndarray:
    """Shrink an image to 22..111 pixels a side and enlarge it back, each with one of five interpolations."""
    side = image.shape[0]
    small = int((SIDE_RATIO[0] + side_draw * (SIDE_RATIO[1] - SIDE_RATIO[0])) * side)
    down, up = (INTERPOLATIONS[int(draw * len(INTERPOLATIONS))] for draw in interpolation_draws)
    shrunk = cv2.resize(image, (small, small), interpolation=down)
    return np.asarray(cv2.resize(shrunk, (side, side), interpolation=up))


def jitter_colours(image: np.ndarray, factor_draws: np.ndarray, order_draw: float) -> np.ndarray:
    """Brightness, contrast and saturation by factors in [0.5, 1.5], in random order (torchvision's ColorJitter)."""
    picture = Image.fromarray(image)
    for which in ORDERS[int(order_draw * len(ORDERS))]:
        factor = FACTOR[0] + factor_draws[which] * (FACTOR[1] - FACTOR[0])
        picture = ENHANCERS[which](picture).enhance(factor)
    return np.asarray(picture)


def flip(images_NHWC: np.ndarray, index_N: np.ndarray, seed: int, epoch_N: np.ndarray) -> np.ndarray:
    """Horizontal flip of 0.5; gives a new array."""
    flipped_N = uniform_draws(seed, epoch_N, index_N)[:, FLIP] < 0.5
    return np.where(flipped_N[:, None, None, None], images_NHWC[:, :, ::-1], images_NHWC)


def adaface(images_NHWC: np.ndarray, index_N: np.ndarray, seed: int, epoch_N: np.ndarray) -> np.ndarray:
    """AdaFace's augmentation and flip of uint8 images [N, H, W, 3]; gives a new array."""
    draws_NK = uniform_draws(seed, epoch_N, index_N)
    images = images_NHWC.copy()
    boxes = crop_boxes(draws_NK, images.shape[1])
    for i in np.flatnonzero((draws_NK[:, [CROP, LOW_RES, PHOTOMETRIC]] < PROBABILITY).any(axis=1)):
        draws = draws_NK[i]
        if draws[CROP] < PROBABILITY:
            images[i] = paste_crop(images[i], boxes[i])
        if draws[LOW_RES] < PROBABILITY:
            images[i] = lower_resolution(images[i], draws[SIDE], draws[INTERPOLATION : INTERPOLATION + 2])
        if draws[PHOTOMETRIC] < PROBABILITY:
            images[i] = jitter_colours(images[i], draws[FACTORS : FACTORS + 3], draws[ORDER])
    flipped_N = draws_NK[:, FLIP] < 0.5
    images[flipped_N] = images[flipped_N, :, ::-1]
    return images


def unchanged(images_NHWC: np.ndarray, index_N: np.ndarray, seed: int, epoch_N: np.ndarray) -> np.ndarray:
    """No augmentation."""
    return images_NHWC


AUGMENTATIONS: Final[dict[str, Augmentation]] = {"adaface": adaface, "flip": flip, "none": unchanged}
