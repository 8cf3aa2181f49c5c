"""The reading end of the stream: whole shards, verified, held open while their rows are dealt in the planned order."""

# Shape legend: n = samples of a chunk, in the order of training

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipeline.data.shard_source import ShardSource
from pipeline.data.shards import Shard
from pipeline.data.stream_plan import StreamPlan

# Requests to a store that wait at the same time; the start of a run needs a shard of every stream at once.
READ_THREADS: Final = 8
CHUNKS_AHEAD: Final = 8


class OpenShards:
    """Shards in memory: those in use, and those that will be soon, which threads fetch meanwhile.

    Args:
        source: Reads and verifies one shard.
    """

    def __init__(self, source: ShardSource) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read-shard")
        self._open: dict[int, Future[Shard]] = {}

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch these, in order of need, and forget all others."""
        for gone in self._open.keys() - set(shards):
            self._open.pop(gone).cancel()
        for shard in shards:
            if shard not in self._open:
                self._open[shard] = self._threads.submit(self._source.read, shard)

    def __getitem__(self, shard: int) -> Shard:
        return self._open[shard].result()


class PlanReader:
    """Deals encoded images in the order of a rank's plan, chunk by chunk; lives in an actor.

    Stateless but for speed: what it gives for a chunk depends on the plan alone, so a restarted actor goes on.
    """

    def __init__(self, plan: StreamPlan, world_size: int, rank: int, start_step: int) -> None:
        self._plan, self._world_size, self._rank, self._start_step = plan, world_size, rank, start_step
        self._shards = OpenShards(plan.shard_source())

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """Tables of encoded samples for chunk numbers ``batch["chunk"]``."""
        for chunk in batch["chunk"].tolist():
            steps = self._plan.chunk(chunk, self._world_size, self._start_step)
            ahead = self._plan.chunk(chunk + CHUNKS_AHEAD, self._world_size, self._start_step)
            self._shards.expect(self._plan.planned_shards(self._world_size, self._rank, range(steps.start, ahead.stop)))
            yield self._table(steps)

    def _table(self, steps: range) -> pa.Table:
        samples = self._plan.samples(self._world_size, self._rank, steps)
        images: list[Any] = [None] * len(samples.row)
        label_n = np.empty(len(images), np.int64)
        for number in np.unique(samples.shard).tolist():
            shard, places = self._shards[number], np.flatnonzero(samples.shard == number)
            label_n[places] = shard.labels[samples.row[places]]
            for place, row in zip(places.tolist(), samples.row[places].tolist(), strict=True):
                images[place] = shard.images[row]
        return pa.table(
            {
                "image": pa.array(images, pa.large_binary()),
                "label": label_n,
                "shard": samples.shard,
                "row": samples.row,
                "lap": samples.lap,
            }
        )
