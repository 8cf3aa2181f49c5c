"""Rows of classes survive another number of ranks and another set of classes bit by bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st

from lgaf.heads import resharding
from lgaf.heads.centres import initial_centres
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import create_margin
from lgaf.heads.resharding import carried_over, check_old_of_new, match_identities, reshard
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.optim import OptimizerConfig
from tests.distributed import run_distributed

DIM = 3


def _rows(num_rows: int, *tail: int, seed: int = 0) -> torch.Tensor:
    """Any bits of float32 at all, NaNs among them; compared by `_same_bits`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (num_rows, *tail), generator=generator).int().view(torch.float32)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.int32), right.view(torch.int32))


def _shard(whole: torch.Tensor, world: int, rank: int) -> torch.Tensor:
    classes = class_range(len(whole), world, rank)
    return whole[classes.start : classes.stop]


def _shards(whole: torch.Tensor, world: int) -> list[torch.Tensor]:
    return [_shard(whole, world, rank) for rank in range(world)]


def _expected(old: torch.Tensor, old_of_new: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    expected = fresh.clone()
    for new_id, old_id in enumerate(old_of_new.tolist()):
        if old_id != -1:
            expected[new_id] = old[old_id]
    return expected


def _map(num_old: int, num_new: int, num_kept: int, seed: int) -> torch.Tensor:
    """``num_kept`` random old classes at random places of the new ones."""
    generator = torch.Generator().manual_seed(seed)
    old_of_new = torch.full((num_new,), -1)
    places = torch.randperm(num_new, generator=generator)[:num_kept]
    old_of_new[places] = torch.randperm(num_old, generator=generator)[:num_kept]
    return old_of_new


# --- another number of ranks


@given(st.integers(1, 80), st.integers(1, 12), st.integers(1, 12), st.sampled_from([(), (DIM,), (0,), (2, 2)]))
def test_reshard_is_slicing_and_its_own_inverse(num_classes, old_world, new_world, tail):
    assume(num_classes >= max(old_world, new_world))
    whole = _rows(num_classes, *tail)
    shards = _shards(whole, old_world)
    resharded = reshard(shards, num_classes, new_world)
    assert all(map(_same_bits, resharded, _shards(whole, new_world)))
    assert _same_bits(torch.cat(resharded), whole)
    back = reshard(resharded, num_classes, old_world)
    assert len(back) == old_world
    assert all(map(_same_bits, back, shards))


def test_resharded_rows_are_copies_without_gradient():
    whole = torch.nn.Parameter(torch.ones(6, DIM))
    resharded = reshard([whole], 6, 1)[0]
    assert not resharded.requires_grad
    resharded.zero_()
    assert whole.detach().eq(1).all()


@pytest.mark.parametrize(
    ("shards", "num_classes", "world", "text"),
    [
        ([torch.ones(3, 2), torch.ones(3, 2)], 5, 2, r"the shard of rank 1 of 2 has 3 rows where its classes are 2"),
        ([torch.ones(3, 2), torch.tensor(1.0)], 5, 2, r"rank 1 of 2 has no rows where its classes are 2"),
        (
            [torch.ones(3, 2), torch.ones(2, 4)],
            5,
            2,
            r"the shard of rank 1 of 2 has rows of shape \[4\] and torch.float32, rank 0's of shape \[2\]",
        ),
        ([torch.ones(3, 2), torch.ones(2, 2).double()], 5, 2, r"rank 1 of 2 .*float64, rank 0's .*float32"),
        ([torch.ones(3), torch.ones(2, 1)], 5, 2, r"rank 1 of 2 has rows of shape \[1\] .* rank 0's of shape \[\]"),
        ([], 5, 2, "the number of shards=0"),
        ([torch.ones(5, 2)], 5, 6, "num_classes=5 is less than the 6 ranks"),
        ([torch.ones(1, 2)] * 3, 2, 1, "num_classes=2 is less than the 3 ranks"),
        ([torch.ones(5, 2)], 0, 1, "num_classes=0"),
    ],
)
def test_shards_that_do_not_fit_are_named(shards, num_classes, world, text):
    with pytest.raises(ValueError, match=text):
        reshard(shards, num_classes, world)


# --- which class was which


def test_identities_are_matched_by_name():
    matched = match_identities(["ann", "bob", "cy"], ["cy", "dan", "ann"])
    assert matched.tolist() == [2, -1, 0]
    assert matched.dtype == torch.int64
    check_old_of_new(matched, 3)
    assert match_identities([], ["ann"]).tolist() == [-1]


@given(st.permutations([f"person {i}" for i in range(9)]), st.integers(0, 9), st.integers(0, 9))
def test_matched_identities_have_the_same_name(names, num_old, first_new):
    old, new = names[:num_old], sorted(names[first_new:])
    matched = match_identities(old, new).tolist()
    assert [old[i] if i >= 0 else None for i in matched] == [name if name in old else None for name in new]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (["a", "b", "a"], ["a"], "the old identity 'a' stands twice, as class 0 and class 2"),
        (["a"], ["c", "b", "b"], "the new identity 'b' stands twice, as class 1 and class 2"),
    ],
)
def test_a_name_that_stands_twice_is_refused(old, new, text):
    with pytest.raises(ValueError, match=text):
        match_identities(old, new)


