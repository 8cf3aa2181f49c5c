"""AdaFace's augmentation as the protocol's words have it (PROTOCOLS 3(e)): Pillow, one image, one step after another.

The oracle takes the same table of draws as `pipeline.data.augment` and nothing else from it. Beside it: pictures, and
the arguments that an operation draws.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from pipeline.data.augment.draws import sample_keys, uniforms
from pipeline.data.augment.operation import Operation

SIDE = 112
FLIP, CROP, LOW_RESOLUTION, PHOTOMETRIC = 0, 1, 2, 3


def faces(count: int, seed: int = 0) -> np.ndarray:
    """Smooth and noisy pictures without a single black pixel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, 256, (count, 8, 8, 3)).astype(np.uint8)
    smooth = np.stack([cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR) for image in coarse])
    noise = rng.integers(-10, 11, smooth.shape)
    return np.clip(smooth.astype(np.int64) + noise, 1, 255).astype(np.uint8)


def plans(operation: Operation, count: int = 4000, side: int = SIDE) -> list[tuple]:
    """Arguments of an operation for `count` samples."""
    keys = sample_keys(3, np.zeros(count, np.int64), np.arange(count))
    return list(operation.plan(uniforms(keys, operation.columns), side))


def crop_parameters(draws: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params(scale=(0.2, 1), ratio=(3/4, 4/3))."""
    for attempt in range(10):
        first, second = draws[13 + 2 * attempt], draws[14 + 2 * attempt]
        area = (0.2 + 0.8 * first) * SIDE * SIDE
        low, high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.exp(low + second * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= SIDE and 0 < height <= SIDE:
            return int(draws[4] * (SIDE - height + 1)), int(draws[5] * (SIDE - width + 1)), height, width
    return 0, 0, SIDE, SIDE


def crop(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    top, left, height, width = crop_parameters(draws)
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    canvas[top : top + height, left : left + width, :] = image[top : top + height, left : left + width, :]
    return canvas


def low_resolution(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    methods = [cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]
    side = int((0.2 + 0.8 * draws[6]) * SIDE)
    small = cv2.resize(image, (side, side), interpolation=methods[int(5 * draws[7])])
    return cv2.resize(small, (SIDE, SIDE), interpolation=methods[int(5 * draws[8])])


def photometric(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    orders = ["bcs", "bsc", "cbs", "csb", "sbc", "scb"]
    enhancers = {"b": ImageEnhance.Brightness, "c": ImageEnhance.Contrast, "s": ImageEnhance.Color}
    factors = {"b": 0.5 + draws[9], "c": 0.5 + draws[10], "s": 0.5 + draws[11]}
    picture = Image.fromarray(image)
    for letter in orders[int(6 * draws[12])]:
        picture = enhancers[letter](picture).enhance(factors[letter])
    return np.array(picture)


def adaface(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """One image by its row of 33 draws."""
    if draws[CROP] < 0.2:
        image = crop(image, draws)
    if draws[LOW_RESOLUTION] < 0.2:
        image = low_resolution(image, draws)
    if draws[PHOTOMETRIC] < 0.2:
        image = photometric(image, draws)
    if draws[FLIP] < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
