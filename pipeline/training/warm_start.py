"""What a run's weights are first: a model and class centres that there are already; and the note of what they were.

The note in the run's folder names exact versions. An alias may move, and a run go on, between two starts: a start
before the first checkpoint begins with the weights that the first start found.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import numpy as np

from lgaf.config import from_dict
from pipeline import storage
from pipeline.data.sources import SYNTHETIC
from pipeline.tracking.model_reference import SCHEME, ModelReference

NOTE: Final = "warm_start.json"
_MODEL: Final = "warm_start/model"
_CLASSES: Final = "warm_start/old_of_new.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStart:
    """Start from weights that there are, instead of fresh ones."""

    model: str = ""
    """Network to start from: the folder of an exported model, or models:/NAME@ALIAS or models:/NAME/VERSION in the
    run's MLflow store. Its settings must be those of --model, but for what touches no weights (dropout)."""
    head: str = ""
    """Folder of a run, finished or stopped, whose newest checkpoint has the class centres to start from, with their
    momentum. People are known again by their names within a data set; new ones start as in a fresh head."""
    sets: dict[str, str] = field(default_factory=dict)
    """Which data set of this run goes on with which of the head's run, both by place: needed where neither content,
    nor name, nor being the only ones left says so. "" as the second: its people are all new."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.model.startswith(SCHEME):
            ModelReference.parse(self.model, "warm_start.model")
        if self.head and not self.model:
            raise ValueError(
                f"warm_start.head={self.head!r} needs warm_start.model: centres say nothing to a fresh network"
            )
        if self.sets and not self.head:
            raise ValueError(f"warm_start.sets={self.sets!r} needs warm_start.head: there are no centres to match")

    def normalised(self) -> WarmStart:
        """The same with canonical places."""

        def place(uri: str) -> str:
            return uri if uri in ("", SYNTHETIC) or uri.startswith(SCHEME) else storage.normalise(uri)

        sets = {place(new): place(old) for new, old in self.sets.items()}
        return replace(self, model=place(self.model), head=place(self.head), sets=sets)


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedModel:
    """The network that a run starts from; a copy lies in the run's folder.

    Attributes:
        source: ``models:/NAME/VERSION``, or the folder it was in.
        fingerprint: SHA-256 of its weights.
    """

    source: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedHead:
    """The class centres that a run starts from.

    Attributes:
        run: Folder of their run.
        checkpoint: Folder of the checkpoint.
        step: Steps that it was after.
        files: Digest over names, sizes and times of its files.
        num_classes: Of the old run.
        optimizer_tensors: What its optimizer kept of the centres, by name.
        sets: Its packed data sets with their weights.
        names: The places of the same sets as that run was given them.
        data_fingerprint: Of its data.
        same_network: Whether that run exported the very network of `PinnedModel`; None: it exported none.
    """

    run: str
    checkpoint: str
    step: int
    files: str
    num_classes: int
    optimizer_tensors: tuple[str, ...]
    sets: dict[str, float]
    names: tuple[str, ...]
    data_fingerprint: str
    same_network: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SetMatch:
    """How the people of one data set of the new run are known.

    Attributes:
        new: Its place.
        old: Place of the set of the old run that it goes on with; empty: none.
        why: What says so.
        num_kept: People who are in both.
        num_new: People who are in the new one alone.
    """

    new: str
    old: str
    why: str
    num_kept: int
    num_new: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMatch:
    """How many classes are kept, new and dropped, over all sets.

    Attributes:
        data_fingerprint: Of the new run's data.
        num_kept: Their centres are those of the old run.
        num_new: Their centres are fresh.
        num_dropped: Classes of the old run that are gone.
        sets: The same by set of the new run.
    """

    data_fingerprint: str
    num_kept: int
    num_new: int
    num_dropped: int
    sets: tuple[SetMatch, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartNote:
    """What was asked for, and what it was when the run began."""

    asked: WarmStart
    model: PinnedModel
    head: PinnedHead | None = None
    classes: ClassMatch | None = None

    def summary(self) -> str:
        """One line for people."""
        text = f"starts from {self.model.source} ({self.model.fingerprint[:12]})"
        if self.head is not None and self.classes is not None:
            text += (
                f"; class centres of {self.head.run} after {self.head.step} steps: {self.classes.num_kept} kept, "
                f"{self.classes.num_new} new, {self.classes.num_dropped} dropped"
            )
            text += "" if self.head.same_network is not False else " (that run trained them with another network)"
        return text


def read_note(run_uri: str) -> WarmStartNote | None:
    """The note of a run; None where there is none."""
    uri = storage.join(run_uri, NOTE)
    return from_dict(WarmStartNote, storage.read_json(uri), NOTE) if storage.exists(uri) else None


def write_note(run_uri: str, note: WarmStartNote) -> None:
    """Write the note, once all that it tells of is there."""
    storage.write_json(storage.join(run_uri, NOTE), asdict(note))


def model_copy(run_uri: str) -> str:
    """Folder of the network that a run starts from: workers reach it, wherever they and the registry are."""
    return storage.join(run_uri, _MODEL)


def write_classes(run_uri: str, old_of_new: np.ndarray) -> None:
    """Write the old class id of each class of a run, int64, -1 for a new one."""
    buffer = io.BytesIO()
    np.save(buffer, old_of_new.astype("<i8"), allow_pickle=False)
    storage.write_bytes(storage.join(run_uri, _CLASSES), buffer.getvalue())


def read_classes(run_uri: str) -> np.ndarray:
    """What `write_classes` wrote."""
    found: np.ndarray = np.load(io.BytesIO(storage.read_bytes(storage.join(run_uri, _CLASSES))), allow_pickle=False)
    return found.astype(np.int64)


def started_from(run_uri: str) -> str:
    """What a run's weights were first, without places on the machine; empty: fresh ones."""
    note = read_note(run_uri)
    if note is None:
        return ""
    source = f"`{note.model.source}`" if note.model.source.startswith(SCHEME) else "an exported model"
    return f"{source}, SHA-256 `{note.model.fingerprint}`" + (" and class centres" if note.head else "")
