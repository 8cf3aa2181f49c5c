"""Whether an MLflow store cannot be reached just now, or was reached and says no: what waits, and what is an error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from pipeline import retries
from pipeline.places import StorageError

# Of MLflow: its database is locked or away, or it asks to come back later.
_PASSING_CODES: Final = frozenset(
    {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
)
# Of requests, SQLAlchemy and botocore, which are no errors of Python's own kinds. A RetryError is what MLflow's client
# makes of answers with 408, 429 and 5xx.
_PASSING_CLASSES: Final = frozenset(
    {
        "ChunkedEncodingError",
        "ConnectionError",
        "HTTPClientError",
        "OperationalError",
        "RetryError",
        "Timeout",
    }
)
_REFUSING_CLASSES: Final = frozenset({"MlflowException", "SQLAlchemyError", "ClientError", "Boto3Error"})
# They are among the passing ones by their base class, but the next attempt meets the same.
_LASTING_TEXTS: Final = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")

_is_quiet: ContextVar[bool] = ContextVar("_is_quiet", default=False)


class TrackingError(Exception):
    """MLflow could not do what was asked; the message names the store."""


class StoreUnreachableError(TrackingError, ConnectionError):
    """The store cannot be reached now; trying again later may help."""


class StoreRefusedError(TrackingError, ValueError):
    """The store was reached (or never can be) and refuses; trying again does not help."""


class _Quiet(logging.Filter):
    """Drops the lines of libraries about each attempt: who contacts the store here warns once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _is_quiet.get()


_QUIET: Final = _Quiet()


@contextmanager
def contacting(tracking_uri: str) -> Iterator[None]:
    """Name the errors of calls to a store, and keep the libraries' lines about each retry out of the log.

    Raises:
        StoreUnreachableError: In place of what says that the store is away.
        StoreRefusedError: In place of any other error of MLflow or of the connection to it.
    """
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).addFilter(_QUIET)  # adding it twice does nothing
    handled = sys.exc_info()[1]  # not of these calls, though it will be in the context of their errors
    before = _is_quiet.set(True)
    try:
        yield
    except (StorageError, TrackingError):
        raise
    except Exception as error:
        if is_unreachable(error, handled):
            raise StoreUnreachableError(f"MLflow at {tracking_uri} cannot be reached: {reason(error)}") from error
        if isinstance(error, OSError) or _is_of(error, _REFUSING_CLASSES):
            raise StoreRefusedError(f"MLflow at {tracking_uri} refuses: {reason(error)}") from error
        raise
    finally:
        _is_quiet.reset(before)


def is_unreachable(error: BaseException, handled: BaseException | None = None) -> bool:
    """Whether an error of MLflow's client says that the store is away. Pure.

    Args:
        error: What a call raised. MLflow keeps the connection's own error as its cause or its context.
        handled: An error that was being handled when the call was made: it and its causes do not count.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and cause is not handled and id(cause) not in seen:
        seen.add(id(cause))
        if any(text in str(cause) for text in _LASTING_TEXTS):
            return False
        if _may_pass(cause):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def _may_pass(error: BaseException) -> bool:
    if getattr(error, "error_code", None) in _PASSING_CODES or _is_of(error, _PASSING_CLASSES):
        return True
    answer = getattr(error, "response", None)  # of requests' HTTPError: an object, of botocore's ClientError: a dict
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    status = metadata.get("HTTPStatusCode", getattr(answer, "status_code", None))
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    return retries.may_pass(error)


def _is_of(error: BaseException, names: frozenset[str]) -> bool:
    """By name: requests, botocore and MLflow take long to load, and not all of them need be there."""
    return any(parent.__name__ in names for parent in type(error).__mro__)


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
