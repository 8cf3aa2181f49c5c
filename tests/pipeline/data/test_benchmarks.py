"""Reading and writing insightface's .bin files: real packs, packs of every maker, hostile and broken ones."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline import storage
from pipeline.data.benchmarks import (
    BENCHMARKS,
    decode_images,
    find_benchmark,
    find_verification_sets,
    read_verification_bin,
    write_verification_bin,
)

REAL_LFW = Path(__file__).parents[3].parent / "shared" / "data" / "faces_celeb299" / "lfw_folds1to5.bin"


def face(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
    """A smooth colour image, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)


def jpeg(seed: int, height: int = 112, width: int = 112) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(face(seed, height, width)), quality=98)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [jpeg(seed) for seed in range(6)]
SAME = [True, False, True]


def put(tmp_path: Path, data: bytes, name: str = "lfw.bin") -> str:
    uri = str(tmp_path / name)
    storage.write_bytes(uri, data)
    return uri


# ---- what we write, and what others write ------------------------------------------------------------------------


def test_what_is_written_reads_back_and_by_the_peers(tmp_path):
    uri = str(tmp_path / "cfp_fp.bin")
    digest = write_verification_bin(uri, IMAGES, np.array(SAME))
    data = Path(uri).read_bytes()
    found = read_verification_bin(uri)
    assert (found.name, found.images, found.is_same.tolist(), found.num_folds) == ("cfp_fp", IMAGES, SAME, 10)
    assert found.is_same.dtype == np.bool_
    assert found.fingerprint == digest == hashlib.sha256(data).hexdigest()
    for encoding in ("ASCII", "bytes"):  # insightface's load_bin tries the first, TFace's takes the second
        bins, issame_list = pickle.loads(data, encoding=encoding)
        assert (bins, issame_list) == (IMAGES, SAME)
        assert all(type(value) is bool for value in issame_list)


def test_equal_content_makes_equal_files(tmp_path):
    repeated = [IMAGES[0], bytes(bytearray(IMAGES[0]))]  # equal, not identical
    first = write_verification_bin(str(tmp_path / "a.bin"), repeated, [1])
    assert write_verification_bin(str(tmp_path / "b.bin"), [IMAGES[0], IMAGES[0]], [True]) == first


# Under numpy 1's names too, in the protocols without frames (whose lengths a replaced name would make wrong).
@pytest.mark.parametrize(("protocol", "numpy_1"), [*((p, False) for p in range(6)), *((p, True) for p in range(4))])
def test_arrays_of_imencode_and_numpy_booleans_are_read(tmp_path, protocol, numpy_1):
    arrays = [cv2.imencode(".jpg", face(seed))[1] for seed in range(6)]
    arrays[0].flags.writeable = False  # protocol 5 writes it as bytes, the others as bytearray
    data = pickle.dumps((arrays, [np.bool_(value) for value in SAME]), protocol=protocol)
    if numpy_1:
        data = data.replace(b"numpy._core.", b"numpy.core.")
        assert b"numpy.core." in data
    found = read_verification_bin(put(tmp_path, data))
    assert found.images == [array.tobytes() for array in arrays]
    assert found.is_same.tolist() == SAME


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_is_same_may_be_one_array(tmp_path, protocol):
    data = pickle.dumps((tuple(IMAGES), np.array(SAME)), protocol=protocol)
    assert read_verification_bin(put(tmp_path, data)).is_same.tolist() == SAME


def test_packs_of_python_2_are_read(tmp_path):
    # What cPickle of Python 2 wrote for ([str, ...], [True, False]) with protocol 2: BINSTRING images.
    strings = b"".join(b"T" + len(image).to_bytes(4, "little") + image for image in IMAGES[:4])
    data = b"\x80\x02]q\x00(" + strings + b"e]q\x01(\x88\x89e\x86q\x02."
    found = read_verification_bin(put(tmp_path, data))
    assert (found.images, found.is_same.tolist()) == (IMAGES[:4], [True, False])
    # And with protocol 1, where booleans are the integers I01 and I00.
    data = b"(](" + strings + b"e](I01\nI00\net."
    assert read_verification_bin(put(tmp_path, data)).is_same.tolist() == [True, False]


