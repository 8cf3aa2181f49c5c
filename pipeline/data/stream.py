"""From shards to training batches: the planned order through Ray Data.

Each rank runs a Ray Data execution of its own read plan (`pipeline.data.order`): one actor reads and verifies whole
shards and deals their rows in batch order, a pool of actors decodes and augments, and the rank cuts the rows into
batches. Nothing depends on timing.
"""

# Shape legend: B = batch on this rank, n = samples of a plan, H, W = 112

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import ActorPoolStrategy, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from lgaf.config import require_choice, require_in_range, require_positive
from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.cache import ShardCache
from pipeline.data.decoding import Decoder
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import Mixture
from pipeline.data.order import EpochOrder, Plan, epoch_order, plan, planned_shards, steps_per_epoch
from pipeline.data.pacing import pace
from pipeline.data.quarantine import Quarantine
from pipeline.data.reading import PlanReader
from pipeline.data.shard_source import ShardSource
from pipeline.data.shards import ShardError

TRAIN: Final = "train"
# One task of the reading actor deals this many chunks: few tasks, and little to do again when the actor dies.
CHUNKS_PER_TASK: Final = 64
# Of a rank's CPUs: reading takes little, mostly waiting.
READER_CPUS: Final = 0.05
MAX_OBJECT_STORE_BYTES: Final = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How samples flow."""

    num_streams: int = 16
    """Shards that a global batch mixes; divides the batch size. More mix better and hold more shards in memory: about
    this many encoded ones over all ranks, or one a rank where there are more ranks than streams."""
    augmentation: str = "adaface"
    """Recipe: see docs/augmentation.md."""
    block_rows: int = 512
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


class TrainBatch(NamedTuple):
    """One rank's part of a global batch: uint8 images [B, H, W, 3], labels [B], global sample indices [B]."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


class Share(NamedTuple):
    """What one rank's execution may take of the cluster: CPUs, and bytes of the object store."""

    cpus: float
    object_store_bytes: int

    @classmethod
    def of_cluster(cls, world_size: int, reserved_cpus: float) -> Share:
        """An equal share for each rank of what the training workers leave.

        Each rank executes on its own, so each must be told its share or the first would take all. Of the object store,
        all ranks together take half; what lies ready beyond `MAX_OBJECT_STORE_BYTES` a rank would only be older.
        """
        found = ray.cluster_resources()
        return cls(
            max(0.1, (found.get("CPU", 1.0) - reserved_cpus) / world_size),
            int(min(MAX_OBJECT_STORE_BYTES, found.get("object_store_memory", 1 << 30) / 2 / world_size)),
        )


