"""The rivals of the data benchmark are right, and so is what it measures with: so being faster means something."""

# numpy's global generator is what AdaFace draws from.
# ruff: noqa: NPY002

from __future__ import annotations

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.manifest import Manifest
from pipeline.data.recordio import RecordIOReader, image_keys
from pipeline.data.shards import read_shard
from tests.benchmarks import data_adaface, data_order, data_rivals
from tests.benchmarks.data_measure import check_labels, consume
from tests.benchmarks.data_set import DataSet, Recipe, load_set, open_set
from tests.pipeline.data.writers import jpeg

RECIPE = Recipe(num_people=6, faces_per_person=2, variants=20, samples_per_shard=40, seed=3)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> DataSet:
    return open_set(tmp_path_factory.mktemp("bench") / "data", RECIPE, say=lambda text: None)


def _picture(number: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(number))).convert("RGB")


def _blend(pixels: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    # PIL cuts to whole grey levels after each step.
    return np.floor(np.clip(pixels * factor + other * (1 - factor), 0, 255))


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels @ np.array([0.299, 0.587, 0.114]))[..., None]


def _jittered_by_formula(pixels: np.ndarray, order: list[int], factors: list[float]) -> np.ndarray:
    """ColorJitter from its definition: blends with black, with the mean grey, with the grey picture."""
    for which in order:
        if which == 0:
            pixels = _blend(pixels, 0.0, factors[0])
        elif which == 1:
            pixels = _blend(pixels, round(float(_grey(pixels).mean())), factors[1])
        elif which == 2:
            pixels = _blend(pixels, _grey(pixels), factors[2])
    return pixels


@pytest.mark.parametrize("seed", range(8))
def test_adafaces_colours_are_color_jitters_by_its_definition(seed):
    torch.manual_seed(seed)
    order = torch.randperm(4).tolist()
    factors = [float(torch.empty(1).uniform_(0.5, 1.5)) for _ in range(3)]
    torch.manual_seed(seed)
    found = np.asarray(data_adaface.jitter(_picture(seed)), np.float64)
    expected = _jittered_by_formula(np.asarray(_picture(seed), np.float64), order, factors)
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - expected).mean() < 0.1


def test_adafaces_crop_keeps_its_box_in_place_and_blackens_the_rest():
    picture = _picture()
    found = np.asarray(data_adaface.paste_crop(picture, 10, 25, 60, 40))
    kept = np.zeros((112, 112), bool)
    kept[10:70, 25:65] = True
    np.testing.assert_array_equal(found[kept], np.asarray(picture)[kept])
    assert not found[~kept].any()


