"""Verification benchmarks: insightface's ``.bin`` files and the registry of the named ones.

A ``.bin`` is a pickle of ``(images, is_same)``: 2P encoded images (JPEG or PNG) and P booleans; pair i is images 2i and
2i+1. Source: insightface, ``load_bin`` of arcface_torch and ``build_eval_pack.py`` of arcface_mxnet. Unpickling runs
whatever a file says, so only the few constructors that such files need are let through, each replaced by a harmless
stand-in of our own. Nothing here imports torch: data workers start without it.
"""

# Shape legend: P = pairs, 2P or N = images

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import simplejpeg
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from pipeline import storage

DEFAULT_NUM_FOLDS: Final = 10
IMAGE_SIDE: Final = 112
EXPECTED: Final = "expected a pickle of (images, is_same): 2P encoded images and P booleans"
_PICKLE_PROTOCOL: Final = 4  # Python 3.4 and later read it, and bytes need no constructor in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark known by its file name (without ``.bin``), with its title in papers and its published folds."""

    name: str
    title: str
    num_folds: int
    description: str


BENCHMARKS: Final = (
    Benchmark(name="lfw", title="LFW", num_folds=10, description="6,000 pairs of faces in the wild"),
    Benchmark(name="cfp_fp", title="CFP-FP", num_folds=10, description="7,000 pairs, one frontal and one profile face"),
    Benchmark(name="agedb_30", title="AgeDB-30", num_folds=10, description="6,000 pairs, 30 years between the faces"),
    Benchmark(name="calfw", title="CALFW", num_folds=10, description="6,000 pairs of LFW's people, differing in age"),
    Benchmark(name="cplfw", title="CPLFW", num_folds=10, description="6,000 pairs of LFW's people, differing in pose"),
    # Half of LFW keeps half of its published folds, of 600 pairs each.
    Benchmark(name="lfw_folds1to5", title="LFW (folds 1 to 5)", num_folds=5, description="LFW's first 3,000 pairs"),
    Benchmark(
        name="synth-pose", title="Synthetic pose", num_folds=10, description="synthetic faces, differing in pose"
    ),
    Benchmark(name="synth-deform", title="Synthetic deformation", num_folds=10, description="synthetic faces, warped"),
    Benchmark(name="synth-lowres", title="Synthetic low resolution", num_folds=10, description="synthetic, few pixels"),
)


def find_benchmark(name: str) -> Benchmark:
    """The registered benchmark of that name; an unknown one has 10 folds and its name for a title."""
    known = (benchmark for benchmark in BENCHMARKS if benchmark.name == name)
    return next(known, Benchmark(name=name, title=name, num_folds=DEFAULT_NUM_FOLDS, description="not registered"))


# eq=False: a generated == would compare arrays for truth, which numpy refuses.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VerificationSet:
    """One benchmark, its images still encoded.

    Attributes:
        name: File name without ``.bin``.
        images: 2P encoded images; pair i is images 2i and 2i+1.
        is_same: bool [P].
        fingerprint: SHA-256 (hex) of the file's bytes.
        num_folds: Folds of its protocol, from `BENCHMARKS`.
    """

    name: str
    images: list[bytes]
    is_same: NDArray[np.bool_]
    fingerprint: str
    num_folds: int


def read_verification_bin(uri: str) -> VerificationSet:
    """Read a ``.bin`` of either Python's making; images may be bytes or uint8 arrays of ``cv2.imencode``.

    Raises:
        StorageError: The file is absent or unreadable.
        ValueError: It is truncated, asks for anything but plain data, or is no verification set; the URI is named.
    """
    data = storage.read_bytes(uri)
    try:
        # encoding="bytes": a str of Python 2 is bytes. Pickles of Python 3 have none, so it changes nothing for them.
        content = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except _RefusedError as refusal:
        raise ValueError(f"{uri}: refuses to unpickle {refusal}; {EXPECTED}") from None
    except Exception as error:  # a corrupt pickle can raise nearly anything
        raise ValueError(f"{uri}: is truncated or not a pickle ({error}); {EXPECTED}") from error
    images, is_same = _checked_content(uri, content)
    name = storage.normalise(uri).rsplit("/", 1)[-1].removesuffix(".bin")
    return VerificationSet(
        name=name,
        images=images,
        is_same=is_same,
        fingerprint=hashlib.sha256(data).hexdigest(),
        num_folds=find_benchmark(name).num_folds,
    )


