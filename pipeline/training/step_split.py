"""Where the time of training steps goes, read from a profiler's trace: each moment belongs to one part."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lgaf import phases
from lgaf.config import from_dict
from pipeline import storage

FOLDER: Final = "profile"
COMMUNICATION: Final = "communication"
OTHER: Final = "other"

_PART_OF_PHASE: Final = {phase: phase.removeprefix("lgaf/") for phase in phases.PHASES}

PARTS: Final = (
    "data_wait",
    "forward",
    "head",
    "backward",
    COMMUNICATION,
    "optimizer",
    "checkpoint",
    OTHER,
)
"""Parts of a step. ``head`` is its forward pass; ``communication`` what the step waits for, not what runs beside it."""

_STEP: Final = "ProfilerStep#"
_DEVICE_WORK: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES: Final = frozenset({"cuda_runtime", "cuda_driver"})

Event = Mapping[str, Any]
Spans = NDArray[np.float64]


class TraceError(ValueError):
    """A trace does not hold what a split of steps needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSplit:
    """Where the time of some steps of one rank went.

    Attributes:
        rank: Whose steps.
        world_size: Ranks of the run.
        device: Kind of device, "cpu" or "cuda".
        global_batch: Samples of a step, over all ranks.
        first_step: Of the run, from 0.
        steps: Seconds of each step by part (`PARTS`); they add up to the step's wall time.
        collectives_s: Time a step in which a collective is under way, exposed or not (mean).
        overlapped_s: Of that, what the step does not wait for: something is computed meanwhile (mean).
        untraced_step_s: Median wall time of the steps before the profiler began, which it does not slow down; 0 where
            there was none.
    """

    rank: int
    world_size: int
    device: str
    global_batch: int
    first_step: int
    steps: tuple[dict[str, float], ...]
    collectives_s: float
    overlapped_s: float
    untraced_step_s: float

    @property
    def step_s(self) -> float:
        """Mean wall time of a step."""
        return float(np.mean([sum(step.values()) for step in self.steps]))

    @property
    def mean_s(self) -> dict[str, float]:
        """Mean seconds a step, by part."""
        return {part: float(np.mean([step[part] for step in self.steps])) for part in PARTS}

    @property
    def share(self) -> dict[str, float]:
        """Fraction of the steps' wall time, by part; they add up to 1."""
        total = self.step_s
        return {part: seconds / total for part, seconds in self.mean_s.items()}

    @property
    def images_per_second(self) -> float:
        """Of all ranks together, in the profiled steps."""
        return self.global_batch / self.step_s

    def save(self, uri: str) -> None:
        """Write JSON: the fields, and beside them the figures that follow from them."""
        derived = {
            "step_s": self.step_s,
            "steps_per_second": 1 / self.step_s,
            "images_per_second": self.images_per_second,
            "mean_s": self.mean_s,
            "share": self.share,
        }
        storage.write_json(uri, asdict(self) | {"derived": derived})

    @classmethod
    def load(cls, uri: str) -> StepSplit:
        """Read what `save` wrote.

        Raises:
            StorageError: It cannot be read.
            ValueError: A field is unknown, missing or of the wrong kind; the field is named.
        """
        content = storage.read_json(uri)
        return from_dict(cls, {key: value for key, value in content.items() if key != "derived"}, uri)


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedTime:
    """Seconds by step and part, and means of what is told beside them (see `StepSplit`)."""

    steps: tuple[dict[str, float], ...]
    collectives_s: float
    overlapped_s: float


def read_trace(content: bytes) -> list[Event]:
    """The events of a gzipped Chrome trace."""
    events: list[Event] = json.loads(gzip.decompress(content))["traceEvents"]
    return events


