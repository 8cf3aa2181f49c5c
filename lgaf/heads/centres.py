"""Class centres: their first values, their norms, and the part of them that a step looks at."""

# Shape legend: D = embedding, C = centres on this rank, K = centres that a step looks at

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from lgaf.seeding import mixed_seed

INIT_STD: Final = 0.01
INIT_BLOCK: Final = 4096
# First part of the seeds of the centres: keeps them apart from those of dropout.
CENTRES_SEED: Final = 1
# As `F.normalize`: the length that shorter centres are divided by.
LEAST_NORM: Final = 1e-12


def initial_centres(classes: range, embedding_dim: int, seed: int) -> Tensor:
    """Class centres [len(classes), D] ~ N(0, 0.01), a function of the global class id alone.

    Drawn in fixed blocks of class ids, so that no rank draws the whole matrix and no two ranks draw the same rows
    (seeding all ranks alike, as others do, makes class k of every rank start at the same point).
    """
    weight = torch.empty(len(classes), embedding_dim)
    for block in range(classes.start // INIT_BLOCK, -(-classes.stop // INIT_BLOCK)):
        generator = torch.Generator().manual_seed(mixed_seed(CENTRES_SEED, seed, block))
        first = block * INIT_BLOCK
        rows = torch.randn(INIT_BLOCK, embedding_dim, generator=generator)
        low, high = max(first, classes.start), min(first + INIT_BLOCK, classes.stop)
        weight[low - classes.start : high - classes.start] = rows[low - first : high - first] * INIT_STD
    return weight


@dataclass(frozen=True, slots=True)
class Centres:
    """The centres that one step looks at: all of this rank, or a sample of them.

    Attributes:
        weight_CD: All centres of this rank, not normalised.
        rows_K: Which of them, ascending; None: all.
        inverse_norm_K: 1 / length of each.
    """

    weight_CD: Tensor
    rows_K: Tensor | None
    inverse_norm_K: Tensor

    @classmethod
    def all(cls, weight_CD: Tensor) -> Centres:
        """Every centre of this rank."""
        return cls(weight_CD, None, _inverse_norm(weight_CD))

    @classmethod
    def some(cls, weight_CD: Tensor, rows_K: Tensor) -> Centres:
        """The centres of these rows."""
        blocks = [_inverse_norm(weight_CD.index_select(0, rows)) for rows in torch.split(rows_K, INIT_BLOCK)]
        return cls(weight_CD, rows_K, torch.cat(blocks) if blocks else weight_CD.new_empty(0))

    def __len__(self) -> int:
        """K."""
        return self.inverse_norm_K.shape[0]

    def chunks(self, size: int) -> Iterator[slice]:
        """The positions 0 to K in pieces."""
        return (slice(low, min(low + size, len(self))) for low in range(0, len(self), size))

    def __getitem__(self, chunk: slice) -> Tensor:
        """Centres of a chunk of positions; a view where all are looked at."""
        return self.weight_CD[chunk] if self.rows_K is None else self.weight_CD.index_select(0, self.rows_K[chunk])

    def columns(self, labels_G: Tensor, first_class: int) -> Tensor:
        """Position of each sample's own class, -1 where another rank has it. With a sample, it must be in it."""
        local_G = labels_G - first_class
        owned_G = (local_G >= 0) & (local_G < self.weight_CD.shape[0])
        if self.rows_K is not None:
            local_G = torch.searchsorted(self.rows_K, local_G.contiguous())
        return torch.where(owned_G, local_G, -1)

    def own(self, columns_G: Tensor) -> tuple[Tensor, Tensor]:
        """The own centres [G, D] of the samples and their inverse norms [G].

        Where another rank has them the inverse norm is 0, and the centre any: every use is a product of both.
        """
        if not len(self):
            nothing_GD = self.weight_CD.new_zeros(len(columns_G), self.weight_CD.shape[1])
            return nothing_GD, nothing_GD.new_zeros(len(columns_G))
        owned_G = columns_G >= 0
        position_G = columns_G.clamp_min(0)
        row_G = position_G if self.rows_K is None else self.rows_K[position_G]
        return self.weight_CD[row_G], self.inverse_norm_K[position_G] * owned_G


def _inverse_norm(weight_CD: Tensor) -> Tensor:
    norm_C: Tensor = torch.linalg.vector_norm(weight_CD, dim=1)
    return norm_C.clamp_min(LEAST_NORM).reciprocal()


def unit(x_BD: Tensor) -> Tensor:
    """Rows of length 1."""
    return F.normalize(x_BD, eps=LEAST_NORM)
