"""The class-parallel pass of the head as one differentiable function, chunk by chunk of the classes.

No step holds the logits of all classes. The forward pass takes each chunk's logits together to one number a sample; the
backward pass needs each logit's share in that number. Where the shares fit the memory budget the forward pass keeps
them (three matrix products a step), else the backward pass computes them again (four). The idea is that of Cut
Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009), here for margins, for shards and samples of the classes, and for
objectives other than softmax (docs/adr/0006).
"""

# Shape legend: G = global batch, D = embedding, C = centres on this rank, K = centres that the step looks at, k = those
#               of a chunk, L = learned scalars of the margin

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lgaf.heads.centres import Centres
from lgaf.heads.chunks import Chunks, FusedPass, Shares, chunks_of

# Classes of a chunk where the budget allows: on a CPU a chunk stays in the cache, on a GPU it fills the device.
CPU_CHUNK: Final = 2048
GPU_CHUNK: Final = 32768


class Plan(NamedTuple):
    """How a pass goes: classes a chunk, and whether the shares are kept."""

    chunk: int
    keep: bool


def plan_chunks(num_centres: int, bytes_per_class: int, kept_per_class: int, budget: int, largest: int) -> Plan:
    """Chunks within a memory budget.

    Args:
        num_centres: K.
        bytes_per_class: Temporary memory of a chunk, per class of it.
        kept_per_class: Memory of kept shares, per class.
        budget: Bytes for all of it.
        largest: Classes a chunk at most.
    """
    chunk = max(1, min(largest, num_centres, budget // bytes_per_class))
    return Plan(chunk, chunk * bytes_per_class + num_centres * kept_per_class <= budget)


def plan_of(problem: FusedPass, chunks: Chunks, num_rows: int) -> Plan:
    """Chunks within the pass's budget."""
    weight, products = problem.centres.weight_CD, problem.products
    sampled, updates = problem.centres.rows_K is not None, problem.update is not None
    copies = row_copies(sampled, products.operands != weight.dtype, updates)
    return plan_chunks(
        len(problem.centres),
        chunks.bytes_per_class(num_rows, weight.itemsize) + copies * weight.shape[1] * weight.itemsize,
        num_rows * products.operands.itemsize,
        problem.budget,
        GPU_CHUNK if weight.is_cuda else CPU_CHUNK,
    )


def row_copies(sampled: bool, rounded: bool, updates: bool) -> int:
    """Copies [k, D] that a chunk needs at one time.

    The product with the gradient, then what is not a view of something kept: centres, rounded operands, gradient, and
    an update's weight decay and rows of centres and momentum.
    """
    return 1 + sampled + 2 * rounded + updates * (2 + 2 * sampled)


def own_cosines(unit_GD: Tensor, centres: Centres, columns_G: Tensor) -> Tensor:
    """Cosines [G] of the samples with their own centres, 0 where another rank has them; without gradient."""
    own_GD, inverse_norm_G = centres.own(columns_G)
    product_G: Tensor = torch.linalg.vecdot(unit_GD.detach(), own_GD)
    return product_G * inverse_norm_G


def fused_pass(
    unit_GD: Tensor, weight_CD: Tensor, learned: Mapping[str, Tensor], problem: FusedPass, cosine_G: Tensor
) -> tuple[Tensor, Tensor]:
    """The other classes' number [G] of the objective and the cosines [G] with the own classes, differentiable.

    Args:
        unit_GD: Embeddings of length 1.
        weight_CD: Centres of this rank.
        learned: Learned scalars of the margin.
        problem: The rest.
        cosine_G: What `own_cosines` gave.
    """
    learned_L = torch.stack(list(learned.values())) if learned else unit_GD.new_empty(0)
    accumulated_G, cosine_G = _Fused.apply(  # type: ignore[no-untyped-call]
        unit_GD, weight_CD, learned_L, cosine_G, problem, tuple(learned), torch.is_grad_enabled()
    )
    return accumulated_G, cosine_G


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit_GD: Tensor,
        weight_CD: Tensor,
        learned_L: Tensor,
        cosine_G: Tensor,
        problem: FusedPass,
        names: tuple[str, ...],
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        chunks = chunks_of(unit_GD, dict(zip(names, learned_L, strict=True)), problem)
        plan = plan_of(problem, chunks, len(unit_GD))
        differentiate = differentiate and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        for chunk in problem.centres.chunks(plan.chunk):
            operand_kD = problem.products.operand(problem.centres[chunk])
            shares = chunks.add(operand_kD, chunk, differentiate and plan.keep)
            kept += shares or ()
        ctx.problem, ctx.chunks, ctx.plan, ctx.num_learned = problem, chunks, plan, len(learned_L)
        # Not as attributes of ctx: these would live as long as the loss does, saved tensors end with the backward pass.
        ctx.save_for_backward(unit_GD, weight_CD, cosine_G, *kept)
        return chunks.accumulated(), cosine_G.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The forward pass has decided on the precision; an autocast around the backward pass does not.
        with torch.autocast(grads[0].device.type, enabled=False):
            return _backward(ctx, *grads)


def _backward(ctx: Any, grad_G: Tensor, grad_cosine_G: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `_Fused.forward`."""
    problem: FusedPass = ctx.problem
    try:
        unit_GD, _, cosine_G, *kept = ctx.saved_tensors
    except RuntimeError as error:
        if problem.update is not None:
            error.add_note("the centres moved in another backward pass: with an update in it, each one is a step")
        raise
    centres, products = problem.centres, problem.products
    wants_unit, wants_weight, wants_learned = ctx.needs_input_grad[:3]
    own = _OwnClasses(problem, unit_GD, cosine_G, grad_cosine_G)
    gradients = _CentreGradients(problem) if wants_weight else None
    coefficients_PG = ctx.chunks.coefficients(grad_G)
    gradient_GD, learned_grad_L = torch.zeros_like(unit_GD), unit_GD.new_zeros(ctx.num_learned)
    scaled_GD = unit_GD
    for i, chunk in enumerate(centres.chunks(ctx.plan.chunk)):
        weight_kD = centres[chunk]
        operand_kD = products.operand(weight_kD)
        shares = Shares(*kept[2 * i : 2 * i + 2]) if kept else ctx.chunks.shares(operand_kD, chunk)
        if i < len(coefficients_PG):
            coefficient_G1 = coefficients_PG[i, :, None]
            scaled_GD = products.operand(unit_GD * coefficient_G1)
        learned_grad_L += (shares.learned_GL * coefficient_G1).sum(dim=0)
        if wants_unit and len(coefficients_PG) == 1:  # the factor of all comes at the end
            products.add_product(gradient_GD, shares.shares_kG.t(), operand_kD)
        elif wants_unit:
            part_GD = products.product(shares.shares_kG.t(), operand_kD)
            gradient_GD.addcmul_(part_GD, coefficient_G1)
        if gradients is not None:
            gradients.add(chunk, weight_kD, shares.shares_kG, scaled_GD, own)
    if len(coefficients_PG) == 1:
        gradient_GD *= coefficients_PG[0, :, None]
    return (
        own.add_to_embeddings(gradient_GD) if wants_unit else None,
        gradients.result(own) if gradients is not None else None,
        learned_grad_L if wants_learned else None,
        None,
        None,
        None,
        None,
    )


class _OwnClasses:
    """The gradients through the cosines with the own classes."""

    def __init__(self, problem: FusedPass, unit_GD: Tensor, cosine_G: Tensor, grad_cosine_G: Tensor) -> None:
        own_GD, inverse_norm_G = problem.centres.own(problem.columns_G)
        self._columns_G = problem.columns_G
        # Both are 0 where another rank has the class.
        self._grad_unit_GD = own_GD * (grad_cosine_G * inverse_norm_G)[:, None]
        direction_GD = unit_GD - own_GD * (cosine_G * inverse_norm_G)[:, None]
        self._grad_weight_GD = direction_GD * (grad_cosine_G * inverse_norm_G)[:, None]

    def add_to_embeddings(self, gradient_GD: Tensor) -> Tensor:
        return gradient_GD.add_(self._grad_unit_GD)

    def add_to_centres(self, gradient_kD: Tensor, chunk: slice) -> None:
        """Add to the gradients of a chunk; samples whose class is elsewhere add nothing to its first row."""
        row_G = self._columns_G - chunk.start
        inside_G = (row_G >= 0) & (row_G < len(gradient_kD))
        if len(gradient_kD):
            gradient_kD.index_add_(0, row_G * inside_G, self._grad_weight_GD * inside_G[:, None])


class _CentreGradients:
    """The gradients of the centres: all of them in one tensor, or handed on chunk by chunk."""

    def __init__(self, problem: FusedPass) -> None:
        self._problem = problem
        weight_CD = problem.centres.weight_CD
        self._all_KD = None if problem.update else weight_CD.new_empty(len(problem.centres), weight_CD.shape[1])

    def add(self, chunk: slice, weight_kD: Tensor, shares_kG: Tensor, scaled_GD: Tensor, own: _OwnClasses) -> None:
        problem, centres = self._problem, self._problem.centres
        out_kD = torch.empty_like(weight_kD) if self._all_KD is None else self._all_KD[chunk]
        problem.products.product(shares_kG, scaled_GD, out=out_kD)
        # What lies along the centre changes its length alone, and with it nothing of the loss.
        along_k = torch.linalg.vecdot(out_kD, weight_kD) * centres.inverse_norm_K[chunk].square()
        out_kD.addcmul_(weight_kD, along_k[:, None], value=-1.0)
        if problem.update is not None:
            own.add_to_centres(out_kD, chunk)
            problem.update(chunk if centres.rows_K is None else centres.rows_K[chunk], out_kD)

    def result(self, own: _OwnClasses) -> Tensor | None:
        """The gradient for autograd: dense; sparse where only some centres were looked at; None where handed on."""
        if self._all_KD is None:
            return None
        centres = self._problem.centres
        own.add_to_centres(self._all_KD, slice(0, len(centres)))
        if centres.rows_K is None:
            return self._all_KD
        shape = centres.weight_CD.shape
        # Ascending rows, each once: so it is coalesced, and needs no check.
        return torch.sparse_coo_tensor(
            centres.rows_K[None], self._all_KD, shape, is_coalesced=True, check_invariants=False
        )
