"""Saving the checkpoints of a run beside its training: any number of workers writes them, any other reads them.

Training waits for a copy of its state in host memory alone; files, checksums, upload and marker are another thread's.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import save

from lgaf.distributed import all_reduce_sum, rank_in, world_size
from lgaf.state import training_state
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.training.checkpoint import checksum
from pipeline.training.commits import MARKER, Checkpoint, checkpoint_uri, prune

_logger = logging.getLogger(__name__)

# Between two attempts to write one checkpoint: rising from the first to the last.
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 60.0
# Of the writers' own collectives: an upload may keep the other ranks waiting.
GROUP_TIMEOUT: Final = timedelta(hours=2)


class Checkpointer:
    """Saves a step's state while training goes on; at most one checkpoint is under way.

    All ranks make one and call its methods alike. A storage that is full or away does not stop training: there is a
    warning, and the same state is written again, at growing intervals, until it is committed or a newer one is due.

    Args:
        run_uri: Folder of the run.
        train_step: What is saved.
        writer: Of whose attempt the checkpoints are; part of their folders' names.
        keep: Newest checkpoints to keep.
        keep_best: Of the others, as many with the lowest loss.
        details: Written into each marker, for people.
        check_newest: Rank 0 calls this before it deletes or commits anything; it raises where others have the run.
        before_commit: Rank 0 calls this before the marker: what a checkpoint counts on must be safe by then.
    """

    def __init__(
        self,
        run_uri: str,
        train_step: TrainStep,
        *,
        writer: str = "",
        keep: int,
        keep_best: int = 0,
        details: Mapping[str, Any] | None = None,
        check_newest: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_uri, self._train_step, self._writer = run_uri, train_step, writer
        self._keep, self._keep_best, self._details = keep, keep_best, dict(details or {})
        self._check_newest, self._before_commit = check_newest, before_commit
        self._group: Any = None
        if world_size(train_step.group) > 1:
            # The writers talk to each other beside the training's collectives, over the hosts' network.
            ranks = dist.get_process_group_ranks(train_step.group)
            self._group = dist.new_group(ranks, timeout=GROUP_TIMEOUT, backend="gloo")
        # Pinned buffers that are used again save half of the copy's time; they need an accelerator.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=train_step.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._failed = False  # an attempt of the one under way did
        self._superseded = threading.Event()
        self._told = False  # that it takes long
        self._bug: BaseException | None = None
        self._uri = self._last_error = ""
        self.committed = 0  # the step of the last one, 0 while it is under way

    def is_free(self) -> bool:
        """Whether the last checkpoint is done with, on all ranks alike: one that fails gives way to the next."""
        if not self._is_busy_anywhere():
            return True
        if self._failed:
            self._superseded.set()
        elif not self._told and rank_in(self._group) == 0:
            self._told = True
            _logger.warning("%s: is still being written while the next checkpoint is due", self._uri)
        return False

    def save(self, loss: float | None = None) -> bool:
        """Begin a checkpoint of the state as it is now.

        Args:
            loss: What `keep_best` compares.

        Returns:
            False, on all ranks alike, where the last one is still under way: ask again.
        """
        started = time.perf_counter()
        if not self.is_free():
            return False
        step = self._train_step.num_steps_done
        state = training_state(self._train_step)
        if "scaler" in state:
            state["scaler"] = state["scaler"].state_dict()
        staged = self._stager.stage(state)
        self._failed, self._told, self._superseded = False, False, threading.Event()
        self.committed, self._uri = 0, self._folder(step)
        marker = self._details | {"step": step, "loss": loss, "stall_s": time.perf_counter() - started}
        self._thread = threading.Thread(target=self._write, args=(staged, marker), name="checkpoint", daemon=True)
        self._thread.start()
        return True

    def save_now(
        self, patience_s: float, loss: float | None = None, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Save the state as it is now, unless that is done, and wait until it is committed.

        Args:
            patience_s: How long a storage that is full or away is waited for.
            loss: As for `save`.
            on_wait: Called now and then, as long as there is patience.

        Raises:
            StorageError: It was not committed by then.
        """
        deadline = time.monotonic() + patience_s
        step = self._train_step.num_steps_done
        self._wait_until_free(deadline, on_wait)
        if not self._any_rank(self.committed == step):
            if self.save(loss):
                self._wait_until_free(deadline, on_wait)
            if not self._any_rank(self.committed == step):
                raise storage.StorageError(
                    f"{self._folder(step)}: was not written within {patience_s:g} s: {self._last_error}"
                ) from TimeoutError()

    def _wait_until_free(self, deadline: float, on_wait: Callable[[], None]) -> None:
        while self._is_busy_anywhere():
            if self._any_rank(time.monotonic() > deadline):
                self._superseded.set()  # ends after the attempt that is under way
            else:
                on_wait()
            if self._thread is not None:
                self._thread.join(1.0)

    def _is_busy_anywhere(self) -> bool:
        """Raises on all ranks alike where the writer of one ended by what no storage did."""
        is_busy = self._thread is not None and self._thread.is_alive()
        bug = self._bug  # as it is now: one that comes meanwhile is met by all alike the next time
        own = torch.tensor([float(is_busy), float(bug is not None)])
        busy, failed = all_reduce_sum(own, self._train_step.group).tolist()
        if bug is not None:
            raise bug
        if failed:
            raise RuntimeError(f"{self._uri}: the writer of another rank failed")
        return bool(busy)

    def _any_rank(self, flag: bool) -> bool:
        # Over the training's group: the writers may be talking over their own.
        return bool(all_reduce_sum(torch.tensor(float(flag)), self._train_step.group))

    def _write(self, staged: dict[str, Any], marker: dict[str, Any]) -> None:
        delay_s = FIRST_DELAY_S
        try:
            if self._train_step.device.type == "cuda":
                torch.cuda.set_device(self._train_step.device)  # a thread begins with the first
            while not self._attempt(staged, marker):
                self._failed = True
                self._superseded.wait(delay_s)
                if not self._go_on():
                    return
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            self.committed = marker["step"]
        except BaseException as error:  # raised where training next asks
            self._bug = error

    def _folder(self, step: int) -> str:
        return checkpoint_uri(self._run_uri, step, self._writer)

    def _go_on(self) -> bool:
        """Whether to try again: rank 0 says."""
        decision = [not self._superseded.is_set()]
        if self._group is not None:
            dist.broadcast_object_list(decision, group=self._group, group_src=0)
        return decision[0]

    def _attempt(self, staged: dict[str, Any], marker: dict[str, Any]) -> bool:
        """Write and commit; False, on all ranks alike, if the storage of one would not."""
        uri = self._folder(marker["step"])
        files: dict[str, Any] = {}
        # A remote checkpoint is put together here first; torch makes the folder, and tells all ranks if it cannot.
        staging = Path(tempfile.gettempdir()) / f"lgaf-checkpoint-{uuid.uuid4().hex}"
        folder = storage.local_path(uri) if storage.is_local(uri) else staging
        parts = (
            functools.partial(self._clear, uri),
            functools.partial(self._write_files, staged, folder),
            functools.partial(self._upload, uri, folder, files),
            functools.partial(self._commit, uri, marker, files, time.perf_counter()),
        )
        try:
            return all(self._together(uri, part, files) for part in parts)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _clear(self, uri: str) -> None:
        if rank_in(self._group) == 0:
            self._check_newest()
            storage.delete_tree(uri)  # remains of an attempt that failed, or that a kill cut short

    def _write_files(self, staged: dict[str, Any], folder: Path) -> None:
        save(
            staged,
            storage_writer=FileSystemWriter(folder),
            # Batch-norm statistics differ between ranks; the exported model has rank 0's, so the checkpoint does too.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=self._group,
            no_dist=self._group is None,
        )

    def _upload(self, uri: str, folder: Path, files: dict[str, Any]) -> None:
        """Read this rank's files again: for their checksums, and for a store that is no file system."""
        for path in folder.iterdir():
            if _is_of_rank(path.name, rank_in(self._group)):
                files[path.name] = checksum(storage.normalise(path))
                if not storage.is_local(uri):
                    storage.write_bytes(storage.join(uri, path.name), path.read_bytes())

    def _commit(self, uri: str, marker: dict[str, Any], files: dict[str, Any], started: float) -> None:
        if rank_in(self._group) == 0:
            self._check_newest()
            self._before_commit()
            seconds = {"write_s": time.perf_counter() - started}
            storage.write_json(storage.join(uri, MARKER), marker | {"files": files} | seconds)
            try:
                newest = Checkpoint(marker["step"], self._writer, uri)
                prune(self._run_uri, self._keep, self._keep_best, newest)
            except OSError as error:  # it counts all the same
                _logger.warning("%s: older checkpoints could not be deleted: %s", self._run_uri, error)

    def _together(self, uri: str, part: Callable[[], None], files: dict[str, Any]) -> bool:
        """Do a part on all ranks, and let each know whether all could; ``files`` of all ranks become one."""
        failure, bug = None, None
        try:
            part()
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            failure = _storage_failure(error)
            bug = error if failure is None else None
        own = (failure, repr(bug) if bug is not None else None, dict(files))
        everyone: list[Any] = [own]
        if self._group is not None:
            everyone = [None] * world_size(self._group)
            dist.all_gather_object(everyone, own, group=self._group)
        if bug is not None:
            raise bug
        for rank, (_, others_bug, others) in enumerate(everyone):
            files.update(others)
            if others_bug is not None:
                raise RuntimeError(f"{uri}: rank {rank} cannot write: {others_bug}")
        failures = [f"rank {rank}: {entry[0]}" for rank, entry in enumerate(everyone) if entry[0] is not None]
        if failures:
            self._last_error = "; ".join(failures)
            if rank_in(self._group) == 0:
                _logger.warning("%s: the checkpoint is not written, training goes on: %s", uri, self._last_error)
        return not failures


def _storage_failure(error: BaseException) -> str | None:
    """What a storage that is full, forbidden or away says; None for any other error."""
    if isinstance(error, CheckpointException):
        inner = [failure[0] for failure in error.failures.values()]
        reasons = [_storage_failure(failure) for failure in inner]
        return None if None in reasons else "; ".join(str(reason) for reason in reasons)
    if isinstance(error, OSError):
        return str(error)
    # Torch's writer of zip files has no class of its own for a disk that is full, and hides Python's.
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return str(error).splitlines()[0]
    return None


def _is_of_rank(name: str, rank: int) -> bool:
    """Whether a rank wrote a file; rank 0 has the metadata too."""
    return name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))