class PlannedDataConfig(ray.train.DataConfig):
    """Gives each Ray Train rank the iterator of its own read plan, from where the run resumes.

    Ray's default split deals blocks by timing, drops rows to equalise, and starts the epoch again after a failure.

    Args:
        plan: The run's samples.
        start_step: Asked on every (re)start of the worker group for the step to go on from.
        reserved_cpus: CPUs of the cluster that the training workers keep for themselves.
        quarantine: Where bad images go.
    """

    def __init__(
        self,
        plan: StreamPlan,
        start_step: Callable[[], int],
        reserved_cpus: float = 0.0,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(datasets_to_split="all")
        self._plan, self._start_step, self._reserved_cpus = plan, start_step, reserved_cpus
        self._quarantine = quarantine

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One Ray Data iterator per rank; called by Ray Train."""
        start, share = self._start_step(), Share.of_cluster(world_size, self._reserved_cpus)
        return [
            {
                name: rank_dataset(self._plan, world_size, rank, start, share, self._quarantine).iterator()
                for name in datasets
            }
            for rank in range(world_size)
        ]


def rank_dataset(
    plan: StreamPlan,
    world_size: int,
    rank: int,
    start_step: int,
    share: Share,
    quarantine: Quarantine | None = None,
) -> Any:
    """The Ray dataset of one rank: rows ``image, label, index`` in the order of its batches.

    Args:
        plan: The run's samples.
        world_size: Ranks.
        rank: This one.
        start_step: Step of the run to start from.
        share: What this execution may take.
        quarantine: Where bad images go; without one, the first is an error.
    """
    lean = replace(plan, data=plan.data.without_identities())
    reader_cpus = min(READER_CPUS, share.cpus / 10)
    # Whole CPUs as far as there are; on a small machine what is left of a rank's share.
    num_decoders = max(1, round(share.cpus))
    decoder_cpus = min(1.0, (share.cpus - 2 * reader_cpus) / num_decoders)
    source = _Chunks(plan.num_chunks(world_size, start_step))
    dataset = (
        ray.data.read_datasource(source, num_cpus=reader_cpus, override_num_blocks=source.num_tasks, concurrency=1)
        .map_batches(
            PlanReader,
            fn_constructor_args=(lean, world_size, rank, start_step),
            batch_size=1,
            num_cpus=reader_cpus,
            compute=ActorPoolStrategy(size=1),
        )
        .map_batches(
            Decoder,
            fn_constructor_args=(lean, quarantine),
            batch_size=plan.chunk_rows(world_size),
            batch_format="pyarrow",
            num_cpus=decoder_cpus,
            compute=ActorPoolStrategy(size=num_decoders),
        )
    )
    dataset.context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(cpu=share.cpus, object_store_memory=share.object_store_bytes),
    )
    # One call's pixels a block: the first batch does not wait for more.
    dataset.context.target_max_block_size = plan.config.block_rows * plan.data.image_side**2 * 3
    pace(dataset)
    return dataset


class _Chunks(Datasource):
    """The numbers of a plan's chunks as a Ray data source."""

    def __init__(self, num_chunks: int) -> None:
        super().__init__()
        self._num_chunks = num_chunks
        self.num_tasks = max(1, -(-num_chunks // CHUNKS_PER_TASK))

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._num_chunks

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        numbers = [
            np.arange(start, min(start + CHUNKS_PER_TASK, self._num_chunks))
            for start in range(0, self._num_chunks, CHUNKS_PER_TASK)
        ]
        return [
            ReadTask(
                lambda chunk=chunk: [pa.table({"chunk": chunk})], BlockMetadata(len(chunk), chunk.nbytes, None, None)
            )
            for chunk in numbers or [np.arange(0)]
        ]


class BatchAssembler:
    """Cuts the rows of a rank's plan, which arrive in order, into its batches.

    Args:
        blocks: Columns ``image, label, index``, as `rank_dataset` yields them.
        size: Samples of a batch on this rank.
    """

    def __init__(self, blocks: Iterator[dict[str, np.ndarray]], size: int) -> None:
        self._blocks, self._size = blocks, size
        self._rest: TrainBatch | None = None

    def __iter__(self) -> BatchAssembler:
        return self

    def __next__(self) -> TrainBatch:
        """The next batch; its images are a view of a block where they lie within one.

        Raises:
            StopIteration: The plan is done.
            ShardError: The rows end in the middle of a batch.
        """
        parts: list[TrainBatch] = []
        wanted = self._size
        while wanted:
            if self._rest is None or not len(self._rest.labels):
                block = next(self._blocks, None)
                if block is None:
                    if parts:
                        raise ShardError(
                            f"the samples end in the middle of a batch: {wanted} of {self._size} are missing"
                        )
                    raise StopIteration
                self._rest = TrainBatch(block["image"], block["label"], block["index"])
            parts.append(TrainBatch(*(column[:wanted] for column in self._rest)))
            self._rest = TrainBatch(*(column[wanted:] for column in self._rest))
            wanted -= len(parts[-1].labels)
        images, labels, indices = zip(*parts, strict=True)
        # Labels and indices are copied, for they are kept for a while: a view would keep its whole block of pixels.
        return TrainBatch(
            images[0] if len(parts) == 1 else np.concatenate(images), np.concatenate(labels), np.concatenate(indices)
        )
