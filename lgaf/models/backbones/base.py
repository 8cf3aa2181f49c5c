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
        """``block(x)``; with gradient checkpointing its activations are computed again in the backward pass."""
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            out: Tensor = block(x)
            return out

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _untracked_batch_norm(block)

        again: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return again


@contextmanager
def _untracked_batch_norm(block: nn.Module) -> Iterator[None]:
    """The second pass over a batch must not move the running statistics a second time."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class BackboneSpec(Protocol):
    """The size of one backbone."""

    def build(self) -> Backbone:
        """Make it with fresh weights."""
        ...
