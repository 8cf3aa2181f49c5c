"""Checkpoints of a run: written by any number of workers, read by any other.

A checkpoint is a folder of `torch.distributed.checkpoint` files; see `pipeline.training.commits` for when it counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lgaf.distributed import rank_in
from lgaf.state import training_state
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.training.commits import MARKER, checkpoint_uri, prune

METADATA: Final = ".metadata"  # as torch's FileSystemWriter calls it


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
        prune(run_uri, keep)


def restore_checkpoint(run_uri: str, step: int, train_step: TrainStep) -> None:
    """Load the checkpoint after ``step`` steps into network, head and optimizer, at any world size.

    Raises:
        StorageError: A file of it is missing or unreadable.
    """
    read_checkpoint(checkpoint_uri(run_uri, step), training_state(train_step), train_step.group)
    train_step.num_steps_done = step


def read_checkpoint(uri: str, state: dict[str, Any], group: ProcessGroup | None) -> None:
    """Load what ``state`` has a place for from the checkpoint at ``uri`` into its tensors; all ranks call this.

    Raises:
        StorageError: A file of it is missing or unreadable, or it lacks one of the tensors.
    """
    with tempfile.TemporaryDirectory() as staging:
        folder = storage.local_path(uri) if storage.is_local(uri) else Path(staging)
        if not storage.is_local(uri):
            for info in storage.list_files(uri):
                (folder / info.uri.rsplit("/", 1)[1]).write_bytes(storage.read_bytes(info.uri))
        try:
            load(state, storage_reader=FileSystemReader(folder), process_group=group, no_dist=group is None)
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            reason = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
            raise storage.StorageError(f"{uri}: the checkpoint cannot be read: {reason}") from error


def tensor_shapes(uri: str) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor of the checkpoint at ``uri``, by its names there ("head.weight").

    Raises:
        StorageError: It cannot be read.
    """
    with tempfile.TemporaryDirectory() as staging:
        folder = storage.local_path(uri) if storage.is_local(uri) else Path(staging)
        if not storage.is_local(uri):
            (folder / METADATA).write_bytes(storage.read_bytes(storage.join(uri, METADATA)))
        try:
            known = FileSystemReader(folder).read_metadata().state_dict_metadata
        except Exception as error:  # of many kinds, whatever the bytes lead the reader to
            raise storage.StorageError(f"{uri}: the checkpoint cannot be read: {error}") from error
    return {name: tuple(entry.size) for name, entry in known.items() if isinstance(entry, TensorStorageMetadata)}


def _barrier(train_step: TrainStep) -> None:
    if train_step.group is not None:
        dist.barrier(group=train_step.group)
