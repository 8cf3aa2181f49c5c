"""The recipes by name: which operations, how often, in which order."""

# Shape legend: N = samples of a block, H = side of an image, S = steps of a recipe

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipeline.data.augment.blur import BOX, DEFOCUS, GAUSSIAN, MOTION
from pipeline.data.augment.colour import JITTER
from pipeline.data.augment.draws import sample_keys, uniforms
from pipeline.data.augment.geometry import CROP, FLIP, LOW_RESOLUTION, WARP
from pipeline.data.augment.occlusion import ERASE, HOLES_CUT, MASK, SUNGLASSES
from pipeline.data.augment.operation import Operation
from pipeline.data.augment.photometric import PHOTOMETRIC
from pipeline.data.augment.sensor import LOW_QUALITY, NOISE, RECOMPRESS

Augmentation = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
"""(images uint8 [N, H, H, 3], index int64 [N], seed, epoch int64 [N]) -> images of the same shape and dtype.

The caller gives the images up: they may be changed in place and returned.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """An augmentation made of operations, in order; each is drawn independently of the others.

    Attributes:
        summary: What it is for, in one line.
        steps: Operations with their probabilities in (0, 1]. An operation comes once: its draws are its own.
    """

    summary: str
    steps: tuple[tuple[Operation, float], ...]

    def __post_init__(self) -> None:
        """Check the steps."""
        names = [operation.name for operation, _ in self.steps]
        if len(set(names)) < len(names):
            raise ValueError(f"Recipe.steps must name each operation once, got {', '.join(names)}")
        for operation, probability in self.steps:
            if not 0 < probability <= 1:
                raise ValueError(f"Recipe.steps: probability of {operation.name} must be in (0, 1], got {probability}")

    @property
    def untouched(self) -> float:
        """The probability that none of the operations but the flip is applied."""
        return math.prod(1 - probability for operation, probability in self.steps if operation is not FLIP)

    def __call__(self, images_NHWC: np.ndarray, index_N: np.ndarray, seed: int, epoch_N: np.ndarray) -> np.ndarray:
        """Augment a block.

        Args:
            images_NHWC: uint8 [N, H, H, 3]. Changed in place where possible; a read-only or strided block is copied.
            index_N: Number of each sample in its data set, int64 [N].
            seed: Of the run, 0..2^64 - 1.
            epoch_N: Of each sample, int64 [N].

        Raises:
            ValueError: Shape or dtype is another.
        """
        _require_block(images_NHWC, index_N, epoch_N)
        if not self.steps:
            return images_NHWC
        images = np.require(images_NHWC, requirements=["C", "W"])
        # Image by image, all its operations in turn: it stays in the cache.
        for image, actions in zip(images, self._actions(images.shape, index_N, seed, epoch_N), strict=True):
            for apply, arguments in actions:
                apply(image, *arguments)
        return images

    def _actions(
        self, shape: tuple[int, ...], index_N: np.ndarray, seed: int, epoch_N: np.ndarray
    ) -> list[list[tuple[Callable[..., None], tuple[Any, ...]]]]:
        """What happens to each image; parameters are drawn only for the images that need them."""
        keys_N = sample_keys(seed, epoch_N, index_N)
        gates_NS = uniforms(keys_N, [operation.gate for operation, _ in self.steps])
        actions: list[list[tuple[Callable[..., None], tuple[Any, ...]]]] = [[] for _ in range(shape[0])]
        for gates_N, (operation, probability) in zip(gates_NS.T, self.steps, strict=True):
            hit = np.flatnonzero(gates_N < probability)
            arguments = operation.plan(uniforms(keys_N[hit], operation.columns), shape[1])
            for sample, of_sample in zip(hit.tolist(), arguments, strict=True):
                actions[sample].append((operation.apply, of_sample))
        return actions


def _require_block(images: np.ndarray, index_N: np.ndarray, epoch_N: np.ndarray) -> None:
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != np.uint8 or not square:
        raise ValueError(f"images must be uint8 [N, H, H, 3], got {images.dtype} {list(images.shape)}")
    if not index_N.shape == epoch_N.shape == images.shape[:1]:
        raise ValueError(
            f"index and epoch must have one entry for each of the {len(images)} images, "
            f"got shapes {list(index_N.shape)} and {list(epoch_N.shape)}"
        )


_HALF_FLIPPED: Final = (FLIP, 0.5)

AUGMENTATIONS: Final[dict[str, Recipe]] = {
    "adaface": Recipe(
        summary="AdaFace's and the paper's: the default",
        steps=((CROP, 0.2), (LOW_RESOLUTION, 0.2), (JITTER, 0.2), _HALF_FLIPPED),
    ),
    "flip": Recipe(summary="as arcface_torch trains", steps=(_HALF_FLIPPED,)),
    "none": Recipe(summary="the images as they are", steps=()),
    # CVLface chooses one of crop (95%) and holes (5%) in 20% of the images, and one of low resolution (80%), box and
    # Gaussian (10% each) in another 20%. Drawn independently, each comes as often, and two seldom meet.
    "gridsample": Recipe(
        summary="CVLface's: every image moved, scaled and lit anew",
        steps=(
            (WARP, 1.0),
            (CROP, 0.19),
            (HOLES_CUT, 0.01),
            (LOW_RESOLUTION, 0.16),
            (BOX, 0.02),
            (GAUSSIAN, 0.02),
            (PHOTOMETRIC, 1.0),
            _HALF_FLIPPED,
        ),
    ),
    "jpeg": Recipe(
        summary="stored badly: compression, and small faces cut from poor recordings",
        steps=((LOW_QUALITY, 0.2), (RECOMPRESS, 0.3), _HALF_FLIPPED),
    ),
    "motion_blur": Recipe(
        summary="moved or out of focus",
        steps=((MOTION, 0.3), (DEFOCUS, 0.2), _HALF_FLIPPED),
    ),
    "occlusion": Recipe(
        summary="partly hidden: masks, sunglasses, anything in front",
        steps=((MASK, 0.15), (SUNGLASSES, 0.15), (ERASE, 0.25), _HALF_FLIPPED),
    ),
    # In the order of their causes: the scene, the frame, the light, the lens, the sensor, the file.
    "strong": Recipe(
        summary="everything that makes a surveillance face poor, in the order in which it happens",
        steps=(
            (MASK, 0.1),
            (SUNGLASSES, 0.1),
            (ERASE, 0.1),
            (WARP, 0.3),
            (CROP, 0.1),
            (JITTER, 0.3),
            (MOTION, 0.2),
            (DEFOCUS, 0.1),
            (LOW_RESOLUTION, 0.3),
            (NOISE, 0.2),
            (LOW_QUALITY, 0.15),
            (RECOMPRESS, 0.15),
            _HALF_FLIPPED,
        ),
    ),
}

adaface: Final = AUGMENTATIONS["adaface"]
