"""The data plane against its rivals: images/s, first batches, memory, mixing, packing.

``make bench BENCH=data`` (about 25 minutes), ``ARGS="OUT.md --only adaface ours --repeats 1"`` for some of it. The set
(40,000 JPEGs, 1.4 GB in all forms) and the rivals' environment are made once, in and beside ``--folder``. Every thing
runs in a fresh process on two cores, one after the other, round after round: a machine that drifts then drifts for all.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.data.manifest import Manifest
from tests.benchmarks import data_report
from tests.benchmarks.data_arms import ARMS
from tests.benchmarks.data_order import many_shards, mixing
from tests.benchmarks.data_s3 import uploaded
from tests.benchmarks.data_set import DEFAULT_FOLDER, DataSet, open_set, write_record
from tests.benchmarks.data_watch import ArmError, make_mds, rivals_python, run_arm
from tests.benchmarks.head_report import Report

BUSY = 0.5


@dataclass
class Arguments:
    """Settings of the benchmark."""

    markdown: Annotated[str, tyro.conf.Positional] = ""
    """File to add the tables to."""
    only: tuple[str, ...] = ()
    """Arms, groups of them (the part of a name before the dash: adaface, webdataset, ray, streaming, ceiling, ours,
    pack) or `order`; all where empty. Arms: see `tests.benchmarks.data_arms.ARMS`."""
    repeats: int = 3
    """Rounds."""
    folder: Path = DEFAULT_FOLDER
    """Where the set is made and kept."""
    streaming_python: str = ""
    """Interpreter with MosaicML Streaming and torchvision; an environment is made beside the set where empty."""
    pack_copies: int = 1
    """Packing: how often each image is in the RecordIO file; 6 make 2 GB."""
    streams: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128)
    """Numbers of streams in the table of mixing."""


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments, config=(tyro.conf.AvoidSubcommands,))
    # Ended from outside, it must not leave the measured process behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = Report(arguments.markdown)
    load = os.getloadavg()[0]
    report.say(f"{os.cpu_count()} cores, load {load:.1f}")
    if load > BUSY:
        report.say("Other work is running: take the figures as provisional, and the ratios with care.")
    names = _names(arguments)
    data = open_set(arguments.folder, say=report.say)
    results, is_quiet = _run_all(arguments, names, data, report)
    data_report.rates(results, report)
    data_report.targets(results, report, is_quiet)
    for table in (data_report.resumes, data_report.memory, data_report.packing):
        table(results, report)
    if not arguments.only or "order" in arguments.only:
        _order(arguments, data, report)


def _names(arguments: Arguments) -> list[str]:
    known = {*ARMS, *(name.partition("-")[0] for name in ARMS), "order"}
    if unknown := set(arguments.only) - known:
        sys.exit(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")

    def is_wanted(name: str) -> bool:
        # A group's name that is an arm's too (`ours`) means the group.
        return not arguments.only or name in arguments.only or name.partition("-")[0] in arguments.only

    return [name for name in ARMS if is_wanted(name)]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What runs once a round: an arm, its option and its interpreter."""

    name: str
    option: str = ""
    python: str = sys.executable


def _run_all(arguments: Arguments, names: list[str], data: DataSet, report: Report) -> tuple[data_report.Results, bool]:
    with ExitStack() as servers:
        return _take_turns(_turns(arguments, names, data, report, servers), arguments.repeats, data, report)


def _turns(arguments: Arguments, names: list[str], data: DataSet, report: Report, servers: ExitStack) -> list[Turn]:
    """Prepare what the arms need; those that cannot have it are named and left out."""
    turns, guests = [], [name for name in names if ARMS[name].rivals_python]
    if guests:
        try:
            python = arguments.streaming_python or rivals_python(arguments.folder.parent / "streaming-venv")
            make_mds(data.folder, python)
            turns += [Turn(name=name, python=python) for name in guests]
        except ArmError as error:
            report.say(str(error))
    if "ours-s3" in names:
        try:
            turns.append(Turn(name="ours-s3", option=servers.enter_context(uploaded(data))))
        except ArmError as error:
            report.say(str(error))
    for name in names:
        if name not in guests and name != "ours-s3":
            turns.append(Turn(name=name, option=_record(arguments, data) if name.startswith("pack") else ""))
    return sorted(turns, key=lambda turn: list(ARMS).index(turn.name))


def _take_turns(turns: list[Turn], repeats: int, data: DataSet, report: Report) -> tuple[data_report.Results, bool]:
    """Run the arms round after round; gives their results, and whether the machine was quiet before each.

    An arm that fails is named and left out from there on.
    """
    results: data_report.Results = {}
    before: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=report.console) as progress:
        bar = progress.add_task("", total=repeats * len(turns))
        for _ in range(repeats):
            for turn in list(turns):
                progress.update(bar, description=turn.name)
                before.append(psutil.cpu_percent(1.0))
                try:
                    watched = run_arm(turn.name, data.folder, turn.option, turn.python)
                    results.setdefault(turn.name, []).append(watched)
                    # Said at once: a run that is stopped has not been for nothing.
                    report.say(f"{turn.name}: {watched.result.rate:,.0f} images/s")
                except ArmError as error:
                    report.say(str(error))
                    turns.remove(turn)
                    results.pop(turn.name, None)
                finally:
                    shutil.rmtree(data.folder / f"{turn.name}-out", ignore_errors=True)
                progress.advance(bar)
    return results, data_report.loads(before, report) if before else True


def _record(arguments: Arguments, data: DataSet) -> str:
    """The RecordIO file to pack; empty: the set's own."""
    if arguments.pack_copies == 1:
        return ""
    folder = data.folder / f"copies-{arguments.pack_copies}"
    if not (folder / "property").exists():  # written last
        images = data.jpegs()
        write_record(folder / "train.rec", [images[i] for i in range(len(images))], data.labels, arguments.pack_copies)
    return str(folder / "train.rec")


def _order(arguments: Arguments, data: DataSet, report: Report) -> None:
    manifest, labels = Manifest.load(str(data.packed)), data.labels
    for each in (manifest, many_shards(manifest, 8)):
        found = {f"{count} streams": mixing(each, labels, count) for count in arguments.streams}
        found["full permutation"] = mixing(each, labels, None)
        size = each.shards[0].num_samples
        data_report.order(found, report, f"Mixing: {len(each.shards)} shards of {size:,} samples, batch 128")


if __name__ == "__main__":
    main()
