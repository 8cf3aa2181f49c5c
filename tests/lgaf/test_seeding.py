"""Seeds: distinct over all that a run draws for, every part counts, and they fit torch's CPU generator."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from lgaf.seeding import mixed_seed

parts = st.integers(0, 2**63 - 1)


def test_distinct_over_seeds_steps_and_ranks():
    grid = list(itertools.product(range(4), range(250), range(8)))
    assert len({mixed_seed(*point) for point in grid}) == len(grid)


def test_no_two_streams_of_one_step_are_shifts_of_each_other():
    # Seeds that differ by a constant over a grid would repeat: seed + step + rank is the classic mistake.
    assert len({mixed_seed(a, b, c) for a, b, c in itertools.permutations((1, 2, 3))}) == 6
    assert mixed_seed(1, 0, 0) != mixed_seed(0, 1, 0) != mixed_seed(0, 0, 1)


@given(st.lists(parts, min_size=1, max_size=4), st.data())
def test_every_part_matters(numbers, data):
    index = data.draw(st.integers(0, len(numbers) - 1))
    other = data.draw(parts.filter(lambda value: value != numbers[index]))
    changed = [*numbers[:index], other, *numbers[index + 1 :]]
    assert mixed_seed(*changed) != mixed_seed(*numbers)


@given(parts, st.integers(0, 10**6), st.integers(0, 10**4))
def test_fits_the_32_bits_that_torch_uses(seed, step, rank):
    mixed = mixed_seed(seed, step, rank)
    assert isinstance(mixed, int)
    assert 0 <= mixed < 2**32
    assert mixed == mixed_seed(seed, step, rank)


def test_torch_draws_differ_where_the_seeds_do():
    draws = {
        tuple(torch.rand(2, generator=torch.Generator().manual_seed(mixed_seed(0, step, rank))).tolist())
        for step in range(20)
        for rank in range(4)
    }
    assert len(draws) == 80
