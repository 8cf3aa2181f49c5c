"""What MLflow is to be told and does not know yet: one file each in the run's folder, so that no kill loses it."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline import storage

FOLDER: Final = "mlflow_outbox"
RUN_FILE: Final = "mlflow.json"

_NAME = re.compile(r"(\d{10})-(\d{20})-[0-9a-f]{8}-([a-z_]+)\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One write that waits.

    Attributes:
        name: Of its file; names sort by age.
        kind: What to write.
        time_ms: When it was asked for, in milliseconds since 1970: what is sent twice has the same time both times.
        content: JSON-serialisable.
    """

    name: str
    kind: str
    time_ms: int
    content: Mapping[str, Any]


def kind_of(name: str) -> str:
    """The kind of the event with this name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name={name!r} is not that of an event")
    return match[3]


def time_ms_of(name: str) -> int:
    """When the event with this name was asked for, in milliseconds since 1970."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name={name!r} is not that of an event")
    return int(match[2]) // 1_000_000


class Outbox:
    """The folder of the events of one run, on any storage.

    An event is numbered one above all that wait, so what one process adds after another has returned comes later,
    whatever their clocks say; two that add at the same moment are ordered by their clocks.

    Args:
        uri: The folder; made with the first event.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._last = 0

    def add(self, kind: str, content: Mapping[str, Any]) -> str:
        """Write an event and give its name; it is durable when this returns.

        Raises:
            StorageError: It cannot be written.
        """
        newest = max((int(name[:10]) for name in self.waiting()), default=0)
        self._last = max(self._last, newest) + 1
        now_ns = time.time_ns()
        name = f"{self._last:010d}-{now_ns:020d}-{uuid.uuid4().hex[:8]}-{kind}.json"
        body = {"time_ms": now_ns // 1_000_000, "content": dict(content)}
        storage.write_bytes(storage.join(self.uri, name), json.dumps(body).encode())
        return name

    def waiting(self) -> list[str]:
        """Names of all events, oldest first."""
        names = (info.uri.rsplit("/", 1)[1] for info in storage.list_files(self.uri))
        return sorted(name for name in names if _NAME.fullmatch(name))

    def read(self, name: str) -> Event | None:
        """One event, None if another process has sent it since.

        Raises:
            StorageError: It cannot be read.
        """
        try:
            body = storage.read_json(storage.join(self.uri, name))
        except storage.MissingError:
            return None
        return Event(name=name, kind=kind_of(name), time_ms=body["time_ms"], content=body["content"])

    def remove(self, name: str) -> None:
        """Forget an event: the store has it."""
        storage.delete_file(storage.join(self.uri, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAddress:
    """Which MLflow run a run's results go to; travels to workers. Loading this module does not load MLflow.

    Attributes:
        run_uri: Folder of the run: `FOLDER` and `RUN_FILE` lie in it.
        tracking_uri: MLflow store.
        experiment: Made if it is not there.
        run_name: Shown in the UI.
        tags: Set on the run.
    """

    run_uri: str
    tracking_uri: str
    experiment: str
    run_name: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def outbox(self) -> Outbox:
        """Where writes wait."""
        return Outbox(storage.join(self.run_uri, FOLDER))

    def noted(self) -> dict[str, Any]:
        """What is known of the MLflow run in this store: ``run_id`` and ``replaced``, the runs before it that are gone.

        Empty where the run was never made in this store.
        """
        try:
            found: dict[str, Any] = storage.read_json(storage.join(self.run_uri, RUN_FILE))
        except storage.MissingError:
            return {}
        return found if found.get("tracking_uri") == self.tracking_uri else {}

    def identity(self) -> dict[str, Any]:
        """What tells this MLflow run from others before it has an id: it changes with the store, and when it is gone.

        The id itself may come at any moment, so what was done for this run is known by this instead.
        """
        return {"store": self.tracking_uri, "run_name": self.run_name, "replaced": self.noted().get("replaced", 0)}

    def run_id(self) -> str | None:
        """Id of the MLflow run; None while nobody could make it."""
        return self.noted().get("run_id")

    def note(self, run_id: str) -> None:
        """Remember the MLflow run, for the workers and for the next attempt."""
        before = self.noted()
        replaced = before.get("replaced", 0) + int(before.get("run_id", run_id) != run_id)
        content = {"tracking_uri": self.tracking_uri, "run_id": run_id, "replaced": replaced}
        storage.write_json(storage.join(self.run_uri, RUN_FILE), content)
