"""A run on Ray Train: starts the workers, survives their deaths, gives the trained model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
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
from pipeline.model_store import read_model_info
from pipeline.runtime import is_on_cluster
from pipeline.tracking.outbox import RunAddress
from pipeline.training.commits import MARKER, checkpoint_uri, latest_step, placeholder_dataset
from pipeline.training.failure import clear_fatal, raise_fatal
from pipeline.training.loop import MODEL_FOLDER, LoopSpec, train_worker
from pipeline.training.metrics_log import read_metrics

POLL_S = 0.5

OnProgress = Callable[[int, int, float, float], None]


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


@ray.remote(num_cpus=0)
class _ProgressBoard:
    """How far the run is: rank 0 tells it, the driver asks it. Works wherever the workers are."""

    def __init__(self) -> None:
        self._latest: tuple[int, float, float] | None = None

    def update(self, steps_done: int, loss: float, images_per_second: float) -> None:
        self._latest = (steps_done, loss, images_per_second)

    def latest(self) -> tuple[int, float, float] | None:
        return self._latest


def stream_plan(config: TrainConfig, data: Manifest | Mixture) -> StreamPlan:
    """Which samples a run trains on; ``ValueError`` if there are too few of them, or of people."""
    if data.num_classes < config.num_workers:
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

    Args:
        config: Of the run.
        data: The packed data.
        run_uri: Folder of the run: checkpoints, ``metrics.jsonl``, the exported model.
        tracking: MLflow run to log to.
        on_progress: Told (steps done, steps in all, loss, images/s).

    Raises:
        FatalTrainingError: The data are bad; the message names the shard.
        TrainingFailedError: Workers died more often than ``workers.max_failures``.
    """
    plan = stream_plan(config, data)
    _check_same_data(data, run_uri)
    _check_gpus(config)
    clear_fatal(run_uri)
    board: Any = _ProgressBoard.remote()  # type: ignore[attr-defined]
    spec = LoopSpec(
        config=config,
        run_uri=run_uri,
        plan=plan,
        tracking=tracking,
        progress=board,
    )
    trainer = _trainer(config, spec)
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, plan.total_steps, on_progress, finished), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except Exception:
        raise_fatal(run_uri)  # the plain reason instead of Ray's wrapping of it
        raise
    finally:
        finished.set()
        watcher.join()
    return _result(config, plan, run_uri)


def _check_same_data(data: Manifest | Mixture, run_uri: str) -> None:
    done = latest_step(run_uri)
    if not done:
        return
    before = storage.read_json(storage.join(checkpoint_uri(run_uri, done), MARKER))["data_fingerprint"]
    if before != data.fingerprint:
        raise ManifestError(
            f"{data.uri}: the run was trained on data with fingerprint {before[:12]}, "
            f"this has {data.fingerprint[:12]}: take another run_name"
        )


def _check_gpus(config: TrainConfig) -> None:
    """On a machine of its own, refuse what Ray would wait for without end; a cluster may still grow."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if config.workers.use_gpu and found < config.num_workers and not is_on_cluster():
        raise ValueError(
            f"num_workers={config.num_workers} with workers.use_gpu need as many GPUs, this machine has {found}: "
            "take fewer workers, or --workers.no-use-gpu"
        )


def _trainer(config: TrainConfig, spec: LoopSpec) -> Any:
    filesystem, path = storage.resolve(storage.join(spec.run_uri, "ray"))
    reserved = config.num_workers * config.workers.cpus_per_worker
    failures = config.workers.max_failures
    if config.divergence.policy == "rollback" and failures >= 0:  # -1: no limit
        failures += config.divergence.budget
    quarantine = Quarantine(storage.join(spec.run_uri, QUARANTINE), config.stream.max_bad_images)
    return TorchTrainer(
        train_worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.workers.use_gpu,
            resources_per_worker={"CPU": config.workers.cpus_per_worker}
            | ({"GPU": 1} if config.workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=failures),
        ),
        # Asked again on every restart of the group: there a noted fatal error ends the run.
        datasets={TRAIN: functools.partial(placeholder_dataset, spec.run_uri)},
        dataset_config=PlannedDataConfig(spec.plan, functools.partial(latest_step, spec.run_uri), reserved, quarantine),
    )


def _watch(board: Any, total: int, on_progress: OnProgress | None, finished: threading.Event) -> None:
    while on_progress is not None:
        done = finished.wait(POLL_S)
        try:
            latest = ray.get(board.latest.remote(), timeout=5)
        except Exception:  # the display must never end a run
            return
        if latest is not None:
            on_progress(latest[0], total, latest[1], latest[2])
        if done:
            return


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
