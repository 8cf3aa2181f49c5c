"""Collectives over an explicit process group, with gradients where a loss needs them.

``group=None`` means this process alone: no process group need exist, and every function is the identity.
"""

# Shape legend: B = rows on this rank, G = rows of all ranks, D = columns, W = world size

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


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
    dist.all_gather_into_tensor(gathered, value.contiguous(), group=group)
    return gathered.view(world_size(group), *value.shape)


def gather_sizes(num_rows: int, device: torch.device, group: ProcessGroup | None) -> list[int]:
    """Rows of every rank; one all-gather of one integer."""
    if world_size(group) == 1:
        return [num_rows]
    sizes: list[int] = all_gather_stack(torch.tensor([num_rows], device=device), group).flatten().tolist()
    return sizes


def all_gather_rows(value_BD: Tensor, sizes: list[int], group: ProcessGroup | None) -> Tensor:
    """Concatenate the rows [B, D] of all ranks to [G, D], B may differ; backward sums the ranks' gradients.

    One all-gather forward, one reduce-scatter backward: the gradient that arrives at each rank's rows is the sum over
    all ranks of what they computed for these rows.
    """
    if world_size(group) == 1:
        return value_BD
    gathered: Tensor = _AllGatherRows.apply(value_BD, sizes, group)  # type: ignore[no-untyped-call]
    return gathered


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_BD: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        padded = _pad_rows(value_BD, max(sizes))
        gathered = all_gather_stack(padded, group)
        return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sizes, longest = ctx.sizes, max(ctx.sizes)
        parts = torch.stack([_pad_rows(part, longest) for part in torch.split(grads[0], sizes)])
        own = parts.new_empty(parts.shape[1:])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1).contiguous(), group=ctx.group)
        return own[: sizes[rank_in(ctx.group)]], None, None


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


def sum_gradient(parameter: Tensor, group: ProcessGroup | None) -> Tensor:
    """Give ``parameter``, equal on all ranks, itself; its gradient is summed over them (one all-reduce backward)."""
    if world_size(group) == 1:
        return parameter
    shared: Tensor = _SumGradient.apply(parameter, group)  # type: ignore[no-untyped-call]
    return shared


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.group), None
