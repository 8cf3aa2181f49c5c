"""Which start of the workers a run belongs to: the newest, whatever still lives of those before it.

A network that splits, or a job that was submitted twice, leaves two groups of workers with one run. Each start leaves
a note in the run's folder before training begins. Those of an older one find it when they next write, and end; each
writes checkpoints of its own, and what came late does not count (`Attempt.discards`). No clocks, leases or locks:
object stores have none.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass, field, replace
from typing import Final

from pipeline import storage

FOLDER: Final = "attempts"
_NAME = re.compile(rf"/{FOLDER}/(\d{{6}})-([^/]+)-(\d{{8}})\.(json|began)$")


class SupersededError(RuntimeError):
    """Other workers go on with the run."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run's workers.

    Attributes:
        number: From 1. Two that began in the same moment may share it; the claimants decide.
        claimant: Who started it; `controller_of` makes them.
        first_step: The steps done before it: those of the checkpoint that it goes on from.
        began: Whether it is certain that it goes on from there. Until then it has the run, and discards nothing.
    """

    number: int
    claimant: str
    first_step: int
    began: bool = field(default=False, compare=False)

    @property
    def writer(self) -> str:
        """Name of what it writes; those of later attempts are greater."""
        return f"{self.number:06d}-{self.claimant}"

    def discards(self, step: int, writer: str) -> bool:
        """Whether a checkpoint does not count, as this later attempt began without it. Pure.

        Args:
            step: Steps done at the checkpoint.
            writer: Of the attempt that wrote it.
        """
        return self.began and writer < self.writer and self.first_step < step


def controller_of(job: str, number: int) -> str:
    """The name of a job's ``number``-th controller; one that died may have left workers."""
    return f"{job}.{number}"


def attempts_of(run_uri: str) -> list[Attempt]:
    """All starts of a run's workers, in order."""
    names = [_NAME.search(info.uri) for info in storage.list_files(storage.join(run_uri, FOLDER))]
    kinds: dict[Attempt, set[str]] = {}
    for name in names:
        if name:
            kinds.setdefault(Attempt(int(name[1]), name[2], int(name[3])), set()).add(name[4])
    found = [replace(attempt, began="began" in given) for attempt, given in kinds.items()]
    return sorted(found, key=lambda attempt: attempt.writer)


def write_note(run_uri: str, attempt: Attempt) -> None:
    """From here on the run is this attempt's; if it began, what others commit beyond its first step counts no more."""
    note = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": socket.gethostname()}
    storage.write_json(_note(run_uri, attempt), note)
    if attempt.began:
        storage.write_json(_note(run_uri, attempt, "began"), note)


def delete_note(run_uri: str, attempt: Attempt) -> None:
    """It never was."""
    for kind in ("began", "json"):
        storage.delete_file(_note(run_uri, attempt, kind))


def check_newest(run_uri: str, attempt: Attempt) -> None:
    """To be called before anything of the run is written; a note that someone deleted is put back.

    Raises:
        SupersededError: Other workers have the run.
        StorageError: The storage is away.
    """
    found = attempts_of(run_uri)
    if any(other.writer > attempt.writer for other in found):
        raise _superseded(run_uri, found[-1])
    if attempt not in found:
        write_note(run_uri, attempt)


def check_not_superseded(run_uri: str, claimant: str, attempts: list[Attempt] | None = None) -> None:
    """Raise `SupersededError` if another job has taken the run over from a claimant that had it."""
    found = attempts_of(run_uri) if attempts is None else attempts
    job = _job(claimant)
    if any(_job(attempt.claimant) == job for attempt in found) and _job(found[-1].claimant) != job:
        raise _superseded(run_uri, found[-1])


def _job(claimant: str) -> str:
    return claimant.rsplit(".", 1)[0]


def _note(run_uri: str, attempt: Attempt, kind: str = "json") -> str:
    return storage.join(run_uri, FOLDER, f"{attempt.writer}-{attempt.first_step:08d}.{kind}")


def _superseded(run_uri: str, newest: Attempt) -> SupersededError:
    try:
        note = storage.read_json(_note(run_uri, newest))
        who = f" (at {note['at']}, by {note['host']})"
    except storage.StorageError:  # taken back meanwhile
        who = ""
    return SupersededError(
        f"{run_uri}: other workers took this run over, from step {newest.first_step}{who}; these end. If another job "
        "is meant to run beside this one, give it another --run-name"
    )
