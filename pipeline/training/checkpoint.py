"""Checkpoints of a run: written by any number of workers, read by any other.

A checkpoint is a folder of `torch.distributed.checkpoint` files. It counts from the moment its marker is there, which
is written last: a folder without one is what a kill left behind.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lgaf.distributed import rank_in
from lgaf.state import training_state
from lgaf.step import TrainStep
from pipeline import storage

MARKER: Final = "COMMITTED.json"
_FOLDER = re.compile(r"checkpoints/step_(\d+)/")


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Folder of the checkpoint after ``step`` steps."""
    return storage.join(run_uri, "checkpoints", f"step_{step:08d}")


def committed_steps(run_uri: str) -> list[int]:
    """Steps done at each committed checkpoint, rising."""
    files = storage.list_files(storage.join(run_uri, "checkpoints"))
    found = [_FOLDER.search(info.uri) for info in files if info.uri.endswith(f"/{MARKER}")]
    return sorted(int(match.group(1)) for match in found if match)


def latest_step(run_uri: str) -> int:
    """Steps done at the newest committed checkpoint; 0 where there is none."""
    return max(committed_steps(run_uri), default=0)


def save_checkpoint(run_uri: str, train_step: TrainStep, details: dict[str, Any], keep: int) -> None:
    """Write a checkpoint; all ranks call this.

    Args:
        run_uri: Folder of the run.
        train_step: What to save.
        details: Written into the marker, for people.
        keep: Newest checkpoints to keep; older ones and remains of unfinished ones are deleted.
    """
    group, rank = train_step.group, rank_in(train_step.group)
    uri = checkpoint_uri(run_uri, train_step.num_steps_done)
    if rank == 0:
        storage.delete_tree(uri)  # remains of an attempt that a kill cut short
    _barrier(train_step)
    with tempfile.TemporaryDirectory() as staging:
        folder = storage.local_path(uri) if storage.is_local(uri) else Path(staging)
        folder.mkdir(parents=True, exist_ok=True)
        save(
            training_state(train_step),
            storage_writer=FileSystemWriter(folder),
            # Batch-norm statistics differ between ranks; the exported model has rank 0's, so the checkpoint does too.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=group,
            no_dist=group is None,
        )
        if not storage.is_local(uri):
            # Each rank's own files; rank 0 has the metadata too.
            for path in folder.iterdir():
                storage.write_bytes(storage.join(uri, path.name), path.read_bytes())
        _barrier(train_step)
    if rank == 0:
        storage.write_json(storage.join(uri, MARKER), details | {"step": train_step.num_steps_done})
        _prune(run_uri, keep)


def restore_checkpoint(run_uri: str, step: int, train_step: TrainStep) -> None:
    """Load the checkpoint after ``step`` steps into network, head and optimizer, at any world size.

    Raises:
        StorageError: A file of it is missing or unreadable.
    """
    uri = checkpoint_uri(run_uri, step)
    with tempfile.TemporaryDirectory() as staging:
        folder = storage.local_path(uri) if storage.is_local(uri) else Path(staging)
        if not storage.is_local(uri):
            for info in storage.list_files(uri):
                (folder / info.uri.rsplit("/", 1)[1]).write_bytes(storage.read_bytes(info.uri))
        try:
            load(
                training_state(train_step),
                storage_reader=FileSystemReader(folder),
                process_group=train_step.group,
                no_dist=train_step.group is None,
            )
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            reason = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
            raise storage.StorageError(f"{uri}: the checkpoint cannot be read: {reason}") from error
    train_step.num_steps_done = step


def _barrier(train_step: TrainStep) -> None:
    if train_step.group is not None:
        dist.barrier(group=train_step.group)


def _prune(run_uri: str, keep: int) -> None:
    kept = set(committed_steps(run_uri)[-keep:])
    files = storage.list_files(storage.join(run_uri, "checkpoints"))
    present = {int(match.group(1)) for info in files if (match := _FOLDER.search(info.uri))}
    for step in present - kept:
        storage.delete_tree(checkpoint_uri(run_uri, step))
