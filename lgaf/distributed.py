"""Collectives over an explicit process group, with gradients where a loss needs them.

``group=None`` means this process alone: no process group need exist, and every function is the identity.
"""

# Shape legend: B = rows on this rank, G = rows of all ranks, D = columns, W = world size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 has new names, and warns of the old ones in every process.
ALL_GATHER: Final = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER: Final = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def world_size(group: ProcessGroup | None) -> int:
    """Number of processes of the group (1 for None)."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: ProcessGroup | None) -> int:
    """Rank of this process in the group (0 for None)."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce_sum(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks, without gradient; one all-reduce."""
    if world_size(group) == 1:
        return value
    summed = value.clone()
    dist.all_reduce(summed, group=group)
    return summed


def all_gather_stack(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Stack the equally shaped tensors of all ranks to [W, ...], without gradient; one all-gather."""
    if world_size(group) == 1:
        return value.unsqueeze(0)
    # Gloo takes the output only with the ranks' rows end to end.
    gathered = value.new_empty((world_size(group) * value.shape[0], *value.shape[1:]))
    getattr(dist, ALL_GATHER)(gathered, value.contiguous(), group=group)
    return gathered.view(world_size(group), *value.shape)


class RowExchange:
    """Gives every rank the rows of all ranks: one all-gather forward, one reduce-scatter backward.

    Ranks may have different numbers of rows, none at all too. A caller that knows the numbers gives them. Else each
    rank sends as many rows as any had before, its own number ahead of them; only where a rank has more than ever is a
    second all-gather needed.

    The all-gather runs while the caller goes on between `start` and `finish`, where the backend can do so.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self._most = 1
        self._sizes: list[int] | None = None
        self._gathered: Tensor | None = None
        self._work: dist.Work | None = None

    def start(self, value_BD: Tensor, sizes: Sequence[int] | None = None) -> None:
        """Send this rank's rows.

        Args:
            value_BD: Rows; B may differ between ranks.
            sizes: Rows of every rank, if known; given by all ranks or by none.

        Raises:
            ValueError: ``sizes`` are not those of the group, or not this rank's.
        """
        world, rank = world_size(self.group), rank_in(self.group)
        if sizes is not None and (len(sizes) != world or sizes[rank] != len(value_BD)):
            raise ValueError(f"rank {rank} of {world} has {len(value_BD)} rows, which does not fit sizes={list(sizes)}")
        self._sizes = [len(value_BD)] if world == 1 else None if sizes is None else list(sizes)
        if world > 1:
            self._send(value_BD.detach())

    def finish(self, value_BD: Tensor, shared_L: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [G, D] of all ranks in rank order, and ``shared_L``; their gradients are summed over the ranks.

        Args:
            value_BD: What was given to `start`.
            shared_L: Numbers that are equal on all ranks: their gradients travel with those of the rows.
        """
        if world_size(self.group) == 1:
            return value_BD, shared_L
        sizes, gathered_WRD = self._received(value_BD)
        if torch.is_grad_enabled() and not value_BD.requires_grad:
            # All ranks or none take part in the backward collective: one whose rows need no gradient (it may have no
            # rows) would else leave the others waiting.
            value_BD = value_BD.detach().requires_grad_()
        rows_GD, shared_L = _ExchangeRows.apply(  # type: ignore[no-untyped-call]
            value_BD, shared_L, gathered_WRD, sizes, self.group
        )
        return rows_GD, shared_L

    def _send(self, value_BD: Tensor) -> None:
        if self._sizes is None:
            number = value_BD.new_full((1, value_BD.shape[1]), len(value_BD))
            own = torch.cat([number, _pad_rows(value_BD[: self._most], self._most)])
        else:
            own = _pad_rows(value_BD, max(self._sizes))
        self._gathered = own.new_empty((world_size(self.group) * own.shape[0], own.shape[1]))
        self._work = getattr(dist, ALL_GATHER)(self._gathered, own, group=self.group, async_op=True)

    def _received(self, value_BD: Tensor) -> tuple[list[int], Tensor]:
        assert self._work is not None
        assert self._gathered is not None
        self._work.wait()
        gathered_WRD = self._gathered.view(world_size(self.group), -1, value_BD.shape[1])
        self._gathered = self._work = None
        if self._sizes is not None:
            return self._sizes, gathered_WRD
        sizes: list[int] = gathered_WRD[:, 0, 0].long().tolist()
        if max(sizes) > self._most:
            self._most = max(sizes)
            self._send(value_BD.detach())
            return self._received(value_BD)
        return sizes, gathered_WRD[:, 1:]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_BD: Tensor, shared_L: Tensor, gathered_WRD: Tensor, sizes: list[int], group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.sizes, ctx.group = sizes, group
        rows_GD = torch.cat([gathered_WRD[rank, :size] for rank, size in enumerate(sizes)])
        return rows_GD, shared_L.view_as(shared_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_GD, grad_L = grads
        sizes, rank, dim = ctx.sizes, rank_in(ctx.group), grad_GD.shape[1]
        # The shared numbers' gradients fill rows after those of each rank: their sum reaches all.
        end = max(sizes) * dim
        parts_WN = grad_GD.new_zeros(len(sizes), end + -(-len(grad_L) // dim) * dim)
        for part_N, rows in zip(parts_WN, torch.split(grad_GD, sizes), strict=True):
            part_N[: rows.numel()] = rows.flatten()
        parts_WN[:, end : end + len(grad_L)] = grad_L
        own_N = torch.empty_like(parts_WN[0])
        getattr(dist, REDUCE_SCATTER)(own_N, parts_WN.flatten(), group=ctx.group)
        own_BD = own_N[: sizes[rank] * dim].view(-1, dim)
        return own_BD, own_N[end : end + len(grad_L)], None, None, None


def _pad_rows(value: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - value.shape[0]
    if missing == 0:
        return value.contiguous()
    return torch.cat([value, value.new_zeros((missing, *value.shape[1:]))])


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """Give ``value`` itself; its gradient is multiplied by ``factor`` on the way back."""
    if factor == 1:
        return value
    scaled: Tensor = _ScaleGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def gather_for_all(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Stack the equally shaped tensors of all ranks to [W, ...], for ranks that all go on to the same scalar.

    One all-gather forward, none backward: each rank's scalar is the whole loss, so the gradient of this rank's part is
    complete as it is.
    """
    if world_size(group) == 1:
        return value.unsqueeze(0)
    gathered: Tensor = _GatherForAll.apply(value, group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank = rank_in(group)
        return all_gather_stack(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.rank], None
