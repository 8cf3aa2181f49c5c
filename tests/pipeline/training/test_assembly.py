"""How many threads a worker may give torch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.assembly import safe_threads


@pytest.mark.parametrize(
    ("threads", "sizes", "parts", "safe"),
    [
        (2, [64, 64], 1, 2),
        (2, [11, 11, 10], 1, 1),
        (8, [12, 12], 1, 6),
        (4, [64], 3, 1),
        (4, [64], 4, 4),
        (1, [7], 1, 1),
    ],
)
def test_threads_divide_what_is_computed_at_once(threads, sizes, parts, safe):
    assert safe_threads(threads, sizes, parts) == safe


@given(st.integers(1, 64), st.lists(st.integers(1, 600), min_size=1, max_size=8))
def test_there_are_never_more_than_wanted_and_always_one(threads, sizes):
    found = safe_threads(threads, sizes)
    assert 1 <= found <= threads
    assert all(size % found == 0 for size in sizes)
