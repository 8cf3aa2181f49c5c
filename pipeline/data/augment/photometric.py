"""CVLface's photometric part: two changes of light or colour in turn, each one of seven."""

# Shape legend: M = images, K = draws per image

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import cv2
import numpy as np

from pipeline.data.augment import colour
from pipeline.data.augment.operation import Operation

NUM_CHANGES: Final = 2
# 18 equal steps: theirs are bins 5 to 22 of 31 between 0 and 0.9.
STRENGTH_STEP: Final = 0.03
STRENGTH_BINS: Final = (5, 22)
# They draw again, twice at most, when it is one of the last two: what is left of those is (2/7)^3.
RARE: Final = (2 / 7) ** 3
_SMOOTH: Final = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13

Change = Callable[[np.ndarray, float, bool], None]


def _brightness(image: np.ndarray, factor: float, rounding: bool) -> None:
    colour.enhance(image, colour.BRIGHTNESS, factor, rounding)


def _contrast(image: np.ndarray, factor: float, rounding: bool) -> None:
    colour.enhance(image, colour.CONTRAST, factor, rounding)


def _saturation(image: np.ndarray, factor: float, rounding: bool) -> None:
    colour.enhance(image, colour.SATURATION, factor, rounding)


def _sharpness(image: np.ndarray, factor: float, rounding: bool) -> None:
    del rounding  # no need to equal Pillow's, whose border stays as it is
    smooth = cv2.filter2D(image, -1, _SMOOTH, borderType=cv2.BORDER_REPLICATE)
    cv2.addWeighted(image, factor, smooth, 1 - factor, 0.0, dst=image)


def _nothing(image: np.ndarray, factor: float, rounding: bool) -> None:
    del image, factor, rounding


def _equalise(image: np.ndarray, factor: float, rounding: bool) -> None:
    del factor, rounding
    np.copyto(image, cv2.merge([cv2.equalizeHist(plane) for plane in cv2.split(image)]))


def _to_grey(image: np.ndarray, factor: float, rounding: bool) -> None:
    del factor, rounding
    cv2.cvtColor(colour.grey(image), cv2.COLOR_GRAY2RGB, dst=image)


CHANGES: Final[tuple[Change, ...]] = (
    _brightness,
    _contrast,
    _saturation,
    _sharpness,
    _nothing,
    _equalise,
    _to_grey,
)
_SHARES: Final = np.array([(1 - RARE) / 5] * 5 + [RARE / 2] * 2)


def change(image: np.ndarray, changes: tuple[tuple[int, float, bool], ...]) -> None:
    """Apply changes (index in `CHANGES`, factor, rounding) in their order, in place."""
    for which, factor, rounding in changes:
        CHANGES[which](image, factor, rounding)


def plan_changes(draws_M4: np.ndarray, side: int) -> list[tuple[Any, ...]]:
    """Columns: the kind of each change, then its strength with its sign."""
    del side  # light has no size
    kinds = np.searchsorted(_SHARES.cumsum()[:-1], draws_M4[:, :NUM_CHANGES], side="right").tolist()
    low, high = STRENGTH_BINS
    bins = np.floor(draws_M4[:, NUM_CHANGES:] * 2 * (high - low + 1)).astype(np.int64)
    strength = STRENGTH_STEP * (low + bins // 2)
    factors_M2 = (1 + np.where(bins % 2, strength, -strength)).astype(np.float32).astype(np.float64)
    triples = zip(kinds, factors_M2.tolist(), colour.can_round(factors_M2).tolist(), strict=True)
    return [(tuple(zip(*of_image, strict=True)),) for of_image in triples]


PHOTOMETRIC: Final = Operation(
    name="photometric",
    gate=123,
    columns=(124, 125, 126, 127),
    plan=plan_changes,
    apply=change,
    ranges=(
        f"two of brightness, contrast, saturation, sharpness (x 1 +/- {STRENGTH_STEP * STRENGTH_BINS[0]:.2f} to "
        f"{STRENGTH_STEP * STRENGTH_BINS[1]:.2f}), nothing, and seldom ({RARE:.1%}) equalised or grey"
    ),
    source="CVLface gridsample_v1",
)
