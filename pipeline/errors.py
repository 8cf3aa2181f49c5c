"""Which errors are the user's to mend, and how to find them under what Ray wraps around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pipeline import retries
from pipeline.data.manifest import ManifestError
from pipeline.data.quarantine import QuarantineError
from pipeline.data.recordio import RecordIOError
from pipeline.data.shards import ShardError
from pipeline.data.sources import SourceError
from pipeline.data.spill import PackError
from pipeline.storage import MissingError, StorageError
from pipeline.tracking.reachability import TrackingError
from pipeline.training.attempts import SupersededError

DATA_ERRORS: Final = (
    ManifestError,
    MissingError,
    PackError,
    QuarantineError,
    RecordIOError,
    ShardError,
    SourceError,
)
USER_ERRORS: Final = (*DATA_ERRORS, StorageError, SupersededError, TrackingError, ValueError)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, outermost first: chained causes, Ray's ``cause``, Ray Train's own."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        workers = getattr(current, "worker_failures", None) or {}
        context = None if current.__suppress_context__ else current.__context__
        others = (getattr(current, name, None) for name in ("cause", "controller_failure"))
        inner = [current.__cause__, *others, context, *workers.values()]
        waiting += [cause for cause in inner if isinstance(cause, BaseException)]


def user_error(error: BaseException) -> BaseException | None:
    """The innermost error that a user can mend, None if there is none (a bug, or the machine)."""
    found = [cause for cause in causes(error) if isinstance(cause, USER_ERRORS)]
    specific = [cause for cause in found if isinstance(cause, (*DATA_ERRORS, StorageError, TrackingError))]
    return (specific or found or [None])[-1]


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may not meet it: something could not be reached, which is not the same as not there."""
    return any(retries.may_pass(cause) for cause in causes(error))


def message(error: BaseException) -> str:
    """The one line that says what is wrong, without the traceback that Ray puts into its copies."""
    inner = getattr(error, "cause", None)
    text = str(inner if isinstance(inner, BaseException) else error).strip()
    if isinstance(error, (*DATA_ERRORS, StorageError)):
        text = text.split("\n", 1)[0]  # ours are one line; what follows is Ray's advice on retries
    return text or type(error).__name__
