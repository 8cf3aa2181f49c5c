"""The split of training steps for people: a table and a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.training.step_split import FOLDER, PARTS, StepSplit

_NAME: Final = re.compile(r"/rank(\d+)_steps\.json$")
_TEXT_WIDTH: Final = 100


def read_splits(run_uri: str) -> list[StepSplit]:
    """The splits of a run's profiled ranks, by rank; none where nothing was profiled."""
    files = [info.uri for info in storage.list_files(storage.join(run_uri, FOLDER))]
    return sorted((StepSplit.load(uri) for uri in files if _NAME.search(uri)), key=lambda split: split.rank)


def split_table(splits: Sequence[StepSplit]) -> Table:
    """Milliseconds a step and share of each part, of the first rank; with several, the least and most over them.

    Args:
        splits: By rank, at least one.
    """
    first = splits[0]
    table = Table(title=f"Where a step's time goes, rank {first.rank} of {first.world_size}", title_justify="left")
    table.add_column("part")
    names = ["ms a step", "share"] + (["least", "most"] if len(splits) > 1 else [])
    for name in names:
        table.add_column(name, justify="right")
    means, shares = first.mean_s, first.share
    for part in PARTS:
        row = [f"{means[part] * 1e3:,.2f}", f"{shares[part]:.1%}"]
        if len(splits) > 1:
            others = [split.mean_s[part] * 1e3 for split in splits]
            row += [f"{min(others):,.2f}", f"{max(others):,.2f}"]
        table.add_row(part.replace("_", " "), *row)
    table.add_section()
    table.add_row("step", f"{first.step_s * 1e3:,.2f}", "100.0%")
    table.add_row("collectives that nobody waits for", f"{first.overlapped_s * 1e3:,.2f}", "")
    table.caption = caption(first)
    table.caption_justify = "left"
    return table


def caption(split: StepSplit) -> str:
    """One line on what was measured."""
    last = split.first_step + len(split.steps) - 1
    text = (
        f"steps {split.first_step} to {last}: {1 / split.step_s:,.2f} steps/s, {split.images_per_second:,.0f} images/s"
    )
    if split.untraced_step_s:
        text += f"; before the profiler began {split.global_batch / split.untraced_step_s:,.0f} images/s"
    return text


def table_text(split: StepSplit) -> str:
    """The table as plain text."""
    console = Console(file=io.StringIO(), width=_TEXT_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(split_table([split]))
    return capture.get()


def split_figure(split: StepSplit) -> Figure:
    """Draw each profiled step as a bar of its parts."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    numbers = [split.first_step + i for i in range(len(split.steps))]
    floor = [0.0] * len(numbers)
    for i, part in enumerate(PARTS):
        heights = [step[part] * 1e3 for step in split.steps]
        label = f"{part.replace('_', ' ')} {split.share[part]:.1%}"
        axes.bar(numbers, heights, bottom=floor, width=0.8, color=f"C{i}", label=label)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("ms", fontsize=12)
    axes.set_title(f"Where a step's time goes, rank {split.rank} of {split.world_size}", fontsize=14)
    axes.grid(visible=True, axis="y", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=10)
    return figure
