"""Batch norm over the global batch in place of each rank's own rows."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup

from lgaf.distributed import world_size


def synchronise_norms(model: nn.Module, group: ProcessGroup | None) -> None:
    """Make every batch norm of ``model`` take its statistics over all ranks in training; in place.

    Parameters, running statistics and their names stay what they are, so states load either way; in eval mode the
    outputs are the same to the bit. Each batch norm then costs one all-gather forward and one all-reduce backward (and
    the all-gather again where its block is computed again). Nothing happens with one rank: its batch is the global one.

    Args:
        model: A network; its root is no batch norm.
        group: All ranks. The converted modules hold it, and cannot be copied from then on.
    """
    if world_size(group) > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # type: ignore[no-untyped-call]


def check_synchronised_norms(device: torch.device, group: ProcessGroup | None) -> None:
    """Raise ``ValueError`` where torch could not train with such batch norms: on several ranks without accelerators."""
    if world_size(group) > 1 and device.type == "cpu":
        raise ValueError(
            f"step.sync_batch_norm=True with {world_size(group)} ranks on CPUs: torch's SyncBatchNorm trains on "
            "accelerators alone; set it to False, or train on GPUs (workers.use_gpu)"
        )
