"""A look at some shards of a packed data set, for sets that have no report of their packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from lgaf.config import require_positive
from pipeline.data.checks import ImageStatistics, colour_of
from pipeline.data.images import decode_rgb
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.shards import read_shard
from pipeline.runtime import map_tasks

DEFAULT_NUM_SHARDS: Final = 8
EXAMPLES: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What was seen in some shards.

    Attributes:
        shards: Numbers of the shards that were read.
        num_shards: Shards of the set.
        samples_per_identity: Images of each person in those shards, by label; zero for people that were not met.
        num_unreadable: Images that cannot be decoded.
        unreadable_examples: Some of them, as (shard, key, reason).
        statistics: Over all images of those shards.
    """

    shards: tuple[int, ...]
    num_shards: int
    samples_per_identity: list[int]
    num_unreadable: int
    unreadable_examples: list[tuple[str, str, str]]
    statistics: ImageStatistics

    @property
    def is_whole(self) -> bool:
        """Whether every shard was read."""
        return len(self.shards) == self.num_shards


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShardTask:
    uri: str
    info: ShardInfo
    num_classes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    labels: np.ndarray  # int64 [n]
    unreadable: list[tuple[str, str, str]]
    statistics: dict[str, Any]


def spread(num_shards: int, wanted: int) -> list[int]:
    """Choose ``wanted`` of ``num_shards`` numbers (all, if there are fewer), evenly from first to last."""
    if wanted >= num_shards:
        return list(range(num_shards))
    return [int(number) for number in np.linspace(0, num_shards - 1, wanted).round()]


def survey(
    manifest: Manifest,
    num_shards: int | None = DEFAULT_NUM_SHARDS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read some shards of a data set as Ray tasks, one a shard, and decode their images.

    Args:
        manifest: The set.
        num_shards: How many, evenly spread; None for all.
        on_progress: Told (shards read, shards to read).

    Raises:
        StorageError: A shard cannot be read.
        ShardError: A shard is not what the manifest says.
        ValueError: ``num_shards`` is not positive.
    """
    if num_shards is not None:
        require_positive("num_shards", num_shards)
    numbers = spread(len(manifest.shards), len(manifest.shards) if num_shards is None else num_shards)
    tasks = [
        _ShardTask(uri=manifest.shard_uri(number), info=manifest.shards[number], num_classes=manifest.num_classes)
        for number in numbers
    ]
    on_done = None if on_progress is None else lambda done: on_progress(done, len(tasks))
    statistics, samples, unreadable = ImageStatistics(), np.zeros(manifest.num_classes, np.int64), []
    for seen in map_tasks(_look, tasks, on_done):
        statistics.merge(seen.statistics)
        samples += np.bincount(seen.labels, minlength=manifest.num_classes)
        unreadable += seen.unreadable
    return Survey(
        shards=tuple(numbers),
        num_shards=len(manifest.shards),
        samples_per_identity=samples.tolist(),
        num_unreadable=len(unreadable),
        unreadable_examples=unreadable[:EXAMPLES],
        statistics=statistics,
    )


def _look(task: _ShardTask) -> _Seen:
    shard = read_shard(task.uri, task.info, task.num_classes)
    statistics, unreadable = ImageStatistics(), []
    for key, image in zip(shard.keys, shard.images, strict=True):
        try:
            pixels = decode_rgb(image)
        except ValueError as error:
            statistics.add(len(image))
            unreadable.append((task.info.name, key, str(error)))
        else:
            statistics.add(len(image), pixels, colour_of(image))
    return _Seen(labels=shard.labels, unreadable=unreadable, statistics=asdict(statistics))
