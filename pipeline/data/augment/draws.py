"""The random numbers of the augmentations: a table with a row for each (seed, epoch, sample) and endless columns."""

# Shape legend: N = samples, K = columns, S = side of a tile

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np

# AdaFace's columns come first; those after them belong to the other operations, each to one.
NUM_ADAFACE_DRAWS: Final = 33
TILE_MARGIN: Final = 32
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def uniform_draws(
    seed: int, epoch_N: np.ndarray, index_N: np.ndarray, columns: Sequence[int] = range(NUM_ADAFACE_DRAWS)
) -> np.ndarray:
    """Numbers [N, K] in [0, 1), a pure function of (seed, epoch, index, column): SplitMix64 as a counter hash."""
    return uniforms(sample_keys(seed, epoch_N, index_N), columns)


def sample_keys(seed: int, epoch_N: np.ndarray, index_N: np.ndarray) -> np.ndarray:
    """The row of each sample in the table of draws, as a uint64 key [N]; `seed` is in 0..2^64 - 1."""
    key_1 = _mix(np.array([seed], np.uint64) + _GOLDEN)
    return _mix(_mix(key_1 ^ epoch_N.astype(np.uint64)) ^ index_N.astype(np.uint64))


def uniforms(keys_N: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """The given columns [N, K] of the rows of `sample_keys`."""
    steps_K = (np.asarray(columns, np.uint64) + np.uint64(1)) * _GOLDEN
    bits_NK = _mix(keys_N[:, None] + steps_K)
    return np.asarray((bits_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def between(low: float, high: float, draws: np.ndarray) -> np.ndarray:
    """Draws of [0, 1) stretched to [low, high)."""
    return np.asarray(low + draws * (high - low))


def whole(low: int, high: int, draws: np.ndarray) -> np.ndarray:
    """Draws of [0, 1) as integers of low..high, both included."""
    return np.asarray(low + np.floor(draws * (high - low + 1)), np.int64)


@functools.lru_cache(maxsize=4)
def noise_tile(side: int) -> np.ndarray:
    """Fixed noise [S, S, 3], float32 of mean 0 and deviation 1, S = side + 32: a drawn offset makes it a sample's.

    The sum of four uniforms is near enough to normal, and the same on every machine, which a logarithm is not.
    """
    width = side + TILE_MARGIN
    rows = sample_keys(0, np.zeros(width, np.int64), np.arange(width))
    four = uniforms(rows, range(4 * width * 3)).reshape(width, width, 3, 4)
    tile: np.ndarray = np.asarray((four.sum(axis=3) - 2) * np.sqrt(3.0), np.float32)
    tile.flags.writeable = False
    return tile


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
