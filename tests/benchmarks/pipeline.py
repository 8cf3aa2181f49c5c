"""How fast each part of the pipeline is on this machine; `make bench` prints a table for RESULTS.md.

Ratios are taken within one run, against what the peers do: `tarfile`, PIL, mxnet's one-by-one reading.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.step import TrainStep
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
from pipeline.presets import demo
from pipeline.runtime import ray_session

NUM_IDENTITIES, PER_IDENTITY, BATCH, STREAM_STEPS = 64, 32, 128, 400
REPEATS = 3


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
    torch.set_num_threads(2)
    table = Table(title="images/s, median of three", title_justify="left")
    for column in ("what", "images/s", "ratio to"):
        table.add_column(column, justify="right" if column != "what" else "left")
    with tempfile.TemporaryDirectory() as folder, ray_session():
        started = time.perf_counter()
        spec = SourceSpec(
            format="synthetic",
            synthetic=SyntheticConfig(num_identities=NUM_IDENTITIES, images_per_identity=PER_IDENTITY),
        )
        manifest = pack(spec, folder, PackSettings(samples_per_shard=512))
        packed = manifest.num_samples / (time.perf_counter() - started)
        _one_core(table, manifest)
        table.add_row("pack synthetic faces, all cores", f"{packed:,.0f}", "")
        stream = _stream(manifest)
        bare = _bare_training()
        table.add_row(
            "stream: read, verify, decode, AdaFace augmentation",
            f"{stream:,.0f}",
            f"{stream / bare:.1f}x bare training",
        )
        table.add_row("bare training step in memory (demo network)", f"{bare:,.0f}", "")
    Console(file=sys.stdout, width=110).print(table)


def _one_core(table: Table, manifest: Manifest) -> None:
    torch.set_num_threads(1)
    data = storage.read_bytes(manifest.shard_uri(0))
    shard = parse_shard(data, "shard")
    count = len(shard.images)
    faces = SyntheticFaces(num_identities=NUM_IDENTITIES, images_per_identity=PER_IDENTITY)
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


def _stream(manifest: Manifest) -> float:
    plan = StreamPlan(data=manifest, config=StreamConfig(), seed=0, batch=BATCH, total_steps=STREAM_STEPS)
    dataset = rank_dataset(plan, 1, 0, 0, Share(2.0, 1 << 30))
    blocks = dataset.iterator().iter_batches(batch_size=None, batch_format="numpy")
    batches = BatchAssembler(iter(blocks), BATCH)
    next(batches)  # the start of the execution is not the stream's speed
    started = time.perf_counter()
    count = sum(len(batch.labels) for batch in batches)
    return count / (time.perf_counter() - started)


def _bare_training() -> float:
    config = demo()
    model: LGAFConfig = config.model
    head = ShardedMarginHead(299, model.embedding_dim, create_margin("cosface"))
    step = TrainStep(model.build(), head, OptimizerConfig(), Schedule(), 1000, precision=config.precision)
    images = torch.randint(0, 256, (BATCH, 112, 112, 3), dtype=torch.uint8)
    labels = torch.randint(0, 299, (BATCH,))
    return per_second(lambda: [step(images, labels) for _ in range(5)], 5 * BATCH)


if __name__ == "__main__":
    main()
