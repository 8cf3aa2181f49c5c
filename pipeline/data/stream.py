"""From shards to training batches: the planned order through Ray Data.

Each rank runs a Ray Data execution of its own read plan (`pipeline.data.order`): tasks read and verify whole shards,
actors decode and augment, and the rank deals the rows of its streams into batches. Nothing depends on timing.
"""

# Shape legend: B = batch on this rank, n = rows of a block, H, W = 112

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import ActorPoolStrategy, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from lgaf.config import require_choice, require_positive
from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.images import decode_rgb
from pipeline.data.manifest import Manifest
from pipeline.data.order import ReadPiece, piece_rows, run_plan, stream_slots
from pipeline.data.pacing import pace
from pipeline.data.shards import ShardError, read_shard

TRAIN = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How samples flow.

    Attributes:
        num_streams: Shards that a global batch mixes; divides the batch size. More mix better and hold more shards in
            memory (about ``num_streams`` decoded shards over all ranks).
        augmentation: A name of `AUGMENTATIONS`.
        block_rows: Images that an actor decodes in one call.
    """

    num_streams: int = 16
    augmentation: str = "adaface"
    block_rows: int = 256

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("stream.num_streams", self.num_streams)
        require_positive("stream.block_rows", self.block_rows)
        require_choice("stream.augmentation", self.augmentation, AUGMENTATIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """All that decides which samples a run trains on, in which order."""

    manifest: Manifest
    config: StreamConfig
    seed: int
    batch: int
    total_steps: int

    def pieces(self, world_size: int, rank: int, start_step: int) -> list[ReadPiece]:
        """What a rank reads from ``start_step`` to the end of the run, in the order of its need."""
        return list(
            run_plan(
                self.manifest,
                seed=self.seed,
                num_streams=self.config.num_streams,
                world_size=world_size,
                rank=rank,
                batch=self.batch,
                steps=range(start_step, self.total_steps),
            )
        )


class TrainBatch(NamedTuple):
    """One rank's part of a global batch: uint8 images [B, H, W, 3], labels [B], global sample indices [B]."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


