"""A short real training run, and the same steps without the pipeline: on batches that lie in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lgaf.distributed import rank_in, world_size
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.step import TrainStep
from pipeline.config import TrainConfig, WorkersConfig
from pipeline.data.manifest import Manifest
from pipeline.presets import demo
from pipeline.tracking.outbox import RunAddress
from pipeline.tracking.tracked_run import TrackedRun
from pipeline.training.metrics_log import read_metrics
from pipeline.training.trainer import train
from tests.distributed import run_distributed

# Steps at the start that are not counted: workers, stream and memory find their pace.
WARM_UP = 20


def short_config(batch_size: int, num_workers: int, backbone: str) -> TrainConfig:
    """The demo's recipe, without checkpoints on the way."""
    base = demo()
    return dataclasses.replace(
        base,
        batch_size=batch_size,
        num_workers=num_workers,
        model=dataclasses.replace(base.model, backbone=backbone),
        workers=WorkersConfig(checkpoint_every_steps=1 << 20),
    )


def bare_rate(config: TrainConfig, num_classes: int, num_steps: int) -> float:
    """Images/s (median) of as many ranks as the run has workers, on one batch in memory.

    The ranks are forked: to be called before Ray is started.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "seconds.json"
        run_distributed(config.num_workers, _bare_rank, config, num_classes, num_steps, place)
        seconds = json.loads(place.read_text())
    return config.batch_size / float(np.median(seconds))


def _bare_rank(group: dist.ProcessGroup, config: TrainConfig, num_classes: int, num_steps: int, place: Path) -> None:
    ranks = world_size(group)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))  # as the training loop does
    step = _bare_step(group, config, num_classes)
    rows = config.batch_size // ranks
    images = torch.randint(0, 256, (rows, 112, 112, 3), dtype=torch.uint8)
    labels, seconds = torch.randint(0, num_classes, (rows,)), []
    for _ in range(WARM_UP + num_steps):
        started = time.perf_counter()
        step(images, labels, sizes=[rows] * ranks)
        seconds.append(time.perf_counter() - started)
    if rank_in(group) == 0:
        place.write_text(json.dumps(seconds[WARM_UP:]))


def _bare_step(group: dist.ProcessGroup, config: TrainConfig, num_classes: int) -> TrainStep:
    head = ShardedMarginHead(num_classes, config.model.output_dim, config.head.create(), group=group)
    return TrainStep(
        config.model.build(),
        head,
        config.optimizer,
        config.schedule,
        1 << 20,
        group=group,
        precision=config.precision,
        head_precision=config.head.precision,
        config=config.step,
    )


def job_rate(config: TrainConfig, data: Manifest, num_steps: int, run_uri: str) -> float:
    """Train for about so many steps after the warm-up, in an open Ray session; gives images/s (median of these)."""
    needed = WARM_UP + num_steps
    if config.profile.steps:
        needed = max(needed, config.profile.after + config.profile.steps)
    epochs = -(-needed // (data.num_samples // config.batch_size))
    address = RunAddress(
        run_uri=run_uri, tracking_uri=f"sqlite:///{run_uri}-mlflow.db", experiment="benchmarks", run_name="short-job"
    )
    TrackedRun(address).begin({})  # makes the MLflow run, which rank 0 writes to
    train(dataclasses.replace(config, epochs=epochs), data, run_uri, tracking=address)
    return float(np.median([line["images_per_second"] for line in read_metrics(run_uri)[WARM_UP:]]))
