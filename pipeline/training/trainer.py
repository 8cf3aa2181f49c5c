"""A run on Ray Train: starts the workers, survives their deaths, gives the trained model."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.mixture import Mixture
from pipeline.data.order import steps_per_epoch
from pipeline.data.quarantine import NAME as QUARANTINE
from pipeline.data.quarantine import Quarantine
from pipeline.data.stream import TRAIN, PlannedDataConfig
from pipeline.data.stream_plan import StreamPlan
from pipeline.errors import user_error
from pipeline.model_store import CONFIG, read_model_info
from pipeline.runtime import is_on_cluster, release_placement_groups
from pipeline.stopping import StoppedError, StopSignals
from pipeline.tracking.outbox import RunAddress
from pipeline.training.attempts import SupersededError, check_not_superseded, controller_of
from pipeline.training.commits import begin_attempt, latest_checkpoint, latest_step, read_marker
from pipeline.training.failure import WorkersLostError, clear_fatal, raise_fatal
from pipeline.training.loop import MODEL_FOLDER, LoopSpec, train_worker
from pipeline.training.metrics_log import read_metrics
from pipeline.training.pulse import ANSWER_S, Look, find_hang, make_board

POLL_S = 0.5
OTHERS_LOOK_S = 30.0
REPLACE_S = 3.0  # before another controller: the workers of the one that died end meanwhile

OnProgress = Callable[[int, int, float, float], None]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """What training leaves.

    Attributes:
        model_uri: Folder of the exported model.
        fingerprint: SHA-256 of its weights.
        num_steps: Steps of the run.
        final_loss: Mean of the last epoch's finite losses.
        images_per_second: Median over the steps.
    """

    model_uri: str
    fingerprint: str
    num_steps: int
    final_loss: float
    images_per_second: float


def stream_plan(config: TrainConfig, data: Manifest | Mixture) -> StreamPlan:
    """Which samples a run trains on; ``ValueError`` if there are too few of them, or of people."""
    if data.num_classes < config.most_workers:
        raise ValueError(f"num_workers={config.num_workers} is more than the {data.num_classes} people of the data")
    return StreamPlan(
        data=data,
        config=config.stream,
        seed=config.seed,
        batch=config.batch_size,
        total_steps=config.epochs * steps_per_epoch(data, config.batch_size),
    )


def train(
    config: TrainConfig,
    data: Manifest | Mixture,
    run_uri: str,
    *,
    tracking: RunAddress,
    on_progress: OnProgress | None = None,
) -> TrainedModel:
    """Train a run from its newest checkpoint, or from the start, to its end.

    A worker's death, a node's, or that of Ray Train's controller starts the workers again from the newest checkpoint.
    SIGTERM and the first Ctrl-C end it with a checkpoint.

    Args:
        config: Of the run.
        data: The packed data.
        run_uri: Folder of the run: checkpoints, ``metrics.jsonl``, the exported model.
        tracking: MLflow run to log to.
        on_progress: Told (steps done, steps in all, loss, images/s).

    Raises:
        FatalTrainingError: The data are bad; the message names the shard.
        SupersededError: Another job has taken the run over.
        StoppedError: A signal asked for it; the last checkpoint has everything.
        WorkersLostError: Workers died more often than ``workers.max_failures``.
        StorageError: The last checkpoint could not be written, or none can be read.
    """
    plan = stream_plan(config, data)
    _check_same_data(data, run_uri)
    _check_gpus(config)
    clear_fatal(run_uri)
    job, controllers, controllers_lost = uuid.uuid4().hex, 0, 0
    with StopSignals() as signals:
        while True:
            controllers += 1
            board = make_board()
            spec = LoopSpec(
                config=config,
                run_uri=run_uri,
                plan=plan,
                tracking=tracking,
                board=board,
            )
            try:
                _Fit(config, spec, controller_of(job, controllers), signals, on_progress).run()
            except ActorDiedError as error:  # Ray starts workers again, but not what watches over them
                controllers_lost += 1
                if config.workers.max_failures >= 0 and controllers_lost > config.workers.max_failures:
                    raise
                _logger.warning("Ray Train's controller died, training goes on with another: %s", _first_line(error))
                release_placement_groups()
                time.sleep(REPLACE_S)
                continue
            done = latest_step(run_uri)
            if signals.received:
                raise StoppedError(signals.received, f"stopped after {done} of {plan.total_steps} steps")
            if done == plan.total_steps and storage.exists(storage.join(run_uri, MODEL_FOLDER, CONFIG)):
                return _result(config, plan, run_uri)
            _logger.warning("a node of the run is being taken away: going on elsewhere from step %d", done)


def _check_same_data(data: Manifest | Mixture, run_uri: str) -> None:
    newest = latest_checkpoint(run_uri)
    if newest is None:
        return
    before = read_marker(newest.uri)["data_fingerprint"]
    if before != data.fingerprint:
        raise ManifestError(
            f"{data.uri}: the run was trained on data with fingerprint {before[:12]}, "
            f"this has {data.fingerprint[:12]}: take another run_name"
        )


def _check_gpus(config: TrainConfig) -> None:
    """On a machine of its own, refuse what Ray would wait for without end; a cluster may still grow."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if config.workers.use_gpu and found < config.fewest_workers and not is_on_cluster():
        raise ValueError(
            f"num_workers={config.num_workers} with workers.use_gpu need as many GPUs, this machine has {found}: "
            "take fewer workers, or --workers.no-use-gpu"
        )


