"""Our side of the data benchmark: the stream, one and two ranks, the ceiling that it is held to, packing.

`our_stream` and `our_pack` are all that knows how the pipeline is called.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.images import decode_into
from pipeline.data.manifest import Manifest
from pipeline.data.order import steps_per_epoch
from pipeline.data.shards import Shard, read_shard
from pipeline.data.stream import BatchAssembler, Share, TrainBatch, rank_dataset
from pipeline.data.stream_plan import StreamConfig, StreamPlan
from tests.benchmarks.data_measure import Measurement, check_labels, describe
from tests.benchmarks.data_set import DataSet

BATCH, SEED, CEILING_ROWS = 128, 0, 256
# The stream is timed over one whole epoch between two others: what it holds in advance is then the same at both ends.
EPOCHS, TIMED_EPOCH = 3, 1


def our_stream(
    manifest: Manifest, steps: int, start_step: int = 0, *, rank: int = 0, world_size: int = 1
) -> Iterator[TrainBatch]:
    """The batches of one rank, from ``start_step`` to before ``steps``; Ray is up."""
    plan = StreamPlan(data=manifest, config=StreamConfig(), seed=SEED, batch=BATCH, total_steps=steps)
    dataset = rank_dataset(plan, world_size, rank, start_step, Share.of_cluster(world_size, 0.0))
    blocks = dataset.iterator().iter_batches(batch_size=None, batch_format="numpy")
    return BatchAssembler(iter(blocks), BATCH // world_size)


def our_pack(folder: str, output: str) -> Manifest:
    """Pack an InsightFace pack; Ray is up and its CPUs are how many processes work."""
    from pipeline.data.pack import PackSettings, pack
    from pipeline.data.sources import SourceSpec

    return pack(SourceSpec(format="recordio", uri=folder), output, PackSettings(samples_per_shard=2000))


def start_ray(num_cpus: int = 2) -> None:
    """A local Ray with so many CPUs, else set up as the pipeline's own."""
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000, "num_workers_soft_limit": 8},
    )


def _timed_rank(uri: str, ready: float, start_step: int, steps: int, rank: int, world_size: int) -> dict[str, Any]:
    """One rank's stream to its end; gives its measurement, and what came: samples and labels of the timed epoch."""
    manifest = Manifest.load(uri)
    per_epoch = steps_per_epoch(manifest, BATCH)
    timed = range(TIMED_EPOCH * per_epoch, (TIMED_EPOCH + 1) * per_epoch)
    result, index, labels = Measurement(ready=ready), [], []
    for step, batch in enumerate(our_stream(manifest, steps, start_step, rank=rank, world_size=world_size), start_step):
        now = time.time()
        if not result.samples:
            result.first, result.batch = now, describe(batch.images)
        result.samples += len(batch.labels)
        if step == timed.start - 1:
            result.warm = now
        if step in timed:
            result.counted += len(batch.labels)
        if step < timed.stop:
            result.end = now
        result.done = now
        # Copies: a view would keep its whole block, pixels and all, in Ray's object store.
        index.append(batch.indices.copy())
        labels.append(batch.labels.copy())
    return result.to_dict() | {"index": np.concatenate(index), "labels": np.concatenate(labels)}


