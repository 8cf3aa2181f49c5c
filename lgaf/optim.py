"""The optimizers of the face-recognition recipes, also within the backward pass; clipping over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lgaf.config import require_choice, require_in_range, require_positive
from lgaf.distributed import all_reduce_sum
from lgaf.sampled_optim import RowRule, SampledAdamW, SampledOptimizer, SampledSGD, in_order

if TYPE_CHECKING:
    from lgaf.heads.sharded import ShardedMarginHead


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer; weight decay on matrices and kernels only, not on norms and biases (as AdaFace).

    Attributes:
        kind: "sgd": momentum SGD, the recipe of all convolutional networks here. "adamw": for transformers.
        learning_rate: Peak rate; `Schedule` says how it runs.
        momentum: Of "sgd".
        beta1: Of "adamw": factor of the first moment.
        beta2: Of "adamw": factor of the second moment.
        epsilon: Of "adamw".
        weight_decay: Times the learning rate, subtracted each step as a share of the weight.
        max_norm: The gradient of everything together is scaled down to this norm; 0: it is not. (insightface and
            CVLface: 5; AdaFace: none.)
        reference_batch: Global batch that ``learning_rate`` is meant for: with another one the rate is scaled in
            proportion (https://arxiv.org/abs/1706.02677). 0: the rate stands as it is.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 5e-4
    max_norm: float = 0.0
    reference_batch: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_choice("optimizer.kind", self.kind, ("sgd", "adamw"))
        require_positive("optimizer.learning_rate", self.learning_rate)
        for name in ("momentum", "beta1", "beta2"):
            require_in_range(f"optimizer.{name}", getattr(self, name), 0.0, 0.9999)
        require_positive("optimizer.epsilon", self.epsilon)
        require_in_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)
        require_in_range("optimizer.max_norm", self.max_norm, 0.0, 1e9)
        require_in_range("optimizer.reference_batch", self.reference_batch, 0, 1 << 30)

    def learning_rate_for(self, batch: int) -> float:
        """Peak learning rate with a global batch of this size."""
        return self.learning_rate * (batch / self.reference_batch if self.reference_batch else 1.0)

    def build(self, modules: Iterable[nn.Module]) -> SampledOptimizer:
        """One optimizer over the parameters of several modules, its state present from the start.

        Zeros give the same first step as none at all; being there, they can be loaded into from a checkpoint.
        """
        parameters = [parameter for module in modules for parameter in module.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: SampledOptimizer
        if self.kind == "adamw":
            optimizer = SampledAdamW(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon)
        else:
            optimizer = SampledSGD(groups, lr=self.learning_rate, momentum=self.momentum)
        for parameter in parameters:
            optimizer.prepare(parameter)
        return optimizer


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
            if not in_order(parameter.grad):
                parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values


class UpdateInBackward:
    """Moves a head's centres chunk by chunk in the backward pass, so that no gradient of all of them ever exists.

    One backward pass is then one step: there is no accumulating over several, no clipping of this gradient, and the
    loss must not be scaled (no GradScaler). The head's learned scalars, if any, are left to an optimizer
    (``config.build([head.margin_state])``).

    Args:
        head: On its device; this becomes its ``update``.
        config: The recipe, of kind "sgd".

    Attributes:
        learning_rate: To be set before each backward pass.
        momentum_buffer: As the optimizer would hold it.
    """

    def __init__(self, head: ShardedMarginHead, config: OptimizerConfig) -> None:
        if config.kind != "sgd" or config.max_norm:
            raise ValueError(
                f"optimizer.kind={config.kind!r}, optimizer.max_norm={config.max_norm!r}: centres that move within the "
                "backward pass take momentum SGD, and no clipping"
            )
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
