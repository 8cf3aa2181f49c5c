"""Jobs that are run again, and signals that end them: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import supervision
from pipeline.stopping import EXIT_SIGTERM, StoppedError, StopSignals, exit_on_sigterm
from pipeline.supervision import EXIT_RETRY, is_worth_a_retry, supervise

# Counts its starts in a file, and does at each what the arguments say: a number to exit with, or a signal's name.
CHILD = """
import os, signal, sys
from pathlib import Path
count = Path(sys.argv[1])
number = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (number + 1))
what = sys.argv[2:][number]
if what.isdigit():
    sys.exit(int(what))
os.kill(os.getpid(), getattr(signal, what))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_DELAY_S", 0.01)


@pytest.mark.parametrize(
    ("does", "retries", "exit_code", "starts"),
    [
        (["0"], 3, 0, 1),
        (["SIGKILL", "75", "0"], 3, 0, 3),
        (["1"], 3, 1, 1),  # nobody but the user can mend it
        (["2"], 3, 2, 1),
        (["130"], 3, 130, 1),  # Ctrl-C
        (["SIGKILL", "SIGKILL", "SIGKILL"], 2, 137, 3),
        (["143", "0"], 1, 0, 2),  # a node that was taken away
        (["75", "1"], 5, 1, 2),
    ],
)
def test_a_job_is_started_again_when_that_may_help(tmp_path, does, retries, exit_code, starts):
    count = tmp_path / "count"
    assert supervise([sys.executable, "-c", CHILD, str(count), *does], retries) == exit_code
    assert len(count.read_text()) == starts


@given(st.integers(-64, 255))
def test_success_and_mistakes_are_never_tried_again(code):
    if code in (0, 1, 2, 130):
        assert not is_worth_a_retry(code)
    if code < 0 or code == EXIT_RETRY:
        assert is_worth_a_retry(code)


def _parent(tmp_path, body: str) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {os.getcwd()!r})\n{body}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_signal_goes_on_to_the_job_and_ends_the_attempts(tmp_path):
    child = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); time.sleep(60)"
    )
    body = (
        f"from pipeline.supervision import supervise\nsys.exit(supervise([sys.executable, '-c', {child!r}], retries=5))"
    )
    parent = _parent(tmp_path, body)
    assert parent.stdout.readline() == "up\n"
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 143
    assert parent.stdout.read() == ""  # no other attempt


def test_sigterm_runs_what_a_job_does_at_its_end():
    body = (
        "import time\nfrom pipeline.stopping import exit_on_sigterm\n"
        "with exit_on_sigterm():\n    try:\n        print('up', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('put away', flush=True)\n"
    )
    process = _parent(None, body)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == EXIT_SIGTERM == 143
    assert process.stdout.read() == "put away\n"


@pytest.mark.parametrize(
    ("number", "second"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["term", "int"]
)
def test_the_first_signal_is_noted_the_second_ends_at_once(number, second):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert signals.received == number
        with pytest.raises(second):  # noqa: PT012
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert {each: signal.getsignal(each) for each in before} == before
    assert str(StoppedError(number, "stopped after 3 of 9 steps")).endswith(f", by {signal.Signals(number).name}")


def test_the_handler_before_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with exit_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
