"""ShardedMarginHead: a loss with a margin, the class centres shared out over the ranks.

The exact form: every rank holds the centres of its contiguous range of classes, sees the embeddings of the global batch
and computes the logits of its own classes only. Equal to the dense head at any world size (`lgaf.reference`).
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding, C = classes on this rank, W = world size,
#               N = the samples whose own class is on this rank

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lgaf.distributed import (
    all_gather_rows,
    all_reduce_sum,
    gather_for_all,
    gather_sizes,
    rank_in,
    scale_gradient,
    sum_gradient,
    world_size,
)
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import Margin
from lgaf.heads.objective import exclude
from lgaf.heads.screening import SampleScreening
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


class HeadState(nn.Module):
    """Scalars of a margin (or of the screening) that are saved with the head: statistics, and what is learned."""

    def __init__(self, statistics: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in statistics.items():
            self.register_buffer(name, value)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def values(self, group: ProcessGroup | None) -> dict[str, Tensor]:
        """All by name; the learned ones' gradients are summed over the group."""
        learned = {name: sum_gradient(value, group) for name, value in self.named_parameters()}
        return {**dict(self.named_buffers()), **learned}

    @torch.no_grad()
    def keep(self, statistics: Mapping[str, Tensor]) -> None:
        """Store new values of statistics."""
        for name, value in statistics.items():
            self.get_buffer(name).copy_(value)


class GlobalBatch(NamedTuple):
    """What a rank sees of all ranks' rows."""

    x_GD: Tensor
    labels_G: Tensor
    norm_G: Tensor
    weight_G: Tensor | None


