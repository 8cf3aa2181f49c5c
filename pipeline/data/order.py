"""The order of samples as a pure function: which sample is where in which global batch.

An epoch is one permutation of all samples: the shards in random order, the rows of each shard in random order. It is
cut into ``num_streams`` equal runs; a global batch takes the same number of samples from the head of every stream, so a
batch mixes many shards while each shard is read once, as a whole. Nothing here depends on the number of workers: a rank
reads the slots of the global batch that are its own. The position in a run is the step number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochOrder:
    """The order of one epoch: shard sizes, the shards' order, and the seed of the rows' orders.

    Attributes:
        shard_sizes: Samples of each shard, by shard number.
        shard_order: Shard numbers in the order of this epoch.
        seed: Of the run.
        epoch: From 0.
        num_streams: Runs into which the epoch is cut.
    """

    shard_sizes: tuple[int, ...]
    shard_order: tuple[int, ...]
    seed: int
    epoch: int
    num_streams: int

    def num_steps(self, batch: int) -> int:
        """Global batches of the epoch; what remains (fewer samples than one batch) is left out this epoch."""
        return sum(self.shard_sizes) // batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPiece:
    """What one rank reads of one shard in one go, for one stream.

    Attributes:
        epoch: Of the order.
        stream: The stream that the rows feed.
        shard: Shard number.
        start: First position in the shard's shuffled rows.
        stop: Position behind the last.
        phase: Slot (within the stream's part of a global batch) of the row at ``start``.
        period: Slots of the stream in a global batch.
        slots: This rank's slots of them, as (first, behind the last).
        first_step: Step of the epoch that needs the first row.
    """

    epoch: int
    stream: int
    shard: int
    start: int
    stop: int
    phase: int
    period: int
    slots: tuple[int, int]
    first_step: int


def epoch_order(manifest: Manifest, seed: int, epoch: int, num_streams: int) -> EpochOrder:
    """The order of one epoch.

    Raises:
        ValueError: ``num_streams`` is not positive.
    """
    if num_streams < 1:
        raise ValueError(f"num_streams={num_streams} must be at least 1")
    order = np.random.default_rng((seed, epoch)).permutation(len(manifest.shards))
    return EpochOrder(
        shard_sizes=tuple(shard.num_samples for shard in manifest.shards),
        shard_order=tuple(order.tolist()),
        seed=seed,
        epoch=epoch,
        num_streams=num_streams,
    )


def rank_slots(batch: int, world_size: int, rank: int) -> tuple[int, int]:
    """This rank's slots of a global batch, as (first, behind the last); ranks differ by at most one."""
    return rank * batch // world_size, (rank + 1) * batch // world_size


def stream_slots(batch: int, num_streams: int, world_size: int, rank: int) -> list[tuple[int, int, int]]:
    """The streams that feed a rank: (stream, first slot in the stream's part, behind the last), in batch order."""
    check_batch(batch, num_streams, world_size)
    period = batch // num_streams
    low, high = rank_slots(batch, world_size, rank)
    return [
        (stream, max(low - stream * period, 0), min(high - stream * period, period))
        for stream in range(low // period, -(-high // period))
    ]


def check_batch(batch: int, num_streams: int, world_size: int) -> None:
    """Raise ``ValueError`` unless a global batch can be dealt from the streams to the ranks."""
    if batch % num_streams:
        raise ValueError(f"batch_size={batch} must be a multiple of stream.num_streams={num_streams}")
    if batch < world_size:
        raise ValueError(f"batch_size={batch} is less than the {world_size} workers; each needs a sample")


def plan(
    order: EpochOrder, world_size: int, rank: int, batch: int, step: int = 0, end: int | None = None
) -> list[ReadPiece]:
    """What a rank reads for the steps of an epoch from ``step`` on (to before ``end``), in the order of its need."""
    num_steps = order.num_steps(batch)
    last = num_steps if end is None else min(end, num_steps)
    period = batch // order.num_streams
    ends = np.cumsum([order.shard_sizes[shard] for shard in order.shard_order])
    pieces = []
    for stream, low, high in stream_slots(batch, order.num_streams, world_size, rank):
        base = stream * num_steps * period
        position, stop = base + step * period, base + last * period
        while position < stop:
            place = int(np.searchsorted(ends, position, side="right"))
            shard = order.shard_order[place]
            begin = int(ends[place]) - order.shard_sizes[shard]
            end = min(int(ends[place]), stop)
            piece = ReadPiece(
                epoch=order.epoch,
                stream=stream,
                shard=shard,
                start=position - begin,
                stop=end - begin,
                phase=(position - base) % period,
                period=period,
                slots=(low, high),
                first_step=(position - base) // period,
            )
            if _owned(piece).any():
                pieces.append(piece)
            position = end
    return sorted(pieces, key=lambda piece: (piece.first_step, piece.stream))


def _owned(piece: ReadPiece) -> np.ndarray:
    slot = (np.arange(piece.stop - piece.start) + piece.phase) % piece.period
    return (slot >= piece.slots[0]) & (slot < piece.slots[1])


def piece_rows(piece: ReadPiece, shard_size: int, seed: int) -> np.ndarray:
    """Rows of the shard that a piece takes, in the order of training: int64 [n]."""
    shuffled = np.random.default_rng((seed, piece.epoch, piece.shard)).permutation(shard_size)
    rows: np.ndarray = shuffled[piece.start : piece.stop][_owned(piece)]
    return rows


def run_plan(
    manifest: Manifest, *, seed: int, num_streams: int, world_size: int, rank: int, batch: int, steps: range
) -> Iterator[ReadPiece]:
    """What a rank reads for the steps of a whole run, epoch after epoch.

    Args:
        manifest: The data.
        seed: Of the run.
        num_streams: See `epoch_order`.
        world_size: Ranks.
        rank: This one.
        batch: Global batch.
        steps: Global steps of the run: from where it starts or resumes to its end.
    """
    per_epoch = steps_per_epoch(manifest, batch)
    step = steps.start
    while step < steps.stop:
        epoch = step // per_epoch
        order = epoch_order(manifest, seed, epoch, num_streams)
        last = steps.stop - epoch * per_epoch
        yield from plan(order, world_size, rank, batch, step % per_epoch, last)
        step = (epoch + 1) * per_epoch


def steps_per_epoch(manifest: Manifest, batch: int) -> int:
    """Global batches of an epoch.

    Raises:
        ValueError: The data is smaller than one batch.
    """
    num_steps = manifest.num_samples // batch
    if num_steps == 0:
        raise ValueError(f"batch_size={batch} is more than the {manifest.num_samples} samples of {manifest.uri}")
    return num_steps
