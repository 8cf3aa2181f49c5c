"""AdaFace's augmentation against a plain re-implementation driven by the same draws, and the draws' statistics."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from pipeline.data import augment
from pipeline.data.augment import adaface, flip, unchanged, uniform_draws

SIDE = 112
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def faces(count: int, seed: int = 0) -> np.ndarray:
    """Smooth and noisy pictures without a single black pixel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, 256, (count, 8, 8, 3)).astype(np.uint8)
    smooth = np.stack([cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR) for image in coarse])
    noise = rng.integers(-10, 11, smooth.shape)
    return np.clip(smooth.astype(np.int64) + noise, 1, 255).astype(np.uint8)


def draws_of(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return uniform_draws(seed, np.full(count, epoch), np.arange(count))


# --- the re-implementation, written from the protocol's words (PROTOCOLS 3(e)) ---


def crop_parameters(draws: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params(scale=(0.2, 1), ratio=(3/4, 4/3))."""
    for attempt in range(10):
        first, second = draws[13 + 2 * attempt], draws[14 + 2 * attempt]
        area = (0.2 + 0.8 * first) * SIDE * SIDE
        low, high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.exp(low + second * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= SIDE and 0 < height <= SIDE:
            return int(draws[4] * (SIDE - height + 1)), int(draws[5] * (SIDE - width + 1)), height, width
    return 0, 0, SIDE, SIDE


def crop_by_hand(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    top, left, height, width = crop_parameters(draws)
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    canvas[top : top + height, left : left + width, :] = image[top : top + height, left : left + width, :]
    return canvas


def low_resolution_by_hand(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    methods = [cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]
    side = int((0.2 + 0.8 * draws[6]) * SIDE)
    small = cv2.resize(image, (side, side), interpolation=methods[int(5 * draws[7])])
    return cv2.resize(small, (SIDE, SIDE), interpolation=methods[int(5 * draws[8])])


def photometric_by_hand(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    orders = ["bcs", "bsc", "cbs", "csb", "sbc", "scb"]
    brightness, contrast, saturation = (0.5 + draws[column] for column in (9, 10, 11))
    picture = Image.fromarray(image)
    for letter in orders[int(6 * draws[12])]:
        if letter == "b":
            picture = ImageEnhance.Brightness(picture).enhance(brightness)
        elif letter == "c":
            picture = ImageEnhance.Contrast(picture).enhance(contrast)
        else:
            picture = ImageEnhance.Color(picture).enhance(saturation)
    return np.array(picture)


def adaface_by_hand(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    if draws[1] < 0.2:
        image = crop_by_hand(image, draws)
    if draws[2] < 0.2:
        image = low_resolution_by_hand(image, draws)
    if draws[3] < 0.2:
        image = photometric_by_hand(image, draws)
    if draws[0] < 0.5:
        image = cv2.flip(image, 1)
    return image


def splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


# --- against the re-implementation ---


def test_adaface_equals_the_re_implementation():
    images = faces(600)
    index, epoch = np.arange(600) * 17, np.repeat([0, 3], 300)
    ours, draws = adaface(images, index, 11, epoch), uniform_draws(11, epoch, index)
    # All eight combinations are among them, so no order of the steps goes untested.
    assert len({tuple(row) for row in draws[:, 1:4] < 0.2}) == 8
    for i in range(600):
        np.testing.assert_array_equal(ours[i], adaface_by_hand(images[i], draws[i]))


def test_every_interpolation_pair_and_colour_order_equals_the_re_implementation():
    image, draws = faces(1)[0], draws_of(400)
    pairs, orders = set(), set()
    for row in draws:
        np.testing.assert_array_equal(
            augment.lower_resolution(image, row[6], row[7:9]), low_resolution_by_hand(image, row)
        )
        np.testing.assert_array_equal(
            augment.jitter_colours(image, row[9:12], row[12]), photometric_by_hand(image, row)
        )
        pairs.add((int(5 * row[7]), int(5 * row[8])))
        orders.add(int(6 * row[12]))
    assert len(pairs) == 25
    assert len(orders) == 6


def test_crop_boxes_equal_torchvisions_formula():
    draws = draws_of(3000)
    boxes = augment.crop_boxes(draws, SIDE)
    assert [tuple(box) for box in boxes.tolist()] == [crop_parameters(row) for row in draws]


def test_a_crop_that_never_fits_falls_back_to_the_whole_image():
    draws = np.full((1, augment.NUM_DRAWS), 0.99)
    draws[:, 14::2] = 0.999  # the widest ratio of the largest area: wider than the image, ten times over
    draws[:, 13::2] = 0.999
    assert augment.crop_boxes(draws, SIDE).tolist() == [[0, 0, SIDE, SIDE]]
    assert crop_parameters(draws[0]) == (0, 0, SIDE, SIDE)


def test_black_outside_the_crop_and_untouched_inside():
    images = faces(50)
    for image, box in zip(images, augment.crop_boxes(draws_of(50), SIDE), strict=True):
        top, left, height, width = box
        kept = augment.paste_crop(image, box)
        inside = np.zeros((SIDE, SIDE), bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(kept[inside], image[inside])
        assert not kept[~inside].any()
        assert image.all()  # so that black can only be the canvas


def test_ranges_of_the_parameters():
    draws = draws_of(20_000)
    boxes = augment.crop_boxes(draws, SIDE)
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= SIDE).all()
    assert (left + width <= SIDE).all()
    share, ratio = height * width / SIDE**2, width / height
    assert 0.19 < share.min() < 0.21
    assert 0.95 < share.max() <= 1
    assert 0.73 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.37
    sides = [int((0.2 + 0.8 * draw) * SIDE) for draw in draws[:, 6]]
    assert (min(sides), max(sides)) == (22, 111)


@pytest.mark.parametrize(("draw", "side"), [(0.0, 22), (0.9999, 111), (0.5, 67)])
def test_the_image_is_shrunk_to_22_to_111_pixels(draw, side):
    # Nearest down and up keeps as many different columns as the small picture has.
    columns = np.arange(SIDE, dtype=np.uint8)[None, :, None].repeat(SIDE, 0).repeat(3, 2)
    seen = augment.lower_resolution(columns, draw, np.array([0.0, 0.0]))
    assert len(np.unique(seen[0, :, 0])) == side


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (0.5, 1.0), (np.nextafter(1, 0), 1.5)])
def test_brightness_factors_go_from_a_half_to_one_and_a_half(draw, factor):
    grey = np.full((SIDE, SIDE, 3), 100, np.uint8)  # of one grey: contrast and saturation leave it
    seen = augment.jitter_colours(grey, np.array([draw, 0.3, 0.9]), 0.0)
    assert abs(int(seen[0, 0, 0]) - 100 * factor) <= 1
    assert seen.min() == seen.max()


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


def test_the_images_that_come_back_untouched_are_as_many_as_the_protocol_says():
    count = 4000
    image = faces(1)
    out = adaface(np.broadcast_to(image, (count, SIDE, SIDE, 3)), np.arange(count), 0, np.zeros(count, np.int64))
    flipped = image[0][:, ::-1]
    plain, mirrored = (out == image).all(axis=(1, 2, 3)), (out == flipped).all(axis=(1, 2, 3))
    error = 4 * math.sqrt(0.256 * 0.744 / count)
    assert abs(plain.mean() - 0.256) < error
    assert abs(mirrored.mean() - 0.256) < error


def test_every_column_is_uniform():
    draws = draws_of(20_000, seed=9)
    assert 0 <= draws.min() < draws.max() < 1
    grid = np.arange(1, 20_001) / 20_000
    for column in range(augment.NUM_DRAWS):
        values = np.sort(draws[:, column])
        distance = max((grid - values).max(), (values - grid + 1 / 20_000).max())
        assert distance < 2.2 / math.sqrt(20_000)  # Kolmogorov-Smirnov: p = 1e-4 each


def test_columns_are_independent():
    draws = draws_of(20_000, seed=10)
    correlation = np.corrcoef(draws.T) - np.eye(augment.NUM_DRAWS)
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


@given(seed=st.integers(0, MASK), epoch=st.integers(0, 10**6), index=st.integers(0, 2**40))
def test_the_draws_are_splitmix64_of_seed_epoch_and_index(seed, epoch, index):
    # By Python's integers: a change of numpy or machine cannot shift what a run saw.
    key = splitmix(splitmix(splitmix((seed + GOLDEN) & MASK) ^ epoch) ^ index)
    expected = [(splitmix((key + column * GOLDEN) & MASK) >> 11) * 2.0**-53 for column in range(1, 34)]
    assert augment.NUM_DRAWS == 33
    assert uniform_draws(seed, np.array([epoch]), np.array([index]))[0].tolist() == expected


# --- what the augmentations promise ---


@settings(max_examples=25)
@given(data=st.data(), name=st.sampled_from(["adaface", "flip", "none"]))
def test_permuting_and_cutting_the_rows_permutes_and_cuts_the_result(data, name):
    images, function = faces(12), augment.AUGMENTATIONS[name]
    index, epoch = np.arange(12) * 5, np.arange(12) // 4
    whole = function(images, index, 3, epoch)
    order = np.array(data.draw(st.permutations(range(12))))
    cut = data.draw(st.integers(0, 12))
    parts = [function(images[rows], index[rows], 3, epoch[rows]) for rows in (order[:cut], order[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole[order])


@pytest.mark.parametrize("function", [adaface, flip])
def test_the_input_is_not_modified(function):
    images = faces(64)
    before = images.copy()
    out = function(images, np.arange(64), 0, np.zeros(64, np.int64))
    np.testing.assert_array_equal(images, before)
    assert not np.shares_memory(out, images)
    assert (out.dtype, out.shape) == (np.uint8, images.shape)
    out[:] = 0
    np.testing.assert_array_equal(images, before)
    images.flags.writeable = False  # as a block from Ray's object store
    function(images, np.arange(64), 0, np.zeros(64, np.int64))


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    images = faces(200)
    out = flip(images, np.arange(200), 6, np.zeros(200, np.int64))
    mirrored = draws_of(200, seed=6)[:, 0] < 0.5
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(out[mirrored], images[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(out[~mirrored], images[~mirrored])


def test_none_changes_nothing():
    images = faces(4)
    np.testing.assert_array_equal(unchanged(images, np.arange(4), 0, np.zeros(4, np.int64)), faces(4))
