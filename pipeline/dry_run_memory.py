"""What a worker of a run holds in memory, item by item: sizes of its tensors, and activations that were counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lgaf.config import require_choice
from lgaf.heads.class_shard import class_range
from lgaf.memory import Activations, HeadSize, tensor_bytes
from lgaf.models import FaceNetwork
from lgaf.models.backbones import IMAGE_SIDE
from pipeline.config import TrainConfig
from pipeline.probe import largest_part, largest_share

PIXELS = 3 * IMAGE_SIDE**2


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryItem:
    """One of the things that take memory.

    Attributes:
        name: What.
        num_bytes: At most.
        when: "always", or in the "passes" forward and backward, or in the "update" of the weights.
        note: How it is known, or what decides on it.
    """

    name: str
    num_bytes: int
    when: str = "always"
    note: str = ""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_choice("when", self.when, ("always", "passes", "update"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Of the worker that needs most.

    Attributes:
        items: On the device that trains.
        host_bytes: Worker 0's tensors of a checkpoint, copied to the host's memory while one is written.
        checkpoint_bytes: Of a whole checkpoint in the storage.
        person_bytes: Of each person, where their number is not known: the items then lack the head.
    """

    items: tuple[MemoryItem, ...]
    host_bytes: int
    checkpoint_bytes: int
    person_bytes: int

    @property
    def total_bytes(self) -> int:
        """What is always there, and the larger of what is there in the passes and in the update."""
        phase = {name: sum(item.num_bytes for item in self.items if item.when == name) for name in ("passes", "update")}
        return sum(item.num_bytes for item in self.items if item.when == "always") + max(phase.values())


def largest_shard(num_classes: int, num_workers: int) -> int:
    """People that a worker has at most: the first one's."""
    return len(class_range(num_classes, num_workers, 0))


def head_size(config: TrainConfig, num_classes: int, is_cuda: bool) -> HeadSize:
    """The head of a worker with this many classes."""
    return HeadSize(
        num_classes=num_classes,
        embedding_dim=config.model.output_dim,
        batch=-(-config.batch_size // config.step.accumulate),
        margin=config.head.create(),
        sample_rate=config.head.sample_rate,
        memory_budget=config.head.memory_budget_mib << 20,
        reduced=config.head.precision == "bfloat16",
        in_backward=config.head.update == "backward",
        num_moments=_moments(config),
        is_cuda=is_cuda,
    )


def estimate_memory(
    config: TrainConfig,
    model: FaceNetwork,
    activations: Activations,
    num_classes: int | None,
    is_cuda: bool,
    counted: str = "",
) -> MemoryEstimate:
    """Items of the worker that has most of everything.

    Args:
        config: Of the run.
        model: Its network.
        activations: Counted of it.
        num_classes: Over all workers; None: not known.
        is_cuda: Whether the workers train on GPUs.
        counted: How the activations were counted, for the note.
    """
    size = (
        None if num_classes is None else head_size(config, largest_shard(num_classes, config.fewest_workers), is_cuda)
    )
    items = [
        *_network_items(config, model),
        *([] if size is None else _head_items(config, size)),
        *_pass_items(config, activations, size, counted),
        _update_item(config, model, size, is_cuda),
    ]
    state = sum(item.num_bytes for item in items if item.name in ("weights", "optimizer", "moving average"))
    person = config.model.output_dim * 4 * (1 + _moments(config))
    shard = size.num_classes * person if size else 0
    return MemoryEstimate(
        items=tuple(item for item in items if item.num_bytes or item.note),
        host_bytes=state + shard,
        checkpoint_bytes=state + (num_classes or 0) * person,
        person_bytes=0 if size else person + (config.head.update == "optimizer") * config.model.output_dim * 4,
    )


def _moments(config: TrainConfig) -> int:
    return 2 if config.optimizer.kind == "adamw" else 1


def _network_items(config: TrainConfig, model: FaceNetwork) -> list[MemoryItem]:
    parameters, buffers = list(model.parameters()), list(model.buffers())
    weights, gradients = tensor_bytes(parameters), tensor_bytes(p for p in parameters if p.requires_grad)
    buckets, note = 0, ""
    if config.fewest_workers > 1:
        note = "none: gradients lie in them"
        if config.step.gradient_compression != "none":
            buckets, note = gradients // 2, f"gradients travel as {config.step.gradient_compression}"
        if config.step.accumulate > 1:
            buckets, note = buckets + gradients, "gradients are summed beside them before they travel"
    return [
        MemoryItem(name="weights", num_bytes=weights + tensor_bytes(buffers), note="of the network, float32"),
        MemoryItem(name="gradients", num_bytes=gradients),
        MemoryItem(name="DDP buckets", num_bytes=buckets, note=note),
        MemoryItem(
            name="optimizer",
            num_bytes=_moments(config) * weights,
            note="momentum" if config.optimizer.kind == "sgd" else "two moments",
        ),
        MemoryItem(
            name="moving average",
            num_bytes=weights + tensor_bytes(buffers) if config.step.ema_decay else 0,
            note="" if not config.step.ema_decay else f"step.ema_decay={config.step.ema_decay}",
        ),
    ]


def _head_items(config: TrainConfig, size: HeadSize) -> list[MemoryItem]:
    rows = f"{size.num_classes:,} people x {size.embedding_dim}, float32"
    how = ""
    if size.in_backward:
        how = "none: head.update='backward'"
    elif size.sample_rate < 1.0:
        how = f"at most {size.num_seen:,} drawn people"
    return [
        MemoryItem(name="head: centres", num_bytes=size.weight_bytes, note=rows),
        MemoryItem(name="head: gradient", num_bytes=size.gradient_bytes, note=how),
        MemoryItem(name="head: optimizer", num_bytes=size.optimizer_bytes),
    ]


def _pass_items(
    config: TrainConfig, activations: Activations, size: HeadSize | None, counted: str
) -> Sequence[MemoryItem]:
    part = largest_part(config)
    images = part * PIXELS * 4 + largest_share(config) * PIXELS
    found = [
        MemoryItem(name="images", num_bytes=images, when="passes", note=f"{part:,} at once, float32; bytes before"),
        MemoryItem(name="activations", num_bytes=activations.of(part), when="passes", note=counted),
    ]
    if size is not None:
        budget = f"chunks of logits; head.memory_budget_mib={config.head.memory_budget_mib} bounds it"
        found.append(MemoryItem(name="head: logits", num_bytes=size.temporary_bytes, when="passes", note=budget))
        if config.step.accumulate > 1:
            note = "before it is added to those of the parts before"
            found.append(
                MemoryItem(name="head: a part's gradient", num_bytes=size.gradient_bytes, when="passes", note=note)
            )
    return found


def _update_item(config: TrainConfig, model: FaceNetwork, size: HeadSize | None, is_cuda: bool) -> MemoryItem:
    """Copies that the optimizer makes: of everything at once on a GPU, of one tensor after another on a CPU."""
    tensors = [tensor_bytes([parameter]) for parameter in model.parameters()]
    head = size.update_bytes if size else 0
    copies = sum(tensors) + head if is_cuda else max([*tensors, head]) * _moments(config)
    return MemoryItem(name="optimizer's copies", num_bytes=copies, when="update", note="activations are gone by then")