def test_arrays_of_python_2_are_read(tmp_path):
    def array(image: bytes) -> bytes:
        text = b"T" + len(image).to_bytes(4, "little") + image
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M"
            + len(image).to_bytes(2, "little")
            + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + text
            + b"tb"
        )

    data = b"\x80\x02](" + array(IMAGES[0]) + array(IMAGES[1]) + b"e](\x88e\x86."
    assert [a.tobytes() for a in pickle.loads(data, encoding="bytes")[0]] == IMAGES[:2]  # the pickle is a true one
    assert read_verification_bin(put(tmp_path, data)).images == IMAGES[:2]


# ---- hostile and broken ones -------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w')",), "eval"),
        (runpy.run_path, ("{}",), "runpy.run_path"),
        (np.load, ("{}",), "numpy.load"),
        (np.dtype, ("O",), "a numpy array of type 'O'"),
        (np.ndarray, ((10**12,),), "a call of numpy.ndarray"),
        (bytearray, (10**12,), "bytearray"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_by_name(tmp_path, function, arguments, name, protocol):
    victim = tmp_path / "owned"
    arguments = tuple(arg.format(str(victim)) if isinstance(arg, str) else arg for arg in arguments)
    uri = put(tmp_path, pickle.dumps((IMAGES, [True, Call(function, *arguments), True]), protocol=protocol))
    # Protocols 0 to 2 carry Python 2's name of builtins.
    with pytest.raises(ValueError, match=rf"lfw\.bin: refuses to unpickle (\w+\.)?{re.escape(name)}[;,]"):
        read_verification_bin(uri)
    assert not victim.exists()


def test_a_pickle_cannot_change_the_reader(tmp_path):
    # GLOBAL, then BUILD with (None, {"__defaults__": ()}): sets attributes of whatever find_class returned.
    data = b"\x80\x02cnumpy\ndtype\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    with pytest.raises(ValueError, match="not a pickle"):
        read_verification_bin(put(tmp_path, data))
    test_is_same_may_be_one_array(tmp_path, 4)


@pytest.mark.parametrize("keep", [0, 1, 20, 5000, -1])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, keep):
    data = pickle.dumps((IMAGES, SAME), protocol=4)
    uri = put(tmp_path, data[:keep])
    with pytest.raises(ValueError, match=r"lfw\.bin: is truncated or not a pickle .*expected a pickle of"):
        read_verification_bin(uri)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGES, "holds a list of 6; expected"),
        ({"images": IMAGES}, "holds a dict of 1"),
        ((IMAGES, 3), "holds a list of 6 and a int;"),
        ((IMAGES[:5], SAME), "holds 5 images for 3 pairs, not two for every pair"),
        ((IMAGES, SAME[:2]), "holds 6 images for 2 pairs"),
        (([], []), "holds 0 images for 0 pairs"),
        (([*IMAGES[:5], "text"], SAME), "image 5 is a str, not encoded bytes"),
        ((IMAGES, [True, 2, False]), r"is_same\[1\] is 2, not a boolean"),
        ((IMAGES, [True, None, False]), r"is_same\[1\] is None"),
        ((IMAGES, [True, 1.0, False]), r"is_same\[1\] is 1\.0, not a boolean"),
        ((set(IMAGES), SAME), "holds a set and a list of 3"),
        ((np.zeros((6, 4)), SAME), "refuses to unpickle a numpy array of type 'f8', only uint8 and bool"),
        ((IMAGES, np.array([1, 0, 1])), "refuses to unpickle a numpy array of type 'i8'"),
    ],
)
def test_a_wrong_structure_is_an_error_that_names_it(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_verification_bin(put(tmp_path, pickle.dumps(content)))
    assert "lfw.bin" in str(error.value)


def test_a_wrong_set_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="5 images for 3 pairs"):
        write_verification_bin(str(tmp_path / "lfw.bin"), IMAGES[:5], SAME)
    assert list(tmp_path.iterdir()) == []


# ---- finding -----------------------------------------------------------------------------------------------------


def test_finds_the_sets_of_a_folder_in_order_or_the_one_file(tmp_path):
    for name in ("lfw.bin", "agedb_30.bin", "train.rec", "nested/cplfw.bin"):
        storage.write_bytes(str(tmp_path / name), b"x")
    folder = storage.normalise(str(tmp_path))
    assert find_verification_sets(str(tmp_path) + "/") == [f"{folder}/agedb_30.bin", f"{folder}/lfw.bin"]
    assert find_verification_sets(str(tmp_path / "lfw.bin")) == [f"{folder}/lfw.bin"]
    write_verification_bin("memory://found/lfw.bin", IMAGES, SAME)
    assert read_verification_bin("memory://found/lfw.bin").images == IMAGES
    assert find_verification_sets("memory://found") == ["memory://found/lfw.bin"]


