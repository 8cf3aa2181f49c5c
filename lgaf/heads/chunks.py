"""What one chunk of the classes gives: its number a sample for the loss, and each logit's share in it for the gradient.

Two ways: softmax over plain logits (most margins), where a chunk is one matrix product and one pass of exponentials;
and any other negatives and objectives, whose derivatives autograd finds within the chunk.

Chunks lie classes first, [k, G]: their product with the embeddings is then written where it stays.
"""

# Shape legend: G = global batch, D = embedding, k = classes of a chunk, P = chunks (1: the same for all), L = learned
#               scalars of the margin

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lgaf.heads.centres import LEAST_NORM, Centres
from lgaf.heads.margins import Margin
from lgaf.heads.objective import Softmax, exclude
from lgaf.heads.products import Products

RowUpdate = Callable[[slice | Tensor, Tensor], None]
"""Takes rows of this rank's centres (a slice, or their numbers) and the gradient [k, D] of these; may change them."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float, float, Tensor | None], Tensor]
"""As `lgaf.heads.triton_softmax.exponentials`."""


class Shares(NamedTuple):
    """Derivatives of a chunk's number, up to a coefficient a sample (see `Chunks.coefficients`).

    Attributes:
        shares_kG: By the products of (un-normalised) centres and embeddings, short of the centres' normalisation.
        learned_GL: By the learned scalars of the margin.
    """

    shares_kG: Tensor
    learned_GL: Tensor


class Chunks(Protocol):
    """One pass over the classes; `add` each chunk in order, then take `accumulated`, then the gradients' parts.

    Centres of a chunk come as operands of products, not normalised.
    """

    def add(self, operand_kD: Tensor, chunk: slice, keep: bool) -> Shares | None:
        """Take a chunk into the statistics; its shares where they are to be kept."""
        ...

    def accumulated(self) -> Tensor:
        """The number [G] of all chunks so far."""
        ...

    def shares(self, operand_kD: Tensor, chunk: slice) -> Shares:
        """A chunk's shares, computed again."""
        ...

    def coefficients(self, grad_G: Tensor) -> Tensor:
        """Factors [P, G] that make of each chunk's shares the gradient of the loss, given that of `accumulated`."""
        ...

    @staticmethod
    def bytes_per_class(num_rows: int, itemsize: int) -> int:
        """Temporary memory of a chunk, per class of it."""
        ...


@dataclass(frozen=True, slots=True)
class FusedPass:
    """What a pass over the classes works on besides embeddings and learned scalars.

    Attributes:
        centres: Centres that the step looks at.
        columns_G: Position of each sample's own class among them; -1 where another rank has it.
        margin: Makes logits of cosines.
        state: Its running statistics.
        target_cosine_G: Cosines with the own classes, where the margin wants them.
        products: Multiplies.
        budget: Bytes of temporary memory.
        update: Takes the gradient of each chunk's centres, in place of a gradient of all; None: gradients as usual.
    """

    centres: Centres
    columns_G: Tensor
    margin: Margin
    state: Mapping[str, Tensor]
    target_cosine_G: Tensor | None
    products: Products
    budget: int
    update: RowUpdate | None


def chunks_of(unit_GD: Tensor, learned: Mapping[str, Tensor], problem: FusedPass) -> Chunks:
    """The cheapest way for the problem's margin.

    Args:
        unit_GD: Embeddings of length 1.
        learned: Learned scalars of the margin.
        problem: The rest.
    """
    shift = plain_shift(problem.margin, len(problem.centres), unit_GD.dtype)
    if shift is not None:
        return PlainSoftmaxChunks(unit_GD, problem, shift, len(learned))
    return AnyChunks(unit_GD, problem, learned)


def plain_shift(margin: Margin, num_classes: int, dtype: torch.dtype) -> float | None:
    """`fixed_shift` where the margin's other classes have plain logits and its objective is softmax; else None."""
    if not (margin.plain_negatives and isinstance(margin.objective, Softmax)):
        return None
    return fixed_shift(margin.scale, num_classes, dtype)


