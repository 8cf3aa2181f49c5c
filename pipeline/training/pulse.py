"""How far each worker is: told to one board, which the driver reads and through which it asks the workers to stop.

Progress for people, a stop that all ranks make at the same step (with a checkpoint, where a bare kill would lose the
steps since the last), and the name of the rank that the others wait for when a run hangs.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from torch.distributed import ProcessGroup

from lgaf.distributed import all_gather_stack, rank_in, world_size

BEAT_S: Final = 1.0
ANSWER_S: Final = 30.0  # how long the board may take
# A rank that is not heard of for so long is held up as a whole: stopped, swapped out, on a lost node.
SILENT_S: Final = 15.0

# What a rank does, in the order of a step: of two ranks in one step, the other waits for the one that is less far.
PHASES: Final = ("load", "data", "step", "log", "save", "end")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a rank is.

    Attributes:
        rank: Of the worker.
        world_size: Of its group.
        group: Which group it is of; another one has another number.
        step: That it works on.
        phase: Of the step, one of `PHASES`.
        for_s: Seconds that it has been there.
        process: Where it runs, for people.
        stack: What it does, where it has been there for long.
        heard: When the board heard of it (the board's clock, seconds).
    """

    rank: int
    world_size: int
    group: int
    step: int
    phase: str
    for_s: float
    process: str
    stack: str = ""
    heard: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What the board knows.

    Attributes:
        progress: Steps done, loss and images/s.
        positions: Where each rank of the newest group is.
        warnings: Of the workers, since the last look.
        now: The board's clock.
    """

    progress: tuple[int, float, float] | None
    positions: tuple[Position, ...]
    warnings: tuple[str, ...]
    now: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """A group that does not get on: the ranks that the others wait for, and what is known of them."""

    group: int
    ranks: tuple[int, ...]
    diagnosis: str


class _Board:
    """The actor; `make_board` starts it."""

    def __init__(self) -> None:
        self._progress: tuple[int, float, float] | None = None
        self._positions: dict[int, Position] = {}
        self._workers: dict[int, Any] = {}
        self._groups: list[int] = []  # as they came
        self._warnings: list[str] = []
        self._stop = False

    def update(self, steps_done: int, loss: float, images_per_second: float) -> None:
        self._progress = (steps_done, loss, images_per_second)

    def beat(self, position: Position, worker: Any, warnings: list[str]) -> bool:
        """Note where a rank is and what it warns of; tells it whether to stop."""
        self._warnings += warnings
        if position.group not in self._groups:
            self._groups.append(position.group)
            self._positions, self._workers = {}, {}
        if position.group == self._groups[-1]:  # else it is what remains of a group that was replaced
            self._positions[position.rank] = replace(position, heard=time.monotonic())
            self._workers[position.rank] = worker
        return self._stop

    def look(self) -> Look:
        warnings, self._warnings = tuple(self._warnings), []
        return Look(
            progress=self._progress,
            positions=tuple(self._positions.values()),
            warnings=warnings,
            now=time.monotonic(),
        )

    def ask_to_stop(self) -> None:
        self._stop = True

    def give_up(self, group: int, ranks: tuple[int, ...]) -> None:
        """Kill the workers of these ranks, unless theirs is the newest group no more: Ray Train starts another."""
        if self._groups[-1:] == [group]:
            for rank in ranks:
                if rank in self._workers:
                    ray.kill(self._workers[rank])
            self._positions, self._workers = {}, {}


def make_board() -> Any:
    """Start the board, on this node: it lives as long as the driver's node does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()


