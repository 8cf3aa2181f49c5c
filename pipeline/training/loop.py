"""The training loop of one Ray Train worker: batches in, metrics and checkpoints out."""

from __future__ import annotations

import functools
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.profiler import record_function

from lgaf import phases
from lgaf.distributed import all_gather_stack, rank_in, world_size
from lgaf.heads.global_batch import NonFiniteEmbeddingError
from lgaf.step import StepResult, TrainStep
from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.order import share_sizes
from pipeline.data.stream import TRAIN, BatchAssembler, RankData, TrainBatch
from pipeline.data.stream_plan import StreamPlan
from pipeline.model_card import Export, write_card
from pipeline.model_store import save_model
from pipeline.tracking.metric_sink import MetricSink
from pipeline.tracking.outbox import RunAddress
from pipeline.training.assembly import assemble, safe_threads
from pipeline.training.attempts import check_newest
from pipeline.training.checkpoint import restore_checkpoint
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.commits import Start
from pipeline.training.divergence import DivergedError, decide, note_step, passed_over
from pipeline.training.failure import record_fatal
from pipeline.training.profiling import StepProfiler
from pipeline.training.pulse import Pulse, StopVote
from pipeline.training.step_log import PendingStep, StepLog
from pipeline.training.warm_start import started_from
from pipeline.training.warm_start_apply import apply_warm_start

MODEL_FOLDER = "model"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSpec:
    """What a worker needs: travels to it by Ray.

    Attributes:
        config: Of the run.
        run_uri: Folder of the run.
        plan: Its samples.
        tracking: MLflow run to log to.
        board: Actor that knows how far each worker is (`pipeline.training.pulse`), or None.
    """

    config: TrainConfig
    run_uri: str
    plan: StreamPlan
    tracking: RunAddress
    board: Any = None


def train_worker(loop_config: dict[str, Any]) -> None:
    """Entry point of each Ray Train worker; ``loop_config["spec"]`` is a `LoopSpec`."""
    spec: LoopSpec = loop_config["spec"]
    data: RankData | None = None
    try:
        data = ray.train.get_dataset_shard(TRAIN)
        _train(spec, data)
    except Exception as error:
        if data is not None:
            check_newest(spec.run_uri, data.start.attempt)  # a run that others have does not end by this
        # Bad data stays bad: say so once, instead of restarting the group until the retries are used up.
        record_fatal(spec.run_uri, error)
        raise


def _train(spec: LoopSpec, data: RankData) -> None:
    pulse = Pulse(spec.board, dist.group.WORLD)
    step = build_train_step(spec, dist.group.WORLD)
    start: Start = data.start
    if start.checkpoint is not None:
        restore_checkpoint(start.checkpoint, step)
    else:
        apply_warm_start(spec.config.warm_start, spec.run_uri, step)
    check_ours = functools.partial(check_newest, spec.run_uri, start.attempt)
    log = None
    if rank_in(step.group) == 0:
        run = spec.tracking
        sink = MetricSink(run.tracking_uri, run.run_id, start_after=None, outbox=run.outbox)
        log = StepLog(spec.run_uri, start.first_step, spec.plan, sink, spec.board, check_ours)
    try:
        # Else a kill came between the last checkpoint and the export.
        is_complete = start.first_step == spec.plan.total_steps or _Steps(spec, data, step, log, pulse).run()
        pulse.at(step.num_steps_done, "end")
        if log is not None and is_complete:
            check_ours()
            _export(spec, step)
    finally:
        if log is not None:
            log.close()
    dist.barrier()
    pulse.close()


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


