"""Which classes a rank owns: pure integers."""

from __future__ import annotations

from lgaf.config import require_positive


def class_range(num_classes: int, world_size: int, rank: int) -> range:
    """Contiguous global class ids of one rank.

    Ranks own ceil(num_classes / world_size) classes each, the last ones what remains. This is how `torch.chunk` and
    DTensor's ``Shard(0)`` cut, so that a checkpoint of the shards is one tensor to `torch.distributed.checkpoint`.

    Raises:
        ValueError: No classes, or fewer classes than ranks.
    """
    require_positive("num_classes", num_classes)
    if num_classes < world_size:
        raise ValueError(
            f"num_classes={num_classes} is less than the {world_size} ranks; use at most {num_classes} workers"
        )
    per_rank = -(-num_classes // world_size)
    first = min(rank * per_rank, num_classes)
    return range(first, min(first + per_rank, num_classes))
