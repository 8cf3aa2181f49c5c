"""Which start of the workers a run belongs to: the newest, whatever still lives of those before it.

A network that splits, or a job that was submitted twice, leaves two groups of workers with one run. Each start leaves a
note in the run's folder before its workers are made. Those of an older one find it when they next write, and end; what
they wrote at the same moment does not count (`Attempt.discards`). No clocks, leases or locks: object stores have none.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from typing import Final

from pipeline import storage

FOLDER: Final = "attempts"
_NAME = re.compile(rf"/{FOLDER}/(\d{{6}})-(\d{{8}})-([^/]+)\.json$")


class SupersededError(RuntimeError):
    """Another job goes on with the run."""


@dataclass(frozen=True, order=True, slots=True)
class Attempt:
    """One start of a run's workers; later ones are greater.

    Attributes:
        number: From 1. Two that began in the same moment may share it; the claimants decide.
        first_step: The steps done before it: those of the checkpoint that it went on from.
        claimant: Who started it; `controller_of` makes them.
    """

    number: int
    first_step: int
    claimant: str

    def __str__(self) -> str:
        return f"{self.number:06d}-{self.first_step:08d}-{self.claimant}"

    def discards(self, step: int, written_by: str) -> bool:
        """Whether a checkpoint of an earlier attempt does not count, as this one began without it. Pure.

        Args:
            step: Steps done at the checkpoint.
            written_by: The attempt that wrote it, as a string; empty for those of versions that did not say.
        """
        return written_by < str(self) and self.first_step < step


def controller_of(job: str, number: int) -> str:
    """The name of a job's ``number``-th controller; one that died may have left workers."""
    return f"{job}.{number}"


def attempts_of(run_uri: str) -> list[Attempt]:
    """All starts of a run's workers, in order."""
    found = [_NAME.search(info.uri) for info in storage.list_files(storage.join(run_uri, FOLDER))]
    return sorted(Attempt(int(name[1]), int(name[2]), name[3]) for name in found if name)


def begin_attempt(run_uri: str, claimant: str, first_step: int) -> Attempt:
    """Take the run over from whoever had it.

    Raises:
        SupersededError: Another job did so since this claimant's last attempt.
    """
    before = attempts_of(run_uri)
    check_not_superseded(run_uri, claimant, before)
    attempt = Attempt(before[-1].number + 1 if before else 1, first_step, claimant)
    note = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": socket.gethostname()}
    storage.write_json(storage.join(run_uri, FOLDER, f"{attempt}.json"), note)
    return attempt


def newest_of(run_uri: str, claimant: str) -> Attempt:
    """The newest attempt of one claimant."""
    return [attempt for attempt in attempts_of(run_uri) if attempt.claimant == claimant][-1]


def check_newest(run_uri: str, attempt: Attempt) -> None:
    """To be called before anything of the run is written.

    Raises:
        SupersededError: Other workers have the run.
        StorageError: Nobody knows: the storage is away.
    """
    newest = attempts_of(run_uri)[-1]
    if newest != attempt:
        raise _superseded(run_uri, newest)


def check_not_superseded(run_uri: str, claimant: str, attempts: list[Attempt] | None = None) -> None:
    """Raise `SupersededError` if another job has taken the run over from a claimant that had it."""
    found = attempts_of(run_uri) if attempts is None else attempts
    job = _job(claimant)
    if any(_job(attempt.claimant) == job for attempt in found) and _job(found[-1].claimant) != job:
        raise _superseded(run_uri, found[-1])


def _job(claimant: str) -> str:
    return claimant.rsplit(".", 1)[0]


def _superseded(run_uri: str, newest: Attempt) -> SupersededError:
    note = storage.read_json(storage.join(run_uri, FOLDER, f"{newest}.json"))
    return SupersededError(
        f"{run_uri}: another job on {note['host']} took this run over at {note['began']}, from step "
        f"{newest.first_step}; this one ends. Where both are meant, give them different names (--run-name)"
    )
