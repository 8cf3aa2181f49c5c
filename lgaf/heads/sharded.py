"""ShardedMarginHead: softmax with a margin, the class centres shared out over the ranks.

The exact form: every rank holds the centres of its contiguous range of classes, sees the embeddings of the global batch
and computes the logits of its own classes only. Equal to the dense head at any world size (`lgaf.reference`).
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding, C = classes on this rank, W = world size,
#               N = the samples whose own class is on this rank

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lgaf.distributed import all_gather_rows, all_gather_stack, gather_sizes, rank_in, world_size
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import Margin
from lgaf.seeding import mixed_seed

INIT_STD: Final = 0.01
INIT_BLOCK: Final = 4096
# First part of the seeds of the centres: keeps them apart from those of dropout.
CENTRES_SEED: Final = 1


def initial_centres(classes: range, embedding_dim: int, seed: int) -> Tensor:
    """Class centres [len(classes), D] ~ N(0, 0.01), a function of the global class id alone.

    Drawn in fixed blocks of class ids, so that no rank draws the whole matrix and no two ranks draw the same rows
    (seeding all ranks alike, as others do, makes class k of every rank start at the same point).
    """
    weight = torch.empty(len(classes), embedding_dim)
    for block in range(classes.start // INIT_BLOCK, -(-classes.stop // INIT_BLOCK)):
        generator = torch.Generator().manual_seed(mixed_seed(CENTRES_SEED, seed, block))
        first = block * INIT_BLOCK
        rows = torch.randn(INIT_BLOCK, embedding_dim, generator=generator)
        low, high = max(first, classes.start), min(first + INIT_BLOCK, classes.stop)
        weight[low - classes.start : high - classes.start] = rows[low - first : high - first] * INIT_STD
    return weight


class ShardedMarginHead(nn.Module):
    """Margin softmax over ``num_classes`` identities, class-parallel over ``group``.

    Collectives a step: two all-gathers forward (batch sizes; embeddings with labels and norms packed beside them), one
    all-gather of the row statistics, one reduce-scatter backward. None with a group of one or ``group=None``.

    Args:
        num_classes: Identities over all ranks.
        embedding_dim: D.
        margin: See `lgaf.heads.margins.create_margin`.
        group: The ranks that share the classes; None for this process alone.
        sample_rate: Share of the negative centres seen each step; only 1.0 (all of them) for now.
        seed: Of the initial centres.

    Raises:
        ValueError: Fewer classes than ranks, or another sample rate.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: Margin,
        group: ProcessGroup | None = None,
        sample_rate: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if sample_rate != 1.0:
            raise ValueError(f"sample_rate={sample_rate} is not valid: this head is exact, the only rate is 1.0")
        self.num_classes = num_classes
        self.margin = margin
        self.group = group
        self.classes = class_range(num_classes, world_size(group), rank_in(group))
        self.weight = nn.Parameter(initial_centres(self.classes, embedding_dim, seed))

    def forward(self, embedding_BD: Tensor, labels_B: Tensor, norms_B: Tensor | None = None) -> Tensor:
        """Mean loss over the global batch (the same scalar on every rank), differentiable.

        Gradients are those of this mean: the embedding's rows of this rank get the sum over all class shards.

        Args:
            embedding_BD: Un-normalised embeddings of this rank; B may differ between ranks.
            labels_B: Global class ids, int64.
            norms_B: Quality norms for margins that use them; the embeddings' own are taken where absent.

        Raises:
            ValueError: A label outside [0, num_classes), or counts that do not match.
        """
        self._check_labels(embedding_BD, labels_B)
        with torch.autocast(embedding_BD.device.type, enabled=False):
            x_BD = embedding_BD.to(self.weight.dtype)
            norms = x_BD.detach().norm(dim=1) if norms_B is None else norms_B.detach().to(x_BD.dtype)
            x_GD, labels_G, norm_G = self._gather(x_BD, labels_B, norms)
            logits_GC = self.margin.scale * F.linear(F.normalize(x_GD), F.normalize(self.weight))
            rows_N = ((labels_G >= self.classes.start) & (labels_G < self.classes.stop)).nonzero().squeeze(1)
            columns_N = labels_G[rows_N] - self.classes.start
            cosine_N = (logits_GC[rows_N, columns_N] / self.margin.scale).clamp(-1.0, 1.0)
            target_N = self.margin.target_logit(cosine_N, norm_G[rows_N])
            logits_GC = logits_GC.index_put((rows_N, columns_N), target_N)
            loss: Tensor = _ShardedCrossEntropy.apply(logits_GC, rows_N, columns_N, self.group)  # type: ignore[no-untyped-call]
            return loss

    def _check_labels(self, embedding_BD: Tensor, labels_B: Tensor) -> None:
        if embedding_BD.shape[0] != labels_B.shape[0]:
            raise ValueError(f"{embedding_BD.shape[0]} embeddings came with {labels_B.shape[0]} labels")
        # On an accelerator this look would wait for the device each step; there the data plane's check has to do.
        if labels_B.device.type == "cpu" and labels_B.numel():
            low, high = int(labels_B.min()), int(labels_B.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"labels in [{low}, {high}] do not fit the head's {self.num_classes} classes")

    def _gather(self, x_BD: Tensor, labels_B: Tensor, norms_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if world_size(self.group) == 1:
            return x_BD, labels_B, norms_B
        sizes = gather_sizes(x_BD.shape[0], x_BD.device, self.group)
        # Labels travel as the bits of a float column: an all-gather only copies, so they arrive exactly.
        bits = torch.int64 if x_BD.dtype == torch.float64 else torch.int32
        label_bits_B1 = labels_B.to(bits).view(x_BD.dtype)[:, None]
        packed_GE = all_gather_rows(torch.cat([x_BD, norms_B[:, None], label_bits_B1], dim=1), sizes, self.group)
        dim = x_BD.shape[1]
        labels_G = packed_GE.detach()[:, dim + 1].contiguous().view(bits).long()
        return packed_GE[:, :dim], labels_G, packed_GE.detach()[:, dim]


class _ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over rows whose logits are spread over the ranks; one all-gather of three numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits_GC: Tensor, rows_N: Tensor, columns_N: Tensor, group: ProcessGroup | None) -> Tensor:
        num_rows = logits_GC.shape[0]
        lowest = torch.finfo(logits_GC.dtype).min
        # A rank may own no class (num_classes barely above the world size): its maximum must not win.
        has_classes = logits_GC.shape[1] > 0
        maximum_G = logits_GC.amax(dim=1) if has_classes else logits_GC.new_full((num_rows,), lowest)
        sum_G = (logits_GC - maximum_G[:, None]).exp_().sum(dim=1)
        target_G = logits_GC.new_zeros(num_rows)
        target_G[rows_N] = logits_GC[rows_N, columns_N]
        stats_W3G = all_gather_stack(torch.stack([maximum_G, sum_G, target_G]), group)
        top_G = stats_W3G[:, 0].amax(dim=0)
        total_G = (stats_W3G[:, 1] * (stats_W3G[:, 0] - top_G).exp()).sum(dim=0)
        log_partition_G = top_G + total_G.log()
        ctx.save_for_backward(logits_GC, log_partition_G, rows_N, columns_N)
        # Only the owner of a class put its logit here, so the sum over ranks is that logit.
        return (log_partition_G - stats_W3G[:, 2].sum(dim=0)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_GC, log_partition_G, rows_N, columns_N = ctx.saved_tensors
        grad_GC = (logits_GC - log_partition_G[:, None]).exp_()
        grad_GC[rows_N, columns_N] -= 1.0
        return grad_GC.mul_(grads[0] / logits_GC.shape[0]), None, None, None
