"""The order of samples against an oracle of a few lines: one shuffled sequence, cut into streams, dealt to ranks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import order as orders
from pipeline.data.manifest import Manifest
from pipeline.data.order import epoch_order, plan, planned_shards
from tests.pipeline.data.writers import plain_manifest

WORLD_SIZES = range(1, 17)


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    streams: int
    batch: int
    seed: int

    @property
    def manifest(self) -> Manifest:
        return plain_manifest(self.sizes)

    @property
    def steps(self) -> int:
        return sum(self.sizes) // self.batch


@st.composite
def cases(draw, min_period: int = 1) -> Case:
    streams = draw(st.integers(1, 8))
    period = draw(st.integers(max(min_period, math.ceil(16 / streams)), max(min_period, math.ceil(16 / streams)) + 6))
    batch = streams * period
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= batch))
    return Case(sizes=tuple(sizes), streams=streams, batch=batch, seed=draw(st.integers(0, 2**40)))


def expected_batches(case: Case, epoch: int) -> np.ndarray:
    """The global batches [steps, batch] of an epoch, from the description alone."""
    manifest = case.manifest
    sequence = np.concatenate(
        [
            manifest.offsets[shard] + np.random.default_rng((case.seed, epoch, shard)).permutation(case.sizes[shard])
            for shard in np.random.default_rng((case.seed, epoch, 0)).permutation(len(case.sizes))
        ]
    )
    period = case.batch // case.streams
    runs = sequence[: case.steps * case.batch].reshape(case.streams, case.steps, period)
    return runs.transpose(1, 0, 2).reshape(case.steps, case.batch)


def planned(case: Case, epoch: int, world_size: int, rank: int, step: int = 0, end: int | None = None) -> np.ndarray:
    """One rank's part of the global batches [steps, its slots], as global sample indices."""
    order = epoch_order(case.manifest, case.seed, epoch, case.streams)
    found = plan(order, world_size, rank, case.batch, step, end)
    low, high = orders.rank_slots(case.batch, world_size, rank)
    assert (found.lap == epoch).all()
    assert (found.row < np.array(case.sizes)[found.shard]).all()
    return (case.manifest.offsets[found.shard] + found.row).reshape(-1, high - low)


def everyone(case: Case, epoch: int, world_size: int, step: int = 0) -> np.ndarray:
    """The global batches as all ranks together read them."""
    return np.concatenate([planned(case, epoch, world_size, rank, step) for rank in range(world_size)], axis=1)


@settings(max_examples=40)
@given(case=cases(), epoch=st.integers(0, 50))
def test_the_global_batches_are_those_of_the_description_for_every_world_size(case, epoch):
    expected = expected_batches(case, epoch)
    for world_size in WORLD_SIZES:
        np.testing.assert_array_equal(everyone(case, epoch, world_size), expected)
        widths = [high - low for low, high in (orders.rank_slots(case.batch, world_size, r) for r in range(world_size))]
        assert max(widths) - min(widths) <= 1


@given(case=cases(), epoch=st.integers(0, 3), world_size=st.sampled_from(WORLD_SIZES))
def test_every_sample_comes_at_most_once_an_epoch_and_less_than_a_batch_is_left_out(case, epoch, world_size):
    read = everyone(case, epoch, world_size).ravel().tolist()
    assert len(read) == len(set(read)) == case.steps * case.batch
    assert 0 <= min(read) <= max(read) < sum(case.sizes)
    assert sum(case.sizes) - len(read) < case.batch


@settings(max_examples=60)
@given(case=cases(), data=st.data(), world_size=st.sampled_from(WORLD_SIZES))
def test_resuming_reads_exactly_the_tail_and_no_other_shard(case, data, world_size):
    step = data.draw(st.integers(0, case.steps))
    end = data.draw(st.integers(step, case.steps))
    order = epoch_order(case.manifest, case.seed, 2, case.streams)
    tail = expected_batches(case, 2)[step:end]
    for rank in range(world_size):
        low, high = orders.rank_slots(case.batch, world_size, rank)
        np.testing.assert_array_equal(planned(case, 2, world_size, rank, step, end), tail[:, low:high])
        needed = (np.searchsorted(case.manifest.offsets, tail[:, low:high].ravel(), side="right") - 1).tolist()
        assert planned_shards(order, world_size, rank, case.batch, step, end) == list(dict.fromkeys(needed))


@given(case=cases(), world_size=st.sampled_from(WORLD_SIZES))
def test_a_rank_opens_a_shard_once_in_each_stream_that_it_feeds(case, world_size):
    for rank in range(world_size):
        batches = planned(case, 0, world_size, rank)
        shards = np.searchsorted(case.manifest.offsets, batches, side="right") - 1
        for slots in shards.T:  # one slot belongs to one stream
            changes = slots[np.flatnonzero(np.diff(slots, prepend=-1))]
            assert len(changes) == len(set(changes.tolist()))


