"""Each operation does what its name says, within the ranges that its table states."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.augment import blur, geometry, photometric, sensor
from pipeline.data.augment.draws import between, noise_tile, whole
from tests.pipeline.data.augment_oracle import SIDE, faces, plans


def point() -> np.ndarray:
    """One white pixel in the middle."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[56, 56] = 255
    return image


def spread(image: np.ndarray) -> tuple[float, np.ndarray]:
    """Largest deviation of an image's brightness along a line, and that line's direction (x, y)."""
    weights = image[..., 0].astype(np.float64)
    y, x = np.indices(weights.shape)
    values, vectors = np.linalg.eigh(np.cov(x.ravel(), y.ravel(), aweights=weights.ravel(), ddof=0))
    return float(np.sqrt(values[1])), vectors[:, 1]


# --- draws ---


def test_between_and_whole_reach_their_bounds():
    ends = np.array([0.0, np.nextafter(1, 0)])
    assert between(2, 5, ends) == pytest.approx([2, 5])
    assert whole(2, 5, ends).tolist() == [2, 5]
    drawn = whole(-1, 2, np.linspace(0, 1, 4000, endpoint=False))
    assert np.unique(drawn, return_counts=True)[1].tolist() == [1000] * 4


def test_the_noise_is_near_normal_and_has_no_repetition():
    tile = noise_tile(SIDE)
    assert tile.shape == (SIDE + 32, SIDE + 32, 3)
    assert abs(tile.mean()) < 0.02
    assert abs(tile.std() - 1) < 0.01
    assert abs(float((tile**3).mean())) < 0.05
    for a, b in ((tile[1:], tile[:-1]), (tile[:, 1:], tile[:, :-1]), (tile[..., 1:], tile[..., :-1])):
        assert abs(float((a * b).mean())) < 0.02


# --- geometry ---


def test_the_warp_scales_turns_and_shifts_within_its_ranges():
    matrices = np.stack([matrix for (matrix,) in plans(geometry.WARP)])
    turn = matrices[:, :, :2]
    scale = np.sqrt(np.linalg.det(turn))
    np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), scale[:, None, None] ** 2 * np.eye(2), atol=1e-12)
    assert 0.8 <= scale.min() < 0.805
    assert 1.195 < scale.max() <= 1.2
    degrees = np.rad2deg(np.arctan2(turn[:, 0, 1], turn[:, 0, 0]))
    turned = np.abs(degrees) > 1e-9
    assert abs(turned.mean() - 0.2) < 0.03
    assert 19 < degrees.max() <= 20
    assert -20 <= degrees.min() < -19
    centre = np.array([55.5, 55.5])
    shift = turn @ centre + matrices[:, :, 2] - centre
    room = np.abs(1 - scale) * SIDE / 2 + 0.1 * scale * SIDE / 2
    assert (np.abs(shift) <= room[:, None]).all()
    assert np.abs(shift).max() > 14
    assert np.abs(shift.mean(axis=0)).max() < 0.3


def test_a_warp_that_shifts_by_whole_pixels_moves_the_pixels():
    image = faces(1)[0]
    moved = image.copy()
    geometry.warp(moved, np.array([[1.0, 0.0, 5.0], [0.0, 1.0, -3.0]]))
    np.testing.assert_array_equal(moved[:-3, 5:], image[3:, :-5])
    assert not moved[-3:].any()
    assert not moved[:, :5].any()


def test_the_middle_draws_warp_nothing():
    image = faces(1)[0]
    warped = image.copy()
    geometry.warp(warped, *geometry.WARP.plan(np.array([[0.5, 0.0, 0.5, 0.5, 0.9, 0.0]]), SIDE)[0])
    np.testing.assert_array_equal(warped, image)


# --- blur ---


