"""A run's TrainStep from its configuration: network, head and optimizer on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed import ProcessGroup

from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import FaceNetwork
from lgaf.step import TrainStep
from pipeline.config import TrainConfig


def assemble(
    config: TrainConfig,
    num_classes: int,
    total_steps: int,
    device: torch.device,
    group: ProcessGroup | None = None,
    model: FaceNetwork | None = None,
) -> TrainStep:
    """Make a run's step; the same initial weights on every rank.

    Args:
        config: Of the run.
        num_classes: People over all ranks.
        total_steps: Length of the run.
        device: Of this rank.
        group: All ranks; None for this process alone.
        model: In place of the configuration's network.
    """
    torch.manual_seed(config.seed)
    model = config.model.build() if model is None else model
    head = ShardedMarginHead(
        num_classes,
        config.model.output_dim,
        config.head.create(),
        group=group,
        seed=config.seed,
        sample_rate=config.head.sample_rate,
        screening=config.screening if config.screening.strength > 0 else None,
        memory_budget=config.head.memory_budget_mib << 20,
    )
    return TrainStep(
        model.to(device),
        head.to(device),
        replace(config.optimizer, learning_rate=config.optimizer.learning_rate_for(config.batch_size)),
        config.schedule,
        total_steps,
        group=group,
        precision=config.precision,
        head_precision=config.head.precision,
        update_head_in_backward=config.head.update == "backward",
        seed=config.seed,
        config=config.step,
        leave_out_non_finite=config.divergence.policy == "skip",
    )


def safe_threads(threads: int, sizes: Sequence[int], parts: int = 1) -> int:
    """The most threads of torch, up to ``threads``, that divide every part of these batches.

    On CPUs torch 2.13 ends with a segmentation fault in the backward pass of batches of 3, 5, 7, 9, 15 and 33 on two
    threads, never on one and never with an even batch.

    Args:
        threads: Wanted.
        sizes: Batch of each rank.
        parts: In which each is computed.
    """
    computed = {size * (part + 1) // parts - size * part // parts for size in sizes for part in range(parts)}
    return next(count for count in range(threads, 0, -1) if all(size % count == 0 for size in computed))
