"""TrainStep: one step of training, from a batch of images to updated weights."""

# Shape legend: B = batch on this rank, H, W, C = height, width, colour channels

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import record_function

from lgaf import phases
from lgaf.config import require_choice, require_in_range
from lgaf.distributed import all_gather_stack, all_reduce_sum, rank_in, scale_gradient, world_size
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import FaceNetwork
from lgaf.optim import OptimizerConfig, UpdateInBackward, clip_gradients
from lgaf.schedule import Schedule
from lgaf.seeding import mixed_seed
from lgaf.synchronised_norm import check_synchronised_norms, synchronise_norms

Precision = Literal["float32", "bfloat16", "float16"]
HeadPrecision = Literal["float32", "bfloat16"]
AUTOCAST: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMPRESSION: Final = {"float16": default_hooks.fp16_compress_hook, "bfloat16": default_hooks.bf16_compress_hook}

# Torch's own: where the scale of half precision starts, and the finite steps after which it doubles.
SCALE: Final = 2.0**16
SCALE_INTERVAL: Final = 2000

# First part of the seeds of dropout: keeps them apart from those of the class centres.
DROPOUT_SEED: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """How a step is computed.

    Attributes:
        accumulate: Parts in which each rank computes its batch, one after the other, to need less memory. The mean
            loss is that of the whole batch; batch norm and the margins' statistics see each part.
        ema_decay: Beside the weights that are trained, a moving average of them with this factor a step, which is what
            is exported; 0: none. (0.9999 is usual.)
        compile: Compile the network (torch.compile): minutes at the start, faster steps.
        gradient_compression: Type in which the network's gradients travel between the ranks. "bfloat16" needs NCCL.
        sync_batch_norm: Batch norm sees the rows of all ranks, not each rank its own; on GPUs alone.
    """

    accumulate: int = 1
    ema_decay: float = 0.0
    compile: bool = False
    gradient_compression: Literal["none", "float16", "bfloat16"] = "none"
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        require_in_range("step.accumulate", self.accumulate, 1, 1 << 20)
        require_in_range("step.ema_decay", self.ema_decay, 0.0, 0.9999999)
        require_choice("step.gradient_compression", self.gradient_compression, ("none", *COMPRESSION))


class StepResult(NamedTuple):
    """What a step did.

    Attributes:
        loss: The head's, of the global batch: a scalar tensor, detached.
        learning_rate: That was used.
        left_out: Gradients were not finite and everything stayed as it was; False where nobody looked.
        scale: Of the loss, before gradients were taken; 1 where it is not scaled.
    """

    loss: Tensor
    learning_rate: float
    left_out: bool = False
    scale: float = 1.0