class _Warnings(logging.Handler):
    """Keeps what this process warns of until the board is told: a worker's log is read by nobody."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        return [self._lines.popleft() for _ in range(len(self._lines))]


class Pulse:
    """Tells the board where this rank is and what it warns of, from a thread of its own.

    Args:
        board: Of `make_board`; None: nobody is told.
        group: All ranks.
    """

    def __init__(self, board: Any, group: ProcessGroup | None) -> None:
        self._board = board
        number = all_gather_stack(torch.tensor([secrets.randbits(62)]), group)[0]  # rank 0's draw
        self._position = Position(
            rank=rank_in(group),
            world_size=world_size(group),
            group=int(number),
            step=0,
            phase="load",
            for_s=0.0,
            process=f"pid {os.getpid()} on {socket.gethostname()}",
        )
        self._since = time.monotonic()
        self._of_thread = threading.get_ident()
        self._closed = threading.Event()
        self.asked_to_stop = False
        self._warnings = _Warnings()
        logging.getLogger("pipeline").addHandler(self._warnings)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        if board is not None:
            self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Note what this rank does now."""
        self._position = replace(self._position, step=step, phase=phase)
        self._since = time.monotonic()

    def close(self) -> None:
        """Tell the last, and then nothing more."""
        self._closed.set()
        if self._board is not None:
            self._thread.join(ANSWER_S)
            self._tell(ray.get_runtime_context().current_actor)
        logging.getLogger("pipeline").removeHandler(self._warnings)

    def _run(self) -> None:
        worker = ray.get_runtime_context().current_actor
        while not self._closed.wait(BEAT_S):
            if not self._tell(worker):
                return

    def _tell(self, worker: Any) -> bool:
        for_s = time.monotonic() - self._since
        stack = self._stack() if for_s > SILENT_S else ""
        position = replace(self._position, for_s=for_s, stack=stack)
        try:
            told = self._board.beat.remote(position, worker, self._warnings.take())
            self.asked_to_stop |= ray.get(told, timeout=ANSWER_S)
        except ActorDiedError as error:  # the board is for people: without it training goes on
            _logger.warning("the driver's board is gone, and is told no more: %s", error)
            return False
        except Exception as error:  # a machine with more work than cores, a network that stumbles: asked again
            _logger.debug("the driver's board does not answer: %s", error)
        return True

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._of_thread)
        return "".join(traceback.format_stack(frame)[-6:]) if frame is not None else ""


class StopVote:
    """Whether any rank was asked to stop, found by all of them at the same step and without waiting.

    Each step's votes travel while the step computes. All ranks make one, and cast a vote a step.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group: Any = None
        if world_size(group) > 1:
            self._group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        self._votes: Tensor | None = None
        self._work: Any = None

    def cast(self, stop: bool) -> bool:
        """Vote; gives whether anyone voted to stop at the step before."""
        if self._work is not None:
            self._work.wait()
        decided = self._votes is not None and bool(self._votes)
        self._votes = torch.tensor(float(stop))
        if self._group is not None:
            self._work = dist.all_reduce(self._votes, group=self._group, async_op=True)
        return decided


def find_hang(known: Sequence[Position], now: float, timeout_s: float) -> Hang | None:
    """The ranks that hold up a group in which none got on for ``timeout_s`` seconds, None where some did. Pure.

    Args:
        known: Of the newest group.
        now: The board's clock.
        timeout_s: Longer than any step, save or compilation takes.
    """
    if not known or len(known) < known[0].world_size:
        return None  # still starting: Ray Train has a limit of its own for that
    still_s = {place.rank: place.for_s + (now - place.heard) for place in known}
    if min(still_s.values()) < timeout_s:
        return None
    silent = tuple(place.rank for place in known if now - place.heard > SILENT_S)
    if len(silent) == len(known):
        return None  # what remains of a group that has ended
    behind = min((place.step, PHASES.index(place.phase)) for place in known)
    least = tuple(place.rank for place in known if (place.step, PHASES.index(place.phase)) == behind)
    blamed = silent or least
    if silent:
        reason = "not heard of (stopped, or its node is lost)"
    elif len(blamed) < len(known):
        reason = "the others wait for it"
    else:
        reason = "none is behind the others: the stacks tell"
    lines = [f"no step for {min(still_s.values()):.0f} s; {_ranks(blamed)}: {reason}"]
    for place in sorted(known, key=lambda place: place.rank):
        lines.append(
            f"  rank {place.rank} ({place.process}): step {place.step}, in '{place.phase}' for "
            f"{still_s[place.rank]:.0f} s, last heard of {now - place.heard:.0f} s ago"
        )
        if place.rank in blamed and place.stack:
            lines += [f"    {line}" for line in place.stack.rstrip().splitlines()]
    return Hang(group=known[0].group, ranks=tuple(sorted(blamed)), diagnosis="\n".join(lines))


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
