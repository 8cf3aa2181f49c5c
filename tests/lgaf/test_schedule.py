"""Learning rates: the paper's milestones at any run length, a warm-up without jumps, and bounds."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgaf.schedule import StepSchedule

BASE = 0.1
shares = st.floats(0.01, 1.0)
schedules = st.builds(
    StepSchedule,
    milestones=st.lists(shares, max_size=4).map(lambda found: tuple(sorted(found))),
    factor=st.floats(0.05, 1.0),
    warmup=st.floats(0.0, 1.0),
)


@given(st.integers(1, 100_000))
def test_default_drops_at_epochs_12_20_24_of_26(steps_per_epoch):
    schedule, total = StepSchedule(), 26 * steps_per_epoch
    for reached, epoch in enumerate((12, 20, 24)):
        first = epoch * steps_per_epoch
        before, after = (schedule.learning_rate(BASE, step, total) for step in (first - 1, first))
        assert before == pytest.approx(BASE * 0.1**reached)
        assert after == pytest.approx(BASE * 0.1 ** (reached + 1))
    assert schedule.learning_rate(BASE, 0, total) == BASE
    assert schedule.learning_rate(BASE, total - 1, total) == pytest.approx(1e-4)


@given(st.integers(1, 5000))
def test_the_shape_is_the_same_at_any_run_length(total):
    # 26 need not divide the run: each milestone falls on the first step at or after its share.
    rates = [StepSchedule().learning_rate(BASE, step, total) for step in range(total)]
    for step, rate in enumerate(rates):
        reached = sum(26 * step >= epoch * total for epoch in (12, 20, 24))
        assert rate == pytest.approx(BASE * 0.1**reached)


@given(st.floats(0.001, 1.0), st.integers(1, 3000))
def test_warmup_rises_evenly_to_the_base_and_never_is_zero(warmup, total):
    schedule = StepSchedule(milestones=(), warmup=warmup)
    rates = [schedule.learning_rate(BASE, step, total) for step in range(total)]
    assert min(rates) > 0
    assert max(rates) <= BASE * (1 + 1e-12)
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(rates))
    risen = round(warmup * total)
    if risen == 0:
        assert set(rates) == {BASE}
        return
    # Continuous: it starts one stride above nothing, all strides are equal, it meets the base rate.
    stride = BASE / risen
    for low, high in pairwise([0.0, *rates[:risen]]):
        assert high - low == pytest.approx(stride, rel=1e-6)
    assert rates[risen - 1] == pytest.approx(BASE)
    assert all(rate == BASE for rate in rates[risen:])


@given(schedules, st.floats(1e-4, 10.0), st.integers(1, 10_000), st.data())
def test_every_rate_lies_within_bounds(schedule, base, total, data):
    step = data.draw(st.integers(0, total - 1))
    rate = schedule.learning_rate(base, step, total)
    assert math.isfinite(rate)
    assert 0 < rate <= base * (1 + 1e-12)
    if step >= round(schedule.warmup * total):
        assert rate >= base * schedule.factor ** len(schedule.milestones) * (1 - 1e-9)


@given(schedules, st.integers(1, 1000))
def test_after_the_warmup_the_rate_never_rises(schedule, total):
    first = round(schedule.warmup * total)
    rates = [schedule.learning_rate(BASE, step, total) for step in range(first, total)]
    assert all(after <= before for before, after in pairwise(rates))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"milestones": (0.9, 0.5)}, r"schedule\.milestones=\(0\.9, 0\.5\)"),
        ({"milestones": (0.0,)}, r"schedule\.milestones"),
        ({"milestones": (12, 20, 24)}, r"schedule\.milestones=\(12, 20, 24\).*\(0, 1\]"),
        ({"milestones": (float("nan"),)}, r"schedule\.milestones"),
        ({"factor": 0.0}, r"schedule\.factor=0\.0"),
        ({"warmup": 1.1}, r"schedule\.warmup=1\.1"),
        ({"warmup": -0.1}, r"schedule\.warmup=-0\.1"),
    ],
)
def test_bad_values_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        StepSchedule(**fields)
