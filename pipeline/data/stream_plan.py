"""What a run trains on, and how it is to come: the settings of the stream, and the plan that they and the data make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lgaf.config import require_choice, require_in_range, require_positive
from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.cache import ShardCache
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import Mixture
from pipeline.data.order import EpochOrder, Plan, epoch_order, plan, planned_shards, steps_per_epoch
from pipeline.data.shard_source import ShardSource


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How samples flow."""

    num_streams: int = 16
    """Shards that a global batch mixes; divides the batch size. More mix better and hold more shards in memory: about
    this many encoded ones over all ranks, or one a rank where there are more ranks than streams."""
    augmentation: str = "adaface"
    """Recipe: see docs/augmentation.md."""
    block_rows: int = 1024
    """Images that an actor decodes in one call."""
    max_bad_images: int = 100
    """Images of a run that may turn out undecodable before it ends; they are listed in quarantine.jsonl."""
    wrong_size: Literal["refuse", "resize"] = "refuse"
    """What happens to images of another size than the manifest's: bad images, or made to fit."""
    cache_dir: str = ""
    """Local folder that keeps shards of an object store, on every node; empty: none."""
    cache_gib: float = 100.0
    """Most that the cache may take; the shards that were used least recently go first."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("stream.num_streams", self.num_streams)
        require_positive("stream.block_rows", self.block_rows)
        require_in_range("stream.max_bad_images", self.max_bad_images, 0, 1 << 40)
        require_choice("stream.augmentation", self.augmentation, AUGMENTATIONS)
        require_choice("stream.wrong_size", self.wrong_size, ("refuse", "resize"))
        require_positive("stream.cache_gib", self.cache_gib)


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """All that decides which samples a run trains on, in which order."""

    data: Manifest | Mixture
    config: StreamConfig
    seed: int
    batch: int
    total_steps: int
    _orders: dict[int, EpochOrder] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": {}}  # made again where they are needed

    def order(self, epoch: int) -> EpochOrder:
        """The order of one epoch; the last few are kept."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = epoch_order(self.data, self.seed, epoch, self.config.num_streams)
        return self._orders[epoch]

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return steps_per_epoch(self.data, self.batch)

    def samples(self, world_size: int, rank: int, steps: range) -> Plan:
        """The samples of one rank for these steps of the run, batch after batch."""
        plans = [plan(order, world_size, rank, self.batch, start, end) for order, start, end in self._epochs(steps)]
        return Plan(*(np.concatenate(columns) for columns in zip(*plans, strict=True)))

    def planned_shards(self, world_size: int, rank: int, steps: range) -> list[int]:
        """The shards that these steps of one rank need, in order of need."""
        found = [
            planned_shards(order, world_size, rank, self.batch, start, end) for order, start, end in self._epochs(steps)
        ]
        return list(dict.fromkeys(shard for shards in found for shard in shards))

    def _epochs(self, steps: range) -> Iterator[tuple[EpochOrder, int, int]]:
        """The epochs that the steps lie in, with their first step and the one behind the last in each."""
        per_epoch, step = self.steps_per_epoch, steps.start
        while step < steps.stop:
            epoch = step // per_epoch
            end = min(steps.stop, (epoch + 1) * per_epoch)
            yield self.order(epoch), step - epoch * per_epoch, end - epoch * per_epoch
            step = end

    def chunk(self, number: int, world_size: int, start_step: int) -> range:
        """The steps of one chunk: as many whole batches of a rank as make a block, at least one."""
        length = max(1, self.config.block_rows * world_size // self.batch)
        start = min(start_step + number * length, self.total_steps)
        return range(start, min(start + length, self.total_steps))

    def chunk_rows(self, world_size: int) -> int:
        """Samples of a decoding call: a chunk's, where a batch of a rank is not larger than a block."""
        rows = -(-self.batch // world_size) * max(1, self.config.block_rows * world_size // self.batch)
        return min(rows, self.config.block_rows)

    def num_chunks(self, world_size: int, start_step: int) -> int:
        """Chunks from a step to the end of the run."""
        return -(-(self.total_steps - start_step) // len(self.chunk(0, world_size, 0)))

    def shard_source(self) -> ShardSource:
        """What reads the shards, in a data worker."""
        config = self.config
        cache = ShardCache(config.cache_dir, int(config.cache_gib * (1 << 30))) if config.cache_dir else None
        return ShardSource(self.data, cache)
