"""Reading the checkpoints of a run, at any number of workers, whatever number wrote them.

A checkpoint is a folder of `torch.distributed.checkpoint` files; see `pipeline.training.commits` for when it counts.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lgaf.distributed import all_gather_stack, rank_in, world_size
from lgaf.state import training_state
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.training.commits import MARKER, Checkpoint, mark_damaged

METADATA: Final = ".metadata"  # as torch's FileSystemWriter calls it


class DamagedCheckpointError(storage.StorageError):
    """A checkpoint whose files are not what was written."""


def restore_checkpoint(checkpoint: Checkpoint, train_step: TrainStep) -> None:
    """Load a checkpoint into network, head and optimizer, at any world size.

    Raises:
        DamagedCheckpointError: A file is not what was written. The checkpoint no longer counts, and the workers start
            again from the one before it.
        StorageError: It cannot be read.
    """
    try:
        read_checkpoint(checkpoint.uri, training_state(train_step), train_step.group)
    except DamagedCheckpointError as error:  # on all ranks alike
        if rank_in(train_step.group) == 0:
            mark_damaged(checkpoint.uri, str(error))
        if train_step.group is not None:
            dist.barrier(group=train_step.group)
        raise
    train_step.num_steps_done = checkpoint.step


def read_checkpoint(uri: str, state: dict[str, Any], group: ProcessGroup | None) -> None:
    """Load what ``state`` has a place for from the checkpoint at ``uri`` into its tensors; all ranks call this.

    Raises:
        DamagedCheckpointError: A file is not what was written.
        StorageError: It cannot be read, or it lacks one of the tensors.
    """
    with tempfile.TemporaryDirectory() as staging:
        folder = storage.local_path(uri) if storage.is_local(uri) else Path(staging)
        if not storage.is_local(uri):
            for info in storage.list_files(uri):
                (folder / info.uri.rsplit("/", 1)[1]).write_bytes(storage.read_bytes(info.uri))
        _check_files(uri, folder, group)
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


def _check_files(uri: str, folder: Path, group: ProcessGroup | None) -> None:
    """Compare the files with the marker, each rank some of them."""
    rank, world = rank_in(group), world_size(group)
    try:
        expected = storage.read_json(storage.join(uri, MARKER)).get("files", {})
    except storage.MissingError:  # perhaps on this rank alone
        wrong = [MARKER]
    else:
        wrong = [
            name
            for name in sorted(expected)[rank::world]
            if not (folder / name).is_file() or checksum(folder / name) != expected[name]
        ]
    found = all_gather_stack(torch.tensor([len(wrong)]), group).flatten().tolist()
    if any(found):
        which = ", ".join(wrong) or f"a file that rank {next(rank for rank, count in enumerate(found) if count)} read"
        raise DamagedCheckpointError(f"{uri}: the checkpoint cannot be read: {which}: is not what was written")


def checksum(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a marker has them."""
    with path.open("rb") as file:
        return {"num_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
