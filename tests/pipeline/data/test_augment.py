"""AdaFace's augmentation against the plain oracle driven by the same draws, and the draws' statistics."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augment import adaface, uniform_draws
from pipeline.data.augment.draws import NUM_ADAFACE_DRAWS, sample_keys, uniforms
from pipeline.data.augment.geometry import CROP, LOW_RESOLUTION, crop_boxes, keep_box, lower_resolution
from pipeline.data.images import decode_rgb
from pipeline.data.recordio import RecordIOReader
from pipeline.data.synthetic import SyntheticFaces
from tests.pipeline.data import augment_oracle as oracle
from tests.pipeline.data.augment_oracle import SIDE, faces

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def draws_of(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return uniform_draws(seed, np.full(count, epoch), np.arange(count))


def crop_draws(draws: np.ndarray) -> np.ndarray:
    return draws[:, CROP.columns]


def assert_equals_the_oracle(images: np.ndarray, index: np.ndarray, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Bit for bit; gives the draws."""
    draws = uniform_draws(seed, epoch, index)
    expected = np.stack([oracle.adaface(image, row) for image, row in zip(images, draws, strict=True)])
    ours = adaface(images.copy(), index, seed, epoch)
    wrong = np.flatnonzero((ours != expected).any(axis=(1, 2, 3)))
    assert wrong.tolist() == []
    return draws


# --- against the oracle ---


def test_adaface_equals_the_oracle_on_thousands_of_images():
    seen = set()
    for block in range(10):
        index, epoch = (block * 250 + np.arange(250)) * 17, np.full(250, block // 4)
        draws = assert_equals_the_oracle(faces(250, seed=block), index, 11, epoch)
        seen |= {tuple(row) for row in draws[:, 1:4] < 0.2}
    assert len(seen) == 8  # all combinations are among them, so no order of the steps goes untested


def test_adaface_equals_the_oracle_on_rendered_faces():
    people = SyntheticFaces(num_identities=20, images_per_identity=5)
    images = np.stack([people.image(i) for i in range(100)])
    for epoch in range(3):
        assert_equals_the_oracle(images, np.arange(100), 5, np.full(100, epoch))


@pytest.mark.data
def test_adaface_equals_the_oracle_on_real_faces(shared_data):
    reader = RecordIOReader(str(shared_data / "faces_celeb299" / "train.rec"))
    images = np.stack([decode_rgb(reader[key].payload) for key in range(1, 501)])
    assert_equals_the_oracle(images, np.arange(500), 0, np.zeros(500, np.int64))


@settings(max_examples=30)
@given(
    seed=st.integers(0, MASK),
    epoch=st.integers(0, 1000),
    first=st.integers(0, 2**40),
    pixels=st.sampled_from(["black", "white", "noise", "one colour", "two colours"]),
)
def test_adaface_equals_the_oracle_on_odd_images(seed, epoch, first, pixels):
    rng = np.random.default_rng([seed, epoch])
    images = {
        "black": np.zeros((30, SIDE, SIDE, 3), np.uint8),
        "white": np.full((30, SIDE, SIDE, 3), 255, np.uint8),
        "noise": rng.integers(0, 256, (30, SIDE, SIDE, 3)).astype(np.uint8),
        "one colour": np.broadcast_to(rng.integers(0, 256, (30, 1, 1, 3)), (30, SIDE, SIDE, 3)).astype(np.uint8),
        "two colours": rng.integers(0, 2, (30, SIDE, SIDE, 3)).astype(np.uint8) * 255,
    }[pixels]
    assert_equals_the_oracle(images, first + np.arange(30), seed, np.full(30, epoch))


def test_every_pair_of_interpolations_equals_the_oracle():
    image, draws = faces(1)[0], draws_of(400)
    pairs = set()
    for row, arguments in zip(draws, LOW_RESOLUTION.plan(draws[:, LOW_RESOLUTION.columns], SIDE), strict=True):
        ours = image.copy()
        LOW_RESOLUTION.apply(ours, *arguments)
        np.testing.assert_array_equal(ours, oracle.low_resolution(image, row))
        pairs.add(arguments[1:])
    assert len(pairs) == 25


def test_crop_boxes_equal_torchvisions_formula():
    draws = draws_of(5000)
    boxes = crop_boxes(crop_draws(draws), SIDE)
    assert [tuple(box) for box in boxes.tolist()] == [oracle.crop_parameters(row) for row in draws]


def test_a_crop_that_never_fits_falls_back_to_the_whole_image():
    draws = np.full((1, NUM_ADAFACE_DRAWS), 0.99)
    draws[:, 14::2] = 0.999  # the widest ratio of the largest area: wider than the image, ten times over
    draws[:, 13::2] = 0.999
    assert crop_boxes(crop_draws(draws), SIDE).tolist() == [[0, 0, SIDE, SIDE]]
    assert oracle.crop_parameters(draws[0]) == (0, 0, SIDE, SIDE)


def test_black_outside_the_crop_and_untouched_inside():
    images = faces(50)
    for image, box in zip(images, crop_boxes(crop_draws(draws_of(50)), SIDE).tolist(), strict=True):
        top, left, height, width = box
        kept = image.copy()
        keep_box(kept, *box)
        inside = np.zeros((SIDE, SIDE), bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(kept[inside], image[inside])
        assert not kept[~inside].any()
        assert image.all()  # so that black can only be the canvas


def test_ranges_of_the_parameters():
    draws = draws_of(20_000)
    top, left, height, width = crop_boxes(crop_draws(draws), SIDE).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= SIDE).all()
    assert (left + width <= SIDE).all()
    share, ratio = height * width / SIDE**2, width / height
    assert 0.19 < share.min() < 0.21
    assert 0.95 < share.max() <= 1
    assert 0.73 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.37
    sides = [small for small, _, _ in LOW_RESOLUTION.plan(draws[:, LOW_RESOLUTION.columns], SIDE)]
    assert (min(sides), max(sides)) == (22, 111)


@pytest.mark.parametrize("small", [22, 67, 111])
def test_the_image_is_shrunk_to_as_many_pixels_as_drawn(small):
    # Nearest down and up keeps as many different columns as the small picture has.
    columns = np.arange(SIDE, dtype=np.uint8)[None, :, None].repeat(SIDE, 0).repeat(3, 2)
    lower_resolution(columns, small, cv2.INTER_NEAREST, cv2.INTER_NEAREST)
    assert len(np.unique(columns[0, :, 0])) == small


# --- rates and uniformity ---


def test_the_empirical_rates():
    count = 20_000
    draws = draws_of(count, seed=4)
    applied = draws[:, 1:4] < 0.2

    def near(rate: float, expected: float) -> bool:
        return abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / count)

    for column in range(3):
        assert near(applied[:, column].mean(), 0.2)
    assert near((draws[:, 0] < 0.5).mean(), 0.5)
    assert near((~applied.any(axis=1)).mean(), 0.512)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert near((applied[:, a] & applied[:, b]).mean(), 0.04)
    assert near(applied.all(axis=1).mean(), 0.008)