@pytest.mark.parametrize(
    ("old_of_new", "num_old", "text"),
    [
        (torch.tensor([0, 5, -1, 7]), 5, r"new class 1: old_of_new=5 must be .* below 5.*; 2 of 4 entries"),
        (torch.tensor([0, -2]), 5, "new class 1: old_of_new=-2 must be"),
        (torch.tensor([3, -1, 0, 3, -1]), 5, "new classes 0, 3 all take old class 3"),
        (torch.zeros(20, dtype=torch.int64), 5, "new classes 0, 1, 2, 3, 4, 5, 6, 7 all take old class 0"),
        (torch.tensor([[0]]), 5, r"old_of_new of shape \[1, 1\] and torch.int64 must be one torch.int64 a new class"),
        (torch.tensor([0.0]), 5, r"shape \[1\] and torch.float32 must be"),
        (torch.tensor([0], dtype=torch.int32), 5, r"torch.int32 must be"),
        (torch.tensor([-1]), 0, "num_old_classes=0"),
    ],
)
def test_maps_that_are_not_valid_are_named(old_of_new, num_old, text):
    with pytest.raises(ValueError, match=text):
        check_old_of_new(old_of_new, num_old)
    with pytest.raises(ValueError, match=text):
        carried_over(torch.ones(num_old, 2), num_old, old_of_new, torch.ones(len(old_of_new), 2))


# --- another set of classes, one process


@given(st.data(), st.integers(1, 30), st.integers(1, 30), st.sampled_from([(), (DIM,), (0,), (2, 2)]))
def test_without_a_group_it_is_indexing(data, num_old, num_new, tail):
    num_kept = data.draw(st.integers(0, min(num_old, num_new)))
    old_of_new = _map(num_old, num_new, num_kept, seed=data.draw(st.integers(0, 99)))
    old, fresh = _rows(num_old, *tail), _rows(num_new, *tail, seed=1)
    before = old.clone(), fresh.clone()
    carried = carried_over(old, num_old, old_of_new, fresh, block_rows=data.draw(st.integers(1, 40)))
    assert _same_bits(carried, _expected(old, old_of_new, fresh))
    assert _same_bits(old, before[0])
    assert _same_bits(fresh, before[1])


def test_parameters_come_back_as_plain_copies():
    old, fresh = (torch.nn.Parameter(torch.full((2, DIM), value)) for value in (1.0, 2.0))
    carried = carried_over(old, 2, torch.tensor([1, -1]), fresh)
    assert not carried.requires_grad
    assert carried.tolist() == [[1.0] * DIM, [2.0] * DIM]


@pytest.mark.parametrize(
    ("old", "fresh", "block_rows", "text"),
    [
        (torch.ones(4, 2), torch.ones(3, 2), 1, r"old_shard of rank 0 of 1 has 4 rows where its classes are 5"),
        (torch.ones(5, 2), torch.ones(4, 2), 1, r"fresh of rank 0 of 1 has 4 rows where its classes are 3"),
        (torch.ones(5, 2), torch.ones(3, 1), 1, r"old_shard .* rows of shape \[2\] .*fresh of shape \[1\]"),
        (torch.ones(5, 2).double(), torch.ones(3, 2), 1, r"old_shard .*float64, fresh .*float32"),
        (torch.ones(5, 2), torch.ones(3, 2), 0, "block_rows=0"),
    ],
)
def test_shards_that_do_not_fit_the_map_are_named(old, fresh, block_rows, text):
    with pytest.raises(ValueError, match=text):
        carried_over(old, 5, torch.tensor([0, 1, -1]), fresh, block_rows=block_rows)


