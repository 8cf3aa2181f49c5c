"""Which checkpoints of a run count, and with which the next start of the workers goes on.

A checkpoint counts from the moment its marker is there, which is written last: a folder without one is what a kill left
behind. Ray Train asks for all of this in processes of its own, at every start: nothing here loads torch.
"""

from __future__ import annotations

import re
from typing import Any, Final

import ray.data

from pipeline import storage
from pipeline.training.failure import fatal_message

MARKER: Final = "COMMITTED.json"
_FOLDER = re.compile(r"checkpoints/step_(\d+)/")


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Folder of the checkpoint after ``step`` steps."""
    return storage.join(run_uri, "checkpoints", f"step_{step:08d}")


def committed_steps(run_uri: str) -> list[int]:
    """Steps done at each committed checkpoint, rising."""
    return _steps(storage.list_files(storage.join(run_uri, "checkpoints")), of=f"/{MARKER}")


def latest_step(run_uri: str) -> int:
    """Steps done at the newest committed checkpoint; 0 where there is none."""
    return max(committed_steps(run_uri), default=0)


def prune(run_uri: str, keep: int) -> None:
    """Delete all but the newest ``keep`` committed checkpoints, the remains of unfinished ones too."""
    files = storage.list_files(storage.join(run_uri, "checkpoints"))
    for step in set(_steps(files)) - set(_steps(files, of=f"/{MARKER}")[-keep:]):
        storage.delete_tree(checkpoint_uri(run_uri, step))


def _steps(files: list[storage.FileInfo], of: str = "") -> list[int]:
    """The checkpoints that these files belong to, of those alone whose name ends so."""
    found = [_FOLDER.search(info.uri) for info in files if info.uri.endswith(of)]
    return sorted({int(match.group(1)) for match in found if match})


def placeholder_dataset(run_uri: str) -> Any:
    """What Ray Train takes as the data set at every start; `PlannedDataConfig` replaces it by the ranks' read plans.

    Raises:
        RuntimeError: A failure was noted that a restart cannot mend; this ends the run.
    """
    noted = fatal_message(run_uri)
    if noted is not None:
        raise RuntimeError(noted)
    return ray.data.range(1)
