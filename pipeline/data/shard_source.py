"""The verified shards of a data set, one by one: from its place, or from a local cache of it."""

from __future__ import annotations

from dataclasses import replace

from pipeline.data.cache import ShardCache
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import Mixture
from pipeline.data.shards import Shard, read_shard


class ShardSource:
    """Reads the shards of a data set by number, with labels as the whole set counts them.

    Args:
        data: The set.
        cache: Keeps shards on local disk, if given.
    """

    def __init__(self, data: Manifest | Mixture, cache: ShardCache | None = None) -> None:
        self._data, self._cache = data, cache

    def uri(self, number: int) -> str:
        """Where a shard lies."""
        return self._data.shard_uri(number)

    def read(self, number: int) -> Shard:
        """Read and verify one shard.

        Raises:
            StorageError: It cannot be read.
            ShardError: It is not what the manifest says.
        """
        labels = self._data.label_range(number)
        shard = read_shard(self.uri(number), self._data.shards[number], len(labels), self._cache)
        return replace(shard, labels=shard.labels + labels.start) if labels.start else shard
