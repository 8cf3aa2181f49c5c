"""The order of samples as a pure function: which sample is where in which global batch.

An epoch is one sequence of all samples: the shards in random order, the rows of each shard in random order. It is cut
into ``num_streams`` equal runs; a global batch takes the same number of samples from the head of every run, so a batch
mixes many shards while each shard is read once, as a whole. Nothing here depends on the number of workers: a rank reads
the slots of the global batch that are its own. The position in a run is the step number alone.

Several data sets in one order (`pipeline.data.mixture`): each goes round and round in laps, every lap a new order of
its shards and rows; an epoch takes ``weight`` laps of each, from where the epoch before stopped, and shuffles the
stretches.
"""

# Shape legend: n = samples of a plan, in the order of training

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.data.manifest import ShardInfo


class DataSet(Protocol):
    """What an order is made of: a `Manifest`, or a `Mixture` of several."""

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """All shards; a shard's number is its place here."""
        ...

    @property
    def members(self) -> tuple[tuple[int, float], ...]:
        """The data sets in it, in shard order: (number of shards, laps an epoch)."""
        ...


class Segment(NamedTuple):
    """A stretch of an epoch within one shard: positions ``start`` to ``stop`` of its shuffled rows, in one lap."""

    shard: int
    lap: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of one epoch.

    Attributes:
        segments: The epoch's sequence.
        shard_sizes: Samples of each shard, by shard number.
        seed: Of the run.
        num_streams: Runs into which the epoch is cut.
    """

    segments: tuple[Segment, ...]
    shard_sizes: tuple[int, ...]
    seed: int
    num_streams: int

    @property
    def num_samples(self) -> int:
        """Samples of the epoch."""
        return int(self.ends[-1])

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Place in the epoch behind the last sample of each segment: int64."""
        return np.cumsum([segment.stop - segment.start for segment in self.segments], dtype=np.int64)

    def num_steps(self, batch: int) -> int:
        """Global batches of the epoch; what remains (fewer samples than one batch) is left out this epoch."""
        return self.num_samples // batch


class Plan(NamedTuple):
    """Samples of one rank in the order of training, each array int64 [n]: shard, row in its file, lap of its set."""

    shard: np.ndarray
    row: np.ndarray
    lap: np.ndarray


def epoch_order(data: DataSet, seed: int, epoch: int, num_streams: int) -> EpochOrder:
    """The order of one epoch.

    Raises:
        ValueError: ``num_streams`` is not positive.
    """
    if num_streams < 1:
        raise ValueError(f"num_streams={num_streams} must be at least 1")
    sizes = tuple(shard.num_samples for shard in data.shards)
    segments: list[Segment] = []
    for member, (shards, count) in enumerate(_members(data)):
        segments += _laps(sizes, shards, member, seed, range(epoch * count, (epoch + 1) * count))
    if len(data.members) > 1:
        mixed = np.random.default_rng((seed, epoch, len(data.members))).permutation(len(segments))
        segments = [segments[place] for place in mixed]
    return EpochOrder(segments=tuple(segments), shard_sizes=sizes, seed=seed, num_streams=num_streams)


def _members(data: DataSet) -> Iterator[tuple[range, int]]:
    """The shards of each set, and how many samples an epoch takes of it: at least one."""
    first = 0
    for num_shards, weight in data.members:
        shards = range(first, first + num_shards)
        yield shards, max(1, round(sum(data.shards[shard].num_samples for shard in shards) * weight))
        first = shards.stop


def _laps(sizes: tuple[int, ...], shards: range, member: int, seed: int, wanted: range) -> list[Segment]:
    """The stretches of a set's endless round (lap after lap, each in an order of its own) that an epoch takes."""
    per_lap = sum(sizes[shard] for shard in shards)
    segments = []
    position = wanted.start - wanted.start % per_lap if len(wanted) else wanted.stop
    while position < wanted.stop:
        lap = position // per_lap
        for shard in (shards.start + np.random.default_rng((seed, lap, member)).permutation(len(shards))).tolist():
            start = max(wanted.start - position, 0)
            stop = min(wanted.stop - position, sizes[shard])
            if start < stop:
                segments.append(Segment(shard, lap, start, stop))
            position += sizes[shard]
    return segments


