"""The built-in profiler on real steps of two ranks, with delays of known length in known places."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import record_function

from lgaf import phases
from lgaf.distributed import rank_in
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.step import TrainStep
from pipeline.config import RESUMABLE, recipe
from pipeline.presets import demo
from pipeline.training.profiling import ProfileConfig, StepProfiler
from pipeline.training.split_report import read_splits, split_table, table_text
from pipeline.training.step_split import PARTS, StepSplit
from tests.distributed import run_distributed

ROWS = 4
AFTER, STEPS = 2, 2
PROFILE = ProfileConfig(steps=STEPS, after=AFTER, all_ranks=True)
# Seconds in each part, all different; nothing can be put into the others.
DELAYS = {"data_wait": 0.06, "forward": 0.08, "head": 0.1, "backward": 0.12, "optimizer": 0.14, "other": 0.16}
SKEW_S = 0.25


class _Delay:
    """Sleeps, and notes how long that took in the profiled steps: a busy machine sleeps longer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.slept_s = 0.0
        self.counts = False

    def __call__(self) -> None:
        started = time.perf_counter()
        time.sleep(self._seconds)
        self.slept_s += (time.perf_counter() - started) / STEPS * self.counts


def _step(group) -> TrainStep:
    torch.manual_seed(0)
    model = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, dropout=0.0).build()
    head = ShardedMarginHead(6, 8, create_margin("arcface"), group=group)
    return TrainStep(model, head, OptimizerConfig(learning_rate=0.01, max_norm=5.0), Schedule(), 100, group=group)


def _loop(step: TrainStep, profiler: StepProfiler, num_steps: int, delays: dict[str, _Delay]) -> tuple[float, float]:
    """As the training loop's; gives the mean wall time of profiled steps, and of their data wait, by another clock."""
    images = torch.randint(0, 256, (ROWS, 112, 112, 3), dtype=torch.uint8)
    labels = torch.arange(ROWS)
    step_s = wait_s = 0.0
    for number in range(num_steps):
        is_profiled = AFTER <= number < AFTER + STEPS
        for delay in delays.values():
            delay.counts = is_profiled
        started = time.perf_counter()
        with record_function(phases.DATA_WAIT):
            delays.get("data_wait", _nothing)()
        waited = time.perf_counter()
        step(images, labels, sizes=None if step.group is None else [ROWS, ROWS])
        delays.get("other", _nothing)()
        step_s += (time.perf_counter() - started) / STEPS * is_profiled
        wait_s += (waited - started) / STEPS * is_profiled
        profiler.step()
    return step_s, wait_s


def _nothing() -> None:
    pass


def _put(delays: dict[str, _Delay], step: TrainStep) -> None:
    """Put the delays into their parts of the step, but those which the loop has."""
    places = {
        "forward": step.model.register_forward_pre_hook,
        "head": step.head.register_forward_pre_hook,
        "backward": step.model.register_full_backward_pre_hook,
        "optimizer": step.optimizer.register_step_pre_hook,
    }
    for part in places.keys() & delays.keys():
        places[part](lambda *_, delay=delays[part]: delay())


def _profiled(group, folder: Path, seconds: dict[str, float]) -> StepSplit:
    """The split of a run with delays on this rank, each found in its part."""
    step, rank = _step(group), rank_in(group)
    delays = {part: _Delay(length) for part, length in seconds.items()}
    _put(delays, step)
    with StepProfiler(PROFILE, str(folder), step, 2 * ROWS) as profiler:
        step_s, wait_s = _loop(step, profiler, AFTER + STEPS, delays)
    split = StepSplit.load(str(folder / "profile" / f"rank{rank}_steps.json"))
    assert (split.first_step, len(split.steps), split.rank, split.device) == (AFTER, STEPS, rank, "cpu")
    assert split.step_s == pytest.approx(step_s, rel=0.03, abs=0.003)  # it adds up to the wall time
    assert split.mean_s["data_wait"] == pytest.approx(wait_s, rel=0.03, abs=0.003)
    assert sum(split.share.values()) == pytest.approx(1)
    assert split.untraced_step_s > 0
    for part, delay in delays.items():
        assert delay.slept_s >= seconds[part]
        assert split.mean_s[part] >= delay.slept_s - 1e-4, part
    # What a collective takes is waited for, or something is done meanwhile.
    waited_s = split.collectives_s - split.overlapped_s
    assert 0 < waited_s <= split.mean_s["communication"] + 1e-9
    dist.barrier(group)
    return split


def _check_delays(group, folder: Path) -> None:
    split = _profiled(group, folder / "plain", {})
    assert all(split.mean_s[part] > 0 for part in ("forward", "head", "backward", "communication", "optimizer"))
    split = _profiled(group, folder / "both", DELAYS)
    assert split.mean_s["checkpoint"] == 0.0
    # On one: the other waits for it in a collective, wherever the slow rank's delay is.
    for part in ("data_wait", "backward", "optimizer"):
        slow = rank_in(group) == 1
        split = _profiled(group, folder / part, {part: SKEW_S} if slow else {})
        if not slow:  # it has work of its own meanwhile, so not all of the delay
            assert split.mean_s["communication"] > 0.6 * SKEW_S, (part, split.mean_s)
            assert split.mean_s[part] < 0.4 * SKEW_S, (part, split.mean_s)


