"""SGD as the face-recognition recipes use it, also on a sample of rows, also within the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lgaf.config import require_in_range, require_positive
from lgaf.distributed import all_reduce_sum

if TYPE_CHECKING:
    from lgaf.heads.sharded import ShardedMarginHead

# Rows of a sparse gradient that are moved together; bounds the copies.
ROWS_AT_ONCE: Final = 16_384


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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see `torch.optim.SGD.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = RowRule(group["lr"], group["momentum"], group["weight_decay"])
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                if parameter.grad.is_sparse:
                    self._move_rows(parameter, rule)
            self._move_dense([parameter for parameter in moved if not parameter.grad.is_sparse], rule)
        return loss

    def _move_rows(self, parameter: Tensor, rule: RowRule) -> None:
        assert parameter.grad is not None
        rows_K, values_KD = _rows_once(parameter.grad)
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


def _rows_once(gradient_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a sparse gradient, each once, and their values; those of several backward passes are summed."""
    if not _in_order(gradient_CD):
        gradient_CD = gradient_CD.coalesce()
    return gradient_CD._indices()[0], gradient_CD._values()


def _in_order(gradient_CD: Tensor) -> bool:
    """Whether each row is there once, ascending. Autograd forgets that it is; to coalesce again would be to copy."""
    rows_K = gradient_CD._indices()[0]
    return bool((rows_K[1:] > rows_K[:-1]).all())


@torch.no_grad()
def clip_gradients(
    replicated: Iterable[nn.Parameter], sharded: Iterable[nn.Parameter], max_norm: float, group: ProcessGroup | None
) -> Tensor:
    """Scale all gradients down so that the norm of all of them together is at most ``max_norm``; their norm before.

    As `torch.nn.utils.clip_grad_norm_`, for a class-sharded head too: each rank has other rows, so the squares of
    sharded parameters are summed over the group (one all-reduce of one number), and gradients may be sparse.

    Args:
        replicated: Parameters whose gradients are the same on all ranks.
        sharded: Parameters of which each rank has a part.
        max_norm: Of the gradient.
        group: The ranks; None for this process alone.
    """
    require_positive("max_norm", max_norm)
    same, own = _gradient_values(replicated), _gradient_values(sharded)
    device = next((value.device for value in [*same, *own]), None)
    norm = (all_reduce_sum(_squares(own, device), group) + _squares(same, device)).sqrt()
    for value in [*same, *own]:
        value.mul_((max_norm / (norm + 1e-6)).clamp_max(1.0).to(value.dtype))
    return norm


def _squares(values: list[Tensor], device: torch.device | None) -> Tensor:
    return sum((value.square().sum() for value in values), torch.zeros((), device=device))


def _gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The numbers of the gradients that there are; of sparse ones those of their rows, each row once."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            if not _in_order(parameter.grad):
                parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values


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

    One backward pass is then one step: there is no accumulating over several, no clipping of this gradient, and the
    loss must not be scaled (no GradScaler). The head's learned scalars, if any, are left to an optimizer
    (``config.build([head.margin_state])``).

    Args:
        head: On its device; this becomes its ``update``.
        config: The recipe.

    Attributes:
        learning_rate: To be set before each backward pass.
        momentum_buffer: As the optimizer would hold it.
    """

    def __init__(self, head: ShardedMarginHead, config: SGDConfig) -> None:
        self._weight_CD, self._config = head.weight, config
        self.learning_rate = config.learning_rate
        self.momentum_buffer = torch.zeros_like(head.weight)
        head.update = self

    def __call__(self, rows: slice | Tensor, gradient_kD: Tensor) -> None:
        """Move some rows by their gradient.

        Raises:
            ValueError: The head was moved to another device or type after this was made.
        """
        weight, buffer = self._weight_CD, self.momentum_buffer
        if (weight.dtype, weight.device) != (buffer.dtype, buffer.device):
            raise ValueError(
                f"the centres are {weight.dtype} on {weight.device}, their momentum {buffer.dtype} on {buffer.device}: "
                "move the head first, then make its UpdateInBackward"
            )
        rule = RowRule(self.learning_rate, self._config.momentum, self._config.weight_decay)
        rule.move(weight, buffer, rows, gradient_kD)
