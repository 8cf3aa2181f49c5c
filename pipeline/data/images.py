"""Encoded images to pixels, with a bound on what one may unpack to."""

from __future__ import annotations

import io
from typing import Final

import cv2
import numpy as np
import simplejpeg

# Told from the header, before memory is taken: a few kilobytes can announce gigabytes.
MAX_PIXELS: Final = 4096 * 4096
_PLAIN_JPEG: Final = ("YCbCr", "Gray", "RGB")
# PIL would also start other programs (Ghostscript, for EPS) on what a data set brings.
_PIL_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")

Encoded = bytes | memoryview


def decode_rgb(encoded: Encoded) -> np.ndarray:
    """Decode to uint8 RGB [H, W, 3]: JPEG by simplejpeg (2-3 times faster than PIL), anything else by PIL.

    Grey becomes three equal channels, transparency is dropped, of 16 bits the upper 8 are kept.

    Raises:
        ValueError: The bytes are no image of a known kind (JPEG, PNG, WebP, BMP, GIF, PPM), damaged, or more than
            `MAX_PIXELS`.
    """
    if simplejpeg.is_jpeg(encoded):
        try:
            _bounded(*simplejpeg.decode_jpeg_header(encoded)[:2])
            return np.asarray(simplejpeg.decode_jpeg(encoded, colorspace="RGB"))
        except TooManyPixelsError:
            raise
        except ValueError as error:
            # CMYK and other rarities are PIL's. Damage is not: PIL fills up what is missing, with grey or rubbish.
            if str(error).startswith("Corrupt JPEG data"):
                raise ValueError(f"not a readable image ({len(encoded)} bytes): {error}") from error
    return _decode_by_pil(encoded)


def decode_into(encoded: Encoded, pixels_HWC: np.ndarray, *, resize: bool) -> None:
    """Decode into a given uint8 array [H, W, 3].

    Args:
        encoded: The image.
        pixels_HWC: Where to, contiguous.
        resize: Make images of other sizes fit (area interpolation down, cubic up); else refuse them.

    Raises:
        ValueError: The bytes are no image, damaged, or of another size with ``resize`` off.
    """
    height, width = pixels_HWC.shape[:2]
    if simplejpeg.is_jpeg(encoded):
        try:
            found = simplejpeg.decode_jpeg_header(encoded)
            if found[:2] == (height, width) and found[2] in _PLAIN_JPEG:
                simplejpeg.decode_jpeg(encoded, colorspace="RGB", buffer=pixels_HWC)
                return
        except ValueError:
            pass  # damaged or rare: the general way tells
    pixels_HWC[...] = fitted(decode_rgb(encoded), (height, width), resize=resize)


def fitted(image: np.ndarray, size: tuple[int, int], *, resize: bool) -> np.ndarray:
    """An image in the size (height, width) that is wanted; ``ValueError`` if it has another and may not change."""
    if image.shape[:2] == size:
        return image
    if not resize:
        raise ValueError(f"the image is {image.shape[1]}x{image.shape[0]}, {size[1]}x{size[0]} is expected")
    shrinks = image.shape[0] >= size[0] and image.shape[1] >= size[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size[::-1], interpolation=interpolation))


class TooManyPixelsError(ValueError):
    """An image whose header announces more than `MAX_PIXELS`."""


def _bounded(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise TooManyPixelsError(f"the image is {width}x{height}: more than {MAX_PIXELS} pixels are not decoded")


def _decode_by_pil(encoded: Encoded) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    num_bytes = len(encoded)
    try:
        with Image.open(io.BytesIO(encoded), formats=_PIL_FORMATS) as image:
            _bounded(image.height, image.width)
            if image.mode.startswith("I"):  # 16 bits of grey: PIL's own conversion makes all above 255 white
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode == "F":
                raise ValueError("its pixels are fractions without a range")
            return np.asarray(image.convert("RGB"))
    except TooManyPixelsError:
        raise
    except UnidentifiedImageError as error:  # PIL's own words name an object in memory
        raise ValueError(f"not a readable image ({num_bytes} bytes): no format that is known") from error
    # PIL tells damage in many ways: its PNG and WebP readers raise SyntaxError and ValueError too.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({num_bytes} bytes): {error}") from error