def fixed_shift(scale: float, num_classes: int, dtype: torch.dtype) -> float | None:
    """A number r for which exp(s * cos - r), 1 / length times it and its sum stay normal floats; None: there is none.

    A cosine is bounded, so the logits need no running maximum as others do: float32 has room for 175 powers of e, and
    scale 64 takes 128 of them, ten million classes 16, the shortest centres 28.
    """
    limits = torch.finfo(dtype)
    highest = scale - math.log(LEAST_NORM) + math.log(max(num_classes, 1))
    shift = max(0.0, highest - math.log(limits.max) + 1.0)
    return shift if -scale - shift > math.log(limits.smallest_normal) else None


def kernel_for(unit_GD: Tensor) -> Kernel | None:
    """The Triton kernel in place of the chunk's operations where it can run: same numbers, no pass over the logits."""
    if not unit_GD.is_cuda or unit_GD.dtype != torch.float32:
        return None
    # Only here: elsewhere nothing of Triton is to be loaded.
    from lgaf.heads import triton_softmax

    return triton_softmax.exponentials if triton_softmax.available(unit_GD.device) else None


class PlainSoftmaxChunks:
    """Log-sum-exp of scale * cosine.

    The shares that are kept are exp(s * cos - r) / length of the centre: so no centre need be normalised.
    """

    def __init__(self, unit_GD: Tensor, problem: FusedPass, shift: float, num_learned: int) -> None:
        self._products, columns_G = problem.products, problem.columns_G
        self._unit_GD, self._columns_G = self._products.operand(unit_GD).contiguous(), columns_G
        self._inverse_norm_K = problem.centres.inverse_norm_K
        self._scale, self._shift = problem.margin.scale, shift
        self._kernel = kernel_for(unit_GD)
        self._rows_G = torch.arange(len(columns_G), device=columns_G.device)
        # Learned scalars have no part in plain logits.
        self._nothing_GL = unit_GD.new_zeros(1, num_learned).expand(len(columns_G), -1)
        self._sums_G = unit_GD.new_zeros(len(columns_G))

    def add(self, operand_kD: Tensor, chunk: slice, keep: bool) -> Shares | None:
        """See `Chunks`."""
        exponentials_kG, sums_G = self._exponentials(operand_kD, chunk, keep)
        self._sums_G += sums_G
        return None if exponentials_kG is None or not keep else Shares(exponentials_kG, self._nothing_GL)

    def accumulated(self) -> Tensor:
        """See `Chunks`; the lowest float where there is no other class."""
        lowest = torch.finfo(self._sums_G.dtype).min
        # Not "where above 0": a centre that is NaN must make the loss NaN, not vanish.
        return torch.where(self._sums_G == 0, lowest, self._sums_G.log() + self._shift)

    def shares(self, operand_kD: Tensor, chunk: slice) -> Shares:
        """See `Chunks`."""
        exponentials_kG = self._exponentials(operand_kD, chunk, True)[0]
        assert exponentials_kG is not None
        return Shares(exponentials_kG, self._nothing_GL)

    def coefficients(self, grad_G: Tensor) -> Tensor:
        """See `Chunks`."""
        per_exponential_G = torch.where(self._sums_G == 0, 0.0, self._scale * grad_G / self._sums_G)
        return per_exponential_G[None]

    @staticmethod
    def bytes_per_class(num_rows: int, itemsize: int) -> int:
        """See `Chunks`."""
        return 2 * num_rows * itemsize

    def _exponentials(self, operand_kD: Tensor, chunk: slice, store: bool) -> tuple[Tensor | None, Tensor]:
        """The exponentials of a chunk, if they are to be stored, and their sums [G]."""
        inverse_norm_k = self._inverse_norm_K[chunk]
        size = len(operand_kD)
        if self._kernel is not None:
            shape = (size, len(self._rows_G))
            out_kG = operand_kD.new_empty(shape) if store else None
            row_G = self._columns_G - chunk.start
            sums_G = self._kernel(operand_kD, self._unit_GD, inverse_norm_k, row_G, self._scale, self._shift, out_kG)
            return out_kG, sums_G
        # One row more than classes: where own classes of other chunks are struck out, without asking which they are
        # (asking would wait for an accelerator).
        padded = operand_kD.new_empty(size + 1, len(self._rows_G), dtype=self._products.result)
        exponentials_kG = padded[:size]
        self._products.product(operand_kD, self._unit_GD.t(), out=exponentials_kG)
        torch.addcmul(
            (inverse_norm_k.log() - self._shift)[:, None],
            exponentials_kG,
            (inverse_norm_k * self._scale)[:, None],
            out=exponentials_kG,
        ).exp_()
        row_G = self._columns_G - chunk.start
        row_G = torch.where((row_G >= 0) & (row_G < size), row_G, size)
        padded.index_put_((row_G, self._rows_G), padded.new_zeros(()))
        sums_G = torch.mv(exponentials_kG.t(), inverse_norm_k.reciprocal())
        return self._products.operand(exponentials_kG), sums_G


