"""The training loop of one Ray Train worker: batches in, metrics and checkpoints out."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from lgaf.distributed import all_gather_stack, rank_in, world_size
from lgaf.heads.global_batch import NonFiniteEmbeddingError
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.step import StepResult, TrainStep
from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.order import rank_slots
from pipeline.data.stream import TRAIN, BatchAssembler, TrainBatch
from pipeline.data.stream_plan import StreamPlan
from pipeline.model_card import Export, write_card
from pipeline.model_store import save_model
from pipeline.tracking import metric_names
from pipeline.tracking.metric_sink import MetricSink
from pipeline.training.checkpoint import restore_checkpoint, save_checkpoint
from pipeline.training.commits import latest_step
from pipeline.training.divergence import DivergedError, decide, note_step, passed_over
from pipeline.training.failure import record_fatal
from pipeline.training.metrics_log import MetricsLog, StepMetrics, read_metrics
from pipeline.training.warm_start import started_from
from pipeline.training.warm_start_apply import apply_warm_start

MODEL_FOLDER = "model"
LOSSES_BEFORE = 20  # that are noted with a step that is not finite
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
    result: StepResult
    passed_over: bool
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
    else:
        apply_warm_start(config.warm_start, spec.run_uri, step)
    log = _RankZeroLog(spec, first) if rank_in(step.group) == 0 else None
    if first < plan.total_steps:  # else a kill came between the last checkpoint and the export
        _train_steps(spec, step, log)
    if log is not None:
        _export(spec, step)
        log.close()
    dist.barrier()


def _export(spec: LoopSpec, step: TrainStep) -> None:
    """Write the model and its card."""
    uri, network = storage.join(spec.run_uri, MODEL_FOLDER), step.exported_model
    export = Export(
        fingerprint=save_model(uri, spec.config.model, network.state_dict()),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_steps=spec.plan.total_steps,
        started_from=started_from(spec.run_uri),
    )
    write_card(uri, spec.config, spec.plan.data, export)


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
    to_pass = passed_over(spec.run_uri) if config.divergence.policy == "rollback" else set()
    last_time = time.perf_counter()
    for number in range(step.num_steps_done, plan.total_steps):
        asked = time.perf_counter()
        batch = next(batches)
        data_wait_s = time.perf_counter() - asked
        try:
            result = step.pass_over() if number in to_pass else step(*_to_tensors(batch), sizes=sizes)
            spoilt = ""
        except NonFiniteEmbeddingError as error:  # on every rank alike
            result, spoilt = StepResult(torch.tensor(torch.nan), 0.0), str(error)
        now = time.perf_counter()
        pending.append(_Pending(number, result, number in to_pass, now - last_time, data_wait_s, batch.indices))
        last_time = now
        done = number + 1
        saves = done % config.workers.checkpoint_every_steps == 0 or done == plan.total_steps
        if saves and not spoilt and not step.is_finite():
            spoilt = "weights are not finite"  # a checkpoint of them would be one to fall back on
        if saves or spoilt or done % config.workers.log_every_steps == 0:
            _flush(spec, pending, step, log, durable=saves, spoilt=spoilt)
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
        replace(config.optimizer, learning_rate=config.optimizer.learning_rate_for(config.batch_size)),
        config.schedule,
        spec.plan.total_steps,
        group=group,
        precision=config.precision,
        head_precision=config.head.precision,
        update_head_in_backward=config.head.update == "backward",
        seed=config.seed,
        config=config.step,
        leave_out_non_finite=config.divergence.policy == "skip",
    )


def _to_tensors(batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    # Copies: what Ray hands out is shared memory that nobody may write to.
    return torch.tensor(batch.images), torch.tensor(batch.labels)


def _flush(
    spec: LoopSpec, pending: list[_Pending], step: TrainStep, log: _RankZeroLog | None, durable: bool, spoilt: str
) -> None:
    """Gather what each rank trained on since the last time; rank 0 writes it. All ranks call this.

    Args:
        spec: Of the run.
        pending: Steps since the last time.
        step: The step.
        log: Of rank 0.
        durable: Whether a checkpoint is about to count on the lines.
        spoilt: Why the last step's weights are of no use; empty: they are not known to be.

    Raises:
        DivergedError: A step is not finite (on every rank alike) and the run ends.
        RollbackError: Likewise, and it goes on from the last checkpoint.
    """
    config = spec.config
    batches = _global_batches(pending, step, spec.plan)
    bad = [row for row, entry in enumerate(pending) if _is_bad(entry, config.precision)]
    if spoilt and (not bad or bad[-1] != len(pending) - 1):
        bad.append(len(pending) - 1)
    skips = config.divergence.policy == "skip"
    blamed = bad if skips else bad[:1]
    ends = bool(spoilt) or (bool(bad) and not skips)
    if log is not None:
        kept = pending[: blamed[-1]] if ends else pending
        for row in blamed:
            note_step(
                spec.run_uri, spec.plan.data, pending[row].step, batches[row], log.statistics(pending, row, spoilt)
            )
        log.write(kept, batches, durable)
    if bad:
        if step.group is not None:
            dist.barrier(step.group)  # the notes are there, for all ranks and for the next start
        culprit = pending[blamed[-1]]
        what = f"step {culprit.step}: {spoilt or f'the loss is {float(culprit.result.loss)}'}"
        if culprit.passed_over:
            raise DivergedError(f"{what}, though it was passed over: an earlier step must have spoilt the weights")
        decide(config.divergence, spec.run_uri, culprit.step, what)
        if spoilt:  # an update that was left out cannot be why
            raise DivergedError(f"{what}: there is nothing to go on with")
    pending.clear()


def _is_bad(entry: _Pending, precision: str) -> bool:
    # In half precision updates are left out while the scale finds its height, which is above 1.
    left_out = entry.result.left_out and (precision != "float16" or entry.result.scale < 1)
    return not entry.passed_over and (left_out or not bool(entry.result.loss.isfinite()))


def _global_batches(pending: list[_Pending], step: TrainStep, plan: StreamPlan) -> list[np.ndarray]:
    """The sample indices of each pending step's global batch, in order."""
    slots = _slots(step, plan)
    longest = max(high - low for low, high in slots)
    own = np.full((len(pending), longest), -1, np.int64)
    for row, entry in enumerate(pending):
        own[row, : len(entry.indices)] = entry.indices
    everyone = all_gather_stack(torch.from_numpy(own).to(step.device), step.group).cpu().numpy()
    return [
        np.concatenate([everyone[rank, row, : high - low] for rank, (low, high) in enumerate(slots)])
        for row in range(len(pending))
    ]


