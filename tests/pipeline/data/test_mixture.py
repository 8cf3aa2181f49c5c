"""Several data sets in one order: labels and indices one after another, each sample as often as its weight says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import ManifestError
from pipeline.data.mixture import Mixture
from pipeline.data.order import epoch_order, plan, steps_per_epoch
from pipeline.data.shard_source import ShardSource
from pipeline.data.shards import ShardError
from tests.pipeline.data.writers import jpeg, label_of, packed_set, plain_manifest

FIRST, SECOND = (9, 14, 5), (8, 7)


def mixture(*weights: float) -> Mixture:
    manifests = (plain_manifest(FIRST, "memory://a", 5), plain_manifest(SECOND, "memory://b", 3))
    return Mixture(manifests=manifests, weights=weights)


def seen(
    data: Mixture, epochs: range, batch: int = 4, streams: int = 2, seed: int = 3, world_size: int = 1
) -> list[int]:
    """Global sample indices of some epochs; with a batch of 1 and one stream, nothing is left out."""
    found = []
    for epoch in epochs:
        order = epoch_order(data, seed, epoch, streams)
        for rank in range(world_size):
            samples = plan(order, world_size, rank, batch)
            found += (data.offsets[samples.shard] + samples.row).tolist()
    return found


@settings(max_examples=60)
@given(
    weights=st.tuples(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0]), st.sampled_from([0.3, 1.0, 3.0])),
    first=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_over_epochs_each_sample_comes_as_often_as_its_weight_says(weights, first, seed):
    data, epochs = mixture(*weights), range(first, first + 6)
    counts = Counter(seen(data, epochs, batch=1, streams=1, seed=seed))
    for sizes, weight, offset in ((FIRST, weights[0], 0), (SECOND, weights[1], sum(FIRST))):
        taken = round(sum(sizes) * weight)
        own = [counts[offset + sample] for sample in range(sum(sizes))]
        assert sum(own) == len(epochs) * taken
        assert max(own) - min(own) <= 2  # a round that the epochs cut at both ends
    assert steps_per_epoch(data, 1) == sum(counts.values()) / len(epochs)


def test_weight_one_is_every_sample_once_an_epoch():
    for epoch in range(3):
        assert sorted(seen(mixture(1.0, 1.0), range(epoch, epoch + 1), batch=1, streams=1)) == list(range(43))


def test_half_a_weight_takes_turns():
    two = seen(mixture(1.0, 0.5), range(2), batch=1, streams=1)
    second = Counter(index for index in two if index >= sum(FIRST))
    assert sum(second.values()) == 16  # 15 * 0.5 rounds to 8
    assert set(second) == set(range(28, 43))


def test_a_sample_that_an_epoch_sees_twice_is_in_two_laps():
    order = epoch_order(mixture(1.0, 2.0), 0, 0, 1)
    samples = plan(order, 1, 0, 1)
    index = mixture(1.0, 2.0).offsets[samples.shard] + samples.row
    pairs = list(zip(index.tolist(), samples.lap.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 28 + 30  # so its augmentations differ


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_global_batches_do_not_depend_on_the_world_size(world_size):
    data, batch = mixture(1.0, 1.5), 6
    parts = []
    for rank in range(world_size):
        samples = plan(epoch_order(data, 1, 4, 2), world_size, rank, batch)
        parts.append((data.offsets[samples.shard] + samples.row).reshape(steps_per_epoch(data, batch), -1))
    alone = plan(epoch_order(data, 1, 4, 2), 1, 0, batch)
    np.testing.assert_array_equal(
        np.concatenate(parts, axis=1), (data.offsets[alone.shard] + alone.row).reshape(-1, batch)
    )


def test_sets_are_mixed_within_an_epoch():
    data = Mixture(
        manifests=(plain_manifest((50,) * 40, "memory://a"), plain_manifest((50,) * 40, "memory://b")),
        weights=(1.0, 1.0),
    )
    index = np.array(seen(data, range(1), batch=40, streams=8)).reshape(-1, 40)
    share = (index >= 2000).mean(axis=1)
    assert 0.2 < share.min() < share.max() < 0.8


def test_labels_follow_those_of_the_sets_before(tmp_path):
    first, second = packed_set(tmp_path / "a", (6, 5), 5), packed_set(tmp_path / "b", (7,), 3)
    data = Mixture.load({first.uri: 1.0, second.uri: 0.5})
    assert isinstance(data, Mixture)
    assert (data.num_classes, data.num_samples, len(data.shards)) == (8, 18, 3)
    source = ShardSource(data)
    assert source.read(1).labels.tolist() == [label_of(i, 5) for i in range(6, 11)]
    own = source.read(2)
    assert own.labels.tolist() == [5 + label_of(i, 3) for i in range(7)]
    assert [bytes(image) for image in own.images] == [jpeg(i) for i in range(7)]
    assert data.identities[5:] == second.identities
    assert data.offsets.tolist() == [0, 6, 11, 18]
    assert source.uri(2) == second.shard_uri(0)


def test_one_set_alone_stays_its_manifest(tmp_path):
    manifest = packed_set(tmp_path / "a", (6,))
    assert Mixture.load({manifest.uri: 1.0}) == manifest
    twice = Mixture.load({manifest.uri: 2.0})
    assert steps_per_epoch(twice, 1) == 12
    assert twice.fingerprint != manifest.fingerprint


def test_names_are_left_behind_but_nothing_else():
    data = mixture(1.0, 1.0)
    lean = data.without_identities()
    assert lean.identities == ()
    assert (lean.num_classes, lean.shards, lean.members) == (data.num_classes, data.shards, data.members)
    assert mixture(1.0, 0.5).without_identities().weights == (1.0, 0.5)


def test_a_label_beyond_its_own_set_is_no_one_of_the_next(tmp_path):
    first, second = packed_set(tmp_path / "a", (6,), 5), packed_set(tmp_path / "b", (7,), 3)
    short = replace(first, num_classes=3, identities=first.identities[:3])  # its shard has labels up to 4
    with pytest.raises(ShardError, match=r"a/shard-000000\.tar: labels go from 0 to 4, the data set has 3 classes"):
        ShardSource(Mixture(manifests=(short, second), weights=(1.0, 1.0))).read(0)


def test_a_tiny_weight_still_takes_a_sample():
    assert steps_per_epoch(mixture(1.0, 0.001), 1) == 29


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), 2000.0])
def test_a_weight_that_makes_no_sense_is_refused_by_its_set(weight):
    with pytest.raises(ValueError, match=r"weight=.* of memory://b must be above 0"):
        mixture(1.0, weight)


def test_sets_with_images_of_different_sizes_are_refused(tmp_path):
    first, second = mixture(1.0, 1.0).manifests
    with pytest.raises(ManifestError, match=r"memory://b: images of 128 pixels, those of memory://a have 112"):
        Mixture(manifests=(first, replace(second, image_side=128)), weights=(1.0, 1.0))
