"""The margin head against its rival, PartialFC_V2: time, memory, bytes between ranks, sampling, margins.

``make bench BENCH=head`` takes all tables for a CPU, ``ARGS="--sections rival ranks"`` some of them; on a GPU machine
``ARGS="--device cuda"`` (`tests.benchmarks.head_cuda`). Memory is measured in a fresh process a case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lgaf.heads.margins import MARGINS, create_margin
from tests.benchmarks import head_cuda
from tests.benchmarks.head_measure import (
    ARCFACE,
    COSFACE,
    Arm,
    Problem,
    Timing,
    alternate,
    gap,
    isolated,
    peak_extra,
    wrong_path,
)
from tests.benchmarks.head_ranks import report_ranks
from tests.benchmarks.head_report import MIB, Report, mib, milliseconds, ratio
from tests.benchmarks.head_sampling import report_sampling

Section = Literal["rival", "classes", "ranks", "sampling", "margins", "cuda"]
Advance = Callable[[], None]
CPU_SECTIONS: tuple[Section, ...] = ("rival", "classes", "ranks", "sampling", "margins")
OURS = (Arm("ours, kept", "kept"), Arm("ours, recomputed", "recompute"))
RIVAL = Arm("PartialFC_V2", "rival")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


@dataclass
class Arguments:
    """Settings of the benchmark."""

    sections: tuple[Section, ...] = ()
    """Tables to take; all of the device where empty."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    dim: int = 512
    """Dimension of the embedding."""
    batch: int = 256
    """Rows a step."""
    repeats: int = 5
    """Timed rounds of each case, after one that is not counted."""
    threads: int = 2
    """Threads of torch (each rank has one)."""
    small_budget: int = 64
    """Memory budget of the recomputing head, MiB (less where that would be enough to keep the exponentials)."""
    rival_classes: tuple[int, ...] = (100_000, 400_000)
    """Sizes of the rival's table."""
    sweep_classes: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000)
    """Sizes of the table of costs against classes."""
    rank_classes: int = 100_000
    """Classes of all ranks together."""
    rank_batch: int = 64
    """Rows of each rank."""
    worlds: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks."""
    sampling_classes: int = 400_000
    """Classes of the table of sampling."""
    sample_rate: float = 0.1
    """Share of the centres it sees."""
    margin_classes: int = 100_000
    """Classes of the table of margins."""
    markdown: str = ""
    """File to add the tables to."""
    plots: str = "outputs/plots"
    """Folder for plots."""


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments)
    report = Report(arguments.markdown)
    if (load := os.getloadavg()[0]) > 0.5:
        report.say(
            f"Other work is running (load {load:.1f}): threads that wait for each other swing most; take --threads 1, "
            "or wait, for ratios that mean something."
        )
    sections = arguments.sections or (CPU_SECTIONS if arguments.device == "cpu" else ("cuda",))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=report.console) as progress:
        for section in sections:
            bar = progress.add_task(section, total=_cases(section, arguments))
            SECTIONS[section](arguments, report, lambda bar=bar: progress.advance(bar))


def _cases(section: Section, arguments: Arguments) -> int:
    counts = {
        "rival": 2 * len(arguments.rival_classes),
        "classes": len(arguments.sweep_classes),
        "ranks": len(arguments.worlds),
    }
    return counts.get(section, 1)


def _problem(arguments: Arguments, num_classes: int) -> Problem:
    return Problem(
        num_classes,
        arguments.dim,
        arguments.batch,
        arguments.device,
        arguments.threads,
        arguments.small_budget * MIB,
    )


def _time(problem: Problem, arms: Sequence[Arm], repeats: int, recycle: bool = False) -> dict[str, Timing | None]:
    timings = isolated(problem.device, alternate, problem, arms, repeats, recycle)
    return timings or dict.fromkeys((arm.name for arm in arms), None)


def rival(arguments: Arguments, report: Report, advance: Advance) -> None:
    """Time and memory of both heads, whose losses and gradients must agree."""
    rows = []
    for num_classes in arguments.rival_classes:
        problem = _problem(arguments, num_classes)
        for margin, name in ((ARCFACE, "arcface"), (COSFACE, "cosface")):
            arms = [replace(arm, margin=margin) for arm in (*OURS, RIVAL)]
            fresh = _time(problem, arms, arguments.repeats)
            recycled = _time(problem, arms, arguments.repeats, recycle=True) if problem.device == "cpu" else {}
            memory = {arm.name: isolated(problem.device, peak_extra, problem, arm) for arm in arms}
            for arm in arms:
                if fault := wrong_path(problem, arm, memory[arm.name]):
                    raise SystemExit(fault)
                cells = [f"{num_classes:,}", name, arm.name, *_times(fresh, arm), *_times(recycled, arm)]
                cells += [mib(memory[arm.name]), ratio(memory[arm.name], memory[RIVAL.name])]
                rows.append([*cells, _difference(fresh[arm.name], fresh[RIVAL.name], cells[:3])])
            advance()
    times = ("median", "least", "rival / this")
    report.table(
        f"Against the rival: forward+backward, float32, B={arguments.batch}, D={arguments.dim},"
        f" {arguments.threads} threads, {arguments.repeats} repeats in turn",
        (
            *("classes", "margin", "head", *times, *(f"recycling: {column}" for column in times)),
            *("peak extra memory", "rival / this", "loss (differs by; gradient by)"),
        ),
        rows,
        "Extra: beyond the centres and their gradient. Recycling: the process keeps freed memory, as on an accelerator;"
        " else the kernel gives each large tensor fresh pages, whose faults count.",
    )


def _times(timings: dict[str, Timing | None], arm: Arm) -> list[str]:
    own, theirs = timings.get(arm.name), timings.get(RIVAL.name)
    if own is None:
        return ["killed" if timings else "", "", ""]
    return [milliseconds(own.median), milliseconds(min(own.seconds)), ratio(own.median, theirs and theirs.median)]


def _difference(own: Timing | None, theirs: Timing | None, names: list[str]) -> str:
    """A cell; the program ends where the heads do not agree."""
    if own is None or theirs is None:
        return ""
    loss_gap, gradient_gap = gap(own, theirs)
    if not (loss_gap <= LOSS_TOLERANCE and gradient_gap <= GRADIENT_TOLERANCE):
        raise SystemExit(f"{names}: loss {own.loss}, the rival's {theirs.loss}; gradients differ by {gradient_gap:.1e}")
    return f"{own.loss:.5f} ({loss_gap:.0e}; {gradient_gap:.0e})"


def classes(arguments: Arguments, report: Report, advance: Advance) -> None:
    """Cost against the number of classes, with a straight line through it."""
    rows, seconds, memory = [], {arm.name: [] for arm in OURS}, {arm.name: [] for arm in OURS}
    for num_classes in arguments.sweep_classes:
        problem = _problem(arguments, num_classes)
        timings = _time(problem, OURS, arguments.repeats)
        for arm in OURS:
            own, extra = timings[arm.name], isolated(problem.device, peak_extra, problem, arm)
            seconds[arm.name].append(own.median if own else np.nan)
            memory[arm.name].append(np.nan if extra is None else extra / MIB)
            nanoseconds = f"{1e9 * own.median / num_classes:,.0f} ns" if own else ""
            rows.append([f"{num_classes:,}", arm.name, milliseconds(own.median) if own else "killed", nanoseconds])
            rows[-1].append(mib(extra))
        advance()
    report.table(
        f"Cost against classes: float32, B={arguments.batch}, D={arguments.dim}, CosFace, {arguments.threads} threads",
        ("classes", "head", "forward+backward", "a class", "peak extra memory"),
        rows,
        f"Median of {arguments.repeats}.",
    )
    fits = []
    for arm in OURS:
        for what, unit, values in (("time", "ms", 1000 * np.array(seconds[arm.name])), ("memory", "MiB", memory)):
            values = values[arm.name] if what == "memory" else values
            intercept, slope, r2 = line(np.array(arguments.sweep_classes) / 1e6, np.array(values))
            fits.append([arm.name, what, f"{intercept:,.1f} {unit}", f"{slope:,.1f} {unit}", f"{r2:.5f}"])
    report.table("Straight lines", ("head", "of", "at 0 classes", "a million classes", "R²"), fits)
    report.say(f"plot: {plot(arguments, seconds, memory)}")


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Intercept, slope and R² of the least-squares line; of what was measured."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    if len(x) < 2:
        return float("nan"), float("nan"), float("nan")
    slope, intercept = np.polyfit(x, y, 1)
    scatter = ((y - y.mean()) ** 2).sum()
    return intercept, slope, 1 - ((y - intercept - slope * x) ** 2).sum() / scatter if scatter else 1.0


def plot(arguments: Arguments, seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> Path:
    """Both costs against classes, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    millions = np.array(arguments.sweep_classes) / 1e6
    for axis, values, label in ((axes[0], seconds, "seconds a step"), (axes[1], memory, "peak extra memory, MiB")):
        for name, own in values.items():
            intercept, slope, _ = line(millions, np.array(own))
            (points,) = axis.plot(millions, own, "o", label=name)
            axis.plot(millions, intercept + slope * millions, color=points.get_color(), linewidth=1)
        axis.set(xlabel="million classes", ylabel=label, ylim=(0, None))
        axis.legend()
    Path(arguments.plots).mkdir(parents=True, exist_ok=True)
    figure.savefig(path := Path(arguments.plots) / "head_classes.png", dpi=120)
    return path


