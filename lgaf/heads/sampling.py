"""Which negative centres a step of Partial FC looks at (An et al. 2022).

A class is drawn by a hash of (seed, step, its global id): so what is drawn depends on nothing else, not on the device,
not on how the classes are shared out, and a resumed or re-sharded run draws what the first one would have.
"""

# Shape legend: G = global batch, C = classes on this rank, K = classes drawn

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

# First part of the key: keeps the draws apart from other uses of the same seed.
SAMPLING_SEED: Final = 3
# Ids hashed at once; bounds the extra memory.
BLOCK: Final = 1 << 20
_BITS: Final = 53


def sampled_rows(classes: range, labels_G: Tensor, rate: float, seed: int, step: int) -> Tensor:
    """Rows [K] of this rank's classes to look at, ascending: those of the batch, and a share ``rate`` of the others.

    Each other class is drawn by itself, so K varies a little (by about the root of rate * C).

    Args:
        classes: Global ids of this rank.
        labels_G: Labels of the global batch.
        rate: Probability of each class that is not in the batch.
        seed: Of the run.
        step: Of training.
    """
    key = _signed(int(np.random.SeedSequence((SAMPLING_SEED, seed, step)).generate_state(1, np.uint64)[0]))
    bound = int(rate * (1 << _BITS))
    # One entry more than classes: for the labels of other ranks, which need not be told from the others first.
    chosen_C = torch.zeros(len(classes) + 1, dtype=torch.bool, device=labels_G.device)
    for low in range(0, len(classes), BLOCK):
        high = min(low + BLOCK, len(classes))
        ids = torch.arange(classes.start + low, classes.start + high, device=labels_G.device)
        chosen_C[low:high] = _hash(ids, key) < bound
    local_G = labels_G - classes.start
    chosen_C[torch.where((local_G >= 0) & (local_G < len(classes)), local_G, len(classes))] = True
    return chosen_C[:-1].nonzero().squeeze(1)


def _hash(ids: Tensor, key: int) -> Tensor:
    """53 well-mixed bits of each id (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = ids * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z ^ _shifted(z, 31), 64 - _BITS)


def _shifted(z: Tensor, places: int) -> Tensor:
    # torch shifts the sign in; an unsigned shift has zeros there.
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
