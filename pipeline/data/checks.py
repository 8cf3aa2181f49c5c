"""What packing looks at in an image, and what it remembers of all of them."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import cv2
import numpy as np
import simplejpeg

from lgaf.config import require_choice, require_in_range
from pipeline.data.images import decode_rgb, fitted

BRIGHTNESS_BINS: Final = 32  # of the mean of grey, 0 to 255
CONTRAST_BINS: Final = 32  # of the deviation of grey, 0 to 128
BYTES_BINS: Final = 44  # two an octave, from 1 byte
RESIZED_QUALITY: Final = 95
_COLOURS: Final = {"YCbCr": "colour", "RGB": "colour", "Gray": "grey", "CMYK": "cmyk", "YCCK": "cmyk"}


class BadImageError(ValueError):
    """An image that must not be packed; the message says why, ``kind`` in one word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class PackChecks:
    """What is looked at while packing."""

    decode: bool = True
    """Decode every image: undecodable ones, other sizes and near-empty ones are found now, not in training. Off: images
    are packed unseen, several times faster."""
    bad_images: Literal["error", "drop"] = "error"
    """What a bad image does: end the packing, or be left out and listed in quarantine.jsonl."""
    max_bad_images: int = 1000
    """Bad images that may be left out before packing ends with an error."""
    wrong_size: Literal["refuse", "resize"] = "refuse"
    """Images of another size: bad, or resized and encoded again (JPEG, quality 95)."""
    near_empty: float = 0.0
    """Images whose grey values deviate less than this (of 0 to 128) are bad; 0: none is. Blank crops are below 2."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Images with equal bytes: all are packed, or the first one of the source."""
    fewer_than: int = 2
    """Report people with fewer images than this (after dropping)."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_choice("checks.bad_images", self.bad_images, ("error", "drop"))
        require_choice("checks.wrong_size", self.wrong_size, ("refuse", "resize"))
        require_choice("checks.duplicates", self.duplicates, ("keep", "drop"))
        require_in_range("checks.max_bad_images", self.max_bad_images, 0, 1 << 40)
        require_in_range("checks.near_empty", self.near_empty, 0.0, 128.0)
        require_in_range("checks.fewer_than", self.fewer_than, 0, 1 << 40)
        for name, value, unused in (("near_empty", self.near_empty, 0.0), ("wrong_size", self.wrong_size, "refuse")):
            if not self.decode and value != unused:
                raise ValueError(f"checks.decode=False: {name}={value!r} looks at pixels, which need to be decoded")


@dataclass(kw_only=True, slots=True)
class ImageStatistics:
    """Counts over images: how bright, how contrasted, how large they are. Two can be added.

    Attributes:
        brightness: Images by the mean of their grey values, in `BRIGHTNESS_BINS` bins of 0 to 255.
        contrast: Images by the deviation of their grey values, in `CONTRAST_BINS` bins of 0 to 128.
        num_bytes: Images by encoded size, bin i from 2 ** (i / 2) bytes on.
        sizes: Images by ``<width>x<height>``, as they were found.
        colours: Images by ``colour``, ``grey``, ``cmyk``.
        total_bytes: Of all images.
    """

    brightness: list[int] = field(default_factory=lambda: [0] * BRIGHTNESS_BINS)
    contrast: list[int] = field(default_factory=lambda: [0] * CONTRAST_BINS)
    num_bytes: list[int] = field(default_factory=lambda: [0] * BYTES_BINS)
    sizes: dict[str, int] = field(default_factory=dict)
    colours: dict[str, int] = field(default_factory=dict)
    total_bytes: int = 0

    @property
    def count(self) -> int:
        """Images seen."""
        return sum(self.num_bytes)

    def add(self, encoded_bytes: int, pixels_HWC: np.ndarray | None = None, colour: str = "") -> tuple[float, float]:
        """Count one image, with its pixels where it was decoded; gives its brightness and contrast."""
        self.num_bytes[min(BYTES_BINS - 1, int(2 * np.log2(max(1, encoded_bytes))))] += 1
        self.total_bytes += encoded_bytes
        if pixels_HWC is None:
            return 0.0, 0.0
        mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY)))
        self.brightness[min(BRIGHTNESS_BINS - 1, int(mean / 256 * BRIGHTNESS_BINS))] += 1
        self.contrast[min(CONTRAST_BINS - 1, int(deviation / 128 * CONTRAST_BINS))] += 1
        size = f"{pixels_HWC.shape[1]}x{pixels_HWC.shape[0]}"
        self.sizes[size] = self.sizes.get(size, 0) + 1
        self.colours[colour] = self.colours.get(colour, 0) + 1
        return mean, deviation

    def merge(self, other: dict[str, Any]) -> None:
        """Add the counts of another one, given as a dict."""
        for name in ("brightness", "contrast", "num_bytes"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), other[name], strict=True)])
        self.sizes = dict(Counter(self.sizes) + Counter(other["sizes"]))
        self.colours = dict(Counter(self.colours) + Counter(other["colours"]))
        self.total_bytes += other["total_bytes"]


def checked_image(encoded: bytes, side: int, checks: PackChecks, statistics: ImageStatistics) -> bytes:
    """The bytes to pack for an image.

    Args:
        encoded: As the source has it.
        side: Pixels of each side that are wanted.
        checks: What to look at.
        statistics: Is told of every image, bad ones too.

    Raises:
        BadImageError: It must not be packed.
    """
    if not checks.decode:
        if not encoded:
            raise BadImageError("undecodable", "not a readable image (0 bytes)")
        statistics.add(len(encoded))
        return encoded
    try:
        pixels = decode_rgb(encoded)
    except ValueError as error:
        raise BadImageError("undecodable", str(error)) from error
    _, contrast = statistics.add(len(encoded), pixels, colour_of(encoded))
    if contrast < checks.near_empty:
        raise BadImageError("near-empty", f"grey values deviate by {contrast:.1f}, {checks.near_empty} are expected")
    if pixels.shape[:2] == (side, side):
        return encoded
    try:
        pixels = fitted(pixels, (side, side), resize=checks.wrong_size == "resize")
    except ValueError as error:
        raise BadImageError("wrong-size", str(error)) from error
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), RESIZED_QUALITY, "RGB", "444"))


def colour_of(encoded: bytes) -> str:
    """``colour``, ``grey`` or ``cmyk``, from the header."""
    if simplejpeg.is_jpeg(encoded):
        try:
            return _COLOURS.get(simplejpeg.decode_jpeg_header(encoded)[2], "colour")
        except ValueError:
            return "colour"
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        mode = image.mode
    return "grey" if mode.startswith("I") or mode in ("1", "L", "LA") else "cmyk" if mode == "CMYK" else "colour"
