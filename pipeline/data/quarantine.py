"""Bad images of a run: each is counted once, written down, and paid from a budget."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import ray

from pipeline import storage

NAME: Final = "quarantine.jsonl"


class QuarantineError(ValueError):
    """More bad images than the budget allows; the message names the last one and the list of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadImage:
    """One image that cannot be used: its shard, its key there, its global sample index, and why."""

    shard: str
    key: str
    index: int
    reason: str


class Quarantine:
    """The list of a run's bad images, kept by an actor that all data workers tell; travels to them by pickle.

    Args:
        uri: Where the list is kept (JSON lines); what it holds from before a restart still counts.
        budget: Bad images that the run may have.
    """

    def __init__(self, uri: str, budget: int) -> None:
        self._board: Any = _Board.remote(uri, budget)  # type: ignore[attr-defined]

    def report(self, bad: BadImage) -> None:
        """Add one; the same image again changes nothing.

        Raises:
            QuarantineError: The budget is used up.
        """
        refusal = ray.get(self._board.add.remote(bad))
        if refusal:
            raise QuarantineError(refusal)

    def count(self) -> int:
        """Bad images so far."""
        return int(ray.get(self._board.count.remote()))


# Its list is in the file, so it may die and come back; the same image added again changes nothing.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Board:
    def __init__(self, uri: str, budget: int) -> None:
        self._uri, self._budget = uri, budget
        self._found = {bad.index: bad for bad in read_quarantine(uri)}

    def add(self, bad: BadImage) -> str:
        if bad.index not in self._found:
            self._found[bad.index] = bad
            # Small and rare: the whole list is put again, so that it is never seen half written.
            lines = "".join(json.dumps(asdict(one)) + "\n" for one in self._found.values())
            storage.write_bytes(self._uri, lines.encode())
        if len(self._found) <= self._budget:
            return ""
        return (
            f"{bad.shard}: {bad.key}: {bad.reason}: this is bad image {len(self._found)}, "
            f"stream.max_bad_images={self._budget} are allowed; {self._uri} lists them"
        )

    def count(self) -> int:
        return len(self._found)


def read_quarantine(uri: str) -> list[BadImage]:
    """The list that a run left; an absent one is empty."""
    if not storage.exists(uri):
        return []
    return [BadImage(**json.loads(line)) for line in storage.read_bytes(uri).decode().splitlines()]
