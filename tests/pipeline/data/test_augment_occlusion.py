"""Operations that hide a part of the face hide what they say, and leave the rest."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipeline.data.augment import occlusion
from tests.pipeline.data.augment_oracle import SIDE, faces, plans


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(axis=2)


def test_erasing_covers_a_box_of_the_stated_size_and_nothing_else():
    shares, ratios, kinds = [], [], set()
    for image, (box, noise, colour) in zip(faces(400), plans(occlusion.ERASE, 400), strict=True):
        before = image.copy()
        top, left, height, width = box
        occlusion.erase(image, box, noise, colour)
        inside = np.zeros((SIDE, SIDE), bool)
        inside[top : top + height, left : left + width] = True
        assert inside.sum() == height * width  # the box lies in the image
        np.testing.assert_array_equal(image[~inside], before[~inside])
        deviation = image[inside].std(axis=0).max()
        assert (deviation == 0) == (noise is None)
        if noise is None:
            assert tuple(image[top, left].tolist()) == colour
        shares.append(height * width / SIDE**2)
        ratios.append(height / width)
        kinds.add(noise is None)
    assert kinds == {True, False}
    assert 0.018 < min(shares) < 0.04
    assert 0.36 < max(shares) <= 0.41
    assert 0.28 < min(ratios) < 0.35
    assert 2.9 < max(ratios) < 3.6


def test_noise_differs_from_one_erased_box_to_the_next():
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    for image, offset in zip(images, ((0, 0), (0, 1)), strict=True):
        occlusion.erase(image, (10, 10, 40, 40), offset, (128, 128, 128))
    assert (images[0] != images[1])[10:50, 10:50].mean() > 0.9


def test_holes_are_black_squares_as_many_as_drawn():
    counts = set()
    for image, (places, hole) in zip(faces(200), plans(occlusion.HOLES_CUT, 200), strict=True):
        before = image.copy()
        occlusion.cut_holes(image, places, hole)
        expected = np.zeros((SIDE, SIDE), bool)
        for top, left in places:
            assert 0 <= top <= SIDE - 16
            assert 0 <= left <= SIDE - 16
            expected[top : top + 16, left : left + 16] = True
        np.testing.assert_array_equal(changed(before, image), expected)
        assert not image[expected].any()
        counts.add(len(places))
    assert counts == set(range(12, 21))


def test_a_mask_covers_mouth_and_chin_and_leaves_the_eyes():
    for image, arguments in zip(faces(200), plans(occlusion.MASK, 200), strict=True):
        before, (top, _, _, _, colour) = image.copy(), arguments
        occlusion.cover_mouth(image, *arguments)
        hidden = changed(before, image)
        assert not hidden[: int(top) - 1].any()
        for y, x in ((92, 42), (92, 71), (100, 56)):
            assert tuple(image[y, x].tolist()) == colour
        assert not hidden[52, 38]
        assert not hidden[52, 74]
        assert 0.1 < hidden.mean() < 0.4


def test_sunglasses_cover_both_eyes_and_leave_the_mouth():
    for image, arguments in zip(faces(200), plans(occlusion.SUNGLASSES, 200), strict=True):
        before, (width, height, shift, grey) = image.copy(), arguments
        occlusion.cover_eyes(image, *arguments)
        hidden = changed(before, image)
        for x in (38, 74, 56):  # both eyes and the bridge
            assert image[round(51 + shift), x].tolist() == [grey] * 3
        # OpenCV's smooth edge reaches up to 1.6 pixels out.
        assert not hidden[round(52 + shift + height) + 3 :].any()
        assert not hidden[: round(52 + shift - height) - 2].any()
        assert not hidden[:, : round(38 - width) - 2].any()
        assert hidden[40:70].any(axis=0).sum() == pytest.approx(36 + 2 * width, abs=5)


def test_what_hides_the_face_scales_with_the_image():
    small, large = np.zeros((56, 56, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)
    for image in (small, large):
        occlusion.cover_mouth(image, 70, 8, 10, 12, (255, 255, 255))
        occlusion.cover_eyes(image, 15, 10, 0, 200)
    shrunk = cv2.resize(large, (56, 56), interpolation=cv2.INTER_AREA)
    hidden, expected = small[..., 0] > 100, shrunk[..., 0] > 100
    assert 0.2 < expected.mean() < 0.5
    assert (hidden != expected).mean() < 0.04
