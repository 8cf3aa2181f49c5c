"""From shards to training batches: the planned order through Ray Data.

Each rank runs a Ray Data execution of its own read plan (`pipeline.data.order`): one actor reads and verifies whole
shards and deals their rows in batch order, a pool of actors decodes and augments, and the rank cuts the rows into
batches. Nothing depends on timing.
"""

# Shape legend: B = batch on this rank, n = samples of a plan, H, W = 112

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import ActorPoolStrategy, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from pipeline.data.decoding import Decoder
from pipeline.data.pacing import pace
from pipeline.data.quarantine import Quarantine
from pipeline.data.reading import PlanReader
from pipeline.data.shards import ShardError
from pipeline.data.stream_plan import StreamPlan

TRAIN: Final = "train"
# One task of the reading actor deals this many chunks: few tasks, and little to do again when the actor dies.
CHUNKS_PER_TASK: Final = 64
# Of a rank's CPUs: reading takes little, mostly waiting.
READER_CPUS: Final = 0.05
MAX_OBJECT_STORE_BYTES: Final = 4 << 30


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


class Start(Protocol):
    """From where ranks go on."""

    @property
    def first_step(self) -> int:
        """Steps done before."""


class RankData(NamedTuple):
    """What `ray.train.get_dataset_shard` gives each rank.

    Attributes:
        start: As the group's data set, a callable that makes a `Start`, made it: the same on all ranks.
        rows: This rank's iterator of Ray Data, from there on.
    """

    start: Any
    rows: Any


class PlannedDataConfig(ray.train.DataConfig):
    """Gives each Ray Train rank the iterator of its own read plan, from where the run resumes, as `RankData`.

    Ray's default split deals blocks by timing, drops rows to equalise, and starts the epoch again after a failure. What
    Ray Train calls data sets are `Start` here.

    Args:
        plan: The run's samples.
        cpus_per_worker: CPUs of the cluster that each training worker keeps for itself.
        quarantine: Where bad images go.
    """

    def __init__(
        self,
        plan: StreamPlan,
        cpus_per_worker: float = 0.0,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(datasets_to_split="all")
        self._plan, self._cpus_per_worker = plan, cpus_per_worker
        self._quarantine = quarantine

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One `RankData` per rank; called by Ray Train."""
        share = Share.of_cluster(world_size, world_size * self._cpus_per_worker)

        def rows(rank: int, start: Start) -> Any:
            return rank_dataset(self._plan, world_size, rank, start.first_step, share, self._quarantine).iterator()

        return [
            {name: RankData(start, rows(rank, start)) for name, start in datasets.items()} for rank in range(world_size)
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