def write_verification_bin(uri: str, images: Sequence[bytes], is_same: ArrayLike) -> str:
    """Write a ``.bin`` atomically, in plain Python types that insightface, AdaFace and CVLface read; give its SHA-256.

    Args:
        uri: Where; its file name without ``.bin`` is the benchmark's name.
        images: 2P encoded images.
        is_same: bool (or 0/1) [P].

    Raises:
        ValueError: The images are not bytes, or not two for every pair.
        StorageError: It cannot be written.
    """
    # pickle refers back to objects that it has met: with equal images shared, equal content makes equal files.
    shared: dict[bytes, bytes] = {}
    checked, labels = _checked_content(uri, (list(images), np.asarray(is_same).tolist()))
    plain = [shared.setdefault(image, image) for image in checked]
    data = pickle.dumps((plain, labels.tolist()), protocol=_PICKLE_PROTOCOL)
    storage.write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def find_verification_sets(uri: str) -> list[str]:
    """URIs of the ``.bin`` files directly in a folder, sorted; or the one file that ``uri`` names.

    Raises:
        StorageError: A ``.bin`` that does not exist.
        ValueError: The folder holds none.
    """
    root = storage.normalise(uri)
    if root.endswith(".bin"):
        storage.size(root)  # raises, naming it, unless it is a file
        return [root]
    found = [info.uri for info in storage.list_files(root) if info.uri.endswith(".bin")]
    sets = [file for file in found if "/" not in file.removeprefix(root + "/")]
    if not sets:
        if not storage.exists(root):
            raise ValueError(f"{root}: does not exist; expected a folder of verification sets, or one such file")
        raise ValueError(f"{uri}: holds no verification sets; expected files such as lfw.bin or cfp_fp.bin")
    return sets