def rank_slots(batch: int, world_size: int, rank: int) -> tuple[int, int]:
    """This rank's slots of a global batch, as (first, behind the last); ranks differ by at most one."""
    return rank * batch // world_size, (rank + 1) * batch // world_size


def share_sizes(batch: int, world_size: int) -> list[int]:
    """Samples of a global batch that each rank has."""
    slots = [rank_slots(batch, world_size, rank) for rank in range(world_size)]
    return [high - low for low, high in slots]


def check_batch(batch: int, num_streams: int, world_size: int) -> None:
    """Raise ``ValueError`` unless a global batch can be dealt from the streams to the ranks."""
    if batch % num_streams:
        raise ValueError(f"batch_size={batch} must be a multiple of stream.num_streams={num_streams}")
    if batch < world_size:
        raise ValueError(f"batch_size={batch} is less than the {world_size} workers; each needs a sample")


def plan(order: EpochOrder, world_size: int, rank: int, batch: int, step: int = 0, end: int | None = None) -> Plan:
    """The samples of one rank for the steps of an epoch from ``step`` on (to before ``end``), batch after batch."""
    segment, position = _places(order, world_size, rank, batch, step, end)
    shard, row, lap = (np.empty(len(segment), np.int64) for _ in range(3))
    for number in np.unique(segment).tolist():
        here = segment == number
        piece = order.segments[number]
        begin = int(order.ends[number]) - (piece.stop - piece.start)
        rows = row_order(order.seed, piece.lap, piece.shard, order.shard_sizes[piece.shard])
        shard[here], lap[here] = piece.shard, piece.lap
        row[here] = rows[position[here] - begin + piece.start]
    return Plan(shard, row, lap)


def planned_shards(
    order: EpochOrder, world_size: int, rank: int, batch: int, step: int = 0, end: int | None = None
) -> list[int]:
    """The shards that `plan` of the same arguments reads, in the order of their first use."""
    segment, _ = _places(order, world_size, rank, batch, step, end)
    numbers, first = np.unique(segment, return_index=True)
    return list(dict.fromkeys(order.segments[number].shard for number in numbers[np.argsort(first)].tolist()))


def _places(
    order: EpochOrder, world_size: int, rank: int, batch: int, step: int, end: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Segment and place in the epoch of each sample of a plan."""
    check_batch(batch, order.num_streams, world_size)
    num_steps, period = order.num_steps(batch), batch // order.num_streams
    steps = np.arange(step, num_steps if end is None else min(end, num_steps), dtype=np.int64)
    slots = np.arange(*rank_slots(batch, world_size, rank), dtype=np.int64)
    # Slot s of a global batch is slot s % period of stream s // period, whose run begins at stream * its length.
    starts = slots // period * (num_steps * period) + slots % period
    position = (steps[:, None] * period + starts[None]).reshape(-1)
    return np.searchsorted(order.ends, position, side="right"), position


# A rank looks at the same few shards again and again.
@functools.lru_cache(maxsize=1024)
def row_order(seed: int, lap: int, shard: int, shard_size: int) -> np.ndarray:
    """The rows of a shard in the order of one lap: int64 [shard_size], read only."""
    rows = np.random.default_rng((seed, lap, shard)).permutation(shard_size)
    rows.setflags(write=False)
    return rows


def steps_per_epoch(data: DataSet, batch: int) -> int:
    """Global batches of an epoch.

    Raises:
        ValueError: The data is smaller than one batch.
    """
    total = epoch_samples(data)
    if total // batch == 0:
        raise ValueError(f"batch_size={batch} is more than the {total} samples of an epoch")
    return total // batch


def epoch_samples(data: DataSet) -> int:
    """Samples of an epoch, before what is less than a batch is left out."""
    return sum(count for _, count in _members(data))
