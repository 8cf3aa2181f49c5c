"""The built-in profiler: a trace of some steps, and where their time went."""

from __future__ import annotations

import io
import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lgaf.config import require_in_range
from lgaf.distributed import rank_in, world_size
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.training.step_split import FOLDER, StepSplit, TraceError, read_trace, split_steps

# A trace has ten thousands of events a step, and is read whole.
MAX_STEPS: Final = 200

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Whether the time of some steps is taken apart (docs/training.md, "Where the time goes")."""

    steps: int = 0
    """Steps to profile; 0: none."""
    after: int = 20
    """Steps of this attempt before the first of them, so that starts, compilation and the like are over."""
    all_ranks: bool = False
    """Every rank writes its own; else the first alone."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_in_range("profile.steps", self.steps, 0, MAX_STEPS)
        require_in_range("profile.after", self.after, 1, 1 << 40)


class StepProfiler:
    """Profiles some steps of a loop which calls `step` at the end of each of its steps; does nothing where off.

    Writes ``profile/rank{R}_trace.json.gz`` (for ui.perfetto.dev), ``rank{R}_steps.json``, ``rank{R}_table.txt`` and
    ``rank{R}_steps.png`` into the run's folder, over those of an earlier attempt. What cannot be written costs a
    warning, never the run.

    Args:
        config: What to profile.
        run_uri: Folder of the run.
        step: What is profiled: its rank, device and the number of its first step are taken.
        global_batch: Samples of a step over all ranks.
    """

    def __init__(self, config: ProfileConfig, run_uri: str, step: TrainStep, global_batch: int) -> None:
        self._config, self._run_uri, self._global_batch = config, run_uri, global_batch
        self._rank, self._world_size = rank_in(step.group), world_size(step.group)
        self._device, self._first_step = step.device, step.num_steps_done
        self._is_on = config.steps > 0 and (self._rank == 0 or config.all_ranks)
        self._done = 0
        self._profile: profile | None = None
        # Of the last steps before the profiler begins: as many as it is to see, and not the very first ones.
        self._untraced: deque[float] = deque(maxlen=max(1, min(config.steps, config.after // 2)))
        self._last_time = 0.0

    def __enter__(self) -> StepProfiler:
        if self._is_on and self._config.after == 1:
            self._start()
        self._last_time = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None and kind is not None:
            self._profile.on_trace_ready = None  # the error is what counts
            self._profile.stop()
        elif self._profile is not None:
            self._profile.stop()  # writes what there is
        if self._is_on and kind is None and self._done <= self._config.after:
            _logger.warning(
                "profile.after=%d: nothing was profiled, for there were %d steps", self._config.after, self._done
            )
        self._profile, self._is_on = None, False

    def step(self) -> bool:
        """Count a step of the loop; whether this took time that is no step's."""
        if not self._is_on:
            return False
        was_running = self._profile is not None
        self._done += 1
        before, now = self._last_time, time.perf_counter()
        if self._profile is not None:
            self._advance(self._profile)
        else:
            self._untraced.append(now - before)
            if self._done == self._config.after - 1:
                self._start()
        self._last_time = time.perf_counter()
        return was_running or self._profile is not None

    def _start(self) -> None:
        cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            # A profiler's first step is slow.
            schedule=schedule(wait=0, warmup=1, active=self._config.steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _advance(self, running: profile) -> None:
        last = self._config.after + self._config.steps
        if self._device.type == "cuda" and self._done in (self._config.after, last):
            # What the device still has to do belongs to the steps before.
            torch.cuda.synchronize(self._device)
        running.step()
        if self._done == last:
            running.stop()
            self._profile, self._is_on = None, False

    def _write(self, finished: profile) -> None:
        num_steps = min(self._done - self._config.after, self._config.steps)
        if num_steps < 1:
            return
        try:
            with TemporaryDirectory() as folder:
                finished.export_chrome_trace(str(local := Path(folder) / "trace.json.gz"))
                trace = local.read_bytes()
            storage.write_bytes(self._uri("trace.json.gz"), trace)
            self._write_split(self._split(trace, num_steps))
        except (OSError, TraceError) as error:
            _logger.warning("the profile was not written: %s", error)

    def _split(self, trace: bytes, num_steps: int) -> StepSplit:
        found = split_steps(read_trace(trace), num_steps)
        return StepSplit(
            rank=self._rank,
            world_size=self._world_size,
            device=self._device.type,
            global_batch=self._global_batch,
            first_step=self._first_step + self._config.after,
            steps=found.steps,
            collectives_s=found.collectives_s,
            overlapped_s=found.overlapped_s,
            untraced_step_s=float(np.median(self._untraced)) if self._untraced else 0.0,
        )

    def _write_split(self, split: StepSplit) -> None:
        # Drawing takes half a second to load, which no other run should pay.
        from pipeline.training.split_report import split_figure, table_text

        split.save(self._uri("steps.json"))
        storage.write_bytes(self._uri("table.txt"), table_text(split).encode())
        picture = io.BytesIO()
        split_figure(split).savefig(picture, format="png")
        storage.write_bytes(self._uri("steps.png"), picture.getvalue())

    def _uri(self, name: str) -> str:
        return storage.join(self._run_uri, FOLDER, f"rank{self._rank}_{name}")
