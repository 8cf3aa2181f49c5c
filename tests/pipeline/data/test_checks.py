"""What packing looks at in an image: what is packed, what is refused and why, and what is counted."""

from __future__ import annotations

import io
import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.checks import BadImageError, ImageStatistics, PackChecks, checked_image, colour_of
from pipeline.data.images import decode_rgb, fitted
from tests.pipeline.data.writers import jpeg


def picture(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def flat(grey: int, side: int = 112) -> np.ndarray:
    return np.full((side, side, 3), grey, np.uint8)


def check(encoded: bytes, statistics: ImageStatistics | None = None, **options: Any) -> bytes:
    return checked_image(encoded, 112, PackChecks(**options), statistics or ImageStatistics())


def refusal(encoded: bytes, **options: Any) -> tuple[str, str]:
    with pytest.raises(BadImageError) as caught:
        check(encoded, **options)
    return caught.value.kind, str(caught.value)


# --- one image ---


@pytest.mark.parametrize(
    "encoded",
    [jpeg(3), picture(decode_rgb(jpeg(3))), picture(decode_rgb(jpeg(3)), "WEBP"), picture(flat(9), "JPEG", "CMYK")],
    ids=["jpeg", "png", "webp", "cmyk"],
)
def test_a_good_image_is_packed_as_it_is(encoded):
    assert check(encoded) is encoded


@pytest.mark.parametrize("encoded", [b"", b"no image", jpeg(1)[:1500]], ids=["empty", "garbage", "half"])
def test_an_undecodable_image_is_refused(encoded):
    kind, reason = refusal(encoded)
    assert kind == "undecodable"
    assert reason.startswith(f"not a readable image ({len(encoded)} bytes)")


def test_another_size_is_refused_or_becomes_a_jpeg_of_the_right_one():
    small = jpeg(4, side=96)
    assert refusal(small) == ("wrong-size", "the image is 96x96, 112x112 is expected")
    made = check(small, wrong_size="resize")
    assert made == check(small, wrong_size="resize")
    expected = fitted(decode_rgb(small), (112, 112), resize=True).astype(int)
    assert np.abs(decode_rgb(made) - expected).mean() < 3
    assert check(jpeg(4), wrong_size="resize") == jpeg(4)


def test_a_tall_png_is_resized_too():
    tall = picture(np.random.default_rng(0).integers(0, 256, (300, 150, 3), dtype=np.uint8))
    assert refusal(tall) == ("wrong-size", "the image is 150x300, 112x112 is expected")
    assert decode_rgb(check(tall, wrong_size="resize")).shape == (112, 112, 3)


def test_near_empty_images_are_refused_from_the_bound_on():
    half = flat(100)
    half[:56] = 110  # deviates by 5
    assert check(picture(flat(100))) == picture(flat(100))
    assert check(picture(half), near_empty=5.0) == picture(half)
    assert refusal(picture(half), near_empty=5.1) == (
        "near-empty",
        "grey values deviate by 5.0, 5.1 are expected",
    )
    assert refusal(picture(flat(255)), near_empty=2.0)[0] == "near-empty"
    assert refusal(picture(flat(255, 64)), near_empty=2.0, wrong_size="resize")[0] == "near-empty"


def test_without_decoding_only_nothing_at_all_is_refused():
    assert check(b"no image", decode=False) == b"no image"
    assert refusal(b"", decode=False) == ("undecodable", "not a readable image (0 bytes)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_images": "skip"}, r"checks\.bad_images='skip'"),
        ({"wrong_size": "crop"}, r"checks\.wrong_size='crop'"),
        ({"duplicates": "yes"}, r"checks\.duplicates='yes'"),
        ({"max_bad_images": -1}, r"checks\.max_bad_images=-1"),
        ({"near_empty": 129.0}, r"checks\.near_empty=129\.0"),
        ({"fewer_than": -1}, r"checks\.fewer_than=-1"),
        ({"decode": False, "near_empty": 2.0}, r"checks\.decode=False.*near_empty"),
        ({"decode": False, "wrong_size": "resize"}, r"checks\.decode=False.*wrong_size"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PackChecks(**options)


@pytest.mark.parametrize(
    ("mode", "kind", "colour"),
    [
        ("RGB", "JPEG", "colour"),
        ("L", "JPEG", "grey"),
        ("CMYK", "JPEG", "cmyk"),
        ("RGB", "PNG", "colour"),
        ("RGBA", "PNG", "colour"),
        ("P", "PNG", "colour"),
        ("L", "PNG", "grey"),
        ("LA", "PNG", "grey"),
        ("1", "PNG", "grey"),
        ("RGB", "WEBP", "colour"),
    ],
)
def test_the_kind_of_colour_is_told_from_the_header(mode, kind, colour):
    assert colour_of(picture(decode_rgb(jpeg(1)), kind, mode)) == colour


def test_sixteen_bits_of_grey_are_grey():
    assert colour_of(picture(np.arange(400, dtype=np.uint16).reshape(20, 20))) == "grey"


# --- counts over images ---


def test_images_are_counted_in_their_bins():
    statistics = ImageStatistics()
    half = flat(0)
    half[:56] = 132  # mean 66, deviation 66
    for encoded in (picture(flat(0)), picture(flat(255)), picture(half)):
        check(encoded, statistics)
    assert {place: count for place, count in enumerate(statistics.brightness) if count} == {0: 1, 31: 1, 8: 1}
    assert {place: count for place, count in enumerate(statistics.contrast) if count} == {0: 2, 16: 1}
    assert statistics.sizes == {"112x112": 3}
    assert statistics.colours == {"colour": 3}
    assert statistics.count == 3


@given(st.integers(0, 1 << 30))
def test_the_bins_of_encoded_sizes_are_half_octaves(num_bytes):
    statistics = ImageStatistics()
    statistics.add(num_bytes)
    place = statistics.num_bytes.index(1)
    assert 2 ** (place / 2) <= max(1, num_bytes) * (1 + 1e-12)
    assert place == 43 or max(1, num_bytes) < 2 ** ((place + 1) / 2) * (1 + 1e-12)
    assert statistics.total_bytes == num_bytes


def test_bad_images_are_counted_as_far_as_they_were_seen():
    statistics = ImageStatistics()
    for encoded, options in ((jpeg(1, side=96), {}), (picture(flat(3)), {"near_empty": 2.0}), (b"", {})):
        with pytest.raises(BadImageError):
            check(encoded, statistics, **options)
    assert statistics.count == 2
    assert statistics.sizes == {"96x96": 1, "112x112": 1}


def test_without_decoding_bytes_alone_are_counted():
    statistics = ImageStatistics()
    check(jpeg(1), statistics, decode=False)
    assert (statistics.count, statistics.total_bytes) == (1, len(jpeg(1)))
    assert not statistics.sizes
    assert sum(statistics.brightness) == sum(statistics.contrast) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_counts_of_parts_add_up_to_those_of_the_whole(owners):
    images = [jpeg(number, side=random.Random(number).choice([96, 112])) for number in range(len(owners))]
    whole, parts = ImageStatistics(), [ImageStatistics() for _ in range(4)]
    for owner, encoded in zip(owners, images, strict=True):
        for statistics in (whole, parts[owner]):
            check(encoded, statistics, wrong_size="resize")
    merged = ImageStatistics()
    for part in parts:
        merged.merge(asdict(part))
    assert asdict(merged) == asdict(whole)
