"""Bytes that a training step holds on one rank: what autograd keeps, counted; all else, computed from sizes.

An upper bound by item, not a simulation. Not in it: what an allocator loses to fragments and rounding, workspaces of
cuDNN and cuBLAS, communication buffers of NCCL, the CUDA context (hundreds of MiB), gradients of activations on their
way back (a few of the largest activations), and a few matrices of the global batch in the head.
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding, C = classes of this rank, K = classes of this
#               rank that a step looks at

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lgaf.heads.chunks import AnyChunks, PlainSoftmaxChunks, plain_shift
from lgaf.heads.fused import CPU_CHUNK, GPU_CHUNK, plan_chunks, row_copies
from lgaf.heads.margins import Margin
from lgaf.models import FaceNetwork
from lgaf.models.backbones import IMAGE_SIDE
from lgaf.models.backbones.base import Backbone
from lgaf.sampled_optim import ROWS_AT_ONCE

COUNTED_BATCHES: Final = (2, 4)
"""Images of the two passes that are counted; batch norm needs two."""
FLOAT: Final = 4
INDEX: Final = 8


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Kept:
    """A tensor in the graph: lives as long as the node of the graph that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(run: Callable[[], object], without: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of what ``run`` gives, each storage once.

    Args:
        run: A forward pass; gives its outputs.
        without: Tensors whose storages are not counted: parameters and inputs, which are there anyway.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        held = _Kept(tensor.detach())  # with its graph it would hold the node that holds it, for ever
        kept.add(held)
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        outputs = run()
        # Here, while the outputs hold the graph: what ended with the forward pass is gone.
        storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in kept}
        del outputs
    return sum(size for place, size in storages.items() if place not in there)


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """What autograd keeps of a network's forward pass in training.

    Attributes:
        fixed_bytes: Whatever the batch: rounded copies of the weights under autocast, statistics of batch norms.
        image_bytes: Of each image, its own pixels not among them.
        again_image_bytes: Of each image, of the largest block that gradient checkpointing computes again; 0 without.
    """

    fixed_bytes: int
    image_bytes: int
    again_image_bytes: int

    def of(self, num_images: int) -> int:
        """Bytes for this many images at once."""
        return self.fixed_bytes + num_images * (self.image_bytes + self.again_image_bytes)


def count_activations(model: FaceNetwork, device: torch.device, autocast: torch.dtype | None) -> Activations:
    """Count what autograd keeps at two small batch sizes; the difference is what an image takes.

    The running statistics of ``model`` move.

    Args:
        model: On ``device``.
        device: Where the passes run: kernels of another kind of device may keep other tensors.
        autocast: Type of the forward pass; None: float32.
    """
    model.train()
    fewer, more = (_network_bytes(model, device, autocast, batch) for batch in COUNTED_BATCHES)
    added = COUNTED_BATCHES[1] - COUNTED_BATCHES[0]
    per_image = (more - fewer) // added
    return Activations(
        fixed_bytes=max(0, fewer - per_image * COUNTED_BATCHES[0]),
        image_bytes=per_image,
        again_image_bytes=_largest_block(model, device, autocast) // COUNTED_BATCHES[0],
    )


def _network_bytes(model: FaceNetwork, device: torch.device, autocast: torch.dtype | None, batch: int) -> int:
    images_BCHW = torch.rand(batch, 3, IMAGE_SIDE, IMAGE_SIDE, device=device).mul_(2).sub_(1)
    images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return model(images_BCHW)

    return saved_bytes(run, [*model.parameters(), *model.buffers(), images_BCHW])


def _largest_block(model: FaceNetwork, device: torch.device, autocast: torch.dtype | None) -> int:
    """Bytes of the block that keeps most when it is computed again, for the smaller batch; 0 without checkpointing."""
    backbone: Any = next((module for module in model.modules() if isinstance(module, Backbone)), None)
    if backbone is None or not backbone.gradient_checkpointing:
        return 0
    found = []

    def run(block: nn.Module, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []

        def own() -> Tensor:
            outputs.append(block(x))
            return outputs[0]

        found.append(saved_bytes(own, [*block.parameters(), *block.buffers(), x]))
        return outputs[0]

    backbone.run = run  # this object's alone
    try:
        _network_bytes(model, device, autocast, COUNTED_BATCHES[0])
    finally:
        with contextlib.suppress(AttributeError):
            del backbone.run
    return max(found, default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSize:
    """What decides on a head's memory on one rank.

    Attributes:
        num_classes: C.
        embedding_dim: D.
        batch: Rows that the head sees at once: G, or those of a part of it.
        margin: Of the head.
        sample_rate: Share of the other classes that a step looks at.
        memory_budget: Bytes of temporary memory at most.
        reduced: Whether products take bfloat16 operands.
        in_backward: Whether centres move within the backward pass.
        num_moments: Matrices of optimizer state: 1 (momentum), 2 (AdamW).
        is_cuda: Whether it is on a GPU, where chunks are larger.
    """

    num_classes: int
    embedding_dim: int
    batch: int
    margin: Margin
    sample_rate: float
    memory_budget: int
    reduced: bool
    in_backward: bool
    num_moments: int
    is_cuda: bool

    @property
    def num_seen(self) -> int:
        """K at most: the drawn classes, by about four standard deviations more, and those of the batch."""
        if self.sample_rate >= 1.0:
            return self.num_classes
        drawn = self.sample_rate * self.num_classes
        spread = math.sqrt(drawn * (1 - self.sample_rate))
        return min(self.num_classes, round(drawn + 4 * spread) + self.batch)

    @property
    def weight_bytes(self) -> int:
        """Of the class centres."""
        return self.num_classes * self.embedding_dim * FLOAT

    @property
    def gradient_bytes(self) -> int:
        """Of the centres' gradient: none within the backward pass, rows and their numbers where classes are drawn."""
        if self.in_backward:
            return 0
        rows = INDEX if self.sample_rate < 1.0 else 0
        return self.num_seen * (self.embedding_dim * FLOAT + rows)

    @property
    def optimizer_bytes(self) -> int:
        """Of momentum or moments."""
        return self.weight_bytes * self.num_moments

    @property
    def temporary_bytes(self) -> int:
        """Of chunks of the logits and what is kept of them: as the fused pass plans them, within the budget."""
        shift = plain_shift(self.margin, self.num_seen, torch.float32)
        kind = AnyChunks if shift is None else PlainSoftmaxChunks
        copies = row_copies(self.sample_rate < 1.0, self.reduced, self.in_backward)
        per_class = kind.bytes_per_class(self.batch, FLOAT) + copies * self.embedding_dim * FLOAT
        kept = self.batch * (2 if self.reduced else FLOAT)
        largest = GPU_CHUNK if self.is_cuda else CPU_CHUNK
        plan = plan_chunks(self.num_seen, per_class, kept, self.memory_budget, largest)
        return plan.chunk * per_class + plan.keep * self.num_seen * kept

    @property
    def update_bytes(self) -> int:
        """Copies of the centres' gradient while the optimizer moves them."""
        if self.in_backward:
            return 0
        rows = self.num_seen if self.sample_rate >= 1.0 else min(self.num_seen, ROWS_AT_ONCE) * (2 + self.num_moments)
        return rows * self.embedding_dim * FLOAT