def ours(data: DataSet, ready: float, *, uri: str = "", world_size: int = 1, resume: bool = False) -> Measurement:
    """The stream of all ranks, from the start over three epochs, or from the middle of one to its end; all checked."""
    import ray

    uri = uri or str(data.packed)
    manifest = Manifest.load(uri)
    per_epoch = steps_per_epoch(manifest, BATCH)
    start, steps = (per_epoch // 2, per_epoch) if resume else (0, EPOCHS * per_epoch)
    arguments = [(uri, ready, start, steps, rank, world_size) for rank in range(world_size)]
    if world_size == 1:
        found = [_timed_rank(*arguments[0])]
    else:
        task = ray.remote(num_cpus=0)(_timed_rank)
        found = ray.get([task.remote(*each) for each in arguments])
    index, labels = ([part.pop(name) for part in found] for name in ("index", "labels"))
    ranks = [Measurement(**part) for part in found]
    for epoch in range(start // per_epoch, steps // per_epoch):
        own = range(max(start, epoch * per_epoch) - start, (epoch + 1) * per_epoch - start)
        _check_epoch(data, _of_steps(index, own, steps - start), _of_steps(labels, own, steps - start), len(own), epoch)
    return Measurement(
        ready=ready,
        first=max(rank.first for rank in ranks),
        warm=min(rank.warm for rank in ranks),
        end=max(rank.end for rank in ranks),
        # Of the first to end: from there on processes go.
        done=min(rank.done for rank in ranks),
        counted=sum(rank.counted for rank in ranks),
        samples=sum(rank.samples for rank in ranks),
        batch=ranks[0].batch,
        extra={"first_index": index[0][: ranks[0].samples // (steps - start)].tolist()},
    )


def _of_steps(ranks: list[np.ndarray], steps: range, num_steps: int) -> np.ndarray:
    """What all ranks got in these of their steps."""
    return np.concatenate([rank.reshape(num_steps, -1)[steps.start : steps.stop].ravel() for rank in ranks])


def _check_epoch(data: DataSet, index: np.ndarray, labels: np.ndarray, num_steps: int, epoch: int) -> None:
    """The program ends unless these steps of an epoch gave each sample at most once, with its own label."""
    different = len(np.unique(index))
    if not different == len(index) == num_steps * BATCH:
        raise SystemExit(
            f"ours, epoch {epoch}: {len(index):,} samples, {different:,} of them different, not {num_steps * BATCH:,}"
        )
    if not np.array_equal(labels, data.labels[index]):
        raise SystemExit(f"ours, epoch {epoch}: {(labels != data.labels[index]).sum():,} labels are not their samples'")


def ceiling(data: DataSet, ready: float, processes: int) -> Measurement:
    """A plain loop in each process: read a shard, decode, augment; nothing is handed on."""
    manifest = Manifest.load(str(data.packed))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    shards = [list(range(start, len(manifest.shards), processes)) for start in range(processes)]
    # A core each, so that no library's threads take part of another's.
    cores = sorted(os.sched_getaffinity(0))
    workers = [
        context.Process(target=_plain_loop, args=(manifest, own, cores[number], barrier, results))
        for number, own in enumerate(shards)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    check_labels(np.concatenate([labels for *_, labels in found]), data.labels, "the plain loop")
    return Measurement(
        ready=ready,
        first=ready,
        warm=min(warm for warm, *_ in found),
        end=max(end for _, end, *_ in found),
        counted=sum(counted for _, _, counted, _ in found),
        samples=manifest.num_samples,
        batch=f"uint8 [{CEILING_ROWS}, 112, 112, 3]",
    )


def _plain_loop(manifest: Manifest, shards: list[int], core: int, barrier: Any, results: Any) -> None:
    os.sched_setaffinity(0, {core})
    labels = [_finish(manifest, shards[0])]  # the warm-up
    barrier.wait()
    warm, counted = time.time(), 0
    for number in shards[1:]:
        labels.append(_finish(manifest, number))
        counted += len(labels[-1])
    results.put((warm, time.time(), counted, np.concatenate(labels)))


def _finish(manifest: Manifest, number: int) -> np.ndarray:
    shard: Shard = read_shard(manifest.shard_uri(number), manifest.shards[number], manifest.num_classes)
    augment, first = AUGMENTATIONS["adaface"], int(manifest.offsets[number])
    for start in range(0, len(shard.images), CEILING_ROWS):
        rows = range(start, min(start + CEILING_ROWS, len(shard.images)))
        pixels = np.empty((len(rows), manifest.image_side, manifest.image_side, 3), np.uint8)
        for place, row in enumerate(rows):
            decode_into(shard.images[row], pixels[place], resize=False)
        augment(pixels, first + np.arange(rows.start, rows.stop), SEED, np.zeros(len(rows), np.int64))
    return shard.labels


def packing(record: Path, output: Path, ready: float) -> Measurement:
    """One pack of a RecordIO file; its bytes are those of the images' file."""
    manifest = our_pack(str(record.parent), str(output))
    end = time.time()
    num_bytes = record.stat().st_size
    return Measurement(
        ready=ready,
        first=end,
        warm=ready,
        end=end,
        counted=manifest.num_samples,
        samples=manifest.num_samples,
        batch=f"{len(manifest.shards)} shards",
        extra={"num_bytes": num_bytes},
    )
