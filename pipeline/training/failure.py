"""Failures that a restart cannot mend: noted in the run's folder, so that no retry is spent on them."""

from __future__ import annotations

from typing import Final

from pipeline import storage
from pipeline.errors import DATA_ERRORS, causes, message
from pipeline.training.divergence import DivergedError

NAME: Final = "fatal_error.json"


class FatalTrainingError(ValueError):
    """A run that stopped for good; the message is that of its cause."""


class WorkersLostError(RuntimeError):
    """Workers died more often than ``workers.max_failures`` allows."""


def record_fatal(run_uri: str, error: BaseException) -> None:
    """Note an error that comes again (bad data, a diverged loss); any other (a lost worker) is worth a restart."""
    kinds = (*DATA_ERRORS, DivergedError)
    fatal = next((cause for cause in causes(error) if isinstance(cause, kinds)), None)
    if fatal is not None:
        storage.write_json(storage.join(run_uri, NAME), {"type": type(fatal).__name__, "message": message(fatal)})


def clear_fatal(run_uri: str) -> None:
    """Forget the note of an earlier attempt."""
    storage.delete_file(storage.join(run_uri, NAME))


def fatal_message(run_uri: str) -> str | None:
    """What was noted, None if nothing."""
    uri = storage.join(run_uri, NAME)
    return str(storage.read_json(uri)["message"]) if storage.exists(uri) else None


def raise_fatal(run_uri: str) -> None:
    """Raise `FatalTrainingError` if a failure was noted."""
    noted = fatal_message(run_uri)
    if noted is not None:
        raise FatalTrainingError(noted)