class PlannedDataConfig(ray.train.DataConfig):
    """Gives each Ray Train rank the iterator of its own read plan, from where the run resumes.

    Ray's default split deals blocks by timing, drops rows to equalise, and starts the epoch again after a failure.

    Args:
        plan: The run's samples.
        start_step: Asked on every (re)start of the worker group for the step to go on from.
        reserved_cpus: CPUs of the cluster that the training workers keep for themselves.
    """

    def __init__(self, plan: StreamPlan, start_step: Callable[[], int], reserved_cpus: float = 0.0) -> None:
        super().__init__(datasets_to_split="all")
        self._plan, self._start_step, self._reserved_cpus = plan, start_step, reserved_cpus

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One Ray Data iterator per rank; called by Ray Train."""
        start = self._start_step()
        # Each rank executes on its own, so each must be told its share or the first would take all.
        share = max(0.1, (ray.cluster_resources().get("CPU", 1) - self._reserved_cpus) / world_size)
        return [
            {name: rank_dataset(self._plan, world_size, rank, start, share).iterator() for name in datasets}
            for rank in range(world_size)
        ]


def rank_dataset(plan: StreamPlan, world_size: int, rank: int, start_step: int, cpus: float) -> Any:
    """The Ray dataset of one rank: one row a sample, in the order of its read plan.

    Args:
        plan: The run's samples.
        world_size: Ranks.
        rank: This one.
        start_step: Step of the run to start from.
        cpus: CPUs that this execution may use.
    """
    pieces = plan.pieces(world_size, rank, start_step)
    # On a small machine reader and actor get half each; on a large one a CPU each and as many actors as fit.
    unit = min(1.0, cpus / 2)
    num_actors = max(1, int(cpus / unit) - 1)
    source = _PlanSource([_PieceReader(plan, piece) for piece in pieces])
    dataset = ray.data.read_datasource(source, num_cpus=unit, override_num_blocks=max(1, len(pieces))).map_batches(
        _DecodeAugment,
        fn_constructor_args=(plan.config.augmentation, plan.seed),
        batch_size=plan.config.block_rows,
        batch_format="pyarrow",
        num_cpus=unit,
        compute=ActorPoolStrategy(min_size=1, max_size=num_actors),
    )
    dataset.context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(cpu=cpus)
    )
    # Decoded blocks of about 10 MB: the first batch does not wait for a whole shard.
    dataset.context.target_max_block_size = plan.config.block_rows * plan.manifest.image_side**2 * 3
    pace(dataset)
    return dataset


class _PieceReader:
    """Reads, verifies and orders the rows of one piece; carries only what it needs of the manifest."""

    def __init__(self, plan: StreamPlan, piece: ReadPiece) -> None:
        manifest = plan.manifest
        self.info, self._uri = manifest.shards[piece.shard], manifest.shard_uri(piece.shard)
        self._offset, self._num_classes = int(manifest.offsets[piece.shard]), manifest.num_classes
        self._piece, self._seed = piece, plan.seed

    def __call__(self) -> list[pa.Table]:
        shard = read_shard(self._uri, self.info, self._num_classes)
        rows = piece_rows(self._piece, len(shard.images), self._seed)
        table = pa.table(
            {
                "image": pa.array([shard.images[row] for row in rows], pa.large_binary()),
                "key": pa.array([f"{self._uri}: {shard.keys[row]}" for row in rows]),
                "label": shard.labels[rows],
                "index": rows + self._offset,
                "epoch": np.full(len(rows), self._piece.epoch),
                "stream": np.full(len(rows), self._piece.stream),
            }
        )
        return [table]


class _PlanSource(Datasource):
    """A read plan as a Ray data source: one task a piece, in order."""

    def __init__(self, readers: list[_PieceReader]) -> None:
        super().__init__()
        self._readers = readers

    def estimate_inmemory_data_size(self) -> int:
        return sum(reader.info.num_bytes for reader in self._readers)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [ReadTask(reader, BlockMetadata(None, reader.info.num_bytes, None, None)) for reader in self._readers]


class _DecodeAugment:
    """Turns encoded images into augmented pixels; lives in a CPU actor."""

    def __init__(self, augmentation: str, seed: int) -> None:
        self._augment, self._seed = AUGMENTATIONS[augmentation], seed

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        images = np.stack([self._decode(row, batch) for row in range(len(batch))])
        index = batch["index"].to_numpy()
        return {
            "image": self._augment(images, index, self._seed, batch["epoch"].to_numpy()),
            "label": batch["label"].to_numpy(),
            "index": index,
            "stream": batch["stream"].to_numpy(),
        }

    def _decode(self, row: int, batch: pa.Table) -> np.ndarray:
        try:
            return decode_rgb(batch["image"][row].as_py())
        except ValueError as error:
            raise ShardError(f"{batch['key'][row].as_py()}: {error}") from error


class BatchAssembler:
    """Deals rows that arrive in the order of a read plan into one rank's batches.

    Args:
        blocks: Columns ``image, label, index, stream``, as `rank_dataset` yields them.
        batch: Global batch.
        num_streams: Of the plan.
        world_size: Ranks.
        rank: This one.
    """

    def __init__(
        self, blocks: Iterator[dict[str, np.ndarray]], *, batch: int, num_streams: int, world_size: int, rank: int
    ) -> None:
        self._blocks = blocks
        self._slots = stream_slots(batch, num_streams, world_size, rank)
        self._waiting: dict[int, deque[TrainBatch]] = {stream: deque() for stream, _, _ in self._slots}

    def __iter__(self) -> BatchAssembler:
        return self

    def __next__(self) -> TrainBatch:
        """The next batch.

        Raises:
            StopIteration: The plan is done.
            ShardError: The rows end in the middle of a batch.
        """
        parts: list[TrainBatch] = []
        for stream, low, high in self._slots:
            wanted = high - low
            while wanted:
                while not self._waiting[stream]:
                    block = next(self._blocks, None)
                    if block is None:
                        if parts or any(self._waiting.values()):
                            raise ShardError(f"the samples of stream {stream} end in the middle of a batch")
                        raise StopIteration
                    self._receive(block)
                head = self._waiting[stream].popleft()
                taken = min(wanted, len(head.labels))
                parts.append(TrainBatch(*(column[:taken] for column in head)))
                if taken < len(head.labels):
                    self._waiting[stream].appendleft(TrainBatch(*(column[taken:] for column in head)))
                wanted -= taken
        return TrainBatch(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _receive(self, block: dict[str, np.ndarray]) -> None:
        streams = block["stream"]
        # A block may hold the end of one piece and the start of the next, hence runs of equal streams.
        edges = [0, *(np.flatnonzero(np.diff(streams)) + 1).tolist(), len(streams)]
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                rows = TrainBatch(*(block[name][start:stop] for name in ("image", "label", "index")))
                self._waiting[int(streams[start])].append(rows)
