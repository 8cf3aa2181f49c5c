"""Where the time of a training step goes; ``make bench BENCH=step_split``, ``ARGS="OUT.md --steps 40"`` adds tables.

A short real run on Ray (synthetic faces, the demo's network) with the built-in profiler on.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.data.pack import PackSettings, pack
from pipeline.data.sources import SourceSpec, SyntheticConfig
from pipeline.runtime import ray_session
from pipeline.training.profiling import ProfileConfig
from pipeline.training.split_report import caption, read_splits
from pipeline.training.step_split import PARTS, StepSplit
from tests.benchmarks.head_report import Report
from tests.benchmarks.short_job import WARM_UP, job_rate, short_config

# Share of a step that it may wait for data, once the run has found its pace.
MOST_DATA_WAIT = 0.03


@dataclass
class Arguments:
    """Settings of the benchmark."""

    markdown: Annotated[str, tyro.conf.Positional] = ""
    """File to add the table to."""
    steps: int = 40
    """Steps to profile."""
    workers: int = 2
    """Training workers."""
    batch: int = 128
    """Global batch."""
    backbone: str = "tiny"
    """Of the network."""
    identities: int = 100
    """Synthetic people, of 16 images each."""


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments, config=(tyro.conf.AvoidSubcommands,))
    config = dataclasses.replace(
        short_config(arguments.batch, arguments.workers, arguments.backbone),
        profile=ProfileConfig(steps=arguments.steps, after=WARM_UP, all_ranks=True),
    )
    spec = SourceSpec(
        format="synthetic", synthetic=SyntheticConfig(num_identities=arguments.identities, images_per_identity=16)
    )
    with tempfile.TemporaryDirectory() as folder, ray_session():
        data = pack(spec, str(Path(folder) / "data"), PackSettings(samples_per_shard=config.pack.samples_per_shard))
        run_uri = str(Path(folder) / "run")
        job_rate(config, data, arguments.steps, run_uri)
        splits = read_splits(run_uri)
    report = Report(arguments.markdown)
    _table(report, splits, arguments)
    most = max(split.share["data_wait"] for split in splits)
    verdict = "below" if most < MOST_DATA_WAIT else "NOT below"
    report.say(f"data wait: {most:.1%} of a step on the rank that waits most, {verdict} {MOST_DATA_WAIT:.0%}")


def _table(report: Report, splits: list[StepSplit], arguments: Arguments) -> None:
    columns = ["part", *(text for split in splits for text in (f"rank {split.rank}", "share"))]
    rows = [
        [part.replace("_", " "), *(text for split in splits for text in _cells(split.mean_s[part], split.share[part]))]
        for part in PARTS
    ]
    rows.append(["step", *(text for split in splits for text in _cells(split.step_s, 1.0))])
    title = f"Where a step's time goes: {arguments.backbone}, batch {arguments.batch}, {arguments.workers} workers"
    report.table(title, columns, rows, f"Rank 0, {caption(splits[0])}.")


def _cells(seconds: float, share: float) -> tuple[str, str]:
    return f"{1e3 * seconds:,.1f} ms", f"{share:.1%}"


if __name__ == "__main__":
    main()