def test_no_new_class_is_refused():
    with pytest.raises(ValueError, match="num_classes=0"):
        carried_over(torch.ones(5, 2), 5, torch.tensor([], dtype=torch.int64), torch.ones(0, 2))


# --- another set of classes, several ranks

KEPT = {  # by what happens: old classes, and the old class of each new one
    "appended": (11, torch.cat([torch.arange(11), torch.full((9,), -1)])),
    "put before": (11, torch.cat([torch.full((9,), -1), torch.arange(11)])),
    "removed": (23, torch.arange(23)[torch.arange(23) % 3 != 1]),
    "permuted": (17, torch.randperm(17, generator=torch.Generator().manual_seed(1))),
    "reversed": (16, torch.arange(16).flip(0)),
    "unchanged": (13, torch.arange(13)),
    "replaced": (8, torch.full((9,), -1)),
    # Ceil shares of 5 over 4 ranks: the last owns nothing, before, after, or both.
    "last rank emptied": (9, torch.tensor([8, 7, -1, 0, 1])),
    "last rank filled": (5, torch.cat([torch.full((4,), -1), torch.arange(5).flip(0)])),
    "last rank empty": (5, torch.tensor([4, 0, -1, 3, 2])),
}


def _check_carried(group, names: list[str], blocks: list[int]) -> None:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    exchange, copied_rows = dist.all_to_all_single, resharding._rows
    for name in names:
        num_old, old_of_new = KEPT[name] if name in KEPT else (40, _map(40, 37, 25, seed=int(name)))
        for tail in ((DIM,), (), (0,)):
            old, fresh = _rows(num_old, *tail), _rows(len(old_of_new), *tail, seed=1)
            expected = _shard(_expected(old, old_of_new, fresh), world, rank)
            for block_rows in blocks:
                bound = max(block_rows, world - 1)
                sent = []

                def bounded(output, value, *args, sent=sent, bound=bound, **kwargs):
                    assert len(output) <= bound
                    assert len(value) <= bound
                    sent.append(len(value))
                    exchange(output, value, *args, **kwargs)

                def bounded_copy(shard, rows, device, bound=bound):
                    assert len(rows) <= bound
                    return copied_rows(shard, rows, device)

                with (
                    mock.patch.object(dist, "all_to_all_single", bounded),
                    mock.patch.object(resharding, "_rows", bounded_copy),
                ):
                    carried = carried_over(
                        _shard(old, world, rank), num_old, old_of_new, _shard(fresh, world, rank), group, block_rows
                    )
                assert _same_bits(carried, expected), (name, tail, block_rows)
                # Only what changes its rank travels, and each row once.
                own_old = class_range(num_old, world, rank)
                own_new = class_range(len(old_of_new), world, rank)
                leaving = [n for n, old_id in enumerate(old_of_new.tolist()) if old_id in own_old and n not in own_new]
                assert sum(sent) == len(leaving), (name, tail, block_rows)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_rank_gets_its_rows_in_bounded_blocks(world):
    run_distributed(world, _check_carried, [*KEPT, *map(str, range(6))], [1, 4, 1000])


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 5, 8])
def test_random_maps_over_more_ranks(world):
    run_distributed(world, _check_carried, [*map(str, range(20))], [1, 2, 7, 13, 1000])


def _check_subgroup(group) -> None:
    members = [3, 1]
    pair = dist.new_group(members)
    if dist.get_rank(group) in members:
        rank = dist.get_rank(pair)
        old, old_of_new, fresh = _rows(5, DIM), torch.tensor([4, -1, 0, 3]), _rows(4, DIM, seed=1)
        carried = carried_over(_shard(old, 2, rank), 5, old_of_new, _shard(fresh, 2, rank), pair)
        assert _same_bits(carried, _shard(_expected(old, old_of_new, fresh), 2, rank))


def test_a_part_of_the_ranks_may_share_the_classes():
    run_distributed(4, _check_subgroup)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes_travel(dtype):
    run_distributed(2, _check_dtype, dtype)


def _check_dtype(group, dtype: torch.dtype) -> None:
    rank = dist.get_rank(group)
    old, old_of_new = torch.arange(7).to(dtype), torch.arange(7).flip(0)
    carried = carried_over(_shard(old, 2, rank), 7, old_of_new, _shard(torch.zeros(7, dtype=dtype), 2, rank), group)
    assert torch.equal(carried, _shard(old.flip(0), 2, rank))


