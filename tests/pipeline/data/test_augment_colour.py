"""The fast colour arithmetic against Pillow itself: over every colour, every pair of values and many factors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from pipeline.data.augment import colour
from pipeline.data.augment.colour import BRIGHTNESS, CONTRAST, JITTER, SATURATION
from tests.pipeline.data import augment_oracle as oracle
from tests.pipeline.data.augment_oracle import SIDE, faces

# Every pair: a row per degenerate value, a column per value.
DEGENERATE, VALUE = (grid.astype(np.uint8) for grid in np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))


def pillow_blend(factor: float) -> np.ndarray:
    """Of all 65,536 pairs."""
    return np.asarray(Image.blend(Image.fromarray(DEGENERATE), Image.fromarray(VALUE), factor))


def rational_factors() -> Iterator[float]:
    """Those whose products are whole, and in float32 often only nearly whole: where rounding can go wrong."""
    for divisor in range(1, 40):
        for numerator in range((divisor + 1) // 2, 3 * divisor // 2 + 1):
            yield numerator / divisor


FACTORS = [
    *np.random.default_rng(0).uniform(0.5, 1.5, 1000).tolist(),
    *rational_factors(),
    *(1 + step * 2.0**-23 for step in range(-8, 9)),
    *(k / 255 + step * 2.0**-20 for k in range(128, 383, 15) for step in (-1, 0, 1)),
]


def float32(factor: float) -> float:
    return float(np.float32(factor))


def test_the_grey_of_all_16_million_colours_is_pillows():
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for red in range(256):
        image = np.dstack([np.full_like(green, red), green, blue])
        np.testing.assert_array_equal(colour.grey(image), np.asarray(Image.fromarray(image).convert("L")))


def test_the_written_out_blend_of_every_pair_is_pillows():
    for factor in FACTORS:
        np.testing.assert_array_equal(colour.exact_blend(VALUE, DEGENERATE, factor), pillow_blend(factor))


def test_the_blend_away_from_grey_of_every_pair_is_pillows():
    image, ways = np.repeat(VALUE[..., None], 3, axis=2), set()
    for factor in map(float32, FACTORS):
        rounding, blended = bool(colour.can_round(np.array(factor))), image.copy()
        colour.blend_grey(blended, DEGENERATE, factor, rounding)
        np.testing.assert_array_equal(blended, np.repeat(pillow_blend(factor)[..., None], 3, axis=2))
        ways.add(rounding)
    assert ways == {True, False}


def test_the_blend_away_from_one_value_of_every_pair_is_pillows():
    values, ways = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3), set()
    for factor in map(float32, FACTORS[::9]):
        rounding, expected = bool(colour.can_round(np.array(factor))), pillow_blend(factor)
        for degenerate in range(256):
            blended = values.copy()
            colour.blend_constant(blended, degenerate, factor, rounding)
            np.testing.assert_array_equal(blended, expected[degenerate][values])
        ways.add(rounding)
    assert ways == {True, False}


def test_most_factors_take_the_short_way():
    factors = np.random.default_rng(1).uniform(0.5, 1.5, (5000, 3)).astype(np.float32).astype(np.float64)
    assert 0.8 < colour.can_round(factors).mean() < 0.95  # 255 products, each unfit in one of 2,048 cases


def test_products_near_a_whole_number_take_the_long_way():
    assert colour.can_round(np.array([0.5, 1.0, 1.25, 1.5])).all()
    near = [float32(1 / 3 + 1 / 2), float32(0.7), 1 + 2.0**-23]
    assert not colour.can_round(np.array(near)).any()


@pytest.mark.parametrize(
    ("which", "enhancer"),
    [(BRIGHTNESS, ImageEnhance.Brightness), (CONTRAST, ImageEnhance.Contrast), (SATURATION, ImageEnhance.Color)],
)
def test_each_change_of_a_picture_is_pillows(which, enhancer):
    factors = np.array(FACTORS[:100] + FACTORS[-60:]).astype(np.float32).astype(np.float64)
    for image, factor, rounding in zip(faces(160), factors, colour.can_round(factors), strict=True):
        expected = np.asarray(enhancer(Image.fromarray(image)).enhance(factor))
        colour.enhance(image, which, factor, rounding)
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("high", [0, 1])
def test_the_mean_grey_of_contrast_is_rounded_half_up(high):
    # Half of the pixels 100 and half 101: the mean is 100.5, and one pixel more of either decides.
    image = np.full((SIDE, SIDE, 3), 100, np.uint8)
    image[: SIDE // 2] = 101
    image[0, 0] = 101 if high else 100
    expected = np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(0.5))
    colour.enhance(image, CONTRAST, 0.5, rounding=True)
    np.testing.assert_array_equal(image, expected)


def test_every_order_of_the_changes_equals_the_oracle():
    rng = np.random.default_rng(3)
    draws, orders = rng.random((300, 33)), set()
    for image, row, arguments in zip(faces(300), draws, JITTER.plan(draws[:, JITTER.columns], SIDE), strict=True):
        expected = oracle.photometric(image, row)
        JITTER.apply(image, *arguments)
        np.testing.assert_array_equal(image, expected)
        orders.add(tuple(which for which, _, _ in arguments[0]))
    assert len(orders) == 6


@settings(max_examples=40)
@given(
    side=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
)
def test_images_of_any_size_and_content_equal_the_oracle(side, seed, draws):
    image = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    row = np.zeros(33)
    row[list(JITTER.columns)] = draws
    expected = oracle.photometric(image, row)
    JITTER.apply(image, *JITTER.plan(np.array([draws]), side)[0])
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (0.5, 1.0), (np.nextafter(1, 0), 1.5)])
def test_brightness_factors_go_from_a_half_to_one_and_a_half(draw, factor):
    grey = np.full((SIDE, SIDE, 3), 100, np.uint8)  # of one grey: contrast and saturation leave it
    JITTER.apply(grey, *JITTER.plan(np.array([[draw, 0.3, 0.9, 0.0]]), SIDE)[0])
    assert abs(int(grey[0, 0, 0]) - 100 * factor) <= 1
    assert grey.min() == grey.max()


def test_two_threads_do_not_share_a_buffer():
    import threading

    first, second = faces(2)
    mine = colour.grey(first)
    expected = mine.copy()
    thread = threading.Thread(target=colour.grey, args=(second,))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(mine, expected)