def test_epochs_and_seeds_differ():
    def batches(seed: int, epoch: int) -> np.ndarray:
        case = Case(sizes=(50,) * 20, streams=4, batch=40, seed=seed)
        return everyone(case, epoch, 1)

    first = batches(0, 0)
    np.testing.assert_array_equal(first, batches(0, 0))
    for other in (batches(0, 1), batches(0, 7), batches(1, 0), batches(2**33, 0)):
        assert sorted(other.ravel()) == sorted(first.ravel())  # the same samples
        assert (other != first).mean() > 0.95  # elsewhere
        shared = [len(set(a) & set(b)) for a, b in zip(first, other, strict=True)]
        assert np.mean(shared) < 4  # 40 * 40 / 1000 = 1.6 by chance


@pytest.mark.parametrize(
    ("batch", "streams", "world_size", "message"),
    [
        (10, 4, 1, r"batch_size=10 must be a multiple of stream\.num_streams=4"),
        (2, 4, 1, r"batch_size=2 must be a multiple of stream\.num_streams=4"),
        (4, 4, 5, r"batch_size=4 is less than the 5 workers"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused(batch, streams, world_size, message):
    manifest = plain_manifest((100, 100))
    with pytest.raises(ValueError, match=message):
        orders.check_batch(batch, streams, world_size)
    with pytest.raises(ValueError, match=message):
        plan(epoch_order(manifest, 0, 0, streams), world_size, 0, batch)


def test_data_smaller_than_a_batch_is_refused():
    manifest = plain_manifest((3, 4), uri="memory://tiny")
    assert orders.steps_per_epoch(manifest, 7) == 1
    with pytest.raises(ValueError, match=r"batch_size=8 is more than the 7 samples of an epoch"):
        orders.steps_per_epoch(manifest, 8)


@pytest.mark.parametrize("streams", [0, -1])
def test_streams_must_be_positive(streams):
    with pytest.raises(ValueError, match=r"num_streams=-?\d must be at least 1"):
        epoch_order(plain_manifest((5,)), 0, 0, streams)


class TestShuffleQuality:
    """64 shards of 128 samples, batches of 64 from 16 streams: how far from a full permutation the batches are."""

    case = Case(sizes=(128,) * 64, streams=16, batch=64, seed=5)

    def shards(self, epoch: int) -> np.ndarray:
        return expected_batches(self.case, epoch) // 128

    def test_a_batch_mixes_at_least_as_many_shards_as_there_are_streams(self):
        # A stream's run (512) is longer than a shard and its part of a batch (128 + 4), so no two streams meet in one.
        for epoch in range(5):
            for batch in self.shards(epoch):
                counts = Counter(batch.tolist())
                assert len(counts) >= self.case.streams
                assert max(counts.values()) <= self.case.batch // self.case.streams

    def test_labels_in_a_batch_are_spread_as_by_a_full_permutation(self):
        # Packing shuffled all samples once, so a shard is a random sample and the classes cannot tell the difference.
        rng = np.random.default_rng(0)
        labels = rng.permutation(np.arange(8192) % 200)
        planned = np.array(
            [len(set(labels[batch])) for epoch in range(4) for batch in expected_batches(self.case, epoch)]
        )
        full = np.array([len(set(labels[batch])) for _ in range(4) for batch in rng.permutation(8192).reshape(-1, 64)])
        error = math.sqrt(planned.var() / len(planned) + full.var() / len(full))
        assert abs(planned.mean() - full.mean()) < 4 * error

    def test_how_often_two_samples_meet_in_a_batch_has_a_bound(self):
        # By a full permutation any two meet with probability 63 / 8191. Two of one shard meet more often, by at most
        # shards / streams = 4 (a stream takes 4 of 128 rows at a time); two of different shards as often as by chance.
        chance, same, other, epochs = 63 / 8191, 0, 0, 40
        for epoch in range(epochs):
            for batch in self.shards(epoch):
                counts = np.array(list(Counter(batch.tolist()).values()))
                pairs = int((counts * (counts - 1)).sum()) // 2
                same += pairs
                other += 64 * 63 // 2 - pairs
        same_rate = same / epochs / (64 * 128 * 127 / 2)
        other_rate = other / epochs / (64 * 63 / 2 * 128 * 128)
        assert chance < same_rate <= 4 * chance
        assert other_rate == pytest.approx(chance, rel=0.05)

    def test_the_neighbours_of_a_sample_change_from_epoch_to_epoch(self):
        pairs = []
        for epoch in range(6):
            position = np.empty(8192, np.int64)
            position[expected_batches(self.case, epoch).ravel()] = np.arange(8192) // 64
            pairs.append(position)
        first = pairs[0]
        for later in pairs[1:]:
            again = 0
            for batch in range(128):
                counts = np.unique(later[first == batch], return_counts=True)[1]
                again += int((counts * (counts - 1)).sum()) // 2
            # Of 258,048 pairs that meet, a full permutation repeats 1,985; a shard's pairs four times as often.
            assert again / (128 * 64 * 63 / 2) < 2 * 63 / 8191