class _Steps:
    """The steps from a checkpoint to the end, or to where the workers are asked to stop."""

    def __init__(self, spec: LoopSpec, data: RankData, step: TrainStep, log: StepLog | None, pulse: Pulse) -> None:
        self._spec, self._step, self._log, self._pulse = spec, step, log, pulse
        self._config, self._plan = spec.config, spec.plan
        workers = world_size(step.group)
        self._sizes = share_sizes(self._plan.batch, workers)
        rows = data.rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        self._batches = BatchAssembler(iter(rows), self._sizes[rank_in(step.group)])
        self._checkpointer = Checkpointer(
            spec.run_uri,
            step,
            writer=data.start.attempt.writer,
            keep=self._config.workers.keep_checkpoints,
            keep_best=self._config.workers.keep_best_checkpoints,
            details={"world_size": workers, "data_fingerprint": self._plan.data.fingerprint},
            check_newest=functools.partial(check_newest, spec.run_uri, data.start.attempt),
            before_commit=log.make_durable if log is not None else lambda: None,
        )
        self._vote = StopVote(step.group)
        self._leaves = False  # this rank's node is being taken away
        self._pending: list[PendingStep] = []
        self._losses: list[float] = []  # since the last checkpoint
        self._to_pass = passed_over(spec.run_uri) if self._config.divergence.policy == "rollback" else set()
        self._last_time = time.perf_counter()
        self._save_is_owed = False
        self._profiler = StepProfiler(self._config.profile, spec.run_uri, step, self._plan.batch)

    def run(self) -> bool:
        """Whether the run is complete."""
        with self._profiler:
            for number in range(self._step.num_steps_done, self._plan.total_steps):
                if self._vote.cast(self._pulse.asked_to_stop or self._leaves):
                    self._stop()
                    return False
                self._one_step(number)
        return True

    def _stop(self) -> None:
        """Save, if that can be: whoever asked does not wait for a storage that is away."""
        try:
            if self._flush(saves=True):
                self._save_now()
        except storage.StorageError as error:  # on every rank alike
            _logger.warning("stopped without a checkpoint, the last one counts: %s", error)

    def _one_step(self, number: int) -> None:
        workers = self._config.workers
        asked = time.perf_counter()
        self._pulse.at(number, "data")
        with record_function(phases.DATA_WAIT):
            batch = next(self._batches)
        data_wait_s = time.perf_counter() - asked
        self._pulse.at(number, "step")
        spoilt, passes = "", number in self._to_pass
        try:
            result = self._step.pass_over() if passes else self._step(*_to_tensors(batch), sizes=self._sizes)
        except NonFiniteEmbeddingError as error:  # on every rank alike
            result, spoilt = StepResult(torch.tensor(torch.nan), 0.0), str(error)
        now = time.perf_counter()
        self._pending.append(PendingStep(number, result, passes, now - self._last_time, data_wait_s, batch.indices))
        self._last_time = now
        done = number + 1
        is_last = done == self._plan.total_steps
        due = self._save_is_owed or done % workers.checkpoint_every_steps == 0
        saves = is_last or (due and self._checkpointer.is_free())
        self._save_is_owed = due and not saves
        if saves or spoilt or done % workers.log_every_steps == 0:
            self._flush(saves, spoilt)
        if saves:
            with record_function(phases.CHECKPOINT):
                self._save_now() if is_last else self._save()
        if self._profiler.step() or saves:
            self._last_time = time.perf_counter()  # what was written is not part of any step's time

    def _save(self) -> None:
        self._pulse.at(self._step.num_steps_done, "save")
        self._checkpointer.save(self._mean_loss())
        self._losses.clear()

    def _save_now(self) -> None:
        step, patience_s = self._step.num_steps_done, self._config.workers.storage_patience_s
        self._checkpointer.save_now(patience_s, self._mean_loss(), lambda: self._pulse.at(step, "save"))

    def _mean_loss(self) -> float | None:
        return float(np.mean(self._losses)) if self._losses else None

    def _flush(self, saves: bool, spoilt: str = "") -> bool:
        """Gather what each rank trained on since the last time; rank 0 writes it. All ranks call this.

        Args:
            saves: Whether a checkpoint is about to count on it.
            spoilt: Why the last step's weights are of no use; empty: they are not known to be.

        Returns:
            Whether the weights may be saved; only steps that were never looked at can make it False.

        Raises:
            DivergedError: A step is not finite (on every rank alike) and the run ends.
            RollbackError: Likewise, and it goes on from the last checkpoint.
        """
        pending, step = self._pending, self._step
        if saves and not spoilt and not step.is_finite():
            if not pending:
                return False
            spoilt = "weights are not finite"  # a checkpoint of them would be one to fall back on
        if not pending:
            return True
        self._pulse.at(step.num_steps_done, "log")
        # Ray tells rank 0's to all; every rank asks alike.
        self._leaves = ray.train.get_preemption_info() is not None
        bad = [row for row, entry in enumerate(pending) if entry.is_bad(self._config.precision)]
        if spoilt and (not bad or bad[-1] != len(pending) - 1):
            bad.append(len(pending) - 1)
        skips = self._config.divergence.policy == "skip"
        blamed = bad if skips else bad[:1]
        ends = bool(spoilt) or (bool(bad) and not skips)
        self._report(pending[: blamed[-1]] if ends else pending, blamed, spoilt)
        if blamed:
            self._decide(pending[blamed[-1]], spoilt)
        pending.clear()
        return True

    def _report(self, kept: list[PendingStep], blamed: list[int], spoilt: str) -> None:
        """Write the lines of the steps that stay, and note those that are not finite."""
        batches = self._global_batches()
        self._losses += [float(entry.result.loss) for entry in kept if entry.result.loss.isfinite()]
        if (log := self._log) is None:
            return
        if blamed:
            log.check_newest()
        for row in blamed:
            statistics = log.statistics(self._pending, row, spoilt)
            note_step(self._spec.run_uri, self._plan.data, self._pending[row].step, batches[row], statistics)
        log.write(kept, batches)
        if len(kept) < len(self._pending):  # the workers end here
            log.settle()

    def _decide(self, culprit: PendingStep, spoilt: str) -> None:
        """Go on after a step that is not finite, or raise."""
        if self._step.group is not None:
            dist.barrier(self._step.group)  # the notes are there, for all ranks and for the next start
        what = f"step {culprit.step}: {spoilt or f'the loss is {float(culprit.result.loss)}'}"
        if culprit.passed_over:
            raise DivergedError(f"{what}, though it was passed over: an earlier step must have spoilt the weights")
        decide(self._config.divergence, self._spec.run_uri, culprit.step, what)
        if spoilt:  # an update that was left out cannot be why
            raise DivergedError(f"{what}: there is nothing to go on with")

    def _global_batches(self) -> list[np.ndarray]:
        """The sample indices of each pending step's global batch, in order."""
        own = np.full((len(self._pending), max(self._sizes)), -1, np.int64)
        for row, entry in enumerate(self._pending):
            own[row, : len(entry.indices)] = entry.indices
        device = self._step.device
        everyone = all_gather_stack(torch.from_numpy(own).to(device), self._step.group).cpu().numpy()
        return [
            np.concatenate([everyone[rank, row, :size] for rank, size in enumerate(self._sizes)])
            for row in range(len(self._pending))
        ]


def build_train_step(spec: LoopSpec, group: Any) -> TrainStep:
    """Network, head and optimizer of a run on this worker's device; the same initial weights on every rank."""
    config = spec.config
    neighbours = ray.train.get_context().get_local_world_size()
    threads = config.workers.threads or max(1, len(os.sched_getaffinity(0)) // neighbours)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        safe = safe_threads(threads, share_sizes(spec.plan.batch, world_size(group)), config.step.accumulate)
        if safe < threads:
            _logger.warning("%d threads of torch instead of %d: more do not divide this rank's batch", safe, threads)
        threads = safe
    torch.set_num_threads(threads)
    return assemble(config, spec.plan.data.num_classes, spec.plan.total_steps, device, group)


def _to_tensors(batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    # Copies: what Ray hands out is shared memory that nobody may write to.
    return torch.tensor(batch.images), torch.tensor(batch.labels)