class ShardedMarginHead(nn.Module):
    """Loss with a margin over ``num_classes`` identities, class-parallel over ``group``.

    Collectives a step: two all-gathers forward (batch sizes; embeddings with labels, norms and weights packed beside
    them), one all-gather of the row statistics, one reduce-scatter backward. Margins that compare the other classes
    with the target, and the screening, need one all-reduce more (target cosines), learned scalars of a margin one more
    backward. None with a group of one or ``group=None``.

    Args:
        num_classes: Identities over all ranks.
        embedding_dim: D.
        margin: See `lgaf.heads.margins.create_margin`.
        group: The ranks that share the classes; None for this process alone.
        sample_rate: Share of the negative centres seen each step; only 1.0 (all of them) for now.
        seed: Of the initial centres.
        screening: Lowers the weight of samples that are likely mislabelled or unidentifiable; None: all weigh alike.

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
        screening: SampleScreening | None = None,
    ) -> None:
        super().__init__()
        if sample_rate != 1.0:
            raise ValueError(f"sample_rate={sample_rate} is not valid: this head is exact, the only rate is 1.0")
        self.num_classes = num_classes
        self.margin, self.screening = margin, screening
        self.group = group
        self.classes = class_range(num_classes, world_size(group), rank_in(group))
        self.weight = nn.Parameter(initial_centres(self.classes, embedding_dim, seed))
        self.margin_state = HeadState(margin.initial_state(num_classes), margin.initial_parameters(num_classes))
        self.screening_state = HeadState({} if screening is None else screening.initial_state(), {})

    def forward(
        self,
        embedding_BD: Tensor,
        labels_B: Tensor,
        norms_B: Tensor | None = None,
        weights_B: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over the global batch (the same scalar on every rank), differentiable.

        Gradients are those of this mean: the embedding's rows of this rank get the sum over all class shards. In
        training mode the statistics of margin and screening move first.

        Args:
            embedding_BD: Un-normalised embeddings of this rank; B may differ between ranks.
            labels_B: Global class ids, int64.
            norms_B: Quality norms for margins that use them; the embeddings' own are taken where absent.
            weights_B: Factor of each sample's loss; 1 where absent. All ranks or none give them.

        Raises:
            ValueError: A label outside [0, num_classes), or counts that do not match.
        """
        self._check(embedding_BD, labels_B, norms_B, weights_B)
        with torch.autocast(embedding_BD.device.type, enabled=False):
            batch = self._gather(embedding_BD, labels_B, norms_B, weights_B)
            cosine_GC = F.linear(F.normalize(batch.x_GD), F.normalize(self.weight))
            labels_G = batch.labels_G
            rows_N = ((labels_G >= self.classes.start) & (labels_G < self.classes.stop)).nonzero().squeeze(1)
            columns_N = labels_G[rows_N] - self.classes.start
            cosine_N = cosine_GC[rows_N, columns_N].clamp(-1.0, 1.0)
            target_cosine_G = self._share_targets(cosine_N.detach(), rows_N, len(labels_G))
            state = self._next_margin_state(target_cosine_G, batch.norm_G.detach())
            negatives_GC = self.margin.negative_logits(cosine_GC, target_cosine_G, state)
            accumulated_G = self.margin.objective.accumulate(exclude(negatives_GC, rows_N, columns_N))
            norm_N = batch.norm_G[rows_N]
            target_N = self.margin.target_logit(cosine_N, norm_N, state)
            penalty_N = self.margin.penalty(norm_N)
            own_N2 = torch.stack([target_N, torch.zeros_like(target_N) if penalty_N is None else penalty_N], dim=1)
            # Only the owner of a class fills in its rows, so sums over the ranks are its values.
            own_G2 = own_N2.new_zeros(len(labels_G), 2).index_put((rows_N,), own_N2)
            stats_WG3 = gather_for_all(torch.cat([accumulated_G[:, None], own_G2], dim=1), self.group)
            joined_G = self.margin.objective.join(stats_WG3[:, :, 0])
            target_G, penalty_G = stats_WG3[:, :, 1:].sum(dim=0).unbind(dim=1)
            loss_G = self.margin.objective.loss(joined_G, target_G) + penalty_G
            return self._weighted_mean(loss_G, batch, target_cosine_G)

    def _next_margin_state(self, target_cosine_G: Tensor | None, norm_G: Tensor) -> dict[str, Tensor]:
        state = self.margin_state.values(self.group)
        if self.training:
            moved = self.margin.next_state(state, target_cosine_G, norm_G)
            self.margin_state.keep(moved)
            # The new tensors, not the buffers: these change with the next step, maybe before this one's backward.
            state |= moved
        return state

    def _share_targets(self, cosine_N: Tensor, rows_N: Tensor, num_rows: int) -> Tensor | None:
        if not self.margin.needs_all_targets and self.screening is None:
            return None
        return all_reduce_sum(cosine_N.new_zeros(num_rows).index_put((rows_N,), cosine_N), self.group)

    def _weighted_mean(self, loss_G: Tensor, batch: GlobalBatch, target_cosine_G: Tensor | None) -> Tensor:
        if batch.weight_G is not None:
            loss_G = loss_G * batch.weight_G
        if self.screening is not None:
            assert target_cosine_G is not None
            state = self.screening_state.values(None)
            norm_G = batch.norm_G.detach()
            if self.training:
                self.screening_state.keep(moved := self.screening.next_state(state, target_cosine_G, norm_G))
                state |= moved
            loss_G = loss_G * self.screening.weights(state, target_cosine_G, norm_G)
        return loss_G.mean()

    def _check(self, embedding_BD: Tensor, labels_B: Tensor, norms_B: Tensor | None, weights_B: Tensor | None) -> None:
        for name, value in (("labels", labels_B), ("norms", norms_B), ("weights", weights_B)):
            if value is None:
                continue
            if value.ndim != 1:
                raise ValueError(f"{name} of shape {list(value.shape)} must be one number an embedding, of shape [B]")
            if value.shape[0] != embedding_BD.shape[0]:
                raise ValueError(f"{embedding_BD.shape[0]} embeddings came with {value.shape[0]} {name}")
        # On an accelerator this look would wait for the device each step; there the data plane's check has to do.
        if labels_B.device.type == "cpu" and labels_B.numel():
            low, high = int(labels_B.min()), int(labels_B.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"labels in [{low}, {high}] do not fit the head's {self.num_classes} classes")

    def _gather(
        self, embedding_BD: Tensor, labels_B: Tensor, norms_B: Tensor | None, weights_B: Tensor | None
    ) -> GlobalBatch:
        x_BD = embedding_BD.to(self.weight.dtype)
        if world_size(self.group) == 1:
            norms_B = x_BD.norm(dim=1) if norms_B is None else norms_B.to(x_BD.dtype)
            return GlobalBatch(x_BD, labels_B, norms_B, weights_B)
        sizes = gather_sizes(x_BD.shape[0], x_BD.device, self.group)
        # Labels travel as the bits of a float column: an all-gather only copies, so they arrive exactly.
        bits = torch.int64 if x_BD.dtype == torch.float64 else torch.int32
        columns = [labels_B.to(bits).view(x_BD.dtype), norms_B, weights_B]
        packed_BE = torch.cat([x_BD, *(column[:, None].to(x_BD.dtype) for column in columns if column is not None)], 1)
        dim = x_BD.shape[1]
        x_GD, labels_G1, *rest = all_gather_rows(packed_BE, sizes, self.group).tensor_split((dim, dim + 1), dim=1)
        extra = list(rest[0].unbind(dim=1))
        norm_G = x_GD.norm(dim=1) if norms_B is None else extra.pop(0)
        labels_G = labels_G1.detach().squeeze(1).contiguous().view(bits).long()
        weight_G = None
        if weights_B is not None:
            # All ranks weigh all rows alike, so each finds the whole gradient, of which the gather sums W.
            weight_G = scale_gradient(extra.pop(0), 1 / world_size(self.group))
        return GlobalBatch(x_GD, labels_G, norm_G, weight_G)
