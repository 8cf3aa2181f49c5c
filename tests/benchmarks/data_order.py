"""How well the planned order mixes, against a full permutation: pure numpy, no images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.data.order import epoch_order, plan

BATCH, EPOCHS = 128, 5


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What an order does to the samples of one shard and of one person, over some epochs.

    Attributes:
        distances: Batches between two samples that are neighbours in their shard's file: percentiles 1, 5, 50, 95.
        shards_per_batch: Different shards in a batch, mean.
        same_shard_pairs: Part of a batch's pairs that come from one shard.
        collisions: Pairs of one person in a batch: mean, standard deviation.
        sorted_collisions: The same if the shards were sorted by person, as folders packed in order are: the hard case.
    """

    distances: tuple[float, ...]
    shards_per_batch: float
    same_shard_pairs: float
    collisions: tuple[float, float]
    sorted_collisions: tuple[float, float]


def planned(manifest: Manifest, num_streams: int, epoch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row of each sample in the order of an epoch, as the batches have them: int64 [n] each."""
    whole = plan(epoch_order(manifest, seed, epoch, num_streams), 1, 0, BATCH)
    return whole.shard, whole.row


def permuted(manifest: Manifest, epoch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The same of a full permutation."""
    kept = manifest.num_samples // BATCH * BATCH
    sample = np.random.default_rng((seed, epoch, 1)).permutation(manifest.num_samples)[:kept]
    shard = np.searchsorted(manifest.offsets, sample, side="right") - 1
    return shard, sample - manifest.offsets[shard]


def mixing(manifest: Manifest, labels: np.ndarray, num_streams: int | None, epochs: int = EPOCHS) -> Mixing:
    """Measure an order; ``num_streams`` None: the full permutation."""
    in_order = np.sort(labels)
    found = []
    for epoch in range(epochs):
        shard, row = permuted(manifest, epoch) if num_streams is None else planned(manifest, num_streams, epoch)
        sample = manifest.offsets[shard] + row
        found.append(
            (
                neighbour_distances(manifest, shard, row),
                _distinct(shard),
                pairs_alike(shard),
                pairs_alike(labels[sample]),
                pairs_alike(in_order[sample]),
            )
        )
    distances, distinct, same_shard, same, same_sorted = (np.concatenate(part) for part in zip(*found, strict=True))
    return Mixing(
        distances=tuple(np.percentile(distances, (1, 5, 50, 95)).tolist()),
        shards_per_batch=float(distinct.mean()),
        same_shard_pairs=float(same_shard.mean() / (BATCH * (BATCH - 1) / 2)),
        collisions=(float(same.mean()), float(same.std())),
        sorted_collisions=(float(same_sorted.mean()), float(same_sorted.std())),
    )


def neighbour_distances(manifest: Manifest, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Batches between each two neighbours of a shard's file that the epoch both has."""
    step = np.full(manifest.num_samples, -1)
    step[manifest.offsets[shard] + row] = np.arange(len(shard)) // BATCH
    inside = np.ones(manifest.num_samples, bool)
    inside[manifest.offsets[1:] - 1] = False  # the last of a shard has no next
    here = np.flatnonzero(inside)
    here = here[(step[here] >= 0) & (step[here + 1] >= 0)]
    distances: np.ndarray = np.abs(step[here + 1] - step[here])
    return distances


def _distinct(values: np.ndarray) -> np.ndarray:
    batches = np.sort(values.reshape(-1, BATCH), axis=1)
    counts: np.ndarray = 1 + (np.diff(batches, axis=1) != 0).sum(axis=1)
    return counts


def pairs_alike(values: np.ndarray) -> np.ndarray:
    """Pairs of equal values in each batch."""
    counts = np.zeros((len(values) // BATCH, int(values.max()) + 1), np.int64)
    np.add.at(counts, (np.arange(len(values)) // BATCH, values), 1)
    pairs: np.ndarray = (counts * (counts - 1) // 2).sum(axis=1)
    return pairs


def many_shards(manifest: Manifest, factor: int) -> Manifest:
    """A manifest of as many samples in more, smaller shards: what a larger set looks like to a batch."""
    shards = tuple(
        replace(shard, num_samples=shard.num_samples // factor) for shard in manifest.shards for _ in range(factor)
    )
    return replace(manifest, shards=shards)
