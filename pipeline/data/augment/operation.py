"""What an operation is: one change of one image, with the draws that decide on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One change of an image, and where its draws come from.

    Attributes:
        name: As the tables call it.
        gate: Column of the draw that is compared with the operation's probability in a recipe.
        columns: Columns of the draws that set its parameters. No two operations share a column and none ever moves:
            a run that is resumed with newer code sees the same images.
        plan: Turns draws [N, K] of those columns and the image's side into the arguments of `apply`, a row per image.
        apply: Changes one uint8 image [H, W, 3] in place.
        ranges: The parameters' distributions, for the reader.
        source: Where it comes from.
    """

    name: str
    gate: int
    columns: tuple[int, ...]
    plan: Callable[[np.ndarray, int], Sequence[tuple[Any, ...]]]
    apply: Callable[..., None]
    ranges: str
    source: str


def rows(*columns: np.ndarray | list[Any]) -> list[tuple[Any, ...]]:
    """Arguments of equal length as rows of plain Python values, which OpenCV takes faster than numpy's."""
    return list(zip(*(c.tolist() if isinstance(c, np.ndarray) else c for c in columns), strict=True))
