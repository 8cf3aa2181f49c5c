"""Tensors with one row a class, for another number of ranks or another set of classes.

For the centres of the head and whatever the optimizer keeps beside them: rows are only ever copied, never changed.
"""

# Shape legend: C = all classes, D = columns, W = world size. Shards may have any shape after their rows, also none.

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lgaf.config import require_positive
from lgaf.distributed import all_gather_stack, rank_in, world_size
from lgaf.heads.class_shard import class_range

# At 512 columns of float32 these are 128 MiB.
BLOCK_ROWS: Final = 65_536
NEW_IDENTITY: Final = -1


@torch.no_grad()
def reshard(shards: Sequence[Tensor], num_classes: int, new_world_size: int) -> list[Tensor]:
    """Cut the shards of all ranks, in rank order, to those of ``new_world_size`` ranks.

    Each new shard is copied from the old ones it overlaps, so the shards may lie in mapped files. The new ones are on
    the device of the first.

    Raises:
        ValueError: The rows of a shard are not the classes of its rank, shards of unlike dtype or columns, or fewer
            classes than ranks.
    """
    require_positive("the number of shards", len(shards))
    old = [class_range(num_classes, len(shards), rank) for rank in range(len(shards))]
    for rank, shard in enumerate(shards):
        _check_shard(f"the shard of rank {rank} of {len(shards)}", shard, len(old[rank]), "rank 0's", shards[0])
    resharded = []
    for new in (class_range(num_classes, new_world_size, rank) for rank in range(new_world_size)):
        rows = shards[0].new_empty((len(new), *shards[0].shape[1:]))
        for classes, shard in zip(old, shards, strict=True):
            low, high = max(new.start, classes.start), min(new.stop, classes.stop)
            if low < high:
                rows[low - new.start : high - new.start] = shard[low - classes.start : high - classes.start]
        resharded.append(rows)
    return resharded


def match_identities(old_names: Sequence[str], new_names: Sequence[str]) -> Tensor:
    """The old class id of each new class [C_new], int64, -1 for a new identity: those of one name are the same.

    Args:
        old_names: Names of the identities in the order of the old class ids.
        new_names: The same of the new ones.

    Raises:
        ValueError: One list holds a name twice.
    """
    old_ids = _ids_by_name("old", old_names)
    _ids_by_name("new", new_names)
    return torch.tensor([old_ids.get(name, NEW_IDENTITY) for name in new_names], dtype=torch.int64)