def ranks(arguments: Arguments, report: Report, advance: Advance) -> None:
    """Time and bytes over gloo ranks."""
    problem = replace(_problem(arguments, arguments.rank_classes), batch=arguments.rank_batch)
    report_ranks(report, problem, (*OURS, RIVAL), arguments.worlds, arguments.repeats, advance)


def sampling(arguments: Arguments, report: Report, advance: Advance) -> None:
    """Sampled centres against all of them."""
    report_sampling(report, _problem(arguments, arguments.sampling_classes), arguments.sample_rate, arguments.repeats)
    advance()


def margins(arguments: Arguments, report: Report, advance: Advance) -> None:
    """Time of every margin against the simplest."""
    problem = _problem(arguments, arguments.margin_classes)
    named = {name: create_margin(name) for name in MARGINS} | {"arcface, straight-through": ARCFACE}
    arms = [replace(arm, name=f"{name}: {arm.name}", margin=m) for name, m in named.items() for arm in OURS]
    timings = _time(problem, arms, arguments.repeats)
    rows = []
    for name in named:
        cells = [name]
        for arm in OURS:
            own, plain = timings[f"{name}: {arm.name}"], timings[f"cosface: {arm.name}"]
            cells += [milliseconds(own.median), f"{own.median / plain.median:.2f}"] if own and plain else ["", ""]
        rows.append(cells)
    report.table(
        f"Margins: {problem.num_classes:,} classes, float32, B={problem.batch}, D={problem.dim},"
        f" {problem.threads} threads, median of {arguments.repeats} in turn",
        ("margin", *(column for arm in OURS for column in (arm.name, "of cosface"))),
        rows,
    )
    advance()


def cuda(arguments: Arguments, report: Report, advance: Advance) -> None:
    """What only a GPU shows."""
    head_cuda.run(report, dim=arguments.dim, repeats=arguments.repeats)
    advance()


SECTIONS: dict[Section, Callable[[Arguments, Report, Advance], None]] = {
    "rival": rival,
    "classes": classes,
    "ranks": ranks,
    "sampling": sampling,
    "margins": margins,
    "cuda": cuda,
}


if __name__ == "__main__":
    main()
