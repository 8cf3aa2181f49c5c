"""Which MLflow store a process talks to, how long it waits for it, and the lock on a model in it."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient

from pipeline import storage


def client(tracking_uri: str) -> MlflowClient:
    """A client of one store; the folder of a sqlite store is made."""
    # With MLflow's default of 7 retries one call to a server that is down takes 4 minutes, with 2 it takes 5 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # Not shorter: the same limit holds for the upload of a model through the server.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # Lines of schema migrations for each new store, and "Waiting up to 300 seconds" for what takes none.
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    database = sqlite_path(tracking_uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri)


def sqlite_path(tracking_uri: str) -> Path | None:
    """The database file of a sqlite tracking URI, None for any other."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)).absolute() if tracking_uri.startswith(prefix) else None


def default_tracking_uri(storage_uri: str) -> str:
    """``MLFLOW_TRACKING_URI`` if it is set, else a sqlite store inside the (local) storage folder.

    Raises:
        ValueError: The storage is remote and the variable is not set: sqlite needs a file system.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    if not storage.is_local(storage_uri):
        raise ValueError(
            f"storage={storage_uri!r} is remote, so MLflow needs a server: set MLFLOW_TRACKING_URI (https://...)"
        )
    return f"sqlite:///{storage.local_path(storage_uri) / 'mlflow.db'}"


@contextmanager
def model_lock(tracking_uri: str, name: str) -> Iterator[None]:
    """Hold the lock of one registered model in one store; the system drops it when the process dies.

    For a sqlite store it is a file beside the database, which covers every process that can open it. For a server it is
    a file in this machine's temporary folder: two *machines* that promote at the same moment do not exclude each other.
    Each write is atomic on the server, so the alias then names one of the two, and both versions keep their decision
    and their ``previous_champion``. Promotions that run as one job per model rule it out.
    """
    database = sqlite_path(tracking_uri)
    # A database has several spellings of its URI, so there the name alone makes the key.
    key = name if database is not None else f"{tracking_uri} {name}"
    if database is not None:
        folder = database.with_name(f"{database.name}.locks")
    else:
        folder = Path(tempfile.gettempdir()) / f"lgaf-mlflow-locks-{getpass.getuser()}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
