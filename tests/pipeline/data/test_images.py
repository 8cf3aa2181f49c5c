"""Decoding: the pixels that PIL gives, for every kind of image, and a bound before memory is taken."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.images import MAX_PIXELS, TooManyPixelsError, decode_into, decode_rgb, fitted
from tests.pipeline.data.writers import jpeg

PICTURE = np.random.default_rng(5).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def encoded(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def by_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has next to nothing behind it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9)))]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_announcing(width: int, height: int) -> bytes:
    """A real JPEG whose frame header tells another size."""
    data = bytearray(jpeg(0))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "BMP") for mode in ("L", "RGB")],
        *[(mode, "GIF") for mode in ("L", "P")],
        *[(mode, "PPM") for mode in ("L", "RGB")],
        *[(mode, "WEBP") for mode in ("RGB", "RGBA")],
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
    ],
)
def test_every_kind_of_image_gives_the_pixels_that_pil_gives(mode, kind):
    data = encoded(mode, kind)
    pixels = decode_rgb(data)
    assert pixels.dtype == np.uint8
    allowed = 1 if mode == "CMYK" else 0  # two ways to round black times colour
    assert np.abs(pixels.astype(int) - by_pil(data)).max() <= allowed
    into = np.zeros(PICTURE.shape, np.uint8)
    decode_into(data, into, resize=False)
    assert np.array_equal(into, pixels)


@pytest.mark.parametrize("subsampling", ["444", "420"])
@pytest.mark.parametrize("quality", [30, 95])
def test_a_jpeg_gives_the_pixels_that_pil_gives(quality, subsampling):
    pixels = np.repeat(np.repeat(PICTURE, 8, 0), 8, 1)
    data = simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)
    assert np.array_equal(decode_rgb(data), by_pil(data))
    assert np.array_equal(decode_rgb(memoryview(data)), by_pil(data))


def test_a_grey_jpeg_has_three_equal_channels():
    pixels = decode_rgb(encoded("L", "JPEG"))
    assert pixels.shape == PICTURE.shape
    assert (pixels == pixels[..., :1]).all()


def test_transparency_is_dropped_and_what_lies_below_stays():
    clear = np.dstack([PICTURE, np.zeros(PICTURE.shape[:2], np.uint8)])
    buffer = io.BytesIO()
    Image.fromarray(clear, "RGBA").save(buffer, "PNG")
    assert np.array_equal(decode_rgb(buffer.getvalue()), PICTURE)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_sixteen_bits_of_grey_keep_their_upper_eight_and_do_not_become_white(kind):
    deep = np.linspace(0, 65535, 24 * 20).astype(np.uint16).reshape(24, 20)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, kind)
    pixels = decode_rgb(buffer.getvalue())
    assert np.array_equal(pixels, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "ICO", "TGA"])
def test_kinds_that_no_data_set_has_are_not_even_looked_at(kind):
    # PIL runs Ghostscript on EPS.
    with pytest.raises(ValueError, match=r"^not a readable image \(\d+ bytes\)"):
        decode_rgb(encoded("RGB", kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_image_is_refused(kind, share):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded("RGB", kind, **options)
    cut = data[: int(len(data) * share)]
    with pytest.raises(ValueError, match=rf"^not a readable image \({len(cut)} bytes\): "):
        decode_rgb(cut)
    with pytest.raises(ValueError, match=r"^not a readable image"):
        decode_into(cut, np.zeros(PICTURE.shape, np.uint8), resize=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
def test_whatever_is_damaged_the_error_is_a_value_error(kind):
    data, rng = encoded("RGB", kind), random.Random(kind)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(damaged), 120))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels = decode_rgb(bytes(damaged))
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
            except ValueError:
                refused += 1
    assert refused > 20


@given(st.binary(max_size=200))
def test_bytes_that_are_no_image_are_a_value_error(data):
    with pytest.raises(ValueError, match=r"^not a readable image"):
        decode_rgb(data)


def test_images_that_announce_gigabytes_are_refused_before_these_are_taken(tmp_path):
    bombs = {"png": png_header(60_000, 60_000), "jpeg": jpeg_announcing(60_000, 60_000)}
    for name, data in {**bombs, "small": jpeg(0)}.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import pathlib, resource, sys, numpy as np\n"
        "from pipeline.data.images import decode_into\n"
        "def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "def decode(name): decode_into(pathlib.Path(sys.argv[1], name).read_bytes(), target, resize=True)\n"
        "target = np.zeros((112, 112, 3), np.uint8)\n"
        "decode('small')\n"  # what imports and a first image take is no part of it
        "before = memory()\n"
        "for name in sys.argv[2:]:\n"
        "    try: decode(name)\n"
        "    except ValueError as error: print(error)\n"
        "print((memory() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *bombs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *errors, grown_mib = done.stdout.splitlines()
    assert len(errors) == len(bombs)
    assert all("60000x60000" in error or "3600000000 pixels" in error for error in errors), errors
    assert int(grown_mib) < 50


@pytest.mark.parametrize("make", [png_header, jpeg_announcing])
def test_the_bound_is_on_pixels_not_on_a_side(make):
    side = int(MAX_PIXELS**0.5)
    with pytest.raises(TooManyPixelsError, match=rf"^the image is {side}x{side + 1}: more than {MAX_PIXELS} pixels"):
        decode_rgb(make(side, side + 1))
    thin = np.zeros((2, 60_000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(thin).save(buffer, "PNG" if make is png_header else "JPEG")
    assert decode_rgb(buffer.getvalue()).shape == thin.shape


# --- into a given array ---


@pytest.mark.parametrize("data", [jpeg(1, side=96), encoded("RGB", "PNG")], ids=["jpeg", "png"])
def test_another_size_is_refused_or_resized(data):
    height, width = decode_rgb(data).shape[:2]
    target = np.zeros((112, 112, 3), np.uint8)
    with pytest.raises(ValueError, match=rf"^the image is {width}x{height}, 112x112 is expected$"):
        decode_into(data, target, resize=False)
    decode_into(data, target, resize=True)
    assert np.array_equal(target, fitted(decode_rgb(data), (112, 112), resize=True))
    assert target.std() > 5


def test_decoding_into_an_array_fills_it_and_nothing_else():
    batch = np.full((3, 112, 112, 3), 7, np.uint8)
    decode_into(jpeg(2), batch[1], resize=False)
    assert np.array_equal(batch[1], by_pil(jpeg(2)))
    assert (batch[[0, 2]] == 7).all()


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), wanted=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_fitted_image_has_the_size_and_range_of_what_was_asked(size, wanted):
    image = np.random.default_rng(size).integers(100, 120, (*size, 3), dtype=np.uint8)
    result = fitted(image, wanted, resize=True)
    assert result.shape == (*wanted, 3)
    assert result.dtype == np.uint8
    if size == wanted:
        assert result is image
    assert abs(float(result.mean()) - float(image.mean())) < 12


def test_shrinking_takes_means_over_areas():
    image = np.zeros((224, 224, 3), np.uint8)
    image[::2, ::2] = 200  # one of four
    assert (fitted(image, (112, 112), resize=True) == 50).all()


def test_a_jpeg_with_damaged_data_is_refused_though_pil_would_fill_it_up():
    rng, refused, filled = np.random.default_rng(0), 0, 0
    for trial in range(300):
        data = bytearray(jpeg(trial % 50))
        place = int(rng.integers(len(data) // 2, len(data) - 2))
        data[place] ^= 1 << int(rng.integers(8))
        try:
            decode_rgb(bytes(data))
        except ValueError as error:
            refused += "not a readable image" in str(error)
            with suppress(OSError, SyntaxError, ValueError):
                Image.open(io.BytesIO(bytes(data))).convert("RGB")
                filled += 1
    assert filled > 10
    assert refused >= filled
