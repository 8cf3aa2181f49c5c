"""How fast each part of the pipeline is, and the whole of it against a bare loop; `make bench` prints a table.

Ratios are taken within one run, against what the peers do: `tarfile`, PIL, mxnet's one-by-one reading.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.data.augment import adaface
from pipeline.data.images import decode_rgb
from pipeline.data.manifest import Manifest
from pipeline.data.pack import PackSettings, pack
from pipeline.data.shards import parse_shard
from pipeline.data.sources import SourceSpec, SyntheticConfig
from pipeline.data.stream import BatchAssembler, Share, rank_dataset
from pipeline.data.stream_plan import StreamConfig, StreamPlan
from pipeline.data.synthetic import SyntheticFaces
from pipeline.runtime import ray_session
from tests.benchmarks.short_job import bare_rate, job_rate, short_config

PER_IDENTITY = 32
REPEATS = 3
# Of the bare loop's images/s, that the whole pipeline is to reach.
LEAST_OF_BARE = 0.95


@dataclass
class Arguments:
    """Size of the benchmark."""

    identities: int = 64
    """Synthetic people, of 32 images each."""
    batch: int = 128
    """Global batch."""
    workers: int = 2
    """Training workers."""
    backbone: str = "tiny"
    """Of the network."""
    stream_steps: int = 400
    """Batches that are read in the measurement of the stream alone; with few, all lie ready before the clock starts."""
    train_steps: int = 100
    """Steps that are counted, of the run and of the bare loop."""


def per_second(call: Callable[[], object], amount: int) -> float:
    """Median rate over a few repeats, after one that is not counted."""
    call()
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        rates.append(amount / (time.perf_counter() - started))
    return float(np.median(rates))


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments)
    config = short_config(arguments.batch, arguments.workers, arguments.backbone)
    table = Table(title="images/s, median", title_justify="left")
    for column in ("what", "images/s", "ratio"):
        table.add_column(column, justify="right" if column != "what" else "left")
    # Ranks are forked: before Ray has its threads, and before torch has its own.
    bare = bare_rate(config, arguments.identities, arguments.train_steps)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, ray_session():
        started = time.perf_counter()
        faces = SyntheticConfig(num_identities=arguments.identities, images_per_identity=PER_IDENTITY)
        spec = SourceSpec(format="synthetic", synthetic=faces)
        manifest = pack(spec, str(Path(folder) / "data"), PackSettings(samples_per_shard=512))
        packed = manifest.num_samples / (time.perf_counter() - started)
        _one_core(table, manifest, faces)
        table.add_row("pack synthetic faces, all cores", f"{packed:,.0f}", "")
        stream = _stream(manifest, arguments)
        table.add_row(
            "stream: read, verify, decode, AdaFace augmentation",
            f"{stream:,.0f}",
            f"{stream / bare:.1f}x the bare loop",
        )
        job = job_rate(config, manifest, arguments.train_steps, str(Path(folder) / "run"))
    network = f"{arguments.backbone}, batch {arguments.batch}, {arguments.workers} ranks"
    table.add_row(f"bare loop in memory ({network})", f"{bare:,.0f}", "")
    table.add_row(f"whole pipeline ({network})", f"{job:,.0f}", f"{job / bare:.3f}x (wanted: {LEAST_OF_BARE})")
    Console(file=sys.stdout, width=110).print(table)


def _one_core(table: Table, manifest: Manifest, config: SyntheticConfig) -> None:
    torch.set_num_threads(1)
    data = storage.read_bytes(manifest.shard_uri(0))
    shard = parse_shard(data, "shard")
    count = len(shard.images)
    faces = SyntheticFaces(num_identities=config.num_identities, images_per_identity=config.images_per_identity)
    images = np.stack([decode_rgb(image) for image in shard.images])
    index, epoch = np.arange(count), np.zeros(count, np.int64)
    ours_parse, theirs_parse = (
        per_second(lambda: parse_shard(data, ""), count),
        per_second(lambda: _tarfile(data), count),
    )
    ours_decode = per_second(lambda: [decode_rgb(image) for image in shard.images], count)
    theirs_decode = per_second(
        lambda: [np.asarray(Image.open(io.BytesIO(i)).convert("RGB")) for i in shard.images], count
    )
    table.add_row("render, one core", f"{per_second(lambda: [faces.image(i) for i in range(200)], 200):,.0f}", "")
    table.add_row("parse a shard, one core", f"{ours_parse:,.0f}", f"{ours_parse / theirs_parse:.1f}x tarfile")
    table.add_row("decode, one core", f"{ours_decode:,.0f}", f"{ours_decode / theirs_decode:.1f}x PIL")
    table.add_row(
        "AdaFace augmentation, one core", f"{per_second(lambda: adaface(images, index, 0, epoch), count):,.0f}", ""
    )
    torch.set_num_threads(2)


def _tarfile(data: bytes) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [archive.extractfile(member).read() for member in archive]


def _stream(manifest: Manifest, arguments: Arguments) -> float:
    batch = arguments.batch
    plan = StreamPlan(data=manifest, config=StreamConfig(), seed=0, batch=batch, total_steps=arguments.stream_steps)
    dataset = rank_dataset(plan, 1, 0, 0, Share(2.0, 1 << 30))
    blocks = dataset.iterator().iter_batches(batch_size=None, batch_format="numpy")
    batches = BatchAssembler(iter(blocks), batch)
    next(batches)  # the start of the execution is not the stream's speed
    started = time.perf_counter()
    count = sum(len(found.labels) for found in batches)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