class AnyChunks:
    """Any negatives and objective: autograd over one chunk at a time."""

    def __init__(self, unit_GD: Tensor, problem: FusedPass, learned: Mapping[str, Tensor]) -> None:
        self._problem, self._products, columns_G = problem, problem.products, problem.columns_G
        self._unit_GD, self._columns_G = self._products.operand(unit_GD), columns_G
        # One copy a sample, so that autograd finds one derivative a sample.
        self._learned_G1 = {name: value.detach().expand(len(columns_G), 1) for name, value in learned.items()}
        self._numbers_PG: list[Tensor] = []

    def add(self, operand_kD: Tensor, chunk: slice, keep: bool) -> Shares | None:
        """See `Chunks`."""
        number_G, shares = self._chunk(operand_kD, chunk, keep)
        self._numbers_PG.append(number_G)
        return shares

    def accumulated(self) -> Tensor:
        """See `Chunks`."""
        return self._problem.margin.objective.join(self._stacked())

    def shares(self, operand_kD: Tensor, chunk: slice) -> Shares:
        """See `Chunks`."""
        shares = self._chunk(operand_kD, chunk, True)[1]
        assert shares is not None
        return shares

    def coefficients(self, grad_G: Tensor) -> Tensor:
        """See `Chunks`: how the numbers of the chunks join."""
        with torch.enable_grad():
            numbers_PG = self._stacked().requires_grad_()
            joined_G = self._problem.margin.objective.join(numbers_PG)
        return torch.autograd.grad(joined_G, numbers_PG, grad_G)[0]

    @staticmethod
    def bytes_per_class(num_rows: int, itemsize: int) -> int:
        """See `Chunks`; as many copies as CurricularFace's logits and their derivative need."""
        return 10 * num_rows * itemsize

    def _stacked(self) -> Tensor:
        if not self._numbers_PG:
            return self._unit_GD.new_empty(0, len(self._columns_G), dtype=self._products.result)
        return torch.stack(self._numbers_PG)

    def _chunk(self, operand_kD: Tensor, chunk: slice, differentiate: bool) -> tuple[Tensor, Shares | None]:
        margin, inverse_norm_k1 = self._problem.margin, self._problem.centres.inverse_norm_K[chunk, None]
        cosine_kG = self._products.product(operand_kD, self._unit_GD.t()) * inverse_norm_k1
        with torch.set_grad_enabled(differentiate):
            cosine_GC = cosine_kG.t().detach().requires_grad_(differentiate)
            learned = {n: v.clone().requires_grad_(differentiate) for n, v in self._learned_G1.items()}
            negatives_GC = margin.negative_logits(
                cosine_GC, self._problem.target_cosine_G, {**self._problem.state, **learned}
            )
            number_G = margin.objective.accumulate(exclude(negatives_GC, self._columns_G - chunk.start))
        if not differentiate:
            return number_G, None
        # Each sample's number depends on its own row alone: the gradient of each by its row, in one go.
        ones_G = torch.ones_like(number_G)
        slopes_GC, *learned_G1 = torch.autograd.grad(
            number_G, [cosine_GC, *learned.values()], ones_G, materialize_grads=True
        )
        shares_kG = self._products.operand((slopes_GC.t() * inverse_norm_k1).contiguous())
        learned_GL = torch.cat([number_G.new_zeros(len(number_G), 0), *learned_G1], dim=1)
        return number_G.detach(), Shares(shares_kG, learned_GL)
