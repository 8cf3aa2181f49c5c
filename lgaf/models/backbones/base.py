"""What every backbone is: a body that turns face crops into the feature map C(x)."""

# Shape legend: B = batch on this rank, C = channels of C(x), H, W = its sides

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

IMAGE_SIDE: Final = 112


class Backbone(nn.Module):
    """Body of a network; the projection to an embedding belongs to the branches.

    ``forward`` takes images [B, 3, 112, 112] in [-1, 1] and gives C(x), [B, out_channels, map_side, map_side].

    Attributes:
        out_channels: C of the map.
        map_side: H and W of the map: 7 for the convolutional ones, as in the paper.
        gradient_checkpointing: Keep only the inputs of blocks for the backward pass and compute the rest again.
    """

    out_channels: int
    map_side: int = 7
    gradient_checkpointing: bool = False

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """``block(x)``; with gradient checkpointing its activations are computed again in the backward pass.

        Gradients and running statistics are those of a run without, also under ``torch.compile`` with a backend that
        traces the backward pass (inductor, aot_eager). Its debugging backend "eager" does not, and raises.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            out: Tensor = block(x)
            return out
        if torch.compiler.is_compiling():
            # The compiler recomputes values, not side effects, and takes no context_fn that is not its own.
            compiled: Tensor = checkpoint(block, x, use_reentrant=False)
            return compiled

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _spare_statistics(block)

        again: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return again


@contextmanager
def _spare_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch norms move running statistics that nobody keeps.

    The second pass over a batch must not move them a second time, but must save as many tensors as the first for the
    backward pass, which a batch norm without running statistics does not.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        # What they hold is never read: a batch norm in training uses the statistics of its batch.
        norm._buffers.update(
            {name: None if old is None else torch.zeros_like(old) for name, old in norm._buffers.items()}
        )
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class BackboneSpec(Protocol):
    """The size of one backbone: a value, equal to others of the same size."""

    def __hash__(self) -> int: ...

    def build(self) -> Backbone:
        """Make it with fresh weights."""
        ...
