"""Running a job again when it dies of something that another attempt may not meet.

A job's own process is the last thing that nobody restarts: killed for its memory, with its node, by a bug. It runs as a
child here; the same command resumes it. On Kubernetes RayJob's ``backoffLimit`` does the same.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final

from pipeline.stopping import EXIT_SIGTERM

EXIT_MENDABLE: Final = 1  # by the user alone: a wrong setting, bad data
EXIT_RETRY: Final = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED: Final = 130
# Waits before the next attempt: what died with the last one (workers, a local Ray) has ended by then.
FIRST_DELAY_S: Final = 5.0
LONGEST_DELAY_S: Final = 60.0

_logger = logging.getLogger(__name__)


def is_worth_a_retry(exit_code: int) -> bool:
    """Whether another attempt may get further: killed by a signal, or said so itself. Pure.

    Args:
        exit_code: As `subprocess` gives it: negative for a signal.
    """
    return exit_code < 0 or exit_code in (EXIT_RETRY, EXIT_SIGTERM, 128 + signal.SIGKILL)


def supervise(command: Sequence[str], retries: int) -> int:
    """Run a command until it ends well, cannot, or was started ``1 + retries`` times; gives its exit code.

    SIGTERM and Ctrl-C go on to the child, whose exit is then not followed by another attempt.
    """
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stopping.set()
        # A terminal sends Ctrl-C to both by itself.
        if child and (number == signal.SIGTERM or sys.stdin is None or not sys.stdin.isatty()):
            child[0].send_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(retries + 1):
            child[:] = [subprocess.Popen(command)]
            if received:  # while it was being started
                child[0].send_signal(received[0])
            code = child[0].wait()
            if stopping.is_set() or attempt == retries or not is_worth_a_retry(code):
                return code if code >= 0 else 128 - code
            delay_s = min(FIRST_DELAY_S * 2**attempt, LONGEST_DELAY_S)
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            _logger.warning("the job died (%s); attempt %d of %d in %g s", how, attempt + 2, retries + 1, delay_s)
            if stopping.wait(delay_s):
                return 128 + received[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise AssertionError("unreachable")
