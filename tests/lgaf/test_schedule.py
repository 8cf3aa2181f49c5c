"""Learning rates: the paper's milestones at any run length, a warm-up without jumps, bounds, and torch's own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, PolynomialLR

from lgaf.schedule import Schedule, cosine_decay, polynomial_decay, step_decay, warm_up

BASE = 0.1
shares = st.floats(0.01, 1.0)
step_schedules = st.builds(
    Schedule,
    milestones=st.lists(shares, max_size=4).map(lambda found: tuple(sorted(found))),
    factor=st.floats(0.05, 1.0),
    warmup=st.floats(0.0, 1.0),
)
falling_schedules = st.builds(
    Schedule,
    kind=st.sampled_from(["polynomial", "cosine"]),
    power=st.floats(0.1, 4.0),
    floor=st.floats(0.0, 1.0),
    warmup=st.floats(0.0, 1.0),
)
schedules = step_schedules | falling_schedules


@given(st.integers(1, 100_000))
def test_default_drops_at_epochs_12_20_24_of_26(steps_per_epoch):
    schedule, total = Schedule(), 26 * steps_per_epoch
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
    rates = [Schedule().learning_rate(BASE, step, total) for step in range(total)]
    for step, rate in enumerate(rates):
        reached = sum(26 * step >= epoch * total for epoch in (12, 20, 24))
        assert rate == pytest.approx(BASE * 0.1**reached)


@given(st.floats(0.001, 1.0), st.integers(1, 3000))
def test_warmup_rises_evenly_to_the_base_and_never_is_zero(warmup, total):
    schedule = Schedule(milestones=(), warmup=warmup)
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
        steps_down = schedule.factor ** len(schedule.milestones)
        assert rate >= base * (steps_down if schedule.kind == "step" else schedule.floor) * (1 - 1e-9)


@given(schedules, st.integers(1, 1000))
def test_after_the_warmup_the_rate_never_rises(schedule, total):
    first = round(schedule.warmup * total)
    rates = [schedule.learning_rate(BASE, step, total) for step in range(first, total)]
    assert all(after <= before for before, after in pairwise(rates))


@given(falling_schedules, st.integers(2, 5000))
def test_a_falling_rate_starts_whole_behind_the_warmup_and_ends_one_step_before_its_floor(schedule, total):
    first = round(schedule.warmup * total)
    if first == total:
        return
    assert schedule.learning_rate(BASE, first, total) == pytest.approx(BASE)
    # The floor itself would be that of the step behind the last.
    assert schedule.learning_rate(BASE, total, total) == pytest.approx(schedule.floor * BASE, abs=1e-15)


@given(st.integers(1, 10_000), st.integers(0, 500), st.data())
def test_polynomial_is_insightfaces(total, warmup_steps, data):
    """The formula of arcface_torch's scheduler, warm-up steps left out of the decay, power 1 (PROTOCOLS 3(f))."""
    total += warmup_steps
    step = data.draw(st.integers(warmup_steps, total - 1))
    theirs = BASE * (1 - (step - warmup_steps) / (total - warmup_steps))
    schedule = Schedule(kind="polynomial", warmup=warmup_steps / total)
    assert schedule.learning_rate(BASE, step, total) == pytest.approx(theirs)


def test_the_shapes_have_their_known_values():
    assert [polynomial_decay(step, 4, 2.0) for step in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert [cosine_decay(step, 4) for step in range(5)] == pytest.approx([1, 0.85355339, 0.5, 0.14644661, 0])
    assert [step_decay(step, 4, (0.5, 0.75), 0.1) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [warm_up(step, 3) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize("kind", ["step", "polynomial", "cosine"])
def test_torchs_schedulers_agree(kind):
    """Step by step over a run without warm-up."""
    total, parameter = 40, torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=BASE)
    theirs = {
        "step": lambda: MultiStepLR(optimizer, [10, 20, 30], gamma=0.1),
        "polynomial": lambda: PolynomialLR(optimizer, total, power=1.5),
        "cosine": lambda: CosineAnnealingLR(optimizer, total),
    }[kind]()
    schedule = Schedule(kind=kind, milestones=(0.25, 0.5, 0.75), power=1.5)
    for step in range(total):
        assert schedule.learning_rate(BASE, step, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"milestones": (0.9, 0.5)}, r"schedule\.milestones=\(0\.9, 0\.5\)"),
        ({"milestones": (0.0,)}, r"schedule\.milestones"),
        ({"milestones": (12, 20, 24)}, r"schedule\.milestones=\(12, 20, 24\).*\(0, 1\]"),
        ({"milestones": (float("nan"),)}, r"schedule\.milestones"),
        ({"factor": 0.0}, r"schedule\.factor=0\.0"),
        ({"power": 0.0}, r"schedule\.power=0\.0"),
        ({"floor": 1.5}, r"schedule\.floor=1\.5"),
        ({"kind": "cosin"}, r"schedule\.kind='cosin'.*did you mean 'cosine'"),
        ({"warmup": 1.1}, r"schedule\.warmup=1\.1"),
        ({"warmup": -0.1}, r"schedule\.warmup=-0\.1"),
    ],
)
def test_bad_values_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        Schedule(**fields)
