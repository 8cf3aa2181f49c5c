"""The workers' part of a warm start: network, class centres and their momentum into a fresh `TrainStep`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lgaf.distributed import rank_in, world_size
from lgaf.heads.class_shard import class_range
from lgaf.heads.resharding import carried_over
from lgaf.state import over_classes, training_state
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.model_store import load_model, read_model_info
from pipeline.training.checkpoint import read_checkpoint
from pipeline.training.warm_start import (
    NOTE,
    PinnedHead,
    WarmStart,
    model_copy,
    read_classes,
    read_note,
)

_WEIGHT = "weight"  # of the head, in its checkpoint


@torch.no_grad()
def apply_warm_start(wanted: WarmStart, run_uri: str, step: TrainStep) -> None:
    """Put what a run starts from into its fresh step; nothing where it starts from fresh weights.

    The network's weights and statistics become the model's, also where their average is kept. Centres of people whom
    the old run knew become its, with what the optimizer kept beside them if it is of the same kind (AdamW's count of
    steps too, so that new people's first steps are up to seven times as long as from a fresh start; a warm-up covers
    them). New people's centres stay as they are, without momentum. Statistics and learned numbers of the margin start
    fresh: they follow within some steps, or depend on the number of classes.

    Collectives: those of `carried_over` for each tensor, and those of a checkpoint's reading. All ranks call this.

    Args:
        wanted: Of the run.
        run_uri: Folder of the run, with the note of `pipeline.training.warm_start_prepare`.
        step: On this rank, as it is made.

    Raises:
        StorageError: Note, model or checkpoint are missing or damaged.
    """
    if not wanted.model:
        return
    note = read_note(run_uri)
    if note is None:
        raise storage.StorageError(f"{storage.join(run_uri, NOTE)}: does not exist: the driver writes it first")
    uri = model_copy(run_uri)
    if (found := read_model_info(uri)["sha256"]) != note.model.fingerprint:
        raise storage.StorageError(f"{uri}: sha256 is {found}, {NOTE} says {note.model.fingerprint}")
    state = load_model(uri).state_dict()
    step.model.load_state_dict(state)
    if step.average is not None:
        step.average.module.load_state_dict(state)
    if note.head is not None:
        _carry_over(note.head, run_uri, step)


def _carry_over(old: PinnedHead, run_uri: str, step: TrainStep) -> None:
    state = training_state(step)
    kept = {name: value for name, value in state["head_optimizer"].items() if name.startswith(f"{_WEIGHT}.")}
    if set(kept) != set(old.optimizer_tensors):  # of another kind of optimizer
        kept = {}
    targets = {"head": {_WEIGHT: state["head"][_WEIGHT]}, "head_optimizer": kept}
    num_rows = len(class_range(old.num_classes, world_size(step.group), rank_in(step.group)))
    shards = {
        part: {name: _old_shard(_local(target), num_rows) for name, target in entries.items()}
        for part, entries in targets.items()
    }
    whole: dict[str, Any] = {
        part: {n: over_classes(v, old.num_classes, step.group) if v.ndim else v for n, v in entries.items()}
        for part, entries in shards.items()
    }
    read_checkpoint(old.checkpoint, whole, step.group)
    old_of_new = torch.from_numpy(read_classes(run_uri))
    for part, entries in targets.items():
        for name, target in entries.items():
            own, shard = _local(target), shards[part].pop(name)
            # A single number is of the optimizer as a whole: AdamW's count of steps.
            own.copy_(carried_over(shard, old.num_classes, old_of_new, own, step.group) if own.ndim else shard)


def _old_shard(own: Tensor, num_rows: int) -> Tensor:
    return own.new_empty((num_rows, *own.shape[1:]) if own.ndim else ())


def _local(value: Tensor) -> Tensor:
    """This rank's rows; they are the live ones."""
    return value.to_local() if isinstance(value, DTensor) else value