class _Part(NamedTuple):
    """A part of a batch: this rank's rows, those of each rank, their share of the global batch and of this rank's."""

    rows: slice
    sizes: Sequence[int] | None
    share: float
    own_share: float


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
        precision: Of the network's forward pass. With "float16" the loss is scaled so that small gradients survive,
            and a step whose gradients are not finite is left out on all ranks (torch's gradient scaler).
        head_precision: Of the head's matrix products; its statistics are float32.
        update_head_in_backward: Move the class centres while their gradient is computed, so that it never exists as a
            whole: saves as much memory as the centres take.
        seed: Of dropout.
        config: How a step is computed.
        leave_out_non_finite: Leave out, on all ranks, the update of a step with a gradient that is not finite; each
            step then waits for the device.

    Raises:
        ValueError: The centres are to move within the backward pass, and gradients to be looked at before; or batch
            norm is to see several ranks on CPUs.
    """

    def __init__(
        self,
        model: FaceNetwork,
        head: ShardedMarginHead,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        total_steps: int,
        group: ProcessGroup | None = None,
        precision: Precision = "float32",
        head_precision: HeadPrecision = "float32",
        update_head_in_backward: bool = False,
        seed: int = 0,
        config: StepConfig | None = None,
        leave_out_non_finite: bool = False,
    ) -> None:
        self.config = config or StepConfig()
        check_update_in_backward(update_head_in_backward, precision, self.config, leave_out_non_finite)
        self.model, self.head = model, head
        self.head_update = UpdateInBackward(head, optimizer) if update_head_in_backward else None
        # A head that updates itself leaves its learned scalars alone to the optimizer.
        self.optimizer = optimizer.build([model, head.margin_state if update_head_in_backward else head])
        self.base_learning_rate, self.schedule, self.total_steps = optimizer.learning_rate, schedule, total_steps
        self.max_norm = optimizer.max_norm
        self.group, self.precision, self.head_precision, self.seed = group, precision, head_precision, seed
        self.num_steps_done = 0
        self.device = head.weight.device
        self.scaler = _scaler(self.device, group, precision == "float16", leave_out_non_finite)
        model.set_process_group(None)  # a group cannot be copied
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        self.average = _average(model, self.config.ema_decay)
        model.set_process_group(group)
        if self.config.sync_batch_norm:  # after the average: it is a copy, and only ever evaluated
            check_synchronised_norms(self.device, group)
            synchronise_norms(model, group)
        self._network = self._distributed(model)

    def _distributed(self, model: FaceNetwork) -> nn.Module:
        """The network as it is called: compiled, data-parallel."""
        network: Any = torch.compile(model) if self.config.compile else model
        if world_size(self.group) == 1:
            return network  # type: ignore[no-any-return]
        # Batch-norm buffers stay each rank's own; sending rank 0's around would cost a collective every step.
        # Looking for unused parameters keeps DDP from re-ordering its buckets after the first step: a resumed
        # process would else sum gradients in another order than the one that it continues.
        distributed = DistributedDataParallel(
            network,
            process_group=self.group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=True,
        )
        if self.config.gradient_compression != "none":
            distributed.register_comm_hook(self.group, COMPRESSION[self.config.gradient_compression])
        return distributed

    @property
    def exported_model(self) -> FaceNetwork:
        """The network to evaluate: the moving average where there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor, sizes: Sequence[int] | None = None) -> StepResult:
        """Train on this rank's share of one global batch.

        Args:
            images_BHWC: uint8 RGB.
            labels_B: int64 class ids.
            sizes: B of every rank, if known (see `ShardedMarginHead.forward`).

        Raises:
            ValueError: A rank has fewer samples than a batch has parts.
        """
        learning_rate = self.schedule.learning_rate(self.base_learning_rate, self.num_steps_done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.head_update is not None:
            self.head_update.learning_rate = learning_rate
        torch.manual_seed(mixed_seed(DROPOUT_SEED, self.seed, self.num_steps_done, rank_in(self.group)))
        self.model.train()
        self.head.train()
        self.optimizer.zero_grad(set_to_none=True)
        # A forward pass that is not finite spoils the statistics, which then spoil every step behind it.
        statistics = [buffer.clone() for buffer in self._statistics()] if self.scaler.is_enabled() else []
        parts, loss = self._parts(len(labels_B), sizes), torch.zeros((), device=self.device)
        for part in parts:
            # Gradients of all parts are summed on this rank, and travel once.
            with self._without_travel() if part is not parts[-1] else contextlib.nullcontext():
                loss = loss + self._backward(images_BHWC[part.rows], labels_B[part.rows], part)
        scale = self.scaler.get_scale()
        with record_function(phases.OPTIMIZER):
            left_out = self._update(scale)
        if left_out:
            for buffer, before in zip(self._statistics(), statistics, strict=True):
                buffer.copy_(before)
        self.num_steps_done += 1
        return StepResult(loss, learning_rate, left_out, scale)

    def _statistics(self) -> list[Tensor]:
        """Of batch norm, fusion, margin and screening."""
        return [*self.model.buffers(), *self.head.buffers()]

    def pass_over(self) -> StepResult:
        """Count a step that is not trained on; all ranks call this."""
        learning_rate = self.schedule.learning_rate(self.base_learning_rate, self.num_steps_done, self.total_steps)
        self.num_steps_done += 1
        return StepResult(torch.tensor(torch.nan, device=self.device), learning_rate, left_out=True)

    def is_finite(self) -> bool:
        """Whether all weights and statistics are finite numbers, on all ranks alike; all ranks call this."""
        average = [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]
        tensors = [*self.model.parameters(), *self.head.parameters(), *self._statistics(), *average]
        spoilt = torch.stack([~tensor.detach().isfinite().all().to(self.device) for tensor in tensors]).sum()
        return not bool(all_reduce_sum(spoilt.float(), self.group))

    def _without_travel(self) -> contextlib.AbstractContextManager[None]:
        network = self._network
        return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()

    def _parts(self, num_rows: int, sizes: Sequence[int] | None) -> list[_Part]:
        count = self.config.accumulate
        if count == 1:
            return [_Part(slice(None), sizes, 1.0, 1.0)]
        if sizes is None:
            own = torch.tensor([num_rows], device=self.device)
            sizes = all_gather_stack(own, self.group).flatten().tolist()
        if min(sizes) < count:
            raise ValueError(f"step.accumulate={count} is more than the {min(sizes)} samples of a rank")
        parts = []
        for number in range(count):
            rows = slice(num_rows * number // count, num_rows * (number + 1) // count)
            own_sizes = [size * (number + 1) // count - size * number // count for size in sizes]
            share = sum(own_sizes) / sum(sizes)
            parts.append(_Part(rows, own_sizes, share, (rows.stop - rows.start) / num_rows))
        return parts

    def _backward(self, images_BHWC: Tensor, labels_B: Tensor, part: _Part) -> Tensor:
        """Add a part's gradients; gives its share of the loss."""
        self.head.step = self.num_steps_done  # all parts of a batch look at the same classes
        with record_function(phases.FORWARD):
            images_BCHW = normalise_images(images_BHWC.to(self.device, non_blocking=True))
            with torch.autocast(
                self.device.type, dtype=AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST
            ):
                output = self._network(images_BCHW)
        # DDP averages the ranks' gradients; the head's are already those of the global mean.
        embedding_BD = scale_gradient(output.embedding_BD.float(), world_size(self.group))
        weights_B = output.sample_weight_B
        if weights_B is not None:
            weights_B = scale_gradient(weights_B.float(), world_size(self.group))
        labels_B = labels_B.to(self.device, non_blocking=True)
        in_half = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.head_precision == "bfloat16")
        with record_function(phases.HEAD), in_half:
            loss: Tensor = self.head(embedding_BD, labels_B, weights_B=weights_B, sizes=part.sizes) * part.share
        # A network's own loss is a mean over this rank's rows; DDP makes that the mean over the ranks.
        total = loss if output.auxiliary_loss is None else loss + output.auxiliary_loss * part.own_share
        with record_function(phases.BACKWARD):
            self.scaler.scale(total).backward()
        return loss.detach()

    def _update(self, scale: float) -> bool:
        """Move weights by the gradients that there are; whether they were not finite and had no effect."""
        if self.max_norm:
            self.scaler.unscale_(self.optimizer)
            shards = [self.head.weight]
            replicated = [*self.model.parameters(), *self.head.margin_state.parameters()]
            clip_gradients(replicated, shards, self.max_norm, self.group)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        left_out = self.scaler.get_scale() < scale
        if left_out and self.precision != "float16":
            self.scaler.update(1.0)  # it only looks, and must not fade away
        if self.average is not None and not left_out:
            self.average.update_parameters(self.model)
        return left_out


def check_update_in_backward(wanted: bool, precision: Precision, config: StepConfig, leaves_out: bool) -> None:
    """Raise ``ValueError`` if centres would move before their gradient is summed or looked at, or by a scaled one."""
    if wanted and (precision == "float16" or config.accumulate > 1 or leaves_out):
        raise ValueError(
            f"precision={precision!r}, step.accumulate={config.accumulate}, leaving out what is not finite: "
            f"{leaves_out}: centres that move within the backward pass (head.update='backward') take none of float16, "
            "a batch in parts and divergence.policy='skip'"
        )


def _scaler(device: torch.device, group: ProcessGroup | None, scales: bool, looks: bool) -> torch.amp.GradScaler:
    """Torch's gradient scaler; several ranks agree on whether all gradients are finite.

    One that only looks stays at 1.
    """
    scale, interval = (SCALE, SCALE_INTERVAL) if scales else (1.0, 1 << 30)
    enabled = scales or looks
    if world_size(group) == 1:
        return torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=interval, enabled=enabled)
    return ShardedGradScaler(
        device.type, init_scale=scale, growth_interval=interval, enabled=enabled, process_group=group
    )


def _average(model: FaceNetwork, decay: float) -> AveragedModel | None:
    """What holds the moving average of weights and buffers; None without one."""
    if not decay:
        return None
    rule: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
