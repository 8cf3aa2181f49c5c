"""Reading the checkpoints of a run, at any number of workers, whatever number wrote them.

A checkpoint is a folder of `torch.distributed.checkpoint` files; see `pipeline.training.commits` for when it counts.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lgaf.distributed import all_gather_stack, rank_in, world_size
from lgaf.state import training_state
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.training.commits import MARKER, Checkpoint, mark_damaged


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
    _check_files(uri, group)
    try:
        load(state, storage_reader=_PartsReader(uri), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        reason = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        raise storage.StorageError(f"{uri}: the checkpoint cannot be read: {reason}") from error


def tensor_shapes(uri: str) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor of the checkpoint at ``uri``, by its names there ("head.weight").

    Raises:
        StorageError: It cannot be read.
    """
    try:
        known = _PartsReader(uri).read_metadata().state_dict_metadata
    except Exception as error:  # of many kinds, whatever the bytes lead the reader to
        raise storage.StorageError(f"{uri}: the checkpoint cannot be read: {error}") from error
    return {name: tuple(entry.size) for name, entry in known.items() if isinstance(entry, TensorStorageMetadata)}


class _Files(FileSystem):
    """Files of any storage, as torch's reader opens them."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with storage.open_read(str(path)) as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)


class _PartsReader(FileSystemReader):
    """Reads of a checkpoint, where it lies, the parts that this rank has a place for.

    A part is what one rank wrote of a tensor, and is read whole: at the same world size a rank's own centres.
    """

    def __init__(self, uri: str) -> None:
        super().__init__("")
        self.fs, self.path = _Files(), uri

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        # In one request: torch would ask for a tensor's bytes in many.
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))


def _check_files(uri: str, group: ProcessGroup | None) -> None:
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
            if _checksum_if_there(storage.join(uri, name)) != expected[name]
        ]
    found = all_gather_stack(torch.tensor([len(wrong)]), group).flatten().tolist()
    if any(found):
        which = ", ".join(wrong) or f"a file that rank {next(rank for rank, count in enumerate(found) if count)} read"
        raise DamagedCheckpointError(f"{uri}: the checkpoint cannot be read: {which}: is not what was written")


def checksum(uri: str) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a marker has them."""
    with storage.open_read(uri) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"num_bytes": file.tell(), "sha256": sha256}


def _checksum_if_there(uri: str) -> dict[str, Any] | None:
    try:
        return checksum(uri)
    except storage.MissingError:
        return None