def _slots(step: TrainStep, plan: StreamPlan) -> list[tuple[int, int]]:
    """What each rank has of a global batch."""
    workers = world_size(step.group)
    return [rank_slots(plan.batch, workers, rank) for rank in range(workers)]


class _RankZeroLog:
    """Where rank 0 reports: ``metrics.jsonl``, MLflow, and the progress display."""

    def __init__(self, spec: LoopSpec, first_step: int) -> None:
        self._plan, self._progress = spec.plan, spec.progress
        self._per_epoch = spec.plan.steps_per_epoch
        self._file = MetricsLog(spec.run_uri, first_step)
        self._losses: deque[float] = deque(maxlen=LOSSES_BEFORE)
        self._sink = MetricSink(spec.tracking_uri, spec.mlflow_run_id, start_after=None)
        # What a killed attempt had in memory only is in the file; the sink skips what MLflow has.
        for line in read_metrics(spec.run_uri):
            self._send(line)

    def write(self, entries: list[_Pending], batches: list[np.ndarray], durable: bool) -> None:
        """Write the lines of some steps; ``durable`` before a checkpoint counts on them."""
        lines = []
        for entry, batch in zip(entries, batches, strict=False):  # a run may end before the last of the batches
            line = StepMetrics(
                step=entry.step,
                epoch=entry.step // self._per_epoch,
                loss=float(entry.result.loss),
                lr=entry.result.learning_rate,
                images_per_second=self._plan.batch / entry.seconds,
                samples_digest=hashlib.sha256(batch.astype("<i8").tobytes()).hexdigest(),
            )
            lines.append(line)
            self._send(asdict(line) | {metric_names.DATA_WAIT_S: entry.data_wait_s})
        self._file.write(lines, durable)
        self._losses.extend(line.loss for line in lines)
        if self._progress is not None and lines:
            self._progress.update.remote(lines[-1].step + 1, lines[-1].loss, lines[-1].images_per_second)

    def statistics(self, pending: list[_Pending], row: int, spoilt: str) -> dict[str, Any]:
        """What is noted of the pending step ``row`` beside its samples; those before it are not written yet."""
        losses = [*self._losses, *(float(entry.result.loss) for entry in pending[: row + 1])]
        return {
            "epoch": pending[row].step // self._per_epoch,
            "learning_rate": pending[row].result.learning_rate,
            "loss": str(losses[-1]),  # JSON has no word for nan
            "losses_before": [str(loss) for loss in losses[:-1][-LOSSES_BEFORE:]],
            "found": spoilt if row == len(pending) - 1 else "",
        }

    def _send(self, line: Mapping[str, Any]) -> None:
        """Give MLflow the numbers of a step that are numbers."""
        found = {name: line[name] for name in (*FILED_METRICS, metric_names.DATA_WAIT_S) if name in line}
        self._sink.put(line["step"], {name: value for name, value in found.items() if np.isfinite(value)})

    def close(self) -> None:
        """Send what MLflow does not have yet."""
        self._sink.close()
