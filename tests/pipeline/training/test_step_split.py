"""The split of hand-made traces: what belongs to which part, moment by moment. Times are in microseconds."""

from __future__ import annotations

import gzip
import json

import pytest

from pipeline.training.step_split import PARTS, StepSplit, TraceError, read_trace, split_steps

MAIN, GLOO, AUTOGRAD, STREAM, COLLECTIVES = 100, 101, 102, 7, 20


def _event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = MAIN, **args) -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": end - start, "cat": cat, "tid": tid, "args": args}


def _phase(name: str, start: float, end: float) -> dict:
    return _event(f"lgaf/{name}", start, end, "user_annotation")


def _step(number: int, start: float, end: float) -> dict:
    return _event(f"ProfilerStep#{number}", start, end, "user_annotation")


def _launched(name: str, at: float, start: float, end: float, tid: int = STREAM, by: int = MAIN) -> list[dict]:
    """A kernel on a stream, and the call that launched it."""
    number = round(at * 1000)
    return [
        _event("cudaLaunchKernel", at, at + 1, "cuda_runtime", by, correlation=number),
        _event(name, start, end, "kernel", tid, correlation=number),
    ]


def _microseconds(step: dict[str, float]) -> dict[str, float]:
    assert set(step) == set(PARTS)
    return {part: round(seconds * 1e6, 6) for part, seconds in step.items() if seconds}


def test_phases_and_the_rest():
    events = [_step(3, 0, 100), _phase("data_wait", 5, 15), _phase("forward", 20, 50), _phase("checkpoint", 90, 100)]
    (step,) = split_steps(events, 1).steps
    assert _microseconds(step) == {"data_wait": 10, "forward": 30, "checkpoint": 10, "other": 50}


def test_waiting_for_gloo_is_communication_and_computing_beside_it_is_not():
    events = [
        _step(0, 0, 100),
        _phase("backward", 0, 100),
        _event("evaluate_function", 0, 60),
        _event("c10d::allreduce_", 10, 14),
        _event("gloo:all_reduce", 12, 90, "user_annotation", GLOO),
        _event("aten::mm", 30, 40),
    ]
    split = split_steps(events, 1)
    # Handed over from 10 to 14, waited for from 60 to 90; from 90 to 100 nothing is known but the phase.
    assert _microseconds(split.steps[0]) == {"communication": 34, "backward": 66}
    assert split.collectives_s == pytest.approx(78e-6)
    assert split.overlapped_s == pytest.approx(46e-6)


def test_waiting_for_data_stays_that_while_a_collective_is_under_way():
    events = [
        _step(0, 0, 100),
        _phase("data_wait", 0, 100),
        _event("gloo:all_gather", 20, 40, "user_annotation", GLOO),
    ]
    split = split_steps(events, 1)
    assert _microseconds(split.steps[0]) == {"data_wait": 100}
    assert split.overlapped_s == pytest.approx(20e-6)


def test_another_threads_operators_are_not_the_steps():
    events = [
        _step(0, 0, 100),
        _phase("head", 0, 100),
        _event("gloo:all_gather", 0, 50, "user_annotation", GLOO),
        _event("aten::copy_", 0, 50, tid=GLOO),
    ]
    assert _microseconds(split_steps(events, 1).steps[0]) == {"communication": 50, "head": 50}


def test_on_a_device_a_moment_is_of_what_runs_there_and_only_its_idle_time_of_the_host():
    events = [
        _step(0, 0, 100),
        _phase("data_wait", 0, 10),
        _phase("forward", 10, 20),
        _phase("head", 20, 22),
        _phase("backward", 22, 40),
        _phase("optimizer", 40, 45),
        *_launched("conv", 12, 15, 45),
        *_launched("softmax", 21, 45, 50),
        *_launched("dgrad", 30, 50, 70, by=AUTOGRAD),  # launched by another thread: of the phase at that time
        *_launched("ncclDevKernel_AllReduce_Sum_f32", 35, 60, 80, tid=COLLECTIVES, by=AUTOGRAD),
        *_launched("multi_tensor_sgd", 41, 80, 95),
        _event("gpu copy", 97, 99, "gpu_memcpy", STREAM, correlation=-1),  # launched before the trace began
        _event("lgaf/backward", 50, 90, "gpu_user_annotation", STREAM),
    ]
    split = split_steps(events, 1)
    assert _microseconds(split.steps[0]) == {
        "data_wait": 10,  # 0 to 10: nothing runs, the host waits
        "forward": 35,  # 10 to 15 the host only; 15 to 45
        "head": 5,
        "backward": 20,
        "communication": 10,  # 70 to 80; before, it is hidden
        "optimizer": 15,
        "other": 5,
    }
    assert split.collectives_s == pytest.approx(20e-6)
    assert split.overlapped_s == pytest.approx(10e-6)


def test_work_that_goes_on_in_the_next_step_is_of_both():
    events = [
        _step(0, 0, 50),
        _step(1, 50, 100),
        _step(2, 100, 101),  # of which nothing is wanted
        _phase("forward", 10, 20),
        _phase("data_wait", 60, 90),
        *_launched("conv", 12, 15, 75),
    ]
    first, second = split_steps(events, 2).steps
    assert _microseconds(first) == {"other": 10, "forward": 40}
    assert _microseconds(second) == {"forward": 25, "data_wait": 15, "other": 10}


def test_a_trace_without_the_steps_is_an_error():
    with pytest.raises(TraceError, match="the trace has 1 steps, 2 were to be split"):
        split_steps([_step(0, 0, 10)], 2)


def test_a_trace_is_read_from_its_file():
    events = [_step(0, 0, 10), {"ph": "M", "name": "thread_name", "tid": MAIN, "args": {"name": "python"}}]
    content = gzip.compress(json.dumps({"schemaVersion": 1, "traceEvents": events}).encode())
    assert read_trace(content) == events
    assert _microseconds(split_steps(read_trace(content), 1).steps[0]) == {"other": 10}


def test_figures_of_a_split_and_its_file(tmp_path):
    steps = (dict.fromkeys(PARTS, 0.0) | {"forward": 0.3}, dict.fromkeys(PARTS, 0.0) | {"head": 0.1})
    split = StepSplit(
        rank=1,
        world_size=2,
        device="cpu",
        global_batch=10,
        first_step=4,
        steps=steps,
        collectives_s=0.0,
        overlapped_s=0.0,
        untraced_step_s=0.1,
    )
    assert split.step_s == pytest.approx(0.2)
    assert split.images_per_second == pytest.approx(50)
    assert (split.share["forward"], split.share["head"]) == (pytest.approx(0.75), pytest.approx(0.25))
    split.save(str(tmp_path / "rank1_steps.json"))
    assert StepSplit.load(str(tmp_path / "rank1_steps.json")) == split
