"""ShardedMarginHead: a loss with a margin, the class centres shared out over the ranks.

Every rank holds the centres of its contiguous range of classes, sees the embeddings of the global batch and works on
the logits of its own classes only, in chunks (`lgaf.heads.fused`). Equal to the dense head at any world size
(`lgaf.reference`).
"""

# Shape legend: B = batch on this rank, G = global batch, D = embedding, C = classes on this rank, W = world size,
#               L = learned scalars of the margin

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lgaf.config import require_in_range, require_positive
from lgaf.distributed import RowExchange, all_reduce_sum, gather_for_all, rank_in, world_size
from lgaf.heads.centres import Centres, initial_centres
from lgaf.heads.chunks import FusedPass, RowUpdate
from lgaf.heads.class_shard import class_range
from lgaf.heads.fused import fused_pass, own_cosines
from lgaf.heads.global_batch import (
    BatchExchange,
    GlobalBatch,
    OwnBatch,
    check_agreement,
    check_own_batch,
    check_values,
)
from lgaf.heads.margins import Margin
from lgaf.heads.products import Products
from lgaf.heads.sampling import sampled_rows
from lgaf.heads.screening import SampleScreening

MEMORY_BUDGET: Final = 2 << 30


class HeadState(nn.Module):
    """Scalars of a margin (or of the screening) that are saved with the head: statistics, and what is learned."""

    def __init__(self, statistics: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in statistics.items():
            self.register_buffer(name, value)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def learned(self) -> Tensor:
        """The learned ones [L]."""
        parameters: list[Tensor] = list(self.parameters())
        return torch.stack(parameters) if parameters else torch.empty(0)

    @torch.no_grad()
    def keep(self, statistics: Mapping[str, Tensor]) -> None:
        """Store new values of statistics."""
        for name, value in statistics.items():
            self.get_buffer(name).copy_(value)


class ShardedMarginHead(nn.Module):
    """Loss with a margin over ``num_classes`` identities, class-parallel over ``group``.

    Collectives a step: an all-gather of the embeddings with labels, norms and weights beside them, an all-gather of a
    few numbers a sample, a reduce-scatter backward; margins that compare the other classes with the target have an
    all-reduce of the target cosines too. (One all-gather more where a batch is larger than any before and ``sizes`` are
    not given, and one before the first step that compares the ranks' settings.) None with a group of one or
    ``group=None``.

    Never put it into DistributedDataParallel, which would give all ranks the centres of the first.

    Under autocast to bfloat16 the matrix products take rounded operands; statistics and the target's cosine stay as
    precise as the weights. ``head.double()`` computes in float64.

    Attributes:
        weight: Class centres [C, D] of this rank.
        classes: Their global ids.
        step: Selects the sample of classes; moves on with each forward pass in training mode. Not part of the state: a
            resumed loop sets it (`lgaf.step.TrainStep` does).
        update: Where set, takes the gradients of the centres chunk by chunk in the backward pass, and ``weight`` gets
            no gradient (see `lgaf.optim.UpdateInBackward`).

    Args:
        num_classes: Identities over all ranks.
        embedding_dim: D.
        margin: See `lgaf.heads.margins.create_margin`.
        group: The ranks that share the classes; None for this process alone.
        sample_rate: Share of the other classes' centres seen in each training step (Partial FC); 1: all, exact. Below 1
            ``weight``'s gradient is sparse, over the rows that were seen.
        seed: Of the initial centres and of the sample.
        screening: Lowers the weight of samples that are likely mislabelled or unidentifiable; None: all weigh alike.
        memory_budget: Bytes of temporary memory a step, beyond the gradient of the centres. What it takes to keep G * C
            numbers saves a quarter of the work.

    Raises:
        ValueError: Fewer classes than ranks, or a rate or budget that is not valid.
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
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        super().__init__()
        require_positive("embedding_dim", embedding_dim)
        require_in_range("sample_rate", sample_rate, 1e-6, 1.0)
        require_in_range("memory_budget", memory_budget, 1, 1 << 50)
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.margin, self.screening = margin, screening
        self.group, self.sample_rate, self.seed, self.memory_budget = group, sample_rate, seed, memory_budget
        self.classes = class_range(num_classes, world_size(group), rank_in(group))
        self.weight = nn.Parameter(initial_centres(self.classes, embedding_dim, seed))
        self.margin_state = HeadState(margin.initial_state(num_classes), margin.initial_parameters(num_classes))
        self.screening_state = HeadState({} if screening is None else screening.initial_state(), {})
        self.step = 0
        self.update: RowUpdate | None = None
        self._exchange = RowExchange(group)
        self._agreed = world_size(group) == 1

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, margin={self.margin}, "
            f"sample_rate={self.sample_rate}, classes={self.classes}"
        )

    def forward(
        self,
        embedding_BD: Tensor,
        labels_B: Tensor,
        norms_B: Tensor | None = None,
        weights_B: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean loss over the global batch (the same scalar on every rank), differentiable.

        Gradients are those of this mean: the embedding's rows of this rank get the sum over all class shards. In
        training mode the statistics of margin and screening move first, and ``sample_rate`` holds; else all classes
        count.

        Args:
            embedding_BD: Un-normalised embeddings of this rank; B may differ between ranks.
            labels_B: Global class ids, int64.
            norms_B: Quality norms for margins that use them; the embeddings' own are taken where absent.
            weights_B: Factor of each sample's loss; 1 where absent. All ranks or none give them.
            sizes: B of every rank where the caller knows them: an accelerator need not be waited for then.

        Raises:
            ValueError: Centres that are neither float32 nor float64, shapes that do not match, and, on a CPU, a label
                outside [0, num_classes). (On an accelerator the loss is then NaN: to ask would be to wait for it.)
            NonFiniteEmbeddingError: NaN or infinity in an embedding, on a CPU.
        """
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the head's centres are {self.weight.dtype}, which is too coarse to learn in: leave them float32 (or "
                "float64) and call the head under torch.autocast for products in bfloat16"
            )
        own = OwnBatch(embedding_BD, labels_B, norms_B, weights_B, sizes)
        check_own_batch(own, self.embedding_dim)
        if not self._agreed:
            check_agreement(self.group, embedding_BD.device, self._settings())
            self._agreed = True
        products = Products.for_autocast(self.weight.device, self.weight.dtype)
        with torch.autocast(embedding_BD.device.type, enabled=False):
            batch, centres, columns_G = self._gather(own)
            cosine_G = own_cosines(batch.unit_GD, centres, columns_G)
            target_cosine_G = all_reduce_sum(cosine_G, self.group) if self.margin.needs_all_targets else None
            learned = dict(zip(dict(self.margin_state.named_parameters()), batch.learned_L, strict=True))
            state = self._next_margin_state(learned, target_cosine_G, batch.norm_G.detach())
            problem = FusedPass(
                centres, columns_G, self.margin, state, target_cosine_G, products, self.memory_budget, self.update
            )
            accumulated_G, cosine_G = fused_pass(batch.unit_GD, self.weight, learned, problem, cosine_G)
            return self._loss(batch, accumulated_G, cosine_G, columns_G >= 0, {**state, **learned})

    def _gather(self, own: OwnBatch) -> tuple[GlobalBatch, Centres, Tensor]:
        """Everyone's samples, the centres to look at, and where each sample's own class is among them."""
        exchange = BatchExchange(self._exchange)
        exchange.start(own, self.weight.dtype)
        centres = Centres.all(self.weight.detach()) if not self._samples() else None  # while the samples travel
        batch = exchange.finish(self.embedding_dim, self.margin_state.learned().to(self.weight))
        if not len(batch.labels_G):
            raise ValueError("the global batch is empty: no rank gave an embedding, so there is no mean loss")
        if batch.labels_G.device.type == "cpu":
            check_values(batch, self.num_classes)
        if centres is None:
            rows_K = sampled_rows(self.classes, batch.labels_G, self.sample_rate, self.seed, self.step)
            centres = Centres.some(self.weight.detach(), rows_K)
        if self.training:
            self.step += 1
        return batch, centres, centres.columns(batch.labels_G, self.classes.start)

    def _settings(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        return {
            "num_classes": self.num_classes,
            "embedding_dim": self.embedding_dim,
            "margin": self.margin,
            "sample_rate": self.sample_rate,
            "seed": self.seed,
            "screening": self.screening,
            "dtype": self.weight.dtype,
        }

    def _samples(self) -> bool:
        return self.training and self.sample_rate < 1.0

    def _next_margin_state(
        self, learned: Mapping[str, Tensor], target_cosine_G: Tensor | None, norm_G: Tensor
    ) -> dict[str, Tensor]:
        """The statistics of the margin, moved by this batch in training mode."""
        # Copies, not the buffers: these change with the next step, maybe before this one's backward pass.
        state = {name: value.clone() for name, value in self.margin_state.named_buffers()}
        if self.training:
            moved = self.margin.next_state({**state, **learned}, target_cosine_G, norm_G)
            self.margin_state.keep(moved)
            state |= moved
        return state

    def _loss(
        self,
        batch: GlobalBatch,
        accumulated_G: Tensor,
        cosine_G: Tensor,
        owned_G: Tensor,
        state: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss, of this rank's numbers and the others'."""
        cosine_G, objective = cosine_G.clamp(-1.0, 1.0), self.margin.objective
        target_G = self.margin.target_logit(cosine_G, batch.norm_G, state)
        penalty_G = self.margin.penalty(batch.norm_G)
        own_G3 = torch.stack(
            [target_G, torch.zeros_like(target_G) if penalty_G is None else penalty_G, cosine_G.detach()], dim=1
        )
        # Only the owner of a class fills in its rows, so sums over the ranks are its values.
        own_G3 = torch.where(owned_G[:, None], own_G3, 0.0)
        stats_WG4 = gather_for_all(torch.cat([accumulated_G[:, None], own_G3], dim=1), self.group)
        joined_G = objective.join(stats_WG4[:, :, 0])
        target_G, penalty_G, cosine_G = stats_WG4[:, :, 1:].sum(dim=0).unbind(dim=1)
        loss_G = objective.loss(joined_G, target_G) + penalty_G
        nobodys_G = (batch.labels_G < 0) | (batch.labels_G >= self.num_classes)
        loss_G = loss_G.masked_fill(nobodys_G, torch.nan)
        if batch.weight_G is not None:
            loss_G = loss_G * batch.weight_G
        return (loss_G * self._screened(cosine_G.detach(), batch.norm_G.detach())).mean()

    def _screened(self, target_cosine_G: Tensor, norm_G: Tensor) -> Tensor:
        """Weight [G] that the screening leaves each sample."""
        if self.screening is None:
            return torch.ones_like(target_cosine_G)
        state = dict(self.screening_state.named_buffers())
        if self.training:
            self.screening_state.keep(moved := self.screening.next_state(state, target_cosine_G, norm_G))
            state |= moved
        return self.screening.weights(state, target_cosine_G, norm_G)
