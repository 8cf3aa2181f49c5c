"""Figures of the data card: how many images people have, and what the images are like."""

# Shape legend: C = people, K = bins

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from pipeline.data.checks import BRIGHTNESS_BINS, BYTES_BINS, CONTRAST_BINS, ImageStatistics

# Edges of the bins of `ImageStatistics` [K + 1].
BRIGHTNESS_EDGES: Final = np.linspace(0.0, 256.0, BRIGHTNESS_BINS + 1)
CONTRAST_EDGES: Final = np.linspace(0.0, 128.0, CONTRAST_BINS + 1)
BYTES_EDGES: Final = 2.0 ** (np.arange(BYTES_BINS + 1) / 2)
SIZES_DRAWN: Final = 8
_PEOPLE_BINS: Final = 40

Floats = NDArray[np.float64]


def people_figure(samples_C: Sequence[int]) -> Figure:
    """Draw how many people have how many images, and which share of people and of images that makes; log axes.

    Args:
        samples_C: Images of each person; people without any are left out, one at least has some.
    """
    met = np.sort(np.asarray(samples_C, np.int64))
    met = met[met > 0]
    figure = Figure(figsize=(12.6, 4.0), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    _people_panel(left, met)
    _shares_panel(right, met)
    ticks = _round_numbers(0.7 * met[0], 1.4 * met[-1])
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(0.7 * met[0], 1.4 * met[-1])
        _label_axis(axes, ticks)
        axes.set_xlabel("images of a person", fontsize=10)
        axes.tick_params(labelsize=9)
        axes.grid(visible=True, alpha=0.3)
    return figure


def _people_panel(axes: Axes, met: NDArray[np.int64]) -> None:
    edges = person_bins(int(met[0]), int(met[-1]))
    # A bin of several numbers is as high as its mean number, or wide bins would look like peaks.
    heights = np.histogram(met, edges)[0] / np.diff(edges)
    axes.stairs(heights, edges, fill=True, color="tab:blue", alpha=0.75)
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(0.7, 0.7 * float(heights[heights > 0].min())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("people with that number", fontsize=10)
    axes.set_title("How many images people have", fontsize=12)


def _shares_panel(axes: Axes, met: NDArray[np.int64]) -> None:
    numbers, people = np.unique(met, return_counts=True)
    for counts, color, name in (
        (people, "tab:blue", "of the people"),
        (people * numbers, "tab:orange", "of the images"),
    ):
        shares = 100.0 * np.cumsum(counts) / counts.sum()
        # From 0 up to the first step, and on to the border behind the last.
        x = np.concatenate(([0.5 * numbers[0]], numbers, [2.0 * numbers[-1]]))
        axes.step(x, np.concatenate(([0.0], shares, [100.0])), where="post", color=color, linewidth=2.0, label=name)
    axes.set_ylim(0.0, 102.0)
    axes.set_ylabel("%", fontsize=10)
    axes.set_title("Share of those with at most that many", fontsize=12)
    axes.legend(loc="upper left", fontsize=9)


def person_bins(fewest: int, most: int) -> Floats:
    """Edges of bins of whole numbers from ``fewest`` to ``most``: one number each, then about equal on a log axis."""
    rounded = np.unique(np.geomspace(fewest, most + 1, _PEOPLE_BINS + 1).round())
    return np.asarray(np.concatenate(([fewest], rounded[(rounded > fewest) & (rounded <= most)], [most + 1])) - 0.5)


def images_figure(statistics: ImageStatistics) -> Figure:
    """Draw brightness, contrast, encoded size and, where there are several, sizes in pixels.

    Args:
        statistics: Of at least one image; what was not decoded has no brightness, contrast and size in pixels.
    """
    panels = [_bytes_panel]
    if statistics.sizes:
        panels = [_brightness_panel, _contrast_panel, _bytes_panel]
    if len(statistics.sizes) > 1:
        panels.append(_sizes_panel)
    columns = 2 if len(panels) == 4 else len(panels)
    rows = len(panels) // columns
    figure = Figure(figsize=(4.2 * columns if columns > 1 else 7.0, 3.6 * rows), dpi=100, layout="constrained")
    for place, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(rows, columns, place), statistics)
    return figure


def _brightness_panel(axes: Axes, statistics: ImageStatistics) -> None:
    _histogram(axes, statistics.brightness, BRIGHTNESS_EDGES, "Brightness", "mean grey value, 0 to 255")
    axes.set_xlim(0.0, 256.0)
    axes.xaxis.set_major_locator(FixedLocator([0, 64, 128, 192, 256]))


def _contrast_panel(axes: Axes, statistics: ImageStatistics) -> None:
    _histogram(axes, statistics.contrast, CONTRAST_EDGES, "Contrast", "deviation of grey values")
    axes.set_xlim(0.0, 128.0)
    axes.xaxis.set_major_locator(FixedLocator([0, 32, 64, 96, 128]))


def _bytes_panel(axes: Axes, statistics: ImageStatistics) -> None:
    filled = np.flatnonzero(statistics.num_bytes)
    first, stop = max(0, int(filled[0]) - 2), min(BYTES_BINS, int(filled[-1]) + 3)
    edges = BYTES_EDGES[first : stop + 1]
    _histogram(axes, statistics.num_bytes[first:stop], edges, "Encoded size", "bytes of an image")
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    octaves = [2.0**power for power in range(64) if edges[0] <= 2.0**power <= edges[-1]]
    _label_axis(axes, octaves[:: 1 + len(octaves) // 9])


def _sizes_panel(axes: Axes, statistics: ImageStatistics) -> None:
    ranked = sorted(statistics.sizes.items(), key=lambda item: (-item[1], item[0]))
    drawn = ranked[:SIZES_DRAWN]
    if rest := sum(count for _, count in ranked[SIZES_DRAWN:]):
        drawn.append((f"{len(ranked) - SIZES_DRAWN} others", rest))
    bars = axes.barh([name for name, _ in drawn], [count for _, count in drawn], color="tab:blue", alpha=0.75)
    axes.bar_label(bars, labels=[f"{count:,}" for _, count in drawn], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.7, 8 * max(count for _, count in drawn))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.tick_params(labelsize=9)
    axes.set_title("Sizes found", fontsize=12)
    axes.set_xlabel("images", fontsize=10)
    axes.grid(visible=True, axis="x", alpha=0.3)


def _histogram(axes: Axes, counts_K: Sequence[int], edges: Floats, title: str, label: str) -> None:
    shares = 100.0 * np.asarray(counts_K, np.float64) / max(1, sum(counts_K))
    axes.stairs(shares, edges, fill=True, color="tab:blue", alpha=0.75)
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(label, fontsize=10)
    axes.set_ylabel("% of the images", fontsize=10)
    axes.set_ylim(bottom=0.0)
    axes.tick_params(labelsize=9)
    axes.grid(visible=True, alpha=0.3)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... between two bounds; every whole number where those are too few."""
    steps = [digit * 10.0**power for power in range(12) for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    if len(steps) < 3:
        steps = [float(number) for number in range(int(np.ceil(low)), int(high) + 1)]
    return steps[:: 1 + len(steps) // 12]


def _label_axis(axes: Axes, ticks: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def short_number(value: float) -> str:
    """A whole number in few characters: 512, 2k, 1.5k, 4M; thousands are 1024 for powers of two."""
    base = 1024.0 if value >= 1024 and float(np.log2(value)).is_integer() else 1000.0
    for suffix in ("", "k", "M"):
        if value < base:
            return f"{value:g}{suffix}"
        value /= base
    return f"{value:g}G"


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG: the same figure gives the same ones."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
