"""SGD as the face-recognition recipes use it, also on a sample of rows, also within the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from lgaf.config import require_in_range, require_positive

# Rows of a sparse gradient that are moved together; bounds the copies.
ROWS_AT_ONCE: Final = 65_536


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

    def build(self, modules: Iterable[nn.Module]) -> SampledSGD:
        """One optimizer over the parameters of several modules, its momentum buffers present from the start.

        A zero buffer gives the same first step as none at all; being there, it can be loaded into from a checkpoint.
        """
        parameters = [parameter for module in modules for parameter in module.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = SampledSGD(groups, lr=self.learning_rate, momentum=self.momentum)
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


class SampledSGD(torch.optim.SGD):
    """Momentum SGD that leaves alone what had no part in a step.

    Where a gradient is sparse (a head that looks at a sample of its classes), only its rows see gradient, momentum and
    weight decay; torch's own would let all rows' momentum run on, and refuses weight decay. Dense gradients go to
    torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see `torch.optim.SGD.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = []
        for group in self.param_groups:
            rule = RowRule(group["lr"], group["momentum"], group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    sparse.append((parameter, parameter.grad))
                    rows_K, values_KD = _rows_once(parameter.grad)
                    buffer = self.state[parameter]["momentum_buffer"]
                    blocks = zip(torch.split(rows_K, ROWS_AT_ONCE), torch.split(values_KD, ROWS_AT_ONCE), strict=True)
                    for rows, part_kD in blocks:
                        rule.move(parameter, buffer, rows, part_kD)
                    parameter.grad = None
        super().step()
        for parameter, gradient in sparse:
            parameter.grad = gradient
        return loss


def _rows_once(gradient_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a sparse gradient, each once, and their values; those of several backward passes are summed."""
    rows_K = gradient_CD._indices()[0]
    # Autograd forgets that the rows of one pass are in order; to coalesce them again would be to copy them.
    if not bool((rows_K[1:] > rows_K[:-1]).all()):
        gradient_CD = gradient_CD.coalesce()
    return gradient_CD._indices()[0], gradient_CD._values()


class RowRule(NamedTuple):
    """Momentum SGD on some rows of a matrix."""

    learning_rate: float
    momentum: float
    weight_decay: float

    @torch.no_grad()
    def move(self, weight_CD: Tensor, buffer_CD: Tensor, rows: slice | Tensor, gradient_kD: Tensor) -> None:
        """Move weight and momentum buffer of the rows, in place; the same operations as `torch.optim.SGD`'s."""
        weight_kD, buffer_kD = weight_CD[rows], buffer_CD[rows]
        if self.weight_decay:
            gradient_kD = gradient_kD.add(weight_kD, alpha=self.weight_decay)
        buffer_kD.mul_(self.momentum).add_(gradient_kD)
        weight_kD.add_(buffer_kD, alpha=-self.learning_rate)
        if isinstance(rows, Tensor):  # these are copies, where a slice's are views
            weight_CD[rows], buffer_CD[rows] = weight_kD, buffer_kD


class UpdateInBackward:
    """Moves a head's centres chunk by chunk in the backward pass, so that no gradient of all of them ever exists.

    Set as ``head.update``. One backward pass is then one step: there is no accumulating over several, no clipping of
    this gradient, and the loss must not be scaled (no GradScaler).

    Attributes:
        learning_rate: To be set before each backward pass.
        momentum_buffer: As the optimizer would hold it.
    """

    def __init__(self, weight_CD: nn.Parameter, config: SGDConfig) -> None:
        self._weight_CD, self._config = weight_CD, config
        self.learning_rate = config.learning_rate
        self.momentum_buffer = torch.zeros_like(weight_CD)

    def __call__(self, rows: slice | Tensor, gradient_kD: Tensor) -> None:
        """Move some rows by their gradient."""
        rule = RowRule(self.learning_rate, self._config.momentum, self._config.weight_decay)
        rule.move(self._weight_CD, self.momentum_buffer, rows, gradient_kD)