def test_every_column_is_uniform():
    columns = [*range(NUM_ADAFACE_DRAWS), 40, 64, 100, 127, 100_000]
    draws = uniforms(sample_keys(9, np.zeros(20_000, np.int64), np.arange(20_000)), columns)
    assert 0 <= draws.min() < draws.max() < 1
    grid = np.arange(1, 20_001) / 20_000
    for column in range(len(columns)):
        values = np.sort(draws[:, column])
        distance = max((grid - values).max(), (values - grid + 1 / 20_000).max())
        assert distance < 2.2 / math.sqrt(20_000)  # Kolmogorov-Smirnov: p = 1e-4 each


def test_columns_are_independent():
    draws = uniform_draws(10, np.zeros(20_000, np.int64), np.arange(20_000), range(130))
    correlation = np.corrcoef(draws.T) - np.eye(130)
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)
    for a, b in ((0, 1), (1, 2), (2, 3), (4, 5), (13, 14), (0, 32)):  # chi-square of 8 x 8 cells: 49 degrees of freedom
        counts = np.histogram2d(draws[:, a], draws[:, b], bins=8, range=[[0, 1], [0, 1]])[0]
        assert ((counts - 312.5) ** 2 / 312.5).sum() < 63 + 5 * math.sqrt(2 * 63)


def test_neighbouring_indices_epochs_and_seeds_are_independent():
    count = 20_000
    zero, index = np.zeros(count, np.int64), np.arange(count)
    base = uniform_draws(1, zero, index)
    for other in (
        uniform_draws(1, zero, index + 1),
        uniform_draws(1, zero + 1, index),
        uniform_draws(2, zero, index),
        uniform_draws(2**63, zero, index),
        uniform_draws(1, index, zero),
    ):
        assert np.mean(base == other) < 1e-3
        for column in (0, 1, 6):
            assert abs(np.corrcoef(base[1:, column], other[1:, column])[0, 1]) < 5 / math.sqrt(count)


def splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@given(
    seed=st.integers(0, MASK),
    epoch=st.integers(0, 10**6),
    index=st.integers(0, 2**40),
    others=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
)
def test_the_draws_are_splitmix64_of_seed_epoch_index_and_column(seed, epoch, index, others):
    # By Python's integers: a change of numpy or machine cannot shift what a run saw.
    key = splitmix(splitmix(splitmix((seed + GOLDEN) & MASK) ^ epoch) ^ index)

    def expected(columns: list[int]) -> list[float]:
        return [(splitmix((key + (column + 1) * GOLDEN) & MASK) >> 11) * 2.0**-53 for column in columns]

    row = np.array([epoch]), np.array([index])
    assert uniform_draws(seed, *row)[0].tolist() == expected(list(range(33)))
    assert uniform_draws(seed, *row, others)[0].tolist() == expected(others)