class _Fit:
    """One controller of Ray Train, which is run by a thread; this one shows progress and watches over the workers."""

    def __init__(
        self,
        config: TrainConfig,
        spec: LoopSpec,
        claimant: str,
        signals: StopSignals,
        on_progress: OnProgress | None,
    ) -> None:
        self._config, self._spec, self._claimant = config, spec, claimant
        self._signals, self._on_progress = signals, on_progress
        self._error: BaseException | None = None
        self._superseded: SupersededError | None = None
        self._asked_to_stop = self._warned = False
        self._group: int | None = None

    def run(self) -> None:
        thread = threading.Thread(
            target=self._train, args=(_trainer(self._config, self._spec, self._claimant),), daemon=True
        )
        thread.start()
        threading.Thread(target=self._look_for_others, args=(thread,), daemon=True).start()
        while thread.is_alive():
            thread.join(POLL_S)
            self._watch()
            if self._superseded is not None:
                raise self._superseded
            if self._signals.received and self._group is None:
                return  # nobody trains yet: nothing to wait for
        self._watch()
        if self._error is not None:
            raise_fatal(self._spec.run_uri)  # the plain reason instead of Ray's wrapping of it
            check_not_superseded(self._spec.run_uri, self._claimant)  # likewise
            if isinstance(self._error, WorkerGroupError) and user_error(self._error) is None:
                raise self._workers_lost(self._error) from self._error
            raise self._error

    def _workers_lost(self, error: WorkerGroupError) -> WorkersLostError:
        reasons = [f"rank {rank}: {_last_line(cause)}" for rank, cause in sorted(error.worker_failures.items())]
        # That the others lost their connection to one that died is no cause.
        reasons.sort(key=lambda reason: "onnection" in reason)
        return WorkersLostError(
            f"the workers died more often than workers.max_failures={self._config.workers.max_failures} allows; the "
            f"same command goes on from step {latest_step(self._spec.run_uri)}. The last time: {'; '.join(reasons[:4])}"
        )

    def _train(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._error = error

    def _look_for_others(self, fit: threading.Thread) -> None:
        """Workers look when they write; between, and where they wait for room in the cluster, nobody else would."""
        while fit.is_alive() and self._superseded is None:
            fit.join(OTHERS_LOOK_S)
            with contextlib.suppress(OSError):
                try:
                    check_not_superseded(self._spec.run_uri, self._claimant)
                except SupersededError as error:
                    self._superseded = error

    def _watch(self) -> None:
        board = self._spec.board
        if self._signals.received and not self._asked_to_stop:
            self._asked_to_stop = True
            board.ask_to_stop.remote()
        try:
            look: Look = ray.get(board.look.remote(), timeout=ANSWER_S)
        except Exception as error:  # the display must never end a run
            if not self._warned:
                self._warned = True
                _logger.warning("no progress is shown, and no hang is seen: the board does not answer: %s", error)
            return
        for warning in look.warnings:
            _logger.warning("%s", warning)
        if self._on_progress is not None and look.progress is not None:
            steps, loss, rate = look.progress
            self._on_progress(steps, self._spec.plan.total_steps, loss, rate)
        self._tell_of_new_group(look)
        timeout_s = self._config.workers.hang_timeout_s
        hang = find_hang(look.positions, look.now, timeout_s) if timeout_s else None
        if hang is not None:
            _logger.warning("the run hangs, the workers are started again: %s", hang.diagnosis)
            board.give_up.remote(hang.group, hang.ranks)

    def _tell_of_new_group(self, look: Look) -> None:
        if not look.positions or look.positions[0].group == self._group:
            return
        newest = look.positions[0]
        if self._group is not None:
            _logger.warning("the workers were started again, %d of them", newest.world_size)
        self._group = newest.group


def _trainer(config: TrainConfig, spec: LoopSpec, claimant: str) -> Any:
    filesystem, path = storage.resolve(storage.join(spec.run_uri, "ray"))
    workers = config.workers
    failures = workers.max_failures
    if config.divergence.policy == "rollback" and failures >= 0:  # -1: no limit
        failures += config.divergence.budget
    quarantine = Quarantine(storage.join(spec.run_uri, QUARANTINE), config.stream.max_bad_images)
    return TorchTrainer(
        train_worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": 1} if workers.use_gpu else {}),
            elastic_resize_monitor_interval_s=workers.resize_interval_s,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=failures),
        ),
        # Asked again at every start of the workers.
        datasets={TRAIN: functools.partial(begin_attempt, spec.run_uri, claimant, workers.storage_patience_s)},
        dataset_config=PlannedDataConfig(spec.plan, workers.cpus_per_worker, quarantine),
    )


def _last_line(error: BaseException) -> str:
    """Of an error into whose text Ray puts the traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _result(config: TrainConfig, plan: StreamPlan, run_uri: str) -> TrainedModel:
    lines = read_metrics(run_uri)
    last_epoch = lines[-plan.steps_per_epoch :]
    model_uri = storage.join(run_uri, MODEL_FOLDER)
    return TrainedModel(
        model_uri=model_uri,
        fingerprint=read_model_info(model_uri)["sha256"],
        num_steps=plan.total_steps,
        final_loss=float(np.mean([line["loss"] for line in last_epoch if np.isfinite(line["loss"])])),
        images_per_second=float(np.median([line["images_per_second"] for line in lines])),
    )
