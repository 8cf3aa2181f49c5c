"""The same images of the same people give the same shards, whatever the source was."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.manifest import Manifest
from pipeline.data.pack import PackSettings, pack
from pipeline.data.sources import SourceSpec, detect_format
from tests.pipeline.data.packing import assert_complete, in_process, recordio, samples, shard_bytes
from tests.pipeline.data.writers import jpeg, tar_bytes

SETTINGS = PackSettings(samples_per_shard=7)


def lossless(number: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(jpeg(number))) as image:
        image.save(buffer, kind, lossless=True)
    return buffer.getvalue()


IMAGES = [lossless(i, "PNG") if i == 5 else lossless(i, "WEBP") if i == 17 else jpeg(i) for i in range(40)]
LABELS = [i * 7 % 11 for i in range(40)]
FILES = {f"{label}/{i:02d}.jpg": image for i, (label, image) in enumerate(zip(LABELS, IMAGES, strict=True))}


def as_recordio(folder: Path) -> None:
    recordio(folder, LABELS, dict(enumerate(IMAGES)))


def as_recordio_without_index(folder: Path) -> None:
    as_recordio(folder)
    (folder / "train.idx").unlink()


def as_folder(folder: Path) -> None:
    for name, image in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)


def as_list(folder: Path) -> None:
    as_folder(folder / "images")
    lines = [f"images/{name} {name.partition('/')[0]}\n" for name in reversed(FILES)]
    (folder / "list.txt").write_text("".join(lines))


def as_shards(folder: Path) -> None:
    rows = [
        (f"{i:05d}", image, str(label).encode()) for i, (label, image) in enumerate(zip(LABELS, IMAGES, strict=True))
    ]
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(tar_bytes(rows[number * 15 : (number + 1) * 15]))


def as_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "faces.zip", "w") as archive:
        for name, image in FILES.items():
            archive.writestr(f"web/{name}", image)


def as_tars(folder: Path) -> None:
    for number, mode in enumerate(("w", "w:gz")):
        with tarfile.open(folder / f"{number}.tar{'.gz' if number else ''}", mode) as archive:
            for name, image in list(FILES.items())[number::2]:
                member = tarfile.TarInfo(name)
                member.size = len(image)
                archive.addfile(member, io.BytesIO(image))


def as_tables(folder: Path) -> None:
    table = pa.table({"image": IMAGES, "label": LABELS})
    pq.write_table(table.slice(0, 25), folder / "a.parquet", row_group_size=4)
    with pa.ipc.new_file(str(folder / "b.arrow"), table.schema) as writer:
        writer.write_table(table.slice(25), max_chunksize=4)


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no index": ("recordio", as_recordio_without_index),
    "folder": ("folder", as_folder),
    "list": ("list", as_list),
    "webdataset": ("webdataset", as_shards),
    "zip": ("archives", as_zip),
    "tars": ("archives", as_tars),
    "tables": ("tables", as_tables),
}


def packed(folder: Path, kind: str, writer: Callable[[Path], None]) -> Manifest:
    source = folder / "source"
    source.mkdir()
    writer(source)
    place = source / "list.txt" if kind == "list" else source
    assert detect_format(str(place)) == kind
    with in_process():
        return pack(SourceSpec(format=kind, uri=str(place)), str(folder / "out"), SETTINGS)


@pytest.fixture(scope="module")
def from_recordio(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    manifest = packed(tmp_path_factory.mktemp("recordio"), "recordio", as_recordio)
    assert sorted(samples(manifest)) == sorted((image, str(i)) for image, i in zip(IMAGES, LABELS, strict=True))
    assert manifest.identities == tuple(str(i) for i in range(11))
    return manifest


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_people_give_the_same_shards_from_any_source(tmp_path, from_recordio, name):
    kind, writer = WRITERS[name]
    manifest = packed(tmp_path, kind, writer)
    assert_complete(manifest)
    assert shard_bytes(manifest) == shard_bytes(from_recordio)
    assert manifest.source["format"] == kind
    assert manifest.source != from_recordio.source
    assert replace(manifest, source={}, uri="") == replace(from_recordio, source={}, uri="")


def test_a_large_tar_takes_no_more_memory_than_is_asked_for(tmp_path, monkeypatch):
    # A tar cannot be cut into parts; it becomes several files of buckets instead.
    from pipeline.data import pack as packing

    seen: list[int] = []
    spill_part = packing.spill_part

    def watched(task):
        spills = spill_part(replace(task, memory_bytes=20_000))
        seen.append(len(spills))
        return spills

    monkeypatch.setattr(packing, "spill_part", watched)
    source = tmp_path / "source"
    source.mkdir()
    as_shards(source)
    with in_process():
        cut = pack(SourceSpec(format="webdataset", uri=str(source)), str(tmp_path / "cut"), SETTINGS)
        monkeypatch.setattr(packing, "spill_part", spill_part)
        whole = pack(SourceSpec(format="webdataset", uri=str(source)), str(tmp_path / "whole"), SETTINGS)
    assert min(seen) > 1
    assert shard_bytes(cut) == shard_bytes(whole)
    assert cut.fingerprint == whole.fingerprint


def test_a_place_with_a_manifest_is_no_source(tmp_path, from_recordio):
    assert detect_format(from_recordio.uri) == "packed"