@pytest.mark.slow
def test_a_delay_is_found_in_its_part_and_the_parts_add_up(tmp_path):
    run_distributed(2, _check_delays, tmp_path)
    splits = read_splits(str(tmp_path / "plain"))
    assert [split.rank for split in splits] == [0, 1]
    assert [column.header for column in split_table(splits).columns] == ["part", "ms a step", "share", "least", "most"]


def test_it_writes_a_trace_a_table_and_a_picture_and_then_rests(tmp_path):
    step = _step(None)
    config = ProfileConfig(steps=2, after=1)
    told = []
    with StepProfiler(config, str(tmp_path), step, ROWS) as profiler:
        for _ in range(5):
            step(torch.zeros(ROWS, 112, 112, 3, dtype=torch.uint8), torch.arange(ROWS))
            told.append(profiler.step())
    assert told == [True, True, True, False, False]
    files = {path.name: path.read_bytes() for path in (tmp_path / "profile").iterdir()}
    assert set(files) == {f"rank0_{name}" for name in ("trace.json.gz", "steps.json", "table.txt", "steps.png")}
    events = json.loads(gzip.decompress(files["rank0_trace.json.gz"]))["traceEvents"]
    names = [event.get("name") for event in events]
    for phase in (phases.FORWARD, phases.HEAD, phases.BACKWARD, phases.OPTIMIZER):
        assert names.count(phase) == config.steps
    assert files["rank0_steps.png"].startswith(b"\x89PNG")
    (split,) = read_splits(str(tmp_path))
    assert split.untraced_step_s == 0.0
    assert split.collectives_s == split.mean_s["communication"] == 0.0
    text = files["rank0_table.txt"].decode()
    assert text == table_text(split)
    assert all(part.replace("_", " ") in text for part in PARTS)
    derived = json.loads(files["rank0_steps.json"])["derived"]
    assert derived["images_per_second"] == pytest.approx(ROWS * derived["steps_per_second"])


def test_a_run_that_ends_early_has_the_steps_that_there_were(tmp_path):
    step = _step(None)
    step.num_steps_done = 40  # a resumed run counts on
    with StepProfiler(ProfileConfig(steps=50, after=2), str(tmp_path), step, ROWS) as profiler:
        _loop(step, profiler, 4, {})
    (split,) = read_splits(str(tmp_path))
    assert (split.first_step, len(split.steps)) == (42, 2)


def test_a_run_too_short_for_it_says_so(tmp_path, caplog):
    step = _step(None)
    with (
        caplog.at_level(logging.WARNING),
        StepProfiler(ProfileConfig(steps=5, after=3), str(tmp_path), step, ROWS) as profiler,
    ):
        _loop(step, profiler, 3, {})
    assert "profile.after=3: nothing was profiled, for there were 3 steps" in caplog.text
    assert read_splits(str(tmp_path)) == []


def test_an_error_of_the_loop_is_what_comes_out_and_the_next_profile_works(tmp_path):
    step = _step(None)

    def fail() -> None:
        with StepProfiler(ProfileConfig(steps=5, after=1), str(tmp_path), step, ROWS) as profiler:
            _loop(step, profiler, 3, {})
            raise ValueError("of the loop")

    with pytest.raises(ValueError, match="of the loop"):
        fail()
    assert read_splits(str(tmp_path)) == []
    with StepProfiler(ProfileConfig(steps=1, after=1), str(tmp_path), step, ROWS) as profiler:
        _loop(step, profiler, 2, {})
    assert len(read_splits(str(tmp_path))) == 1


def test_a_place_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    step = _step(None)
    with (
        caplog.at_level(logging.WARNING),
        StepProfiler(ProfileConfig(steps=1, after=1), str(tmp_path), step, ROWS) as profiler,
    ):
        _loop(step, profiler, 3, {})
    assert "the profile was not written" in caplog.text
    assert "profile" in caplog.text


def test_off_it_does_nothing(tmp_path):
    step = _step(None)
    with StepProfiler(ProfileConfig(), str(tmp_path), step, ROWS) as profiler:
        assert not any(profiler.step() for _ in range(30))
    assert list(tmp_path.iterdir()) == []


def test_profiling_is_no_part_of_what_a_run_trains():
    assert "profile" in RESUMABLE
    assert recipe(demo()) == recipe(dataclasses.replace(demo(), profile=ProfileConfig(steps=3)))


@pytest.mark.parametrize(("field", "value"), [("steps", -1), ("steps", 201), ("after", 0)])
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"profile\.{field}={value}"):
        ProfileConfig(**{field: value})