def _check_unlike_maps(group) -> None:
    rank = dist.get_rank(group)
    fresh = torch.zeros(2, DIM)
    # As many rows from and to each rank: nothing but the comparison could tell.
    old_of_new = torch.tensor([3, 2, 1, 0, -1, -1] if rank == 1 else [2, 3, 0, 1, -1, -1])
    with pytest.raises(ValueError, match=r"old_of_new.* of ranks \[1\] are not rank 0's"):
        carried_over(torch.ones(2, DIM), 6, old_of_new, fresh, group)
    with pytest.raises(ValueError, match=r"block_rows of ranks \[1, 2\] are not rank 0's"):
        carried_over(torch.ones(2, DIM), 6, torch.arange(6), fresh, group, block_rows=1 if rank == 0 else 2)
    with pytest.raises(ValueError, match=rf"fresh of rank {rank} of 3 has 2 rows where its classes are 1"):
        carried_over(torch.ones(2, DIM), 6, torch.arange(3), fresh, group)


def test_ranks_with_unlike_maps_are_told():
    run_distributed(3, _check_unlike_maps)


# --- the whole use

SEED = 3
OPTIMIZER = OptimizerConfig(learning_rate=0.5)


def _step(head: ShardedMarginHead, optimizer: torch.optim.Optimizer, num_classes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(8, 16, generator=generator), torch.randint(0, num_classes, (8,), generator=generator)
    if head.group is not None:
        world, rank = dist.get_world_size(head.group), dist.get_rank(head.group)
        x, labels = x.chunk(world)[rank], labels.chunk(world)[rank]
    optimizer.zero_grad()
    loss = head(x, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _head(num_classes: int, group=None):
    head = ShardedMarginHead(num_classes, 16, create_margin("arcface", scale=8.0), group=group, seed=SEED)
    return head, OPTIMIZER.build([head])


def _restore(head, optimizer, weight: torch.Tensor, momentum: torch.Tensor) -> None:
    with torch.no_grad():
        head.weight.copy_(weight)
        optimizer.state[head.weight]["momentum_buffer"].copy_(momentum)


def _check_grown(group, folder, old_names, new_names) -> None:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    num_old, num_new = len(old_names), len(new_names)
    written = [torch.load(folder / f"{writer}.pt") for writer in range(3)]
    old_of_new = match_identities(old_names, new_names)
    head, optimizer = _head(num_new, group)
    carried = {}
    for name, fresh in (("weight", head.weight), ("momentum", optimizer.state[head.weight]["momentum_buffer"])):
        old_shard = reshard([shard[name] for shard in written], num_old, world)[rank]
        carried[name] = carried_over(old_shard, num_old, old_of_new, fresh, group, block_rows=2)
    _restore(head, optimizer, **carried)

    # The same in one process, by plain indexing.
    whole = {name: torch.cat([shard[name] for shard in written]) for name in carried}
    weight = _expected(whole["weight"], old_of_new, initial_centres(range(num_new), 16, SEED))
    momentum = _expected(whole["momentum"], old_of_new, torch.zeros(num_new, 16))
    assert torch.equal(carried["weight"], _shard(weight, world, rank))
    assert torch.equal(carried["momentum"], _shard(momentum, world, rank))

    alone, alone_optimizer = _head(num_new)
    _restore(alone, alone_optimizer, weight, momentum)
    loss = _step(head, optimizer, num_new, seed=9)
    torch.testing.assert_close(loss, _step(alone, alone_optimizer, num_new, seed=9))
    torch.testing.assert_close(head.weight.detach(), _shard(alone.weight.detach(), world, rank))


@pytest.mark.parametrize(
    "new_names",
    [
        [f"person {i}" for i in range(15)],
        sorted([f"person {i}" for i in range(0, 10, 2)] + ["someone", "person 100", "another"]),
    ],
    ids=["appended", "some removed, some added between"],
)
def test_a_trained_head_goes_on_with_other_people(tmp_path, new_names):
    head, optimizer = _head(10)
    for step in range(3):
        _step(head, optimizer, 10, seed=step)
    whole = {"weight": head.weight.detach(), "momentum": optimizer.state[head.weight]["momentum_buffer"]}
    assert whole["momentum"].abs().sum() > 0
    for rank in range(3):
        torch.save({name: _shard(value, 3, rank).clone() for name, value in whole.items()}, tmp_path / f"{rank}.pt")
    run_distributed(2, _check_grown, tmp_path, [f"person {i}" for i in range(10)], new_names)
