"""Optimizers that leave alone what had no part in a step: the rows that a sampling head did not draw.

Dense gradients move as by torch's own, to the bit.
"""

# Shape legend: C = rows of a matrix, K = rows that had a part, k = some of these, D = embedding

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

# Rows of a sparse gradient that are moved together; bounds the copies.
ROWS_AT_ONCE: Final = 16_384


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


class SampledSGD(torch.optim.SGD):
    """Momentum SGD that leaves alone what had no part in a step.

    Where a gradient is sparse (a head that looks at a sample of its classes), only its rows see gradient, momentum and
    weight decay; torch's own would let all rows' momentum run on, and refuses weight decay. Dense gradients move as by
    torch's own, to the bit.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        momentum: Factor of the momentum.
        weight_decay: Of all parameters, unless their group has its own.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def prepare(self, parameter: Tensor) -> None:
        """Make the state of a parameter, as the first step would."""
        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see `torch.optim.SGD.step`."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            rule = RowRule(group["lr"], group["momentum"], group["weight_decay"])
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                if "momentum_buffer" not in self.state[parameter]:
                    self.prepare(parameter)
                if parameter.grad.is_sparse:
                    self._move_rows(parameter, rule)
            self._move_dense([parameter for parameter in moved if not parameter.grad.is_sparse], rule)
        return loss

    def _move_rows(self, parameter: Tensor, rule: RowRule) -> None:
        assert parameter.grad is not None
        rows_K, values_KD = rows_once(parameter.grad)
        buffer = self.state[parameter]["momentum_buffer"]
        blocks = zip(torch.split(rows_K, ROWS_AT_ONCE), torch.split(values_KD, ROWS_AT_ONCE), strict=True)
        for rows, part_kD in blocks:
            rule.move(parameter, buffer, rows, part_kD)

    def _move_dense(self, parameters: list[Tensor], rule: RowRule) -> None:
        # Not super().step(): hooks of a step would be called twice.
        sgd(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            weight_decay=rule.weight_decay,
            momentum=rule.momentum,
            lr=rule.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class SampledAdamW(torch.optim.AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101) for sparse gradients too: only their rows move, and their moments.

    The bias of the moments is corrected by the steps of the whole matrix, as insightface's partial FC does.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Factors of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Of all parameters, unless their group has its own.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def prepare(self, parameter: Tensor) -> None:
        """Make the state of a parameter, as the first step would."""
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see `torch.optim.AdamW.step`."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                if not self.state[parameter]:
                    self.prepare(parameter)
                if parameter.grad.is_sparse:
                    self._move_rows(parameter, group)
            dense = [parameter for parameter in moved if not parameter.grad.is_sparse]
            states = [self.state[parameter] for parameter in dense]
            _adamw(dense, [parameter.grad for parameter in dense], states, group)
        return loss

    def _move_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        rows_K, values_KD = rows_once(parameter.grad)
        for rows, part_kD in zip(torch.split(rows_K, ROWS_AT_ONCE), torch.split(values_KD, ROWS_AT_ONCE), strict=True):
            weight_kD = parameter[rows]
            own = {
                "step": state["step"].clone(),
                "exp_avg": state["exp_avg"][rows],
                "exp_avg_sq": state["exp_avg_sq"][rows],
            }
            _adamw([weight_kD], [part_kD], [own], group)
            parameter[rows], state["exp_avg"][rows] = weight_kD, own["exp_avg"]
            state["exp_avg_sq"][rows] = own["exp_avg_sq"]
        state["step"] += 1


SampledOptimizer = SampledSGD | SampledAdamW


def _adamw(
    parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> None:
    """Torch's own arithmetic on these tensors, in place."""
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _evaluated(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def rows_once(gradient_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a sparse gradient, each once, and their values; those of several backward passes are summed."""
    if not in_order(gradient_CD):
        gradient_CD = gradient_CD.coalesce()
    return gradient_CD._indices()[0], gradient_CD._values()


def in_order(gradient_CD: Tensor) -> bool:
    """Whether each row is there once, ascending. Autograd forgets that it is; to coalesce again would be to copy."""
    rows_K = gradient_CD._indices()[0]
    return bool((rows_K[1:] > rows_K[:-1]).all())
