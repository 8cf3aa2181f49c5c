"""The images of the data benchmark: 40,000 JPEGs of 112x112 in every form that a rival reads.

They are rendered faces, each varied many times by shift, light and sensor noise, so that a whole set is made in two
minutes, and the same one everywhere. ``python -m tests.benchmarks.data_set FOLDER`` makes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import simplejpeg

# Nothing of webdataset, Ray or torch up here: the other environment, MosaicML's, imports this file too.
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "lgaf-bench" / "data"
QUALITY = 95
MAX_SHIFT = 4
# As mxnet's and OpenCV's encoders write packs; with the noise below a file takes 8.2 kB, as in MS1MV2.
SUBSAMPLING = "420"
SIGN = "set.json"
# Of a record: number of labels beyond one, label, id, second id.
HEADER = struct.Struct("<IfQQ")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the set is made of; another recipe is another set.

    Attributes:
        num_people: Labels are 0 .. num_people - 1.
        faces_per_person: Rendered.
        variants: JPEGs made of each rendered face.
        samples_per_shard: Of the packed set.
        noise: Standard deviation of the sensor noise, in grey levels: it decides how large the files are.
        seed: Of everything.
        version: Of the code that makes it.
    """

    num_people: int = 1000
    faces_per_person: int = 2
    variants: int = 20
    samples_per_shard: int = 2000
    noise: float = 9.8
    seed: int = 0
    version: int = 2

    @property
    def num_samples(self) -> int:
        """Images in all."""
        return self.num_people * self.faces_per_person * self.variants


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where the forms of the set are; sample i is the same image in all."""

    folder: Path
    recipe: Recipe

    @property
    def packed(self) -> Path:
        """Our shards and their manifest; webdataset and Ray read the same shards."""
        return self.folder / "packed"

    @property
    def record(self) -> Path:
        """An InsightFace pack, in a folder of its own."""
        return self.folder / "recordio" / "train.rec"

    @property
    def mds(self) -> Path:
        """MosaicML's shards."""
        return self.folder / "mds"

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]."""
        labels: np.ndarray = np.load(self.folder / "labels.npy")
        return labels

    def shard_paths(self) -> list[str]:
        """Of the packed set."""
        return sorted(str(path) for path in self.packed.glob("*.tar"))

    def jpegs(self) -> EncodedImages:
        """All images from memory (mapped, so that workers share it)."""
        return EncodedImages(self.folder)


class EncodedImages(Sequence[bytes]):
    """A list of encoded images that is one file: its pages are in memory once, however many processes use it."""

    def __init__(self, folder: Path) -> None:
        self._bytes = np.memmap(folder / "jpegs.bin", np.uint8, "r")
        self._ends = np.load(folder / "ends.npy").tolist()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices
        return self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()


def open_set(folder: Path, recipe: Recipe | None = None, say: Callable[[str], None] = print) -> DataSet:
    """The set of a folder, made first where it is absent or another."""
    recipe = recipe or Recipe()
    sign = folder / SIGN
    if not sign.exists() or json.loads(sign.read_text())["recipe"] != asdict(recipe):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say(f"making {recipe.num_samples:,} images in {folder}")
        mean = _write(DataSet(folder=folder, recipe=recipe))
        sign.write_text(json.dumps({"recipe": asdict(recipe), "mean_bytes": mean}))
        say(f"made: {mean:,.0f} bytes an image on average")
    data = DataSet(folder=folder, recipe=recipe)
    _save_manifest(data)  # each time: its format may have changed since the images were made
    return data


def load_set(folder: Path) -> DataSet:
    """The set of a folder that holds one."""
    return DataSet(folder=folder, recipe=Recipe(**json.loads((folder / SIGN).read_text())["recipe"]))


def _write(data: DataSet) -> float:
    from tests.pipeline.data.writers import tar_bytes

    recipe = data.recipe
    order = np.random.default_rng(recipe.seed).permutation(recipe.num_samples)
    labels = order // (recipe.faces_per_person * recipe.variants)
    images = _shuffled(recipe, order)
    np.save(data.folder / "labels.npy", labels.astype(np.int64))
    np.save(data.folder / "ends.npy", np.cumsum([len(image) for image in images]))
    (data.folder / "jpegs.bin").write_bytes(b"".join(images))
    data.packed.mkdir()
    for rows in _shard_rows(recipe):
        body = tar_bytes([(f"{i:09d}", images[i], str(labels[i]).encode()) for i in rows])
        (data.packed / f"shard-{rows.start // recipe.samples_per_shard:06d}.tar").write_bytes(body)
    write_record(data.record, images, labels)
    return float(np.mean([len(image) for image in images]))


def _shard_rows(recipe: Recipe) -> list[range]:
    size = recipe.samples_per_shard
    return [range(first, min(first + size, recipe.num_samples)) for first in range(0, recipe.num_samples, size)]


def _save_manifest(data: DataSet) -> None:
    from pipeline.data.manifest import Manifest
    from tests.pipeline.data.writers import shard_info

    recipe = data.recipe
    shards = [
        shard_info(Path(path).name, Path(path).read_bytes(), len(rows))
        for path, rows in zip(data.shard_paths(), _shard_rows(recipe), strict=True)
    ]
    Manifest(
        uri=str(data.packed),
        shards=tuple(shards),
        num_classes=recipe.num_people,
        image_side=112,
        seed=recipe.seed,
        source={"format": "benchmark"},
        identities=tuple(str(person) for person in range(recipe.num_people)),
    ).save()


def write_record(path: Path, images: list[bytes], labels: np.ndarray, copies: int = 1) -> None:
    """Write an InsightFace pack (header first), each image ``copies`` times, without holding it in memory."""
    path.parent.mkdir(exist_ok=True)
    from tests.pipeline.data.writers import record_bytes

    count = len(images) * copies
    with path.open("wb") as record, path.with_suffix(".idx").open("w") as index:
        end = record.write(record_bytes(HEADER.pack(2, 0.0, 0, 0) + np.array([count + 1, count + 1], "<f4").tobytes()))
        index.write("0\t0\n")
        for key in range(1, count + 1):
            row = (key - 1) % len(images)
            index.write(f"{key}\t{end}\n")
            end += record.write(record_bytes(HEADER.pack(0, float(labels[row]), key, 0) + images[row]))
    (path.parent / "property").write_text(f"{labels.max() + 1},112,112\n")


def _shuffled(recipe: Recipe, order: np.ndarray) -> list[bytes]:
    """The JPEGs in the order of the set."""
    people = np.array_split(np.arange(recipe.num_people), min(50, recipe.num_people))
    with ProcessPoolExecutor(2) as pool:
        parts = pool.map(_images_of, [recipe] * len(people), [part.tolist() for part in people])
        made = [image for part in parts for image in part]
    return [made[i] for i in order]


def _images_of(recipe: Recipe, people: list[int]) -> list[bytes]:
    return [image for person in people for image in _images_of_person(recipe, person)]


def _images_of_person(recipe: Recipe, person: int) -> Iterator[bytes]:
    from pipeline.data.synthetic import SyntheticFaces

    faces = SyntheticFaces(
        num_identities=recipe.num_people, images_per_identity=recipe.faces_per_person, seed=recipe.seed
    )
    for number in range(recipe.faces_per_person):
        rng = np.random.default_rng((recipe.seed, person, number))
        face = faces.image(person * recipe.faces_per_person + number)
        for _ in range(recipe.variants):
            yield simplejpeg.encode_jpeg(vary(face, rng, recipe.noise), QUALITY, "RGB", SUBSAMPLING)


def vary(face: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Another photograph of the same scene: shifted, lighter or darker, with noise of its own; uint8 [H, W, 3]."""
    down, right = rng.integers(0, 2 * MAX_SHIFT + 1, 2)
    height, width = face.shape[:2]
    padded = np.pad(face, ((MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)), "edge")
    light = np.float32(rng.uniform(0.8, 1.2))
    pixels = padded[down : down + height, right : right + width] * light
    pixels += noise * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def digest(images: EncodedImages) -> str:
    """SHA-256 over all images, to compare sets."""
    total = hashlib.sha256()
    for index in range(len(images)):
        total.update(images[index])
    return total.hexdigest()


def write_mds(data: DataSet) -> None:
    """Write MosaicML's shards; runs in an environment that has its package."""
    from streaming import MDSWriter

    images, labels = data.jpegs(), data.labels
    shutil.rmtree(data.mds, ignore_errors=True)
    # About as many bytes a shard as ours; "bytes" and not "jpeg", which would encode every image anew.
    limit = (data.folder / "jpegs.bin").stat().st_size * data.recipe.samples_per_shard // len(labels)
    with MDSWriter(out=str(data.mds), columns={"image": "bytes", "label": "int"}, size_limit=limit) as writer:
        for index in range(len(images)):
            writer.write({"image": images[index], "label": int(labels[index])})


def main() -> None:
    """Make the set of a folder and say what it is."""
    data = open_set(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)
    images = data.jpegs()
    shape = simplejpeg.decode_jpeg(images[0]).shape
    text = io.StringIO()
    text.write(f"{data.folder}: {len(images):,} images of {shape}, {len(data.shard_paths())} shards, ")
    text.write(f"sha256 of all {digest(images)[:16]}\n")
    sys.stdout.write(text.getvalue())


if __name__ == "__main__":
    main()
