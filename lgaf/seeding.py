"""Seeds for torch's generators."""

from __future__ import annotations

import numpy as np


def mixed_seed(*parts: int) -> int:
    """One 32-bit seed from several non-negative integers, each of which matters.

    torch's CPU generator uses the low 32 bits of its seed only, so parts must not be put side by side in 64 bits.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