@pytest.mark.parametrize("direction", range(0, 36, 5))
@pytest.mark.parametrize(("step", "length"), [(0, 3.0), (15, 3 + 15 * 15 / 29), (29, 18.0)])
def test_motion_blur_spreads_a_point_along_a_line(step, length, direction):
    image = point()
    blur.blur_motion(image, step, direction)
    deviation, line = spread(image)
    radians = np.pi * direction / 36
    # A line of length L has the deviation L / sqrt(12); its neighbours' share adds a little.
    assert deviation == pytest.approx(np.hypot(length / np.sqrt(12), 0.35), abs=0.45)
    assert abs(line @ (np.cos(radians), np.sin(radians))) > (0.97 if step else 0.9)
    y, x = np.nonzero(image[..., 0])
    assert np.hypot(x - 56, y - 56).max() <= length / 2 + 1.8


@pytest.mark.parametrize("step", [0, 12, 23])
def test_defocus_spreads_a_point_over_a_disc(step):
    image = point()
    blur.blur_defocus(image, step)
    radius = 1 + 3 * step / 23
    y, x = np.nonzero(image[..., 0])
    distance = np.hypot(x - 56, y - 56)
    assert distance.max() < radius + 0.5
    assert len(distance) >= np.pi * (radius - 0.5) ** 2
    np.testing.assert_array_equal(image, image.transpose(1, 0, 2))
    np.testing.assert_array_equal(image[1:], image[1:][::-1])  # a ring about (56, 56): rows 1..111 mirror


@pytest.mark.parametrize("operation", [blur.MOTION, blur.DEFOCUS, blur.GAUSSIAN, blur.BOX])
def test_blur_keeps_an_even_image_and_the_mean_of_any(operation):
    even = np.full((SIDE, SIDE, 3), 77, np.uint8)
    for image, arguments in zip(faces(60), plans(operation, 60), strict=True):
        mean, detail = image.mean(), np.abs(np.diff(image.astype(int), axis=1)).mean()
        operation.apply(image, *arguments)
        assert image.mean() == pytest.approx(mean, abs=1.5)
        assert np.abs(np.diff(image.astype(int), axis=1)).mean() <= detail
        blurred = even.copy()
        operation.apply(blurred, *arguments)
        np.testing.assert_array_equal(blurred, even)


def test_motion_and_defocus_use_all_their_steps():
    assert len({step for step, _ in plans(blur.MOTION)}) == 30
    assert len({direction for _, direction in plans(blur.MOTION)}) == 36
    assert len(set(plans(blur.DEFOCUS))) == 24


def test_box_and_gaussian_blur_in_place_equal_a_copys():
    for image, (width,), (sigma,) in zip(faces(60), plans(blur.BOX, 60), plans(blur.GAUSSIAN, 60), strict=True):
        assert 1 <= width <= 9
        assert 0 <= sigma < 4
        boxed, smooth = image.copy(), image.copy()
        blur.blur_box(boxed, width)
        np.testing.assert_array_equal(boxed, cv2.blur(image, (width, width)))
        blur.blur_gaussian(smooth, sigma)
        reach = 2 * round(3 * sigma) + 1
        np.testing.assert_array_equal(smooth, cv2.GaussianBlur(image, (reach, reach), max(sigma, 1e-6)))


# --- sensor and storage ---


@pytest.mark.parametrize("deviation", [2.0, 9.0, 20.0])
def test_noise_has_the_drawn_deviation(deviation):
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    sensor.add_noise(image, deviation, 5, 9)
    assert image.std() == pytest.approx(deviation, rel=0.03)
    assert image.mean() == pytest.approx(128, abs=0.4)


def test_noise_stays_within_black_and_white_and_differs_by_offset():
    dark, bright = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)
    sensor.add_noise(dark, 20.0, 0, 0)
    sensor.add_noise(bright, 20.0, 0, 1)
    assert dark.max() < 80
    assert bright.min() > 175
    assert (dark.astype(int) != bright.astype(int) - 255).mean() > 0.5
    drawn = plans(sensor.NOISE)
    assert {down for _, down, _ in drawn} == {right for _, _, right in drawn} == set(range(32))


