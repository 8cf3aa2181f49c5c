"""Signals that ask a job to end: the first is answered by a checkpoint, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
EXIT_SIGTERM: Final = 128 + signal.SIGTERM


class StoppedError(RuntimeError):
    """A job that ended because it was asked to; the same command goes on with it.

    Attributes:
        signal_number: What asked.
    """

    def __init__(self, signal_number: int, what: str) -> None:
        super().__init__(f"{what}, by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class StopSignals:
    """Notes SIGTERM (a node that is taken away, ``ray job stop``) and Ctrl-C, instead of dying of them.

    A second Ctrl-C is a ``KeyboardInterrupt``, a second SIGTERM a ``SystemExit``. Only the main thread can take
    signals: elsewhere nothing is noted.

    Attributes:
        received: The first signal, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(EXIT_SIGTERM)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the job through its ``finally`` blocks, in the main thread; the handler before is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
