"""What a job shows: progress while it runs, one table at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.benchmarks import BENCHMARKS
from pipeline.stages import REPORT, RunPlace
from pipeline.training.metrics_log import NAME as METRICS

PLAIN_LINE_EVERY_S = 15.0


class JobDisplay:
    """Progress bars of the stages on a terminal; elsewhere (in a job's log) a plain line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._last_line: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> JobDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def stage(self, name: str, is_done: bool) -> None:
        """A stage begins, or its result was there already."""
        if not self._console.is_terminal:
            self._console.print(f"{name}: {'done before' if is_done else 'started'}")
            return
        note = "done before" if is_done else ""
        total = 1 if is_done else None
        self._tasks[name] = self._progress.add_task(name, total=total, completed=int(is_done), note=note)

    def update(self, name: str, done: int, total: int, note: str) -> None:
        """A stage has done some of its work."""
        if self._console.is_terminal:
            self._progress.update(self._tasks[name], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        last_done, last_time = self._last_line.get(name, (-1, 0.0))
        if done != last_done and (done == total or now - last_time >= PLAIN_LINE_EVERY_S):
            self._last_line[name] = (done, now)
            self._console.print(f"{name}: {done}/{total} {note}")


def _mlflow_run(place: RunPlace) -> str:
    waiting = place.tracked.num_waiting
    note = f"  ({waiting} writes could not be sent yet; the same command sends them)" if waiting else ""
    return f"{place.tracked.address.run_id()}{note}"


def closing_table(config: TrainConfig, place: RunPlace, artefacts: Mapping[str, Any], seconds: float) -> Table:
    """Where everything is and how good the model is."""
    data, model, report = artefacts["data"], artefacts["train"], artefacts["evaluate"]
    registered = artefacts["register"]
    table = Table(title=f"Run {config.run_name}", show_header=False, title_justify="left", min_width=80)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "shards": f"{data.uri}  ({data.num_samples:,} faces, {data.num_classes:,} people, {data.num_shards} shards)",
        "run": place.uri,
        "metrics": storage.join(place.uri, METRICS),
        "model": model.model_uri,
        "report": storage.join(place.uri, REPORT),
        "MLflow store": place.tracking_uri,
        "MLflow run": f"{config.tracking.experiment} / {_mlflow_run(place)}",
        "look at it": f"mlflow ui --host 127.0.0.1 --backend-store-uri {place.tracking_uri}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_section()
    titles = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}
    for result in report.benchmarks:
        table.add_row(
            titles.get(result.name, result.name),
            f"accuracy {result.accuracy:.4f} ± {result.accuracy_std:.4f}  "
            f"({result.num_pairs:,} pairs, {result.num_folds} folds)  TAR@FAR=1e-2 {result.tar_at_far['1e-2']:.4f}",
        )
    table.add_section()
    speed = f"{model.images_per_second:,.0f} images/s over {model.num_steps:,} steps; {seconds:.0f} s in all"
    table.add_row("speed", speed)
    verdict = "[green]promoted[/]" if registered.decision.promote else "[yellow]not promoted[/]"
    table.add_row("registry", f"{registered.model_name} version {registered.version}: {verdict}")
    table.add_row("champion", f"version {registered.champion_version}")
    table.add_row("why", " ".join(registered.decision.reasons))
    return table
