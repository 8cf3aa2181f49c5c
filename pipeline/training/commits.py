"""Which checkpoints of a run count, and with which the next start of the workers goes on.

A checkpoint counts from the moment its marker is there, which is written last and says how long every file of it is: a
folder without one is what a kill left behind. Ray Train asks for all of this in processes of its own, at every start:
nothing here loads torch.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import ray.data

from pipeline import storage
from pipeline.training.attempts import Attempt, attempts_of, begin_attempt
from pipeline.training.failure import fatal_message

MARKER: Final = "COMMITTED.json"
DAMAGED: Final = "DAMAGED.json"
_FOLDER = re.compile(r"checkpoints/step_(\d+)/")

_logger = logging.getLogger(__name__)


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Folder of the checkpoint after ``step`` steps."""
    return storage.join(run_uri, "checkpoints", f"step_{step:08d}")


def read_marker(run_uri: str, step: int) -> dict[str, Any]:
    """What the marker of a committed checkpoint says: ``step``, ``files`` (size and sha256 by name), and more."""
    marker: dict[str, Any] = storage.read_json(storage.join(checkpoint_uri(run_uri, step), MARKER))
    return marker


def committed_steps(run_uri: str) -> list[int]:
    """Steps done at each committed checkpoint, rising."""
    return _steps(storage.list_files(storage.join(run_uri, "checkpoints")), of=f"/{MARKER}")


def latest_step(run_uri: str) -> int:
    """Steps done at the newest checkpoint that counts; 0 where there is none at all.

    It is committed, its files are all there in full, and no later attempt began without it.

    Raises:
        StorageError: There are committed checkpoints, and all of them are damaged.
    """
    files = storage.list_files(storage.join(run_uri, "checkpoints"))
    sizes = {info.uri: info.num_bytes for info in files}
    attempts = attempts_of(run_uri)
    damage: list[str] = []
    for step in reversed(_steps(files, of=f"/{MARKER}")):
        try:
            marker = read_marker(run_uri, step)
        except storage.MissingError:  # swept since it was listed
            continue
        if _is_discarded(attempts, step, marker):
            _logger.warning("%s: does not count, the run went on without it", checkpoint_uri(run_uri, step))
            continue
        found = _damage(run_uri, step, marker, sizes)
        if not found:
            if damage:
                _logger.warning("going on from the checkpoint of step %d: %s", step, "; ".join(damage))
            return step
        damage.append(found)
    # What a loading worker found to be damaged counts too.
    damage += [f"{checkpoint_uri(run_uri, step)}: is damaged" for step in _steps(files, of=f"/{DAMAGED}")]
    if damage:
        raise storage.StorageError(
            f"{'; '.join(damage)}: no checkpoint of the run is whole; delete "
            f"{storage.join(run_uri, 'checkpoints')} to start it from the beginning"
        )
    return 0


def _is_discarded(attempts: list[Attempt], step: int, marker: dict[str, Any]) -> bool:
    """Whether a checkpoint came from workers that others had taken the place of."""
    return any(attempt.discards(step, marker.get("attempt", "")) for attempt in attempts)


def _damage(run_uri: str, step: int, marker: dict[str, Any], sizes: dict[str, int]) -> str:
    """The first file of a checkpoint that is not as long as its marker says; empty where all are."""
    folder = checkpoint_uri(run_uri, step)
    for name, expected in marker.get("files", {}).items():
        uri = storage.join(folder, name)
        found = sizes.get(uri)
        if found != expected["num_bytes"]:
            what = "is not there" if found is None else f"has {found} bytes"
            return f"{uri}: {what} where {MARKER} says {expected['num_bytes']} bytes"
    return ""


def mark_damaged(uri: str, reason: str) -> None:
    """Let the checkpoint at ``uri`` count no more; it is swept with the next commit."""
    storage.write_json(storage.join(uri, DAMAGED), {"reason": reason})
    storage.delete_file(storage.join(uri, MARKER))


def prune(run_uri: str, keep: int, keep_best: int = 0, newest: int | None = None) -> None:
    """Delete checkpoints that are not needed, the remains of unfinished ones too.

    Args:
        run_uri: Folder of the run.
        keep: Newest committed checkpoints that stay.
        keep_best: As many of the others stay, those with the lowest loss.
        newest: The one just committed: those of later steps are what a damaged one led back from.
    """
    files = storage.list_files(storage.join(run_uri, "checkpoints"))
    attempts = attempts_of(run_uri)
    markers = {step: read_marker(run_uri, step) for step in _steps(files, of=f"/{MARKER}")}
    committed = [
        step
        for step, marker in markers.items()
        if (newest is None or step <= newest) and not _is_discarded(attempts, step, marker)
    ]
    stays = set(committed[-keep:])
    if keep_best:
        losses = [(markers[step].get("loss"), -step) for step in committed[:-keep]]
        ranked = sorted(entry for entry in losses if isinstance(entry[0], int | float))
        stays |= {-negative for _, negative in ranked[:keep_best]}
    for step in set(_steps(files)) - stays:
        storage.delete_tree(checkpoint_uri(run_uri, step))


def _steps(files: list[storage.FileInfo], of: str = "") -> list[int]:
    """The checkpoints that these files belong to, of those alone whose name ends so."""
    found = [_FOLDER.search(info.uri) for info in files if info.uri.endswith(of)]
    return sorted({int(match.group(1)) for match in found if match})


def begin_with_placeholder(run_uri: str, claimant: str) -> Any:
    """Begin an attempt, and give Ray Train a data set; `PlannedDataConfig` replaces it by the ranks' read plans.

    Ray Train's controller calls this at every start of the workers, before it makes them: this is where they are told
    apart from those of before, and which step they go on from.

    Raises:
        RuntimeError: A failure was noted that a restart cannot mend; this ends the run.
        SupersededError: Another job has the run now; likewise.
        StorageError: As `latest_step`.
    """
    noted = fatal_message(run_uri)
    if noted is not None:
        raise RuntimeError(noted)
    begin_attempt(run_uri, claimant, latest_step(run_uri))
    return ray.data.range(1)
