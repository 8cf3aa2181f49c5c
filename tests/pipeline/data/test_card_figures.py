"""Figures of the data card: their bins hold every value once, and they show what is given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import StepPatch
from PIL import Image

from pipeline.data.card_figures import images_figure, people_figure, person_bins, png, short_number
from pipeline.data.checks import ImageStatistics


def statistics(sizes: dict[str, int], *, decoded: bool = True) -> ImageStatistics:
    found = ImageStatistics()
    rng = np.random.default_rng(1)
    for name, count in sizes.items():
        width, height = map(int, name.split("x"))
        for _ in range(count):
            image = rng.integers(0, rng.integers(2, 256), (height, width, 3), dtype=np.uint8)
            found.add(int(rng.integers(500, 9000)), image if decoded else None, "colour")
    return found


@given(fewest=st.integers(1, 3000), more=st.integers(0, 100_000))
def test_bins_of_people_hold_every_number_once(fewest, more):
    edges = person_bins(fewest, fewest + more)
    assert edges[0] == fewest - 0.5
    assert edges[-1] == fewest + more + 0.5
    assert np.all(np.diff(edges) >= 1)
    assert np.all(edges % 1 == 0.5), "no number lies on an edge"
    assert len(edges) <= 43


@pytest.mark.parametrize(
    "samples", [[1], [7], [3, 3, 3], [1, 2], [2, 0, 5], list(range(1, 700)), [1] * 1000 + [100_000]]
)
def test_the_figure_of_people_counts_each_person_once(samples):
    figure = people_figure(samples)
    left, right = figure.axes
    (bars,) = [patch for patch in left.patches if isinstance(patch, StepPatch)]
    heights, edges, _ = bars.get_data()
    assert np.sum(heights * np.diff(edges)) == pytest.approx(np.count_nonzero(samples))
    low, high = left.get_ylim()
    assert low < heights[heights > 0].min()
    assert high > heights.max()
    for line, weight in zip(right.lines, (np.sign(samples), np.array(samples)), strict=True):
        x, y = line.get_data()
        assert np.all(np.diff(y) >= 0)
        assert (y[0], y[-1]) == (0, pytest.approx(100))
        middle = np.median(x)
        share = 100 * weight[np.array(samples) <= middle].sum() / weight.sum()
        assert y[np.searchsorted(x, middle, side="right") - 1] == pytest.approx(share)
    assert Image.open(io.BytesIO(png(figure))).size == (1260, 400)


@pytest.mark.parametrize(
    ("sizes", "decoded", "titles"),
    [
        ({"112x112": 30}, True, ["Brightness", "Contrast", "Encoded size"]),
        ({"112x112": 1}, True, ["Brightness", "Contrast", "Encoded size"]),
        ({"112x112": 1}, False, ["Encoded size"]),
        ({"112x112": 9, "96x112": 2}, True, ["Brightness", "Contrast", "Encoded size", "Sizes found"]),
        ({f"{s}x20": 1 for s in range(20, 50)}, True, ["Brightness", "Contrast", "Encoded size", "Sizes found"]),
    ],
    ids=["one size", "one image", "not decoded", "two sizes", "many sizes"],
)
def test_the_figure_of_images_has_a_panel_for_what_is_known(sizes, decoded, titles):
    figure = images_figure(statistics(sizes, decoded=decoded))
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes in figure.axes[:3]:
        for patch in axes.patches:
            assert isinstance(patch, StepPatch)
            assert np.sum(patch.get_data().values) == pytest.approx(100)
            assert patch.get_data().edges[0] >= axes.get_xlim()[0], "all bars are on the picture"
            assert patch.get_data().edges[-1] <= axes.get_xlim()[1]
    if len(titles) == 4:
        bars = figure.axes[3].patches
        assert len(bars) == min(9, len(sizes))
        assert sum(bar.get_width() for bar in bars) == sum(sizes.values())
    assert 0 < len(png(figure)) < 200_000


def test_statistics_at_the_ends_of_their_scales_are_drawn():
    found = ImageStatistics()
    for value, size in ((0, 1), (255, 1 << 40)):
        found.add(size, np.full((4, 4, 3), value, np.uint8), "grey")
    figure = images_figure(found)
    assert figure.axes[2].get_xlim() == (1, 2**22)
    assert png(figure) == png(images_figure(found)), "the same figure gives the same bytes"


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (512, "512"), (1000, "1k"), (1024, "1k"), (2048, "2k"), (5e6, "5M"), (2**30, "1G")]
)
def test_numbers_of_axes_are_short(value, text):
    assert short_number(value) == text
