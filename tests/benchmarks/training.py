"""A whole run against a bare loop on batches in memory, and what its checkpoints cost; ``make bench BENCH=training``.

``ARGS="OUT.md"`` adds the tables to a file. Each arm is a process of its own; a round is bare loop, run, bare loop: the
machine's speed changes within minutes, so the run is compared with the mean of what is before and behind it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from pipeline.config import TrainConfig, WorkersConfig
from pipeline.data.manifest import Manifest
from pipeline.data.pack import PackSettings, pack
from pipeline.data.sources import SourceSpec, SyntheticConfig
from pipeline.runtime import ray_session
from pipeline.training.commits import committed, read_marker
from pipeline.training.metrics_log import read_metrics
from tests.benchmarks.head_report import Report
from tests.benchmarks.short_job import WARM_UP, bare_rate, job_rate, short_config

IDENTITIES, PER_IDENTITY = 100, 32
LEAST_OF_BARE = 0.95
# glibc gives freed memory back and takes it again at each step: without this the bare loop is a tenth slower.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}
MOST_STALL = 0.05  # of the steps between two checkpoints


@dataclass
class Arguments:
    """Settings of the benchmark."""

    markdown: Annotated[str, tyro.conf.Positional] = ""
    """File to add the tables to."""
    rounds: int = 3
    """Rounds; medians are given."""
    steps: int = 100
    """Steps that are counted, of the run and of the bare loop."""
    save_every: int = 25
    """Steps between checkpoints of the run."""
    workers: int = 2
    """Training workers."""
    batch: int = 128
    """Global batch."""
    backbone: str = "tiny"
    """Of the network."""
    arm: Literal["", "bare", "run"] = ""
    """For the benchmark itself."""
    folder: str = ""
    """For the benchmark itself."""


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments, config=(tyro.conf.AvoidSubcommands,))
    if arguments.arm:
        found = _bare(arguments) if arguments.arm == "bare" else _run(arguments)
        (Path(arguments.folder) / "result.json").write_text(json.dumps(found))
        return
    report = Report(arguments.markdown)
    with tempfile.TemporaryDirectory() as folder:
        faces = SyntheticConfig(num_identities=IDENTITIES, images_per_identity=PER_IDENTITY)
        with ray_session():
            pack(SourceSpec(format="synthetic", synthetic=faces), f"{folder}/data", PackSettings(samples_per_shard=512))
        rounds = [_round(arguments, Path(folder)) for _ in range(arguments.rounds)]
    _tables(report, arguments, rounds)


def _round(arguments: Arguments, folder: Path) -> dict[str, Any]:
    before, run, behind = (_arm(arguments, folder, arm) for arm in ("bare", "run", "bare"))
    bare = (before["images_per_second"] + behind["images_per_second"]) / 2
    print(f"bare {before['images_per_second']:.0f} and {behind['images_per_second']:.0f}, run {run}", flush=True)
    return run | {"bare": bare, "ratio": run["images_per_second"] / bare}


def _arm(arguments: Arguments, folder: Path, arm: str) -> dict[str, Any]:
    settings = dataclasses.asdict(arguments) | {"arm": arm, "folder": str(folder)}
    flags = [text for key, value in settings.items() if key != "markdown" for text in (f"--{key}", str(value))]
    environment = os.environ | (KEPT_MEMORY if arm == "bare" else {})
    subprocess.run([sys.executable, "-m", "tests.benchmarks.training", *flags], check=True, env=environment)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def _bare(arguments: Arguments) -> dict[str, Any]:
    config = short_config(arguments.batch, arguments.workers, arguments.backbone)
    return {"images_per_second": bare_rate(config, IDENTITIES, arguments.steps)}


def _run(arguments: Arguments) -> dict[str, Any]:
    data = Manifest.load(f"{arguments.folder}/data")
    with tempfile.TemporaryDirectory() as folder, ray_session():
        run_uri = str(Path(folder) / "run")
        rate = job_rate(_config(arguments), data, arguments.steps, run_uri)
        lines = read_metrics(run_uri)
        seconds = np.array([arguments.batch / line["images_per_second"] for line in lines])
        found = [checkpoint for checkpoint in committed(run_uri) if WARM_UP < checkpoint.step < len(lines)]
        markers = [read_marker(checkpoint.uri) for checkpoint in found]
    steps = [checkpoint.step for checkpoint in found]
    # What is written in the background takes its share of two cores from the steps behind a save.
    beside = [step + row for step in steps for row in range(2) if step + row < len(seconds)]
    others = np.delete(seconds, [*range(WARM_UP), *beside])
    extra = [seconds[step : step + 2].sum() - 2 * np.median(others) for step in steps]
    return {
        "images_per_second": rate,
        "step_s": float(np.median(others)),
        "stall_s": median(marker["stall_s"] for marker in markers),
        "write_s": median(marker["write_s"] for marker in markers),
        "slower_s": float(np.median(extra)),
        "megabytes": sum(file["num_bytes"] for file in markers[-1]["files"].values()) / 1e6,
        "saves": len(markers),
    }


def _config(arguments: Arguments) -> TrainConfig:
    base = short_config(arguments.batch, arguments.workers, arguments.backbone)
    workers = WorkersConfig(checkpoint_every_steps=arguments.save_every, keep_checkpoints=1000)
    return dataclasses.replace(base, workers=workers)


def _tables(report: Report, arguments: Arguments, rounds: list[dict[str, Any]]) -> None:
    network = f"{arguments.backbone}, batch {arguments.batch}, {arguments.workers} workers"
    ratios = [found["ratio"] for found in rounds]
    rows = [
        [f"{number + 1}", f"{found['bare']:,.0f}", f"{found['images_per_second']:,.0f}", f"{found['ratio']:.3f}"]
        for number, found in enumerate(rounds)
    ]
    report.table(
        f"Whole pipeline against a bare loop ({network}), images/s",
        ["round", "bare loop", "run", "ratio"],
        rows,
        f"Median {median(ratios):.3f}; wanted: {LEAST_OF_BARE}. A checkpoint every {arguments.save_every} steps.",
    )
    rows = []
    for number, found in enumerate(rounds):
        interval = found["step_s"] * arguments.save_every
        cost = found["stall_s"] + max(0.0, found["slower_s"])
        rows.append(
            [
                *(f"{number + 1}", f"{found['megabytes']:.1f}", f"{1e3 * found['stall_s']:.1f}"),
                *(
                    f"{1e3 * found['write_s']:.0f}",
                    f"{1e3 * found['slower_s']:.0f}",
                    f"{found['stall_s'] / interval:.2%}",
                ),
                *(f"{cost / interval:.2%}", f"{cost / (found['step_s'] * 500):.3%}"),
            ]
        )
    report.table(
        f"What a checkpoint costs ({network})",
        [
            "round",
            "MB",
            "stall ms",
            "write ms",
            "next two steps, ms slower",
            "stall",
            "in all",
            "in all, every 500 steps",
        ],
        rows,
        f"Shares of {arguments.save_every} steps; wanted of the stall: at most {MOST_STALL:.0%}.",
    )


if __name__ == "__main__":
    main()