def test_adafaces_crop_boxes_have_the_published_sizes_and_shapes():
    torch.manual_seed(0)
    boxes = np.array([data_adaface.crop_box(112, 112) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 112).all()
    assert (left + width <= 112).all()
    area, ratio = height * width / 112**2, width / height
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.max() > 0.95
    assert (ratio.min(), ratio.max()) == (pytest.approx(0.75, abs=0.02), pytest.approx(4 / 3, abs=0.03))
    # Uniform in the logarithm: as many wide boxes as tall ones.
    assert (ratio > 1).mean() == pytest.approx(0.5, abs=0.04)


def test_adafaces_low_resolution_draws_a_side_and_two_interpolations():
    pixels = np.asarray(_picture())
    sides, ways = set(), set()
    for seed in range(300):
        np.random.seed(seed)
        found = data_adaface.lower_resolution(pixels)
        np.random.seed(seed)
        side = int(np.random.uniform(0.2, 1.0) * 112)
        down, up = (int(np.random.choice(data_adaface.INTERPOLATIONS)) for _ in range(2))
        small = cv2.resize(pixels, (side, side), interpolation=down)
        np.testing.assert_array_equal(found, cv2.resize(small, (112, 112), interpolation=up))
        sides.add(side)
        ways.add((down, up))
    assert min(sides) <= 24
    assert max(sides) >= 109
    assert len(ways) == 25


def test_adafaces_tensor_is_normalised_and_flipped_half_of_the_time():
    picture = _picture()
    upright = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1
    torch.manual_seed(0)
    flipped = 0
    for _ in range(200):
        found = data_adaface.to_normalised(picture)
        is_flipped = not torch.allclose(found, upright, atol=1e-6)
        flipped += is_flipped
        torch.testing.assert_close(found, upright.flip(-1) if is_flipped else upright, rtol=0, atol=1e-6)
    assert 75 <= flipped <= 125


def test_adafaces_augmentations_come_each_a_fifth_of_the_time_in_the_published_order(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(data_adaface, "paste_crop", lambda sample, *box: calls.append("crop") or sample)
    monkeypatch.setattr(data_adaface, "lower_resolution", lambda image: calls.append("low") or image)
    monkeypatch.setattr(data_adaface, "jitter", lambda sample: calls.append("colours") or sample)
    augment, picture, orders = data_adaface.Augmenter(), _picture(), []
    np.random.seed(1)
    for _ in range(2000):
        calls.clear()
        augment(picture)
        orders.append(tuple(calls))
    published = ("crop", "low", "colours")
    for name in published:
        assert sum(name in order for order in orders) / 2000 == pytest.approx(0.2, abs=0.03)
    assert orders.count(()) / 2000 == pytest.approx(0.512, abs=0.04)
    assert all(list(order) == sorted(order, key=published.index) for order in orders)
    assert published in orders


@pytest.mark.parametrize("name", ["adaface", "webdataset_pil", "webdataset_fast"])
def test_a_rival_yields_every_sample_once(name, small_set, monkeypatch):
    monkeypatch.setattr(data_rivals, "BATCH", 16)
    result, labels = consume(getattr(data_rivals, name)(small_set), len(small_set.labels), 0.0)
    check_labels(labels, small_set.labels, name)
    assert result.batch == ("uint8 [16, 112, 112, 3]" if name.endswith("fast") else "float32 [16, 3, 112, 112]")
    assert 0 < result.counted < result.samples == len(small_set.labels)
    assert result.first <= result.warm < result.end


@pytest.mark.parametrize("damage", ["lost", "doubled", "swapped"])
def test_the_check_of_labels_sees_what_is_lost_or_doubled(damage):
    labels = np.arange(50) % 10
    found = {
        "lost": labels[:-1],
        "doubled": np.append(labels, 3),
        # As many samples, the same sum: 0 and 2 have become 1 and 1.
        "swapped": np.concatenate([labels[3:], [1, 1, 1]]),
    }[damage]
    check_labels(labels[::-1], labels, "whole")
    with pytest.raises(SystemExit, match=damage):
        check_labels(found, labels, damage)


def test_all_forms_of_the_set_hold_the_same_images_and_labels(small_set):
    images, labels = small_set.jpegs(), small_set.labels
    manifest = Manifest.load(str(small_set.packed))
    shards = [
        read_shard(manifest.shard_uri(number), info, manifest.num_classes)
        for number, info in enumerate(manifest.shards)
    ]
    packed = [image for shard in shards for image in shard.images]
    reader = RecordIOReader(str(small_set.record))
    records = [reader[key] for key in image_keys(reader)]
    assert len(images) == RECIPE.num_samples == 240
    assert [images[i] for i in range(240)] == packed == [record.payload for record in records]
    np.testing.assert_array_equal(np.concatenate([shard.labels for shard in shards]), labels)
    assert [record.labels[0] for record in records] == labels.tolist()
    assert np.bincount(labels).tolist() == [40] * 6
    assert len(set(packed)) == 240


def test_a_set_is_made_once_and_again_for_another_recipe(tmp_path):
    said: list[str] = []
    recipe = Recipe(num_people=2, faces_per_person=1, variants=2, samples_per_shard=2)
    first = open_set(tmp_path / "data", recipe, said.append).jpegs()
    made = len(said)
    again = open_set(tmp_path / "data", recipe, said.append)
    assert len(said) == made
    assert load_set(tmp_path / "data").recipe == recipe
    assert [again.jpegs()[i] for i in range(4)] == [first[i] for i in range(4)]
    other = open_set(tmp_path / "data", replace(recipe, num_people=3), said.append)
    assert len(other.jpegs()) == 6
    assert len(said) > made


def test_mixing_counts_pairs_and_distances():
    assert data_order.pairs_alike(np.repeat([0, 1], 64)).tolist() == [2 * 64 * 63 // 2]
    assert data_order.pairs_alike(np.arange(128)).tolist() == [0]


def test_one_stream_mixes_worse_than_a_permutation_and_many_as_well(small_set, monkeypatch):
    monkeypatch.setattr(data_order, "BATCH", 24)
    manifest, labels = Manifest.load(str(small_set.packed)), small_set.labels
    one, many, full = (data_order.mixing(manifest, labels, count, 20) for count in (1, 24, None))
    assert one.shards_per_batch < 2.5 < 5.5 < many.shards_per_batch
    assert many.distances[2] == pytest.approx(full.distances[2], abs=1)
    assert one.distances[2] < 0.5 * full.distances[2]
    assert one.sorted_collisions[0] > 2 * full.sorted_collisions[0]
    assert many.collisions[0] == pytest.approx(full.collisions[0], rel=0.1)
