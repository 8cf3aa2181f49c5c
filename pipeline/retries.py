"""Trying again where it may help: how often, how long between, and which errors of object stores may pass.

pyarrow gives S3's errors as text alone, so `may_pass` reads the error code and the HTTP status out of it. The settings
come from the environment, so that they reach Ray's workers as the credentials do.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")
_logger = logging.getLogger(__name__)

# Standard in every S3 SDK as errors that may pass; all others are the request's own fault.
TRANSIENT_CODES: Final = frozenset(
    {
        "INTERNAL_FAILURE",
        "NETWORK_CONNECTION",
        "REQUEST_EXPIRED",
        "REQUEST_TIMEOUT",
        "SERVICE_UNAVAILABLE",
        "SLOW_DOWN",
        "THROTTLING",
        "UNKNOWN",  # and no HTTP status beside it: an answer that could not be read
    }
)
MISSING_CODES: Final = frozenset({"NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND"})
# curl: a certificate that cannot be trusted, a bundle of certificates that cannot be read.
LASTING_CURL_CODES: Final = frozenset({60, 77})
TRANSIENT_ERRNOS: Final = frozenset(
    {errno.EAGAIN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET}
)
# Of aiohttp and Azure's SDK, behind gcsfs and adlfs: broken connections that are no OSError and carry no status.
TRANSIENT_CLASSES: Final = frozenset(
    {
        "ClientConnectionError",
        "ClientPayloadError",
        "IncompleteRead",
        "IncompleteReadError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)
_CODE = re.compile(r"AWS Error (\[code \d+\]|[A-Z_]+)")
_STATUS = re.compile(r"\(HTTP status (\d{3})\)")
_CURL = re.compile(r"curlCode: (\d+)")


class TruncatedError(ConnectionError):
    """A body that ended before its announced length."""


class FailedError(Exception):
    """What `call` gives up with; the last error is its ``__cause__``.

    Attributes:
        attempts: How many were made.
    """

    def __init__(self, attempts: int) -> None:
        super().__init__(f"failed after {attempts} attempts")
        self.attempts = attempts


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often to try and how long to wait between.

    The wait after the n-th failure is drawn from the upper half of ``base_delay_s * 2 ** (n - 1)``, at most
    ``max_delay_s``: readers that failed together do not come back together.

    Attributes:
        attempts: The first one included.
        base_delay_s: The longest wait after the first failure.
        max_delay_s: The longest wait of all.
        timeout_s: How long a connection may be silent before an attempt counts as failed.
    """

    attempts: int = 12  # a store that is away for a minute is waited for
    base_delay_s: float = 0.5
    max_delay_s: float = 20.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts!r} must be at least 1")
        if not 0 <= self.base_delay_s <= self.max_delay_s < math.inf:
            raise ValueError(f"0 <= base_delay_s={self.base_delay_s!r} <= max_delay_s={self.max_delay_s!r} must hold")
        if not 1 <= self.timeout_s < math.inf:
            raise ValueError(f"timeout_s={self.timeout_s!r} must be at least 1")

    def delay_s(self, failures: int, draw: float) -> float:
        """Seconds to wait after so many failures; ``draw`` is uniform in [0, 1)."""
        longest = min(self.max_delay_s, self.base_delay_s * 2.0 ** min(failures - 1, 60))
        return longest * (0.5 + 0.5 * draw)


def from_environment() -> RetryPolicy:
    """The policy of ``LGAF_STORAGE_ATTEMPTS``, ``LGAF_STORAGE_BACKOFF_S`` and ``LGAF_STORAGE_TIMEOUT_S``.

    The backoff is that of the first failure; the longest is 40 times as long.

    Raises:
        ValueError: One of them is no number in its range; the message names it.
    """
    base = _number("LGAF_STORAGE_BACKOFF_S", 0.5, low=0.0, high=3600.0)
    return RetryPolicy(
        attempts=int(_number("LGAF_STORAGE_ATTEMPTS", 12, low=1, high=1000, whole=True)),
        base_delay_s=base,
        max_delay_s=40 * base,
        timeout_s=_number("LGAF_STORAGE_TIMEOUT_S", 30.0, low=1.0, high=3600.0),
    )


def _number(name: str, default: float, *, low: float, high: float, whole: bool = False) -> float:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # also where it is no number
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"environment: {name}={text!r} must be {kind} from {low:g} to {high:g}")
    return value


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later.

    Server errors (5xx), throttling (429, SlowDown), time-outs, broken connections and cut bodies may pass. What is
    missing, forbidden, wrongly signed or malformed will not. Pure.
    """
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    text = str(error)
    if code := _CODE.search(text):
        if curl := _CURL.search(text):
            return int(curl[1]) not in LASTING_CURL_CODES
        if status := _STATUS.search(text):
            return _status_may_pass(int(status[1]))
        return code[1] in TRANSIENT_CODES
    for name in ("status", "status_code", "code"):  # of aiohttp, Azure's SDK and gcsfs
        status_code = getattr(error, name, None)
        if isinstance(status_code, int) and 100 <= status_code <= 599:
            return _status_may_pass(status_code)
    if any(parent.__name__ in TRANSIENT_CLASSES for parent in type(error).__mro__):
        return True
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS


def _status_may_pass(status: int) -> bool:
    return status >= 500 or status in (408, 429)


def is_missing(error: BaseException) -> bool:
    """Whether it says that an object or its bucket is not there. Pure."""
    if isinstance(error, FileNotFoundError):
        return True
    code = _CODE.search(str(error))
    return bool(code and code[1] in MISSING_CODES)


def call(
    work: Callable[[], T],
    policy: RetryPolicy,
    what: str,
    *,
    sleep: Callable[[float], object] = time.sleep,
    draw: Callable[[], float] = random.random,
) -> T:
    """Do some work, again while its errors may pass.

    Args:
        work: May be done several times.
        policy: How often and how far apart.
        what: For the log, which has a line for each failure but the last.
        sleep: Waits so many seconds.
        draw: Gives a number uniform in [0, 1).

    Raises:
        FailedError: From the last error: it would not pass, or the attempts are used up.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return work()
        except Exception as error:
            if attempt >= policy.attempts or not may_pass(error):
                raise FailedError(attempt) from error
            delay_s = policy.delay_s(attempt, draw())
            _logger.warning(
                "%s: attempt %d of %d failed, next in %.1f s: %s", what, attempt, policy.attempts, delay_s, error
            )
        sleep(delay_s)
