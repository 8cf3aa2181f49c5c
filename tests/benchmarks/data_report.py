"""Tables of the data benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.benchmarks.data_arms import ARMS
from tests.benchmarks.data_order import Mixing
from tests.benchmarks.data_watch import Watched
from tests.benchmarks.head_report import Report, mib

Results = dict[str, list[Watched]]
# (rival, at least this many times as fast), from the issue.
TARGETS = (("adaface", 3.0), ("adaface-torchvision", 3.0), ("ray", 2.0), ("ray-fast", 2.0), ("ceiling-2", 0.85))
OURS = ("ours", "ours-2")
QUIET = 5.0


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """A cell: median (least to most)."""
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return ""
    middle = form(float(np.median(values)))
    return middle if len(values) == 1 else f"{middle} ({form(min(values))}-{form(max(values))})"


def number(value: float) -> str:
    """A cell."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """A cell."""
    return f"{value:.2f} s"


def ratios(results: Results, ours: str, other: str) -> list[float]:
    """Our rate over the other's, repeat by repeat."""
    pairs = zip(results.get(ours, []), results.get(other, []), strict=False)
    return [own.result.rate / theirs.result.rate for own, theirs in pairs]


def rates(results: Results, report: Report) -> None:
    """The table of all loaders that read an epoch."""
    names = [name for name in results if not ARMS[name].resumed and not name.startswith("pack")]
    rows = []
    for name in names:
        runs = results[name]
        is_loader = not name.startswith("ceiling")
        row = [ARMS[name].title, runs[0].result.batch, spread([run.result.rate for run in runs], number)]
        row += [_times(ratios(results, ours, name)) if ours != name else "" for ours in OURS]
        row.append(spread([run.result.first_batch for run in runs], seconds) if is_loader else "")
        row.append(spread([run.result.first - run.started for run in runs], seconds) if is_loader else "")
        rows.append([*row, spread([float(run.peak) for run in runs], lambda size: mib(int(size)))])
    if rows:
        report.table(
            f"Loaders: images/s after warm-up, two cores, batch 128, {max(map(len, results.values()))} repeats in turn",
            ("loader", "a batch", "images/s", "one rank / this", "two ranks / this", *_FIRST, "peak memory"),
            rows,
            "Median (least to most); ratios are medians over the repeats. Peak memory: proportional set sizes of all "
            "processes together, once a second. Ours is timed over a whole epoch between two others, the rivals over "
            "the last 80 % of one. Every epoch was checked: each sample once, with its label.",
        )


_FIRST = ("first batch", "from the process's start")


def _times(values: list[float]) -> str:
    return spread(values, lambda value: f"{value:.2f}x")


def targets(results: Results, report: Report, is_quiet: bool) -> None:
    """The issue's targets beside what was found; no verdict where other work took part of the machine."""
    rows = []
    for name, least in TARGETS:
        for ours in OURS:
            if found := ratios(results, ours, name):
                met = ("yes" if np.median(found) >= least else "no") if is_quiet else "not to be told"
                rows.append([f"{ARMS[ours].title} / {ARMS[name].title}", f"{least:.2f}x", _times(found), met])
    if rows:
        note = "" if is_quiet else "The machine was busy: repeat this on a quiet one."
        report.table("Targets", ("ratio of images/s", "at least", "found", "met"), rows, note)


def resumes(results: Results, report: Report) -> None:
    """First batches from the start and from mid-epoch."""
    rows = []
    for name, runs in results.items():
        if ARMS[name].resumed:
            start = results.get(name.removesuffix("-resumed"), [])
            cells = [spread([run.result.first_batch for run in part], seconds) for part in (start, runs)]
            rows.append([ARMS[name].title, *cells])
    if rows:
        report.table(
            "Time to the first batch",
            ("loader", "from the start", "after a resume in mid-epoch"),
            rows,
            "From asking the loader (libraries loaded, Ray up). AdaFace's loader, webdataset and read_webdataset have "
            "no resume: they would read up to the place and throw away.",
        )


def memory(results: Results, report: Report) -> None:
    """Whether memory stays flat over epochs."""
    rows = []
    for name, runs in results.items():
        if not name.startswith("ours") or ARMS[name].resumed:
            continue
        for repeat, run in enumerate(runs, start=1):
            timed = run.result
            epochs = [run.memory_between(timed.warm, timed.end), run.memory_between(timed.end, timed.done)]
            cells = [f"{mib(int(part.min()))} to {mib(int(part.max()))}" if len(part) else "" for part in epochs]
            rows.append([ARMS[name].title, str(repeat), *cells])
    if rows:
        report.table(
            "Memory of the whole pipeline, Ray and the rank's process included",
            ("stream", "repeat", "least to most in the second epoch", "in the third"),
            rows,
        )


def packing(results: Results, report: Report) -> None:
    """Speed and memory of packing."""
    rows = []
    for name, runs in results.items():
        if not name.startswith("pack"):
            continue
        rate = [run.result.rate for run in runs]
        bulk = [run.result.extra["num_bytes"] / 1e6 / (run.result.end - run.result.warm) for run in runs]
        rows.append(
            [
                ARMS[name].title,
                f"{runs[0].result.extra['num_bytes'] / 1e6:,.0f} MB, {runs[0].result.samples:,} images",
                spread(rate, number),
                spread(bulk, lambda value: f"{value:.0f} MB/s"),
                spread([float(run.peak) for run in runs], lambda size: mib(int(size))),
            ]
        )
    if rows:
        report.table("Packing from RecordIO", ("", "pack", "images/s", "MB/s", "peak memory"), rows)


def order(found: dict[str, Mixing], report: Report, title: str) -> None:
    """How well the order mixes."""
    rows = [
        [
            name,
            " / ".join(number(value) for value in mixing.distances),
            f"{mixing.shards_per_batch:.1f}",
            f"{100 * mixing.same_shard_pairs:.1f} %",
            f"{mixing.collisions[0]:.2f} ± {mixing.collisions[1]:.2f}",
            f"{mixing.sorted_collisions[0]:.2f} ± {mixing.sorted_collisions[1]:.2f}",
        ]
        for name, mixing in found.items()
    ]
    report.table(
        title,
        (
            *("order", "batches between neighbours of a shard: 1st / 5th / 50th / 95th percentile"),
            *("shards a batch", "pairs of one shard"),
            *("pairs of one person a batch", "if packed in order of persons"),
        ),
        rows,
        "Five epochs; mean ± standard deviation over the batches.",
    )


def loads(before: Sequence[float], report: Report) -> bool:
    """Say how quiet the machine was; whether it was quiet before every run."""
    loud = sum(share > QUIET for share in before)
    most = max(before)
    text = f"CPU of other work in the second before each run: median {np.median(before):.0f} %, most {most:.0f} %."
    if loud:
        text += f" In {loud} of {len(before)} runs it was above {QUIET:.0f} %: take these figures as provisional."
    report.say(text)
    return not loud
