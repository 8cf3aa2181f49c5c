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
from dataclasses import dataclass
from typing import Any, Final

from pipeline import storage

FOLDER: Final = "attempts"
_NAME = re.compile(rf"/{FOLDER}/(\d{{6}})-([^/]+)-(\d{{8}})\.json$")


class SupersededError(RuntimeError):
    """Other workers go on with the run."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run's workers.

    Attributes:
        number: From 1. Two that began in the same moment may share it; the claimants decide.
        claimant: Who started it; `controller_of` makes them.
        first_step: The steps done before it: those of the checkpoint that it goes on from.
    """

    number: int
    claimant: str
    first_step: int

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
        return writer < self.writer and self.first_step < step


def controller_of(job: str, number: int) -> str:
    """The name of a job's ``number``-th controller; one that died may have left workers."""
    return f"{job}.{number}"


def attempts_of(run_uri: str) -> list[Attempt]:
    """All starts of a run's workers, in order."""
    found = [_NAME.search(info.uri) for info in storage.list_files(storage.join(run_uri, FOLDER))]
    return sorted((Attempt(int(name[1]), name[2], int(name[3])) for name in found if name), key=lambda a: a.writer)


def write_note(run_uri: str, attempt: Attempt) -> None:
    """From here on the run is this attempt's."""
    note = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": socket.gethostname()}
    storage.write_json(_note(run_uri, attempt), note)


def delete_note(run_uri: str, attempt: Attempt) -> None:
    """It never was."""
    storage.delete_file(_note(run_uri, attempt))


def check_newest(run_uri: str, attempt: Attempt) -> None:
    """To be called before anything of the run is written.

    Raises:
        SupersededError: Other workers have the run.
        StorageError: Nobody knows: the storage is away, or the note of this attempt is.
    """
    found = attempts_of(run_uri)
    if attempt not in found:
        raise storage.StorageError(f"{_note(run_uri, attempt)}: is gone, so nobody knows whose the run is")
    if found[-1] != attempt:
        raise _superseded(run_uri, found[-1])


def check_not_superseded(run_uri: str, claimant: str, attempts: list[Attempt] | None = None) -> None:
    """Raise `SupersededError` if another job has taken the run over from a claimant that had it."""
    found = attempts_of(run_uri) if attempts is None else attempts
    job = _job(claimant)
    if any(_job(attempt.claimant) == job for attempt in found) and _job(found[-1].claimant) != job:
        raise _superseded(run_uri, found[-1])


def _job(claimant: str) -> str:
    return claimant.rsplit(".", 1)[0]


def _note(run_uri: str, attempt: Attempt) -> str:
    return storage.join(run_uri, FOLDER, f"{attempt.writer}-{attempt.first_step:08d}.json")


def _superseded(run_uri: str, newest: Attempt) -> SupersededError:
    note: dict[str, Any] = storage.read_json(_note(run_uri, newest))
    return SupersededError(
        f"{run_uri}: other workers took this run over, from step {newest.first_step} (at {note['began']}, by "
        f"{note['host']}); these end. If another job is meant to run beside this one, give it another --run-name"
    )
