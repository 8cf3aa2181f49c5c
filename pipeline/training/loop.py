"""The training loop of one Ray Train worker: batches in, metrics and checkpoints out."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from lgaf.distributed import all_gather_stack, rank_in, world_size
from lgaf.heads.global_batch import NonFiniteEmbeddingError
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.order import rank_slots
from pipeline.data.stream import TRAIN, BatchAssembler, TrainBatch
from pipeline.data.stream_plan import StreamPlan
from pipeline.model_store import save_model
from pipeline.tracking import metric_names
from pipeline.tracking.metric_sink import MetricSink
from pipeline.training.checkpoint import restore_checkpoint, save_checkpoint
from pipeline.training.commits import latest_step
from pipeline.training.failure import DivergedError, record_fatal
from pipeline.training.metrics_log import MetricsLog, StepMetrics, read_metrics

MODEL_FOLDER = "model"
FILED_METRICS = (
    metric_names.LOSS,
    metric_names.LEARNING_RATE,
    metric_names.EPOCH,
    metric_names.IMAGES_PER_SECOND,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSpec:
    """What a worker needs: travels to it by Ray.

    Attributes:
        config: Of the run.
        run_uri: Folder of the run.
        plan: Its samples.
        tracking_uri: MLflow store.
        mlflow_run_id: Run to log to.
        progress: Actor that is told how far the run is (method ``update``), or None.
    """

    config: TrainConfig
    run_uri: str
    plan: StreamPlan
    tracking_uri: str
    mlflow_run_id: str
    progress: Any = None


class _Pending(NamedTuple):
    """A step whose loss is not read yet: reading it would wait for the device."""

    step: int
    loss: torch.Tensor
    learning_rate: float
    seconds: float
    data_wait_s: float
    indices: np.ndarray


def train_worker(loop_config: dict[str, Any]) -> None:
    """Entry point of each Ray Train worker; ``loop_config["spec"]`` is a `LoopSpec`."""
    spec: LoopSpec = loop_config["spec"]
    try:
        _train(spec)
    except Exception as error:
        # Bad data stays bad: say so once, instead of restarting the group until the retries are used up.
        record_fatal(spec.run_uri, error)
        raise


def _train(spec: LoopSpec) -> None:
    config, plan = spec.config, spec.plan
    step = build_train_step(spec, dist.group.WORLD)
    first = latest_step(spec.run_uri)
    if first:
        restore_checkpoint(spec.run_uri, first, step)
    log = _RankZeroLog(spec, first) if rank_in(step.group) == 0 else None
    if first < plan.total_steps:  # else a kill came between the last checkpoint and the export
        _train_steps(spec, step, log)
    if log is not None:
        save_model(storage.join(spec.run_uri, MODEL_FOLDER), config.model, step.model.state_dict())
        log.close()
    dist.barrier()


def _train_steps(spec: LoopSpec, step: TrainStep, log: _RankZeroLog | None) -> None:
    config, plan = spec.config, spec.plan
    sizes = [high - low for low, high in _slots(step, plan)]
    batches = BatchAssembler(
        iter(
            ray.train.get_dataset_shard(TRAIN).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        ),
        sizes[rank_in(step.group)],
    )
    pending: list[_Pending] = []
    last_time = time.perf_counter()
    for number in range(step.num_steps_done, plan.total_steps):
        asked = time.perf_counter()
        batch = next(batches)
        data_wait_s = time.perf_counter() - asked
        try:
            result = step(*_to_tensors(batch), sizes=sizes)
        except NonFiniteEmbeddingError as error:  # on every rank alike
            _flush(pending, step, plan, log, durable=False)
            raise _diverged(f"step {number}: {error}") from error
        now = time.perf_counter()
        pending.append(_Pending(number, result.loss, result.learning_rate, now - last_time, data_wait_s, batch.indices))
        last_time = now
        done = number + 1
        saves = done % config.workers.checkpoint_every_steps == 0 or done == plan.total_steps
        if saves or done % config.workers.log_every_steps == 0:
            _flush(pending, step, plan, log, durable=saves)
        if saves:
            details = {"world_size": world_size(step.group), "data_fingerprint": plan.data.fingerprint}
            save_checkpoint(spec.run_uri, step, details, config.workers.keep_checkpoints)
            last_time = time.perf_counter()  # a save is not part of any step's time


def build_train_step(spec: LoopSpec, group: Any) -> TrainStep:
    """Network, head and optimizer of a run on this worker's device; the same initial weights on every rank."""
    config = spec.config
    neighbours = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config.workers.threads or max(1, len(os.sched_getaffinity(0)) // neighbours))
    device = ray.train.torch.get_device()
    torch.manual_seed(config.seed)
    model = config.model.build().to(device)
    head = ShardedMarginHead(
        spec.plan.data.num_classes,
        config.model.output_dim,
        config.head.create(),
        group=group,
        seed=config.seed,
        sample_rate=config.head.sample_rate,
        screening=config.screening if config.screening.strength > 0 else None,
        memory_budget=config.head.memory_budget_mib << 20,
    ).to(device)
    return TrainStep(
        model,
        head,
        config.optimizer,
        config.schedule,
        spec.plan.total_steps,
        group=group,
        precision=config.precision,
        head_precision=config.head.precision,
        update_head_in_backward=config.head.update == "backward",
        seed=config.seed,
    )


def _to_tensors(batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    # Copies: what Ray hands out is shared memory that nobody may write to.
    return torch.tensor(batch.images), torch.tensor(batch.labels)


def _flush(pending: list[_Pending], step: TrainStep, plan: StreamPlan, log: _RankZeroLog | None, durable: bool) -> None:
    """Gather what each rank trained on since the last time; rank 0 writes it. All ranks call this.

    Raises:
        DivergedError: A loss is not finite (on every rank alike); no checkpoint is written over the last good one.
    """
    slots = _slots(step, plan)
    longest = max(high - low for low, high in slots)
    own = np.full((len(pending), longest), -1, np.int64)
    for row, entry in enumerate(pending):
        own[row, : len(entry.indices)] = entry.indices
    everyone = all_gather_stack(torch.from_numpy(own).to(step.device), step.group).cpu().numpy()
    if log is not None:
        digests = []
        for row in range(len(pending)):
            parts = [everyone[rank, row, : high - low] for rank, (low, high) in enumerate(slots)]
            digests.append(hashlib.sha256(np.concatenate(parts).astype("<i8").tobytes()).hexdigest())
        log.write([entry for entry in pending if entry.loss.isfinite()], digests, durable)
    diverged = [entry for entry in pending if not entry.loss.isfinite()]
    if diverged:
        raise _diverged(f"the loss of step {diverged[0].step} is {float(diverged[0].loss)}")
    pending.clear()


def _slots(step: TrainStep, plan: StreamPlan) -> list[tuple[int, int]]:
    """What each rank has of a global batch."""
    workers = world_size(step.group)
    return [rank_slots(plan.batch, workers, rank) for rank in range(workers)]


def _diverged(what: str) -> DivergedError:
    return DivergedError(
        f"{what}: the run diverged; lower optimizer.learning_rate or add schedule.warmup, under a new run_name"
    )


class _RankZeroLog:
    """Where rank 0 reports: ``metrics.jsonl``, MLflow, and the progress display."""

    def __init__(self, spec: LoopSpec, first_step: int) -> None:
        self._plan, self._progress = spec.plan, spec.progress
        self._per_epoch = spec.plan.steps_per_epoch
        self._file = MetricsLog(spec.run_uri, first_step)
        self._sink = MetricSink(spec.tracking_uri, spec.mlflow_run_id, start_after=None)
        # What a killed attempt had in memory only is in the file; the sink skips what MLflow has.
        for line in read_metrics(spec.run_uri):
            self._sink.put(line["step"], {name: line[name] for name in FILED_METRICS})

    def write(self, finite: list[_Pending], digests: list[str], durable: bool) -> None:
        """Write the lines of some steps; ``durable`` before a checkpoint counts on them."""
        lines = []
        for entry, digest in zip(finite, digests, strict=False):  # a run ends at its first loss that is not finite
            line = StepMetrics(
                step=entry.step,
                epoch=entry.step // self._per_epoch,
                loss=float(entry.loss),
                lr=entry.learning_rate,
                images_per_second=self._plan.batch / entry.seconds,
                samples_digest=digest,
            )
            lines.append(line)
            self._sink.put(
                line.step,
                {
                    metric_names.LOSS: line.loss,
                    metric_names.LEARNING_RATE: line.lr,
                    metric_names.EPOCH: line.epoch,
                    metric_names.IMAGES_PER_SECOND: line.images_per_second,
                    metric_names.DATA_WAIT_S: entry.data_wait_s,
                },
            )
        self._file.write(lines, durable)
        if self._progress is not None and lines:
            self._progress.update.remote(lines[-1].step + 1, lines[-1].loss, lines[-1].images_per_second)

    def close(self) -> None:
        """Send what MLflow does not have yet."""
        self._sink.close()
