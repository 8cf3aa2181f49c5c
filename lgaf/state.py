"""The state of a TrainStep as tensors that do not depend on the world size.

The head's tensors are DTensors sharded over classes: `torch.distributed.checkpoint` writes them from any number of
ranks and reads them into any other. The tensors are views of the live ones: loading into the dictionary is a restore.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lgaf.distributed import world_size
from lgaf.step import TrainStep


def training_state(step: TrainStep) -> dict[str, Any]:
    """Network (with the fusion's statistics), class centres and all optimizer tensors, by name.

    Beside them, where the recipe has them, the moving average of the network and the gradient scaler.
    """
    head = step.head
    extras: dict[str, Any] = {}
    if step.average is not None:
        extras["average"] = step.average.state_dict()
    if step.precision == "float16":  # one that only looks whether gradients are finite has nothing to keep
        extras["scaler"] = step.scaler  # torch.distributed.checkpoint asks it for its state, and gives it back
    return extras | {
        "model": step.model.state_dict(),
        "model_optimizer": {
            f"{name}.{key}": value
            for name, parameter in step.model.named_parameters()
            for key, value in step.optimizer.state[parameter].items()
        },
        "head": {
            "weight": over_classes(head.weight.detach(), head.num_classes, step.group),
            **{name: value for name, value in head.state_dict().items() if name != "weight"},
        },
        "head_optimizer": {
            # A single number (AdamW counts its steps) is the same on all ranks.
            f"{name}.{key}": over_classes(value, head.num_classes, step.group)
            if parameter is head.weight and value.ndim
            else value
            for name, parameter in head.named_parameters()
            for key, value in _optimizer_tensors(step, parameter).items()
        },
    }


def _optimizer_tensors(step: TrainStep, parameter: nn.Parameter) -> dict[str, Tensor]:
    if step.head_update is not None and parameter is step.head.weight:
        return {"momentum_buffer": step.head_update.momentum_buffer}  # as the optimizer would call it
    tensors: dict[str, Tensor] = step.optimizer.state[parameter]
    return tensors


def over_classes(shard: Tensor, num_classes: int, group: ProcessGroup | None) -> Tensor:
    """The tensor over all ``num_classes`` classes that ``shard`` holds this rank's rows of; it shares its memory."""
    if group is None or world_size(group) == 1:
        return shard
    mesh = DeviceMesh.from_group(group, shard.device.type)
    shape = torch.Size((num_classes, *shard.shape[1:]))
    return DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=shape, stride=shard.stride())
