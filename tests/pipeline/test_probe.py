"""The timed steps of a dry run: how times are scaled, and that the steps are a run's own."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from lgaf.models import LGAFConfig
from lgaf.step import StepConfig
from pipeline import presets, probe
from pipeline.config import HeadConfig, TrainConfig, WorkersConfig
from pipeline.probe import Timing, largest_part, largest_share, probe_device, time_sizes, worker_threads

CPU = torch.device("cpu")


def _config(**changes: object) -> TrainConfig:
    model = LGAFConfig(backbone="micro", embedding_dim=16, num_heads=2)
    return replace(presets.demo(), **{"model": model, "batch_size": 32, **changes})


@pytest.mark.parametrize(
    ("sizes", "seconds", "wanted", "expected"),
    [
        ((2, 10), (1.0, 3.0), 10, 3.0),
        ((2, 10), (1.0, 3.0), 50, 13.0),  # 0.25 s for each of 40 more
        ((2,), (1.0,), 50, 25.0),  # in proportion
        ((2, 10), (1.0, 0.5), 50, 0.5),  # noise: it does not fall
        ((2, 10), (0.1, 3.0), 50, 15.0),  # noise: not faster than in proportion
        ((2,), (1.0,), 1, 0.5),
    ],
)
def test_times_lie_on_a_line(sizes, seconds, wanted, expected):
    timing = Timing(sizes=sizes, seconds=seconds, wanted=wanted)
    assert timing.at_wanted == pytest.approx(expected)
    assert timing.is_scaled == (sizes[-1] != wanted)


def _sleeping(made: list[int]):
    def make(size: int):
        made.append(size)
        return lambda: time.sleep(0.002 + 0.001 * size)

    return make


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(probe, "STEP_S", 0.05)
    monkeypatch.setattr(probe, "TIMED_S", 0.2)


@pytest.mark.usefixtures("quick")
def test_large_steps_are_scaled_from_the_largest_that_is_quick():
    made: list[int] = []
    timing = time_sizes(_sleeping(made), first=10, wanted=1000, largest=1000)
    assert list(timing.sizes) == made
    # 12 ms at 10, so about 41 in 50 ms; fewer where the machine is busy.
    assert made[0] == 10 < made[1] <= 41
    assert timing.at_wanted == pytest.approx(1.0, rel=0.5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("wanted", "largest", "sizes"), [(14, 1000, [10, 14]), (500, 12, [10, 12]), (10, 1000, [10])])
def test_sizes_end_at_what_is_wanted_or_fits(wanted, largest, sizes):
    made: list[int] = []
    assert time_sizes(_sleeping(made), first=10, wanted=wanted, largest=largest).wanted == wanted
    assert made == sizes


@pytest.mark.usefixtures("quick")
def test_sizes_can_be_multiples():
    made: list[int] = []
    assert time_sizes(_sleeping(made), first=10, wanted=17, largest=1000, multiple=4).is_scaled
    assert made == [10, 16]


@pytest.mark.usefixtures("quick")
def test_a_step_that_takes_too_long_is_done_once(monkeypatch):
    monkeypatch.setattr(probe, "SLOW_S", 0.2)
    calls = []
    timing = time_sizes(lambda size: lambda: (calls.append(size), time.sleep(0.3)), first=2, wanted=9, largest=9)
    assert calls == [2]
    assert timing.seconds[0] >= 0.3


def test_the_largest_worker_counts():
    config = _config(num_workers=3, batch_size=32, step=StepConfig(accumulate=2))
    assert largest_share(config) == 11
    assert largest_part(config) == 6


def test_threads_are_those_of_a_worker_and_come_back():
    before = torch.get_num_threads()
    with worker_threads(_config(workers=WorkersConfig(threads=3)), CPU) as threads:
        assert threads == torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with worker_threads(_config(num_workers=32), CPU) as threads:
        assert threads == 1


def test_a_gpu_is_taken_where_the_run_wants_one_and_there_is_one():
    assert probe_device(_config()) == CPU
    wanted = probe_device(_config(workers=WorkersConfig(use_gpu=True)))
    assert wanted.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step": StepConfig(accumulate=2, ema_decay=0.9)},
        {"head": HeadConfig(name="uniface", sample_rate=0.5)},
        {"head": HeadConfig(name="adaface", update="backward", precision="bfloat16")},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_a_runs_own_steps_are_timed(changes):
    stages: list[str] = []
    found = probe.probe(_config(**changes), 5_000, 1 << 20, CPU, 1, stages.append)
    assert stages == ["network", "head"]
    assert found.network.wanted == 16
    assert found.network.sizes[0] == 2
    assert max(found.network.sizes) <= largest_part(_config(**changes))
    assert found.head is not None
    assert (found.head.sizes[0], found.head.wanted) == (2_000, 5_000)
    assert min(*found.network.seconds, *found.head.seconds) > 0
    assert found.seconds == found.network.at_wanted + found.head.at_wanted


@pytest.mark.usefixtures("quick")
def test_memory_bounds_what_is_timed(monkeypatch):
    monkeypatch.setattr(probe, "STEP_S", 10.0)
    monkeypatch.setattr(probe, "free_bytes", lambda device: 10 << 20)
    found = probe.probe(_config(), 100_000, 1 << 20, CPU, 1)
    assert found.network.sizes == (2, 4), "0.4 of ten images"
    assert found.head is not None
    assert found.head.sizes == (2_000, int(0.4 * (10 << 20)) // (16 * 4 * 4))


@pytest.mark.usefixtures("quick")
def test_a_head_of_unknown_size_is_not_timed():
    found = probe.probe(_config(), None, 1 << 20, CPU, 1)
    assert found.head is None
    assert found.seconds == found.network.at_wanted