def check_old_of_new(old_of_new: Tensor, num_old_classes: int) -> None:
    """Check the old class id of each new class [C_new]: -1 for a new identity, no old class twice.

    Raises:
        ValueError: Not a vector of int64, an entry outside [-1, num_old_classes), or an old class taken twice.
    """
    require_positive("num_old_classes", num_old_classes)
    if old_of_new.ndim != 1 or old_of_new.dtype != torch.int64:
        raise ValueError(
            f"old_of_new of shape {list(old_of_new.shape)} and {old_of_new.dtype} must be one torch.int64 a new class"
        )
    outside = ((old_of_new < NEW_IDENTITY) | (old_of_new >= num_old_classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"new class {first}: old_of_new={int(old_of_new[first])} must be an old class id below {num_old_classes}, "
            f"or {NEW_IDENTITY} for a new identity; {len(outside)} of {len(old_of_new)} entries are neither"
        )
    sorted_ids = old_of_new.sort().values
    repeated = sorted_ids[1:][(sorted_ids[1:] == sorted_ids[:-1]) & (sorted_ids[1:] != NEW_IDENTITY)]
    if len(repeated):
        takers = (old_of_new == repeated[0]).nonzero().flatten().tolist()
        raise ValueError(f"new classes {', '.join(map(str, takers[:8]))} all take old class {int(repeated[0])}")


@torch.no_grad()
def carried_over(
    old_shard: Tensor,
    num_old_classes: int,
    old_of_new: Tensor,
    fresh: Tensor,
    group: ProcessGroup | None = None,
    block_rows: int = BLOCK_ROWS,
) -> Tensor:
    """This rank's shard of the new classes: a copy of ``fresh`` with the old rows of the classes that stay.

    Only rows that change their rank travel, a block at a time: beside the shards a rank holds at most
    max(``block_rows``, W - 1) rows that it sends and as many that it receives, never the whole tensor.

    Collectives: one all-gather of a number, then one all-to-all a block, as many as the busiest pair of ranks needs.
    None with a group of one or ``group=None``. All ranks call it, with the same map.

    Args:
        old_shard: [c, ...], the rows of this rank's ``class_range`` of the old classes; may stay in host memory.
        num_old_classes: Over all ranks.
        old_of_new: [C_new], see `check_old_of_new`; whole on every rank, on any device.
        fresh: [c', ...], the rows of this rank's ``class_range`` of the new classes as if all were new: initial
            centres for the weight, zeros for the momentum. The result is on its device, where the rows also travel.
        group: The ranks that share the classes; None for this process alone.
        block_rows: Rows that a rank sends (and receives) at once.

    Raises:
        ValueError: A map that is not valid or not the same on all ranks, shards that do not fit the classes or each
            other, fewer classes than ranks.
    """
    require_positive("block_rows", block_rows)
    check_old_of_new(old_of_new, num_old_classes)
    world, rank = world_size(group), rank_in(group)
    num_old_rows, num_rows = (len(class_range(num, world, rank)) for num in (num_old_classes, len(old_of_new)))
    _check_shard(f"old_shard of rank {rank} of {world}", old_shard, num_old_rows, "fresh", fresh)
    _check_shard(f"fresh of rank {rank} of {world}", fresh, num_rows, "old_shard", old_shard)
    old_of_new = old_of_new.cpu().contiguous()
    _check_same_on_all_ranks(old_of_new, (num_old_classes, fresh.shape[1:], fresh.dtype, block_rows), fresh, group)

    moves = _plan(num_old_classes, old_of_new, world, rank)
    carried = fresh.clone()
    for source, target in zip(*(torch.split(rows, block_rows) for rows in moves.staying), strict=True):
        carried[target.to(carried.device)] = _rows(old_shard, source, carried.device)
    # A share for each pair bounds both sides alike, however unevenly the rows are spread over the ranks.
    share = max(1, block_rows // max(1, world - 1))
    for first in range(0, moves.busiest_pair, share):
        block = slice(first, first + share)
        sent, received = ([rows[block] for rows in by_peer] for by_peer in (moves.sent, moves.received))
        outgoing = _rows(old_shard, torch.cat(sent), carried.device)
        target = torch.cat(received).to(carried.device)
        incoming = outgoing.new_empty((len(target), *outgoing.shape[1:]))
        dist.all_to_all_single(incoming, outgoing, [len(r) for r in received], [len(r) for r in sent], group=group)
        carried[target] = incoming
    return carried


class _Moves(NamedTuple):
    """Which rows go where; what one rank sends and the other receives is in the same order on both."""

    staying: tuple[Tensor, Tensor]  # rows of the old shard, and where this rank itself has them in the new one
    sent: list[Tensor]  # rows of the old shard, by the rank that gets them; none for this rank
    received: list[Tensor]  # rows of the new shard, by the rank they come from; none from this rank
    busiest_pair: int  # rows from the one to the other of the two ranks with the most, over the whole group


def _plan(num_old_classes: int, old_of_new: Tensor, world: int, rank: int) -> _Moves:
    first_of_rank = torch.tensor([class_range(num_old_classes, world, r).start for r in range(world)])
    sent, received, busiest_pair = [], [], 0
    # Every rank knows the whole map, so none need be told what to send; one receiver at a time keeps this small.
    for receiver in range(world):
        new = class_range(len(old_of_new), world, receiver)
        old_ids = old_of_new[new.start : new.stop]
        known = (old_ids != NEW_IDENTITY).nonzero().flatten()
        old_ids = old_ids[known]
        owner = torch.bucketize(old_ids, first_of_rank[1:], right=True)
        counts = owner.bincount(minlength=world).tolist()
        sent.append(old_ids[owner == rank] - first_of_rank[rank])
        if receiver == rank:
            received = list(torch.split(known[owner.argsort(stable=True)], counts))
        busiest_pair = max(busiest_pair, *counts[:receiver], *counts[receiver + 1 :], 0)
    staying = sent[rank], received[rank]
    sent[rank] = received[rank] = first_of_rank[:0]
    return _Moves(staying, sent, received, busiest_pair)


def _rows(shard: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return shard[rows.to(shard.device)].to(device)


def _check_same_on_all_ranks(
    old_of_new: Tensor, arguments: tuple[object, ...], like: Tensor, group: ProcessGroup | None
) -> None:
    # Ranks with different maps would wait for each other for ever, or put rows to other people's classes.
    digest = zlib.crc32(repr(arguments).encode(), zlib.crc32(old_of_new.numpy().data))
    digests = all_gather_stack(torch.tensor([digest], device=like.device), group).flatten().tolist()
    unlike = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if unlike:
        raise ValueError(
            f"old_of_new, num_old_classes, columns, dtype or block_rows of ranks {unlike} are not rank 0's"
        )


def _check_shard(name: str, shard: Tensor, num_rows: int, other_name: str, other: Tensor) -> None:
    found = shard.shape[0] if shard.ndim else "no"
    if found != num_rows:
        raise ValueError(f"{name} has {found} rows where its classes are {num_rows}")
    if shard.shape[1:] != other.shape[1:] or shard.dtype != other.dtype:
        raise ValueError(
            f"{name} has rows of shape {list(shard.shape[1:])} and {shard.dtype}, "
            f"{other_name} of shape {list(other.shape[1:])} and {other.dtype}"
        )


def _ids_by_name(which: str, names: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for class_id, name in enumerate(names):
        if (first := ids.setdefault(name, class_id)) != class_id:
            raise ValueError(f"the {which} identity {name!r} stands twice, as class {first} and class {class_id}")
    return ids
