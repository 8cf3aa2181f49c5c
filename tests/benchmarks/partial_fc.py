"""The rival of the margin head: insightface's PartialFC_V2, written anew from its method (An et al. 2022).

It does what `arcface_torch/partial_fc_v2.py` does, in its order and with its temporaries (full logits, a one-hot
matrix, copies of rows; in place what is in place there), so that its time and memory are the original's. Two read-outs
are cheaper here, in the rival's favour: the row maximum (without its index) and the own class's probability (without a
copy of the matrix). Where the original differs from the mean loss of one process, so does this: see `PartialFCV2`.
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding, C = classes seen on this rank (all, or the
#               sampled ones), N = the samples whose own class is on this rank, W = world size

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.nn import functional as F

from lgaf.distributed import rank_in, world_size
from lgaf.heads.margins import Margin
from lgaf.heads.margins.arcface import ArcFace
from lgaf.heads.margins.cosface import CosFace

LEAST_PROBABILITY: Final = 1e-30
HALF: Final = (torch.float16, torch.bfloat16)


class PartialFCV2(nn.Module):
    """Class-parallel softmax loss with a margin and, below ``sample_rate=1``, sampled negative centres.

    Unlike `lgaf.heads.sharded.ShardedMarginHead`: every rank brings equally many rows; the embedding's gradient is W
    times that of the global mean (against DistributedDataParallel's mean); the gradient of the centres is dense at any
    rate; a probability below 1e-30 counts as 1e-30. Under autocast the matrix product alone is of low precision.

    Args:
        num_classes: Identities over all ranks.
        embedding_dim: D.
        margin: ArcFace with ``gradient="straight_through"`` (what insightface's is), or CosFace.
        group: The ranks that share the classes; None: this process alone, without any collective.
        sample_rate: Share of this rank's centres seen each step, those of present identities first.
        weight: Centres to start from; drawn where absent.

    Raises:
        ValueError: A margin that insightface has not.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: Margin,
        group: ProcessGroup | None = None,
        sample_rate: float = 1.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        is_arcface = isinstance(margin, ArcFace) and margin.gradient == "straight_through"
        if not is_arcface and not isinstance(margin, CosFace):
            raise ValueError(f"{margin} is not a margin of insightface")
        self.margin, self.group, self.sample_rate = margin, group, sample_rate
        share, rest = divmod(num_classes, world_size(group))
        rank = rank_in(group)
        self.num_local = share + (rank < rest)
        self.class_start = share * rank + min(rank, rest)
        self.num_sample = int(sample_rate * self.num_local)
        self.weight = nn.Parameter(torch.normal(0, 0.01, (self.num_local, embedding_dim)) if weight is None else weight)
        self.index = torch.arange(0)  # the sampled centres of the last step

    def forward(self, embedding_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Mean loss over the global batch."""
        x_GD, labels_G = self._gather(embedding_BD, labels_B)
        column_G = labels_G - self.class_start
        rows_N = ((column_G >= 0) & (column_G < self.num_local)).nonzero().squeeze(1)
        columns_N = column_G[rows_N]
        weight_CD: Tensor = self.weight
        if self.sample_rate < 1:
            self.index = self._sample(columns_N)
            columns_N = torch.searchsorted(self.index, columns_N)
            weight_CD = self.weight[self.index]
        logits_GC = F.linear(F.normalize(x_GD), F.normalize(weight_CD))
        if logits_GC.dtype in HALF:
            logits_GC = logits_GC.float()
        logits_GC = logits_GC.clamp(-1, 1)
        logits_GC = _with_margin(logits_GC, rows_N, columns_N, self.margin)
        loss: Tensor = _CrossEntropy.apply(logits_GC, rows_N, columns_N, self.group)
        return loss

    def _gather(self, embedding_BD: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.group is None:
            return embedding_BD, labels_B
        parts = [torch.zeros_like(labels_B) for _ in range(world_size(self.group))]
        dist.all_gather(parts, labels_B, group=self.group)
        return torch.cat(_AllGather.apply(embedding_BD, self.group)), torch.cat(parts)

    @torch.no_grad()
    def _sample(self, columns_N: Tensor) -> Tensor:
        """The present identities' centres and random others, in order."""
        positives = columns_N.unique()
        if len(positives) > self.num_sample:
            return positives
        priority = torch.rand(self.num_local, device=columns_N.device)
        priority[positives] = 2.0
        return priority.topk(self.num_sample).indices.sort().values


def _with_margin(logits_GC: Tensor, rows_N: Tensor, columns_N: Tensor, margin: Margin) -> Tensor:
    """Cosines to logits; the cosines are used up."""
    if isinstance(margin, CosFace):
        logits_GC[rows_N, columns_N] = logits_GC[rows_N, columns_N] - margin.margin
    elif isinstance(margin, ArcFace):
        # All cosines become angles and then cosines again, behind the back of autograd.
        with torch.no_grad():
            logits_GC.arccos_()
            logits_GC[rows_N, columns_N] += margin.margin
            logits_GC.cos_()
    return logits_GC * margin.scale


def _all_reduce(value: Tensor, op: ReduceOp.RedOpType, group: ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(value, op, group=group)


class _CrossEntropy(torch.autograd.Function):
    """Softmax over all ranks' classes with a gradient of its own; the logits become the probabilities in place."""

    @staticmethod
    def forward(ctx: Any, logits_GC: Tensor, rows_N: Tensor, columns_N: Tensor, group: ProcessGroup | None) -> Tensor:
        highest_G1 = logits_GC.amax(dim=1, keepdim=True)
        _all_reduce(highest_G1, ReduceOp.MAX, group)
        logits_GC.sub_(highest_G1).exp_()
        sum_G1 = logits_GC.sum(dim=1, keepdim=True)
        _all_reduce(sum_G1, ReduceOp.SUM, group)
        probability_GC = logits_GC.div_(sum_G1)
        own_G = probability_GC.new_zeros(len(probability_GC))
        own_G[rows_N] = probability_GC[rows_N, columns_N]
        _all_reduce(own_G, ReduceOp.SUM, group)
        ctx.save_for_backward(probability_GC, rows_N, columns_N)
        return -own_G.clamp_min_(LEAST_PROBABILITY).log_().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient_GC, rows_N, columns_N = ctx.saved_tensors
        one_hot_NC = gradient_GC.new_zeros(len(rows_N), gradient_GC.shape[1])
        one_hot_NC.scatter_(1, columns_N[:, None], 1)
        gradient_GC[rows_N] -= one_hot_NC
        gradient_GC.div_(len(gradient_GC))
        return gradient_GC * grads[0].item(), None, None, None


class _AllGather(torch.autograd.Function):
    """Rows of all ranks; backward reduces each rank's part to it, one by one, and multiplies by W."""

    @staticmethod
    def forward(ctx: Any, value_BD: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        parts = [torch.zeros_like(value_BD) for _ in range(world_size(group))]
        dist.all_gather(parts, value_BD.contiguous(), group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        works = [
            dist.reduce(grad, dist.get_global_rank(ctx.group, rank), ReduceOp.SUM, group=ctx.group, async_op=True)
            for rank, grad in enumerate(grads)
        ]
        for work in works:
            work.wait()
        return grads[rank_in(ctx.group)].mul_(len(grads)), None
