"""Which checkpoints of a run count, and with which the next start of the workers goes on.

A checkpoint counts from the moment its marker is there, which is written last and says how long every file of it is: a
folder without one is what a kill left behind. Each attempt (`pipeline.training.attempts`) has folders of its own.
Ray Train asks for all of this at every start, in processes of its own: nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import re
import time
from dataclasses import replace
from typing import Any, Final, NamedTuple

from pipeline import storage
from pipeline.errors import causes, may_pass
from pipeline.training.attempts import (
    Attempt,
    SupersededError,
    attempts_of,
    check_newest,
    check_not_superseded,
    delete_note,
    write_note,
)
from pipeline.training.failure import fatal_message

MARKER: Final = "COMMITTED.json"
DAMAGED: Final = "DAMAGED.json"
_FOLDER = re.compile(r"^(.*/checkpoints/step_(\d+)(?:-([^/]+))?)/([^/]+)$")
# Looks at a folder that others write to, before it is given up.
LOOKS: Final = 5
RETRY_S: Final = 5.0

_logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """Where a checkpoint lies. Sorts by its step, then by who wrote it (`Attempt.writer`)."""

    step: int
    writer: str
    uri: str


def checkpoint_uri(run_uri: str, step: int, writer: str = "") -> str:
    """Folder of the checkpoint after ``step`` steps; that of an attempt has its `Attempt.writer` in its name."""
    return storage.join(run_uri, "checkpoints", f"step_{step:08d}" + (f"-{writer}" if writer else ""))


def read_marker(uri: str) -> dict[str, Any]:
    """What the marker of a committed checkpoint says: ``step``, ``files`` (size and sha256 by name), and more."""
    marker: dict[str, Any] = storage.read_json(storage.join(uri, MARKER))
    return marker


def committed(run_uri: str) -> list[Checkpoint]:
    """The committed checkpoints, rising."""
    return _having(_files(run_uri), MARKER)


def committed_steps(run_uri: str) -> list[int]:
    """Steps done at each committed checkpoint, rising."""
    return [checkpoint.step for checkpoint in committed(run_uri)]


def latest_step(run_uri: str) -> int:
    """Steps done at the newest checkpoint that counts; 0 where there is none at all. Raises as `latest_checkpoint`."""
    found = latest_checkpoint(run_uri)
    return found.step if found else 0


def latest_checkpoint(run_uri: str) -> Checkpoint | None:
    """The newest checkpoint that counts: committed, all files there in full, and no later attempt began without it.

    Raises:
        StorageError: There are committed checkpoints, and none of them counts.
    """
    for _ in range(LOOKS):
        try:
            return _latest(run_uri)
        except storage.MissingError:  # swept since it was listed
            continue
    raise storage.StorageError(f"{storage.join(run_uri, 'checkpoints')}: others delete what is looked at")


def _latest(run_uri: str) -> Checkpoint | None:
    files = _files(run_uri)
    sizes = {info.uri: info.num_bytes for info in files}
    attempts = attempts_of(run_uri)
    late, damage = [], []
    for checkpoint in reversed(_having(files, MARKER)):
        if _is_discarded(checkpoint, attempts):
            late.append(f"{checkpoint.uri}: came late, the run had gone on without it")
        elif reason := _damage(checkpoint, sizes):
            damage.append(reason)
        else:
            if late or damage:
                _warn_once(f"going on from step {checkpoint.step}: {'; '.join(late + damage)}")
            return checkpoint
    # What a loading worker found to be damaged counts too.
    damage += [f"{checkpoint.uri}: is damaged" for checkpoint in _having(files, DAMAGED)]
    # Late ones alone are nothing lost, where the newest attempt began at the beginning.
    if damage or (late and attempts[-1].first_step):
        raise storage.StorageError(
            f"{'; '.join(late + damage)}: no checkpoint of the run is whole; delete "
            f"{storage.join(run_uri, 'checkpoints')} to start it from the beginning"
        )
    return None


@functools.cache
def _warn_once(text: str) -> None:
    """Several ask at every start."""
    _logger.warning("%s", text)


def _is_discarded(checkpoint: Checkpoint, attempts: list[Attempt]) -> bool:
    return any(attempt.discards(checkpoint.step, checkpoint.writer) for attempt in attempts)


def _damage(checkpoint: Checkpoint, sizes: dict[str, int]) -> str:
    """The first file of a checkpoint that is not as long as its marker says; empty where all are."""
    try:
        marker = read_marker(checkpoint.uri)
    except storage.StorageError as error:
        if not isinstance(error.__cause__, ValueError):  # it could not be read, which says nothing of what it holds
            raise
        return str(error)
    for name, expected in marker.get("files", {}).items():
        uri = storage.join(checkpoint.uri, name)
        found = sizes.get(uri)
        if found != expected["num_bytes"]:
            what = "is not there" if found is None else f"has {found} bytes"
            return f"{uri}: {what} where {MARKER} says {expected['num_bytes']} bytes"
    return ""


def mark_damaged(uri: str, reason: str) -> None:
    """Let the checkpoint at ``uri`` count no more; it is swept with the next commit."""
    storage.write_json(storage.join(uri, DAMAGED), {"reason": reason})
    storage.delete_file(storage.join(uri, MARKER))


def prune(run_uri: str, keep: int, keep_best: int = 0, newest: Checkpoint | None = None) -> None:
    """Delete checkpoints that are not needed, the remains of unfinished ones too; never what a later attempt wrote.

    Args:
        run_uri: Folder of the run.
        keep: Newest committed checkpoints that stay.
        keep_best: As many of the others stay, those with the lowest loss.
        newest: The one just committed: those of later steps are what a damaged one led back from.
    """
    files, attempts = _files(run_uri), attempts_of(run_uri)
    if newest is not None and any(attempt.writer > newest.writer for attempt in attempts):
        return
    counts = [
        checkpoint
        for checkpoint in _having(files, MARKER)
        if (newest is None or checkpoint.step <= newest.step) and not _is_discarded(checkpoint, attempts)
    ]
    stays = set(counts[-keep:])
    if keep_best:
        losses = [(_loss(checkpoint), -place) for place, checkpoint in enumerate(counts[:-keep])]
        ranked = sorted(entry for entry in losses if isinstance(entry[0], int | float))
        stays |= {counts[-negative] for _, negative in ranked[:keep_best]}
    if stays:
        for checkpoint in set(_having(files)) - stays:
            storage.delete_tree(checkpoint.uri)


def _loss(checkpoint: Checkpoint) -> Any:
    try:
        return read_marker(checkpoint.uri).get("loss")
    except storage.StorageError:  # a damaged marker keeps no other from being swept
        return None


def _files(run_uri: str) -> list[storage.FileInfo]:
    return storage.list_files(storage.join(run_uri, "checkpoints"))


def _having(files: list[storage.FileInfo], name: str = "") -> list[Checkpoint]:
    """The checkpoints that these files belong to, rising; only those that have a file of this name."""
    found = [_FOLDER.match(info.uri) for info in files]
    return sorted(
        {Checkpoint(int(match[2]), match[3] or "", match[1]) for match in found if match and name in ("", match[4])}
    )


class Start(NamedTuple):
    """With what the workers begin.

    Attributes:
        attempt: Theirs.
        checkpoint: What they restore; None: they begin at the beginning.
    """

    attempt: Attempt
    checkpoint: Checkpoint | None

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return self.attempt.first_step


def begin_attempt(run_uri: str, claimant: str, patience_s: float = 0.0) -> Start:
    """Take the run over from whoever had it, at its newest checkpoint.

    Ray Train's controller calls this at every start of the workers, before they train: here they are told apart from
    those of before, and what they restore is decided, for all ranks and for their data alike.

    Args:
        run_uri: Folder of the run.
        claimant: Who asks (`controller_of`).
        patience_s: How long a storage that is full or away is waited for, beyond the attempts of each request.

    Raises:
        RuntimeError: A failure was noted that a restart cannot mend; this ends the run.
        SupersededError: Another job took the run over since this claimant's last attempt; likewise.
        StorageError: As `latest_checkpoint`, or the storage is full or away.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _begin(run_uri, claimant)
        except OSError as error:
            if time.monotonic() + RETRY_S > deadline or not (may_pass(error) or _is_full(error)):
                raise
            _logger.warning("%s: the workers wait for the storage: %s", run_uri, error)
            time.sleep(RETRY_S)


def _is_full(error: BaseException) -> bool:
    return any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes(error))


def _begin(run_uri: str, claimant: str) -> Start:
    noted = fatal_message(run_uri)
    if noted is not None:
        raise RuntimeError(noted)
    for _ in range(LOOKS):
        before = attempts_of(run_uri)
        check_not_superseded(run_uri, claimant, before)
        found = latest_checkpoint(run_uri)
        attempt = Attempt(before[-1].number + 1 if before else 1, claimant, found.step if found else 0)
        try:
            write_note(run_uri, attempt)
            # Others may have committed between the look and the note: then this would discard what they did.
            if latest_checkpoint(run_uri) == found:
                check_newest(run_uri, attempt)  # two at once: one of them
                attempt = replace(attempt, began=True)
                write_note(run_uri, attempt)
                return Start(attempt, found)
        except BaseException:
            with contextlib.suppress(OSError):
                delete_note(run_uri, attempt)
            raise
        delete_note(run_uri, attempt)
    raise SupersededError(f"{run_uri}: another job trains this run; give this one another --run-name, or stop that one")