def decode_images(
    images: Sequence[bytes | NDArray[np.uint8]], *, name: str = "images", first_index: int = 0
) -> NDArray[np.uint8]:
    """Decode to RGB uint8 [N, 112, 112, 3].

    Another size is resized to a shorter side of 112 (bicubic, as mxnet's ``resize_short``) and cropped at the centre.

    Args:
        images: N encoded images, JPEG or anything PIL reads; uint8 arrays are taken for encoded bytes.
        name: The set that they come from, for error messages.
        first_index: Index in that set of the first image, where only some are given.

    Raises:
        ValueError: An image cannot be decoded; the set and the image's index are named.
    """
    decoded = np.empty((len(images), IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        data = _encoded(name, first_index + index, image)
        try:
            decoded[index] = _fit(_decode(data))
        except Exception as error:  # PIL's readers raise nearly anything on corrupt bytes
            fault = f"cannot be decoded ({type(error).__name__}, {len(data)} bytes)"
            raise ValueError(f"{name}: image {first_index + index} {fault}") from error
    return decoded


def _decode(data: bytes) -> NDArray[np.uint8]:
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:  # no JPEG, or one that only PIL reads; PIL too refuses one that is cut short
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    return pixels


def _fit(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short != IMAGE_SIDE:
        size = (IMAGE_SIDE * width // short, IMAGE_SIDE * height // short)
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    top, left = (pixels.shape[0] - IMAGE_SIDE) // 2, (pixels.shape[1] - IMAGE_SIDE) // 2
    return pixels[top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]


class _RefusedError(pickle.UnpicklingError):
    """The pickle asks for a constructor that no verification set needs."""


@dataclass(slots=True)
class _Dtype:
    """Stands for ``numpy.dtype``: its name alone."""

    name: str

    def __setstate__(self, state: object) -> None:
        """Drop the state: byte order and alignment mean nothing for the single bytes that are let through."""


@dataclass(slots=True)
class _Array:
    """Stands for ``numpy.ndarray``: the raw bytes of a uint8 or bool array."""

    raw: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take numpy's (version, shape, dtype, is_fortran, raw)."""
        dtype, raw = state[2], state[4]
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array must hold plain bytes")
        self.raw = raw


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, tuples, bytes, numbers, and numpy's bools and byte arrays; refuses everything else by name.

    No code of numpy runs on the file's data. Bound methods are handed out, because a pickle may set attributes of what
    it gets (the BUILD opcode): it could change the defaults of a function, but not through a bound method.
    """

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Give the stand-in for ``module.name``, under numpy 1's and numpy 2's names."""
        allowed: dict[str, Callable[..., Any]] = {
            "numpy.core.multiarray._reconstruct": self._reconstruct,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._frombuffer,
            "numpy.ndarray": self._ndarray,
            "numpy.dtype": self._dtype,
            "_codecs.encode": self._encode,
        }
        stand_in = allowed.get(f"{module}.{name}".replace("numpy._core.", "numpy.core."))
        if stand_in is None:
            raise _RefusedError(f"{module}.{name}")
        return stand_in

    def _dtype(self, name: str | bytes, align: bool = False, copy: bool = False) -> _Dtype:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if text not in ("u1", "b1"):
            raise _RefusedError(f"a numpy array of type {text!r}, only uint8 and bool")
        return _Dtype(text)

    def _reconstruct(self, kind: object, shape: object, code: object) -> _Array:
        return _Array()  # its bytes follow in __setstate__

    def _ndarray(self, *arguments: object) -> _Array:
        raise _RefusedError("a call of numpy.ndarray")  # it is only ever named, as the first argument of _reconstruct

    def _frombuffer(self, raw: bytes, dtype: _Dtype, shape: object, order: object) -> _Array:
        return _Array(bytes(raw))

    def _scalar(self, dtype: _Dtype, raw: bytes) -> int:
        return int(raw[0])

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise _RefusedError(f"_codecs.encode to {encoding!r}")
        return text.encode("latin1")


def _checked_content(uri: str, content: object) -> tuple[list[bytes], NDArray[np.bool_]]:
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise ValueError(f"{uri}: holds {_describe(content)}; {EXPECTED}")
    images, labels = content
    if isinstance(labels, _Array):
        labels = list(labels.raw)
    if not isinstance(images, (tuple, list)) or not isinstance(labels, (tuple, list)):
        raise ValueError(f"{uri}: holds {_describe(images)} and {_describe(labels)}; {EXPECTED}")
    for index, label in enumerate(labels):
        if not isinstance(label, int) or label not in (0, 1):
            raise ValueError(f"{uri}: is_same[{index}] is {label!r}, not a boolean; {EXPECTED}")
    if len(images) != 2 * len(labels) or not labels:
        raise ValueError(
            f"{uri}: holds {len(images)} images for {len(labels)} pairs, not two for every pair; {EXPECTED}"
        )
    return [_encoded(uri, index, image) for index, image in enumerate(images)], np.array(labels, dtype=np.bool_)


def _encoded(uri: str, index: int, image: object) -> bytes:
    """Bytes of one encoded image, given as bytes or as the array that ``cv2.imencode`` makes."""
    if isinstance(image, _Array):
        return image.raw
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size == max(image.shape, default=0):
        return image.tobytes()
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    raise ValueError(f"{uri}: image {index} is {_describe(image)}, not encoded bytes; {EXPECTED}")


def _describe(value: object) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else "")