def split_steps(events: Sequence[Event], num_steps: int) -> TracedTime:
    """Say of each moment of the first ``num_steps`` traced steps which part it belongs to.

    In this order, a moment is

    1. of the phase that launched it, where a device computes or copies;
    2. communication, where a device runs nothing but collectives (NCCL's kernels);
    3. communication, where the thread of the steps hands a collective over, or where it runs no operator while a
       collective is under way on another thread (Gloo's) and it does not wait for data: nobody records such a wait;
    4. of the phase that the thread of the steps is in;
    5. other.

    So what a collective does beside computation counts as computation, and what a rank waits for a slower one counts as
    communication.

    Args:
        events: Of a Chrome trace of `torch.profiler` around steps that name their `lgaf.phases`.
        num_steps: Steps to take.

    Raises:
        TraceError: The trace has fewer steps.
    """
    # Numbers only: Chrome traces also hold instants, names of threads and arrows, without a duration.
    events = [event for event in events if event.get("ph") == "X"]
    steps = sorted((event for event in events if _is_step(event)), key=lambda event: float(event["ts"]))[:num_steps]
    if len(steps) < num_steps:
        raise TraceError(f"the trace has {len(steps)} steps, {num_steps} were to be split")
    thread = steps[0]["tid"]
    own = [
        event for event in events if event.get("tid") == thread and event.get("cat") in ("cpu_op", "user_annotation")
    ]
    spans = {phase: _spans(event for event in own if event["name"] == phase) for phase in phases.PHASES}
    device = _device_work(events, spans)
    operators = [event for event in own if event["cat"] == "cpu_op"]
    gloo = (event for event in events if event["name"].startswith("gloo:") and event.get("tid") != thread)
    bounds = _spans(steps)
    timeline = _Timeline([bounds, *spans.values(), *device.values(), (in_flight := _spans(gloo)), _spans(operators)])

    in_phase = {part: timeline.covered(spans[phase]) for phase, part in _PART_OF_PHASE.items()}
    on_device = {part: timeline.covered(work) for part, work in device.items()}
    nccl_runs = on_device.pop(COMMUNICATION)
    gloo_runs = timeline.covered(in_flight)
    hands_over = timeline.covered(_spans(event for event in operators if event["name"].startswith("c10d::")))
    waits = gloo_runs & ~timeline.covered(_spans(operators)) & ~in_phase["data_wait"]
    choices = [
        *((on_device[part], part) for part in on_device),
        (nccl_runs | hands_over | waits, COMMUNICATION),
        *((in_phase[part], part) for part in in_phase),
    ]
    part = np.select([mask for mask, _ in choices], [PARTS.index(name) for _, name in choices], PARTS.index(OTHER))
    seconds = timeline.seconds(bounds, part, len(PARTS))
    under_way = nccl_runs | gloo_runs
    overlapped = under_way & (part != PARTS.index(COMMUNICATION))
    return TracedTime(
        steps=tuple({name: float(row[i]) for i, name in enumerate(PARTS)} for row in seconds),
        collectives_s=float(timeline.seconds(bounds, under_way, 2)[:, 1].mean()),
        overlapped_s=float(timeline.seconds(bounds, overlapped, 2)[:, 1].mean()),
    )


class _Timeline:
    """Time cut at every start and end of the given spans: within a piece, nothing changes."""

    def __init__(self, spans: Sequence[Spans]) -> None:
        self._edges = np.unique(np.concatenate([span.ravel() for span in spans]))

    def covered(self, spans: Spans) -> NDArray[np.bool_]:
        """Whether each piece lies in any of the spans."""
        change = np.zeros(len(self._edges), np.int64)
        np.add.at(change, np.searchsorted(self._edges, spans[:, 0]), 1)
        np.add.at(change, np.searchsorted(self._edges, spans[:, 1]), -1)
        return np.cumsum(change)[:-1] > 0

    def seconds(self, steps: Spans, kind: NDArray[Any], num_kinds: int) -> NDArray[np.float64]:
        """Seconds of each step by the kind of the pieces, a number below ``num_kinds``: [steps, num_kinds]."""
        starts, lengths = self._edges[:-1], np.diff(self._edges)
        step = np.searchsorted(steps[:, 0], starts, side="right") - 1
        inside = (step >= 0) & (starts < steps[step, 1])
        found = np.zeros((len(steps), num_kinds))
        np.add.at(found, (step[inside], kind[inside].astype(np.int64)), lengths[inside] * 1e-6)
        return found


def _is_step(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(_STEP)


def _spans(events: Iterable[Event]) -> Spans:
    """Start and end [N, 2] of events, in microseconds."""
    found = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]
    return np.array(found, np.float64).reshape(-1, 2)


def _device_work(events: Sequence[Event], spans: Mapping[str, Spans]) -> dict[str, Spans]:
    """What an accelerator did, by the part that launched it (whichever thread did that); collectives apart."""
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    moments = np.array([launched.get(event.get("args", {}).get("correlation"), -np.inf) for event in work])
    collective = np.array(["nccl" in str(event["name"]).lower() for event in work], np.bool_)
    times, unknown = _spans(work), ~collective
    found = {part: np.empty((0, 2)) for part in PARTS} | {COMMUNICATION: times[collective]}
    for phase, part in _PART_OF_PHASE.items():
        starts, ends = np.sort(spans[phase], axis=0).T  # they do not overlap
        latest = np.searchsorted(starts, moments, side="right") - 1
        inside = unknown & (latest >= 0) & (moments < np.append(ends, -np.inf)[latest])
        found[part], unknown = times[inside], unknown & ~inside
    return found | {OTHER: times[unknown]}
