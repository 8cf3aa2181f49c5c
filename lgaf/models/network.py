"""What every network is to the training step and to the protocols."""

# Shape legend: B = batch on this rank, D = embedding

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup


class FaceEmbedding(NamedTuple):
    """What a network says of a batch of faces.

    Attributes:
        embedding_BD: Un-normalised embedding (kappa, eq. 10); the head and the protocols normalise it.
        norm_local_B: Norm of the local feature (0 where there is no local branch).
        norm_global_B: Norm of the global feature (0 where there is no global branch).
        weight_local_B: Share of the local feature in the fusion, 1 minus the global one's.
        sample_weight_B: In training, for networks that weigh their samples: factor of each sample's loss.
        auxiliary_loss: In training, for networks with a loss of their own: a scalar, the mean over this rank's batch,
            added to the head's loss.
    """

    embedding_BD: Tensor
    norm_local_B: Tensor
    norm_global_B: Tensor
    weight_local_B: Tensor
    sample_weight_B: Tensor | None = None
    auxiliary_loss: Tensor | None = None


def global_embedding(
    embedding_BD: Tensor, sample_weight_B: Tensor | None = None, auxiliary_loss: Tensor | None = None
) -> FaceEmbedding:
    """The `FaceEmbedding` of a network with one, global, feature."""
    norm_B = embedding_BD.detach().float().norm(dim=1)
    none_B = norm_B.new_zeros(norm_B.shape)
    return FaceEmbedding(embedding_BD, none_B, norm_B, none_B, sample_weight_B, auxiliary_loss)


class FaceNetwork(nn.Module):
    """Images [B, 3, 112, 112] RGB in [-1, 1] to a `FaceEmbedding`."""

    def set_process_group(self, group: ProcessGroup | None) -> None:
        """Take statistics of the batch over this group's global batch (None: this process alone)."""


class NetworkConfig(Protocol):
    """A network's settings: a frozen dataclass, checked when made."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def output_dim(self) -> int:
        """Length D of the embedding that the head and the protocols see."""
        ...

    def build(self) -> FaceNetwork:
        """Make the network with fresh weights (from torch's global generator)."""
        ...
