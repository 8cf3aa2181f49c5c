"""TrainStep: one step of training, from a batch of images to updated weights."""

# Shape legend: B = batch on this rank, H, W, C = height, width, colour channels

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from lgaf.distributed import rank_in, scale_gradient, world_size
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import FaceNetwork
from lgaf.optim import SGDConfig, UpdateInBackward
from lgaf.schedule import StepSchedule
from lgaf.seeding import mixed_seed

Precision = Literal["float32", "bfloat16"]

# First part of the seeds of dropout: keeps them apart from those of the class centres.
DROPOUT_SEED: Final = 2


class StepResult(NamedTuple):
    """The head's loss of the global batch (scalar tensor, detached) and the learning rate that was used."""

    loss: Tensor
    learning_rate: float


def normalise_images(images_BHWC: Tensor) -> Tensor:
    """uint8 RGB [B, H, W, C] to float [B, C, H, W] in [-1, 1]; the memory stays channels-last."""
    return images_BHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class TrainStep:
    """Owns network, head and optimizer; the loop around it knows none of them.

    The network is data-parallel (DDP) and the head class-parallel over ``group``. Everything random in a step (dropout)
    is drawn from (seed, step, rank), so a resumed run repeats what an uninterrupted one does.

    Args:
        model: The network, on ``device``.
        head: The margin head, on ``device``.
        optimizer: Recipe of the optimizer.
        schedule: Learning rate over the run.
        total_steps: Length of the run.
        group: All ranks; None for this process alone.
        precision: Of the network's forward pass.
        head_precision: Of the head's matrix products; its statistics are float32.
        update_head_in_backward: Move the class centres while their gradient is computed, so that it never exists as a
            whole: saves as much memory as the centres take.
        seed: Of dropout.
    """

    def __init__(
        self,
        model: FaceNetwork,
        head: ShardedMarginHead,
        optimizer: SGDConfig,
        schedule: StepSchedule,
        total_steps: int,
        group: ProcessGroup | None = None,
        precision: Precision = "float32",
        head_precision: Precision = "float32",
        update_head_in_backward: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.head = model, head
        self.head_update = UpdateInBackward(head, optimizer) if update_head_in_backward else None
        # A head that updates itself leaves its learned scalars alone to the optimizer.
        self.optimizer = optimizer.build([model, head.margin_state if update_head_in_backward else head])
        self.base_learning_rate, self.schedule, self.total_steps = optimizer.learning_rate, schedule, total_steps
        self.group, self.precision, self.head_precision, self.seed = group, precision, head_precision, seed
        self.num_steps_done = 0
        self.device = head.weight.device
        model.set_process_group(group)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        self._network: nn.Module = model
        if world_size(group) > 1:
            # Batch-norm buffers stay each rank's own; sending rank 0's around would cost a collective every step.
            # Looking for unused parameters keeps DDP from re-ordering its buckets after the first step: a resumed
            # process would else sum gradients in another order than the one that it continues.
            self._network = DistributedDataParallel(
                model,
                process_group=group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor, sizes: Sequence[int] | None = None) -> StepResult:
        """Train on this rank's share of one global batch.

        Args:
            images_BHWC: uint8 RGB.
            labels_B: int64 class ids.
            sizes: B of every rank, if known (see `ShardedMarginHead.forward`).
        """
        learning_rate = self.schedule.learning_rate(self.base_learning_rate, self.num_steps_done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.head_update is not None:
            self.head_update.learning_rate = learning_rate
        self.head.step = self.num_steps_done
        torch.manual_seed(mixed_seed(DROPOUT_SEED, self.seed, self.num_steps_done, rank_in(self.group)))
        self.model.train()
        self.head.train()
        images_BCHW = normalise_images(images_BHWC.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            output = self._network(images_BCHW)
        # DDP averages the ranks' gradients; the head's are already those of the global mean.
        embedding_BD = scale_gradient(output.embedding_BD.float(), world_size(self.group))
        weights_B = output.sample_weight_B
        if weights_B is not None:
            weights_B = scale_gradient(weights_B.float(), world_size(self.group))
        labels_B = labels_B.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.head_precision == "bfloat16"):
            loss: Tensor = self.head(embedding_BD, labels_B, weights_B=weights_B, sizes=sizes)
        self.optimizer.zero_grad(set_to_none=True)
        # A network's own loss is a mean over this rank's rows; DDP makes that the mean over the ranks.
        total = loss if output.auxiliary_loss is None else loss + output.auxiliary_loss
        total.backward()
        self.optimizer.step()
        self.num_steps_done += 1
        return StepResult(loss.detach(), learning_rate)
