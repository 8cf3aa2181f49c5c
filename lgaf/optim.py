"""SGD as the face-recognition recipes use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lgaf.config import require_in_range, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class SGDConfig:
    """Momentum SGD; decay on matrices and kernels only, not on norms and biases (as AdaFace)."""

    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("optimizer.learning_rate", self.learning_rate)
        require_in_range("optimizer.momentum", self.momentum, 0.0, 0.9999)
        require_in_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)

    def build(self, modules: Iterable[nn.Module]) -> torch.optim.SGD:
        """One optimizer over the parameters of several modules, its momentum buffers present from the start.

        A zero buffer gives the same first step as none at all; being there, it can be loaded into from a checkpoint.
        """
        parameters = [parameter for module in modules for parameter in module.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