@pytest.mark.parametrize(("name", "text"), [("", "holds no verification sets"), ("absent", "does not exist")])
def test_a_folder_without_sets_is_an_error_that_names_it(tmp_path, name, text):
    with pytest.raises(ValueError, match=f"{tmp_path / name}: {text}"):
        find_verification_sets(str(tmp_path / name))


def test_an_absent_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(storage.StorageError, match=r"absent\.bin"):
        find_verification_sets(str(tmp_path / "absent.bin"))


# ---- decoding ----------------------------------------------------------------------------------------------------


def test_jpeg_and_png_and_arrays_decode_to_rgb():
    pixels = face(0)
    grey = np.array(Image.fromarray(pixels).convert("L"))
    encoded = [jpeg(0), png(pixels), np.frombuffer(png(pixels), np.uint8)[:, None], png(grey)]
    decoded = decode_images(encoded)
    assert (decoded.shape, decoded.dtype) == ((4, 112, 112, 3), np.uint8)
    assert np.abs(decoded[0].astype(int) - pixels).mean() < 3  # red is not blue: channels are in order
    assert np.array_equal(decoded[1], pixels)
    assert np.array_equal(decoded[2], pixels)
    assert np.array_equal(decoded[3], np.stack([grey] * 3, axis=2))
    assert decode_images([]).shape == (0, 112, 112, 3)


@pytest.mark.parametrize(("height", "width"), [(112, 96), (250, 250), (160, 112), (64, 48), (300, 113)])
def test_another_size_is_resized_short_and_cropped_at_the_centre(height, width):
    pixels = face(3, height, width)
    short = min(height, width)
    # mxnet: new_h, new_w = (size * h // w, size) where h > w, else (size, size * w // h)
    new_h, new_w = (112 * height // width, 112) if height > width else (112, 112 * width // height)
    whole = cv2.resize(pixels, (new_w, new_h), interpolation=cv2.INTER_CUBIC) if short != 112 else pixels
    top, left = (new_h - 112) // 2, (new_w - 112) // 2
    assert np.array_equal(decode_images([png(pixels)])[0], whole[top : top + 112, left : left + 112])


@pytest.mark.parametrize("broken", [b"", b"not an image", jpeg(1)[:2000], png(face(1))[:300]])
def test_a_corrupt_image_is_an_error_that_names_set_and_image(broken):
    with pytest.raises(ValueError, match="cfp_fp: image 1025 cannot be decoded"):
        decode_images([jpeg(0), broken], name="cfp_fp", first_index=1024)


def test_pixels_instead_of_encoded_bytes_are_refused():
    with pytest.raises(ValueError, match="lfw: image 0 is a ndarray, not encoded bytes"):
        decode_images([face(0)], name="lfw")


# ---- the registry, and the real file -----------------------------------------------------------------------------


def test_registry():
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert len(set(names)) == len(names)
    assert {"lfw", "cfp_fp", "agedb_30", "calfw", "cplfw", "synth-pose", "synth-deform", "synth-lowres"} < set(names)
    assert {benchmark.name for benchmark in BENCHMARKS if benchmark.num_folds != 10} == {"lfw_folds1to5"}
    assert find_benchmark("lfw_folds1to5").num_folds == 5
    assert find_benchmark("our_cameras").num_folds == 10


def test_reading_benchmarks_does_not_load_torch():
    code = "import sys, pipeline.data.benchmarks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


@pytest.mark.data
@pytest.mark.skipif(not REAL_LFW.exists(), reason=f"{REAL_LFW} is absent")
def test_the_real_lfw_pack():
    lfw = read_verification_bin(str(REAL_LFW))
    assert (lfw.name, lfw.num_folds, len(lfw.images), len(lfw.is_same)) == ("lfw_folds1to5", 5, 6000, 3000)
    folds = lfw.is_same.reshape(5, 2, 300)  # LFW: 300 same pairs, then 300 different ones, in every fold
    assert folds[:, 0].all()
    assert not folds[:, 1].any()
    pixels = decode_images(lfw.images[:32], name=lfw.name)
    assert pixels.shape == (32, 112, 112, 3)
    assert 60 < pixels.mean() < 180
