"""Collectives with gradients equal the same computation in one process, uneven and empty ranks included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lgaf.distributed import (
    RowExchange,
    all_gather_stack,
    all_reduce_sum,
    rank_in,
    scale_gradient,
    world_size,
)
from tests.distributed import run_distributed

DIM = 5
SIZES = {1: [[4]], 2: [[3, 4], [5, 0], [0, 5]], 3: [[2, 0, 3], [0, 0, 4], [1, 1, 1]]}  # rows per rank, by world size


def _rows(sizes: list[int]) -> torch.Tensor:
    return torch.randn(sum(sizes), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def _loss_of_rank(gathered: torch.Tensor, rank: int) -> torch.Tensor:
    # Nonlinear, different on every rank, and depending on the place of each row.
    places = torch.arange(1, len(gathered) + 1, dtype=torch.float64)[:, None]
    return (gathered.sin() * places * (rank + 2)).square().sum()


def _check_rows(group, exchange: RowExchange, sizes: list[int], known: bool) -> None:
    rank = dist.get_rank(group)
    everyone = _rows(sizes)
    low = sum(sizes[:rank])
    own = everyone[low : low + sizes[rank]].clone().requires_grad_()
    # Seven numbers that all ranks have alike: more than fit beside the rows of some cases.
    numbers = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    exchange.start(own, sizes if known else None)
    gathered, shared = exchange.finish(own, numbers)
    assert torch.equal(gathered, everyone)
    assert torch.equal(shared, numbers)
    (_loss_of_rank(gathered, rank) + (rank + 1) * (shared**2).sum()).backward()
    total = len(sizes) * (len(sizes) + 1) / 2
    torch.testing.assert_close(numbers.grad, 2 * total * numbers.detach(), rtol=1e-13, atol=0)

    # One process: the same rows, and the sum of all ranks' losses.
    whole = everyone.clone().requires_grad_()
    sum(_loss_of_rank(whole, other) for other in range(len(sizes))).backward()
    assert own.grad.shape == own.shape
    torch.testing.assert_close(own.grad, whole.grad[low : low + sizes[rank]], rtol=1e-13, atol=1e-13)


def _check_sums_and_stacks(group) -> None:
    rank, world = rank_in(group), world_size(group)
    assert (rank, world) == (dist.get_rank(), 3)
    mine = torch.tensor([[rank + 1.0, 10.0 * rank]])
    assert torch.equal(all_reduce_sum(mine, group), torch.tensor([[6.0, 30.0]]))
    assert torch.equal(mine, torch.tensor([[rank + 1.0, 10.0 * rank]])), "the argument must stay as it was"
    stacked = all_gather_stack(mine, group)
    assert stacked.shape == (3, 1, 2)
    assert torch.equal(stacked, torch.tensor([[[1.0, 0.0]], [[2.0, 10.0]], [[3.0, 20.0]]]))
    # Columns of a matrix are not contiguous; the collective must not see their strides.
    column = torch.arange(6.0).view(3, 2)[:, rank % 2]
    assert torch.equal(all_gather_stack(column, group)[rank], column)


def _check_all(group) -> None:
    # One exchange for all: it must forget the lengths of earlier batches where they no longer hold.
    exchange = RowExchange(group)
    for sizes in [*SIZES[world_size(group)], *reversed(SIZES[world_size(group)])]:
        for known in (False, True):
            _check_rows(group, exchange, sizes, known)
    if world_size(group) == 3:
        _check_sums_and_stacks(group)


# All cases of one world size in one start of the ranks: it is the starts that cost.
@pytest.mark.parametrize("world", SIZES)
def test_gathers_equal_one_process_forward_and_backward(world):
    run_distributed(world, _check_all)


def test_no_group_is_this_process_alone():
    value = torch.randn(3, DIM, requires_grad=True)
    assert (world_size(None), rank_in(None)) == (1, 0)
    numbers = torch.randn(2, requires_grad=True)
    exchange = RowExchange(None)
    exchange.start(value)
    rows, shared = exchange.finish(value, numbers)
    assert rows is value
    assert shared is numbers
    with pytest.raises(ValueError, match=r"rank 0 of 1 has 3 rows.*sizes=\[2\]"):
        exchange.start(value, [2])
    assert all_reduce_sum(value, None) is value
    assert torch.equal(all_gather_stack(value, None), value[None])


@pytest.mark.parametrize("factor", [1, 2, 3.5, 0.0])
def test_scale_gradient_scales_the_gradient_alone(factor):
    value = torch.randn(4, DIM, dtype=torch.float64, requires_grad=True)
    same = scale_gradient(value, factor)
    assert torch.equal(same, value)
    (same**3).sum().backward()
    torch.testing.assert_close(value.grad, 3 * value.detach() ** 2 * factor)


def test_scale_gradient_leaves_other_paths_alone():
    value = torch.tensor([2.0], requires_grad=True)
    (scale_gradient(value, 10.0) + 5 * value).sum().backward()
    assert value.grad.item() == 15.0