def test_recompression_is_a_jpeg_of_the_drawn_quality():
    errors = []
    for quality in (90, 50, 20):
        image = faces(1)[0]
        before = image.copy()
        sensor.recompress(image, quality)
        encoded = simplejpeg.encode_jpeg(before, quality, "RGB", "420")
        np.testing.assert_array_equal(image, simplejpeg.decode_jpeg(encoded))
        errors.append(np.abs(image.astype(int) - before).mean())
    assert errors == sorted(errors)
    assert {quality for (quality,) in plans(sensor.RECOMPRESS)} == set(range(20, 91))


def test_the_low_quality_chain_loses_detail_and_keeps_the_picture():
    for image, (small, quality) in zip(faces(40), plans(sensor.LOW_QUALITY, 40), strict=True):
        before = image.astype(int)
        sensor.degrade(image, small, quality)
        assert np.abs(np.diff(image.astype(int), axis=1)).mean() < 0.7 * np.abs(np.diff(before, axis=1)).mean()
        assert image.mean() == pytest.approx(before.mean(), abs=4)
        assert np.corrcoef(image.ravel(), before.ravel())[0, 1] > 0.8
    drawn = plans(sensor.LOW_QUALITY)
    assert {small for small, _ in drawn} == set(range(33, 90))
    assert {quality for _, quality in drawn} == set(range(5, 41))


# --- photometric ---


def test_photometric_changes_come_as_often_as_cvlfaces():
    kinds, factors = [], []
    for (changes,) in plans(photometric.PHOTOMETRIC, 20_000):
        assert len(changes) == 2
        kinds += [kind for kind, _, _ in changes]
        factors += [factor for _, factor, _ in changes]
    shares = np.bincount(kinds, minlength=7) / len(kinds)
    rare = (2 / 7) ** 3  # one of seven, drawn again up to twice when it is one of two
    np.testing.assert_allclose(shares[:5], (1 - rare) / 5, atol=0.01)
    np.testing.assert_allclose(shares[5:], rare / 2, atol=0.003)
    strengths = np.unique(np.round(np.abs(np.array(factors) - 1), 5))
    np.testing.assert_allclose(strengths, np.arange(5, 23) * 0.9 / 30, atol=1e-5)
    assert (np.array(factors) > 1).mean() == pytest.approx(0.5, abs=0.01)


def test_photometric_changes_are_what_they_are_called():
    image, after = faces(1)[0], {}
    for kind, function in enumerate(photometric.CHANGES):
        after[function.__name__] = changed_image = image.copy()
        photometric.change(changed_image, ((kind, 1.5, False),))
    np.testing.assert_array_equal(after["_nothing"], image)
    assert after["_brightness"].mean() > 1.2 * image.mean()
    assert after["_contrast"].std() > 1.1 * image.std()
    chroma = {name: np.ptp(picture.astype(int), axis=2).mean() for name, picture in after.items()}
    assert chroma["_saturation"] > 1.2 * chroma["_nothing"]
    detail = {name: np.abs(np.diff(picture.astype(int), axis=1)).mean() for name, picture in after.items()}
    assert detail["_sharpness"] > 1.2 * detail["_nothing"]
    expected = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(after["_to_grey"], np.repeat(expected[..., None], 3, axis=2))
    for channel in range(3):
        histogram = np.histogram(after["_equalise"][..., channel], 8, (0, 256))[0]
        assert histogram.min() > 0.8 * SIDE**2 / 8


def test_photometric_changes_follow_each_other():
    image = faces(1)[0]
    one_by_one, together = image.copy(), image.copy()
    photometric.change(one_by_one, ((6, 1.0, True),))
    photometric.change(one_by_one, ((0, 1.3, False),))
    photometric.change(together, ((6, 1.0, True), (0, 1.3, False)))
    np.testing.assert_array_equal(together, one_by_one)
