"""What a rank sees of all ranks' samples, and the checks that all ranks make alike."""

# Shape legend: B = batch on this rank, G = global batch, D = embedding, L = learned scalars of the margin

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lgaf.distributed import RowExchange, all_gather_stack, scale_gradient, world_size
from lgaf.heads.centres import unit


class NonFiniteEmbeddingError(ValueError):
    """An embedding holds NaN or infinity: the run diverged, or an image or a weight is damaged."""


class OwnBatch(NamedTuple):
    """Samples of this rank, as `ShardedMarginHead.forward` takes them."""

    embedding_BD: Tensor
    labels_B: Tensor
    norms_B: Tensor | None
    weights_B: Tensor | None
    sizes: Sequence[int] | None


class GlobalBatch(NamedTuple):
    """Samples of all ranks, in rank order.

    Attributes:
        unit_GD: Embeddings of length 1.
        labels_G: Global class ids.
        norm_G: Quality norms.
        weight_G: Factors of the losses; None: all 1.
        learned_L: Learned scalars of the margin, their gradients summed over the ranks.
    """

    unit_GD: Tensor
    labels_G: Tensor
    norm_G: Tensor
    weight_G: Tensor | None
    learned_L: Tensor


class BatchExchange:
    """Makes the global batch of each rank's own, in one all-gather (see `RowExchange`)."""

    def __init__(self, exchange: RowExchange) -> None:
        self._exchange = exchange
        self._packed_BE = torch.empty(0)
        self._labels_B = torch.empty(0)

    def start(self, own: OwnBatch, dtype: torch.dtype) -> None:
        """Send this rank's samples: unit embeddings, with labels, norms and weights as columns beside them."""
        embedding_BD = own.embedding_BD.to(dtype)
        norms_B = torch.linalg.vector_norm(embedding_BD, dim=1) if own.norms_B is None else own.norms_B
        # Labels travel as the bits of a float column: an all-gather only copies, so they arrive exactly.
        integers = _integers(dtype)
        self._labels_B = own.labels_B.long()
        # A label beyond 32 bits stays out of range, instead of becoming another class.
        bits = self._labels_B.clamp(-1, torch.iinfo(integers).max).to(integers).view(dtype)
        columns = [bits, norms_B] if own.weights_B is None else [bits, norms_B, own.weights_B]
        beside_B = torch.stack([column.to(dtype) for column in columns], dim=1)
        self._packed_BE = torch.cat([unit(embedding_BD), beside_B], dim=1)
        self._exchange.start(self._packed_BE, own.sizes)

    def finish(self, embedding_dim: int, learned_L: Tensor) -> GlobalBatch:
        """Receive everyone's."""
        world = world_size(self._exchange.group)
        packed_GE, learned_L = self._exchange.finish(self._packed_BE, learned_L)
        unit_GD, beside_G = packed_GE[:, :embedding_dim].contiguous(), packed_GE[:, embedding_dim:]
        bits_G = beside_G[:, 0].detach().contiguous().view(_integers(packed_GE.dtype))
        labels_G = self._labels_B if world == 1 else bits_G.long()
        # All ranks weigh all rows alike, so each finds the whole gradient, of which the exchange sums W.
        weight_G = scale_gradient(beside_G[:, 2], 1 / world) if beside_G.shape[1] > 2 else None
        self._packed_BE = self._labels_B = torch.empty(0)
        return GlobalBatch(unit_GD, labels_G, beside_G[:, 1], weight_G, learned_L)


def check_agreement(group: ProcessGroup | None, device: torch.device, settings: Mapping[str, object]) -> None:
    """Compare settings between the ranks, once: with different ones they would wait for each other, or train nonsense.

    Raises:
        ValueError: Settings of some ranks are not those of the first; on all ranks.
    """
    digests = torch.tensor([[zlib.crc32(repr(value).encode()) for value in settings.values()]], device=device)
    gathered_WN = all_gather_stack(digests, group).flatten(0, 1).cpu()
    for column, (name, value) in zip(gathered_WN.unbind(dim=1), settings.items(), strict=True):
        if unlike := (column != column[0]).nonzero().flatten().tolist():
            raise ValueError(f"the ranks' heads differ in {name}: {value!r} here; ranks {unlike} differ from rank 0")


def check_own_batch(own: OwnBatch, embedding_dim: int) -> None:
    """Raise ``ValueError`` unless there is one number of each kind an embedding."""
    embedding_BD, labels_B = own.embedding_BD, own.labels_B
    if embedding_BD.ndim != 2 or embedding_BD.shape[1] != embedding_dim:
        raise ValueError(f"embeddings of shape {list(embedding_BD.shape)} must be of shape [B, {embedding_dim}]")
    if labels_B.is_floating_point() or labels_B.dtype == torch.bool:
        raise ValueError(f"labels are {labels_B.dtype}; they must be whole numbers, best int64")
    for name, value in (("labels", labels_B), ("norms", own.norms_B), ("weights", own.weights_B)):
        if value is None:
            continue
        if value.ndim != 1:
            raise ValueError(f"{name} of shape {list(value.shape)} must be one number an embedding, of shape [B]")
        if value.shape[0] != embedding_BD.shape[0]:
            raise ValueError(f"{embedding_BD.shape[0]} embeddings came with {value.shape[0]} {name}")


def check_values(batch: GlobalBatch, num_classes: int) -> None:
    """Look for labels without a class and embeddings that are no numbers; all ranks see, and raise, the same.

    Raises:
        ValueError: A label outside [0, num_classes).
        NonFiniteEmbeddingError: NaN or infinity in an embedding.
    """
    labels_G = batch.labels_G
    if labels_G.numel() and (int(labels_G.min()) < 0 or int(labels_G.max()) >= num_classes):
        raise ValueError(
            f"labels in [{int(labels_G.min())}, {int(labels_G.max())}] do not fit the head's {num_classes} classes: "
            f"valid are 0 to {num_classes - 1}"
        )
    # An infinite one has length infinity, and divided by it holds NaN.
    finite_G = batch.unit_GD.isfinite().all(dim=1)
    if not bool(finite_G.all()):
        rows = (~finite_G).nonzero().squeeze(1).tolist()
        raise NonFiniteEmbeddingError(
            f"{len(rows)} of {len(finite_G)} embeddings of the global batch are not finite, the first is row {rows[0]} "
            f"(label {int(labels_G[rows[0]])}): the network diverged, or an image or weight is damaged"
        )


def _integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32
