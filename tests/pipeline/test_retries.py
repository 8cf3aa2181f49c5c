"""The retry policy: which errors may pass, how long is waited, when it ends."""

from __future__ import annotations

import dataclasses
import errno
import http.client
import itertools
import re

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import retries
from pipeline.retries import FailedError, RetryPolicy, TruncatedError, call, is_missing, may_pass


class StatusError(Exception):
    """As gcsfs and Azure's SDK have them."""

    def __init__(self, **fields: int | str) -> None:
        super().__init__("of an SDK")
        self.__dict__.update(fields)


# Mostly verbatim from pyarrow 25, against a real server behind the fault proxy.
PASSING = [
    "AWS Error SLOW_DOWN during GetObject operation: injected",
    "AWS Error INTERNAL_FAILURE during GetObject operation: ",
    "When getting information for key 'x' in bucket 'b': AWS Error UNKNOWN (HTTP status 503) during HeadObject "
    "operation: No response body.",
    "AWS Error UNKNOWN during GetObject operation: Unable to parse",
    "AWS Error UNKNOWN (HTTP status 429) during HeadObject operation: No response body.",
    "AWS Error UNKNOWN (HTTP status 408) during HeadObject operation: No response body.",
    "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file; Details: end "
    "of response with 2000000 bytes missing",
    "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached",
    "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 52, Server returned nothing",
    "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server",
    "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 6, Could not resolve hostname",
    "AWS Error SERVICE_UNAVAILABLE during GetObject operation: ",
]
LASTING = [
    "AWS Error ACCESS_DENIED during HeadObject operation: No response body.",
    "AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist.",
    "AWS Error NO_SUCH_KEY during GetObject operation: injected",
    "AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: (Request ID: 503)",
    "AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: ",
    "AWS Error [code 134] during GetObject operation: injected",
    "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.",
    "AWS Error UNKNOWN (HTTP status 412) during HeadObject operation: No response body.",
    "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate was not OK",
    "Not a regular file: 'faces/'",
]


@pytest.mark.parametrize(
    "error",
    [
        *map(OSError, PASSING),
        TruncatedError("cut"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("late"),
        OSError(errno.EHOSTUNREACH, "no route"),
        StatusError(code=503),
        StatusError(status_code=429),
        StatusError(status=500),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut"),
        http.client.IncompleteRead(b""),
    ],
    ids=repr,
)
def test_it_may_pass(error):
    assert may_pass(error)
    assert not is_missing(error)


@pytest.mark.parametrize(
    "error",
    [
        *map(OSError, LASTING),
        FileNotFoundError(errno.ENOENT, "none"),
        PermissionError(errno.EACCES, "no"),
        IsADirectoryError(errno.EISDIR, "folder"),
        OSError(errno.ENOSPC, "full"),
        StatusError(code=403),
        StatusError(status_code=404),
        StatusError(code="503"),
        ValueError("AWS"),
        KeyError("status"),
    ],
    ids=repr,
)
def test_it_will_not_pass(error):
    assert not may_pass(error)


def test_what_is_missing():
    assert is_missing(FileNotFoundError())
    assert is_missing(OSError("AWS Error NO_SUCH_KEY during GetObject operation: "))
    assert is_missing(OSError("AWS Error NO_SUCH_BUCKET during GetObject operation: "))
    assert not is_missing(OSError("AWS Error ACCESS_DENIED during GetObject operation: NO_SUCH_KEY"))
    assert not is_missing(PermissionError())


@given(
    attempts=st.integers(1, 12),
    failures=st.integers(0, 15),
    base=st.floats(0, 10),
    factor=st.floats(1, 100),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=15, max_size=15),
)
def test_it_is_done_as_often_as_needed_and_no_oftener(attempts, failures, base, factor, draws):
    policy = RetryPolicy(attempts=attempts, base_delay_s=base, max_delay_s=base * factor)
    done, slept, drawn = [], [], iter(draws)

    def work() -> str:
        done.append(1)
        if len(done) <= failures:
            raise TimeoutError(f"failure {len(done)}")
        return "result"

    def run() -> str:
        return call(work, policy, "it", sleep=slept.append, draw=lambda: next(drawn))

    if failures < attempts:
        assert run() == "result"
        assert len(done) == failures + 1
    else:
        with pytest.raises(FailedError) as caught:
            run()
        assert caught.value.attempts == len(done) == attempts
        assert str(caught.value.__cause__) == f"failure {attempts}"  # the last one
    assert len(slept) == len(done) - 1
    for number, delay_s in enumerate(slept):
        longest = min(base * 2**number, base * factor)
        assert longest / 2 <= delay_s <= longest
        assert delay_s == pytest.approx(longest * (0.5 + draws[number] / 2))


def test_an_error_that_will_not_pass_ends_it_at_once_also_after_others():
    errors = iter([TimeoutError(), TimeoutError(), PermissionError("no"), TimeoutError()])

    def work() -> None:
        raise next(errors)

    with pytest.raises(FailedError) as caught:
        call(work, RetryPolicy(attempts=8), "it", sleep=lambda _: None)
    assert caught.value.attempts == 3
    assert isinstance(caught.value.__cause__, PermissionError)


def test_what_is_no_error_of_the_work_is_let_through():
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(work, RetryPolicy(), "it", sleep=lambda _: pytest.fail("slept"))


def test_readers_that_failed_together_do_not_come_back_together():
    starts: list[list[float]] = [[], []]
    for slept in starts:
        failures = itertools.count()

        def work(failures: itertools.count = failures) -> None:
            if next(failures) < 5:
                raise TimeoutError

        call(work, RetryPolicy(), "it", sleep=slept.append)
    assert len(starts[0]) == 5
    assert not set(starts[0]) & set(starts[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"attempts": 0},
        {"base_delay_s": -1.0},
        {"base_delay_s": 2.0, "max_delay_s": 1.0},
        {"max_delay_s": float("inf")},
        {"base_delay_s": float("nan")},
        {"timeout_s": 0.5},
    ],
    ids=str,
)
def test_a_policy_out_of_range_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RetryPolicy(**fields)


def test_the_policy_comes_from_the_environment(monkeypatch):
    for name in ("ATTEMPTS", "BACKOFF_S", "TIMEOUT_S"):
        monkeypatch.delenv(f"LGAF_STORAGE_{name}", raising=False)
    assert retries.from_environment() == RetryPolicy()
    monkeypatch.setenv("LGAF_STORAGE_ATTEMPTS", "3")
    monkeypatch.setenv("LGAF_STORAGE_BACKOFF_S", "0.1")
    monkeypatch.setenv("LGAF_STORAGE_TIMEOUT_S", " 7.5 ")
    assert dataclasses.asdict(retries.from_environment()) == {
        "attempts": 3,
        "base_delay_s": 0.1,
        "max_delay_s": 4.0,
        "timeout_s": 7.5,
    }


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("LGAF_STORAGE_ATTEMPTS", "0", "a whole number from 1 to 1000"),
        ("LGAF_STORAGE_ATTEMPTS", "2.5", "a whole number from 1 to 1000"),
        ("LGAF_STORAGE_TIMEOUT_S", "soon", "a number from 1 to 3600"),
        ("LGAF_STORAGE_TIMEOUT_S", "nan", "a number from 1 to 3600"),
        ("LGAF_STORAGE_BACKOFF_S", "-1", "a number from 0 to 3600"),
    ],
)
def test_a_setting_out_of_range_is_named(monkeypatch, name, value, valid):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^environment: {name}='{re.escape(value)}' must be {valid}$"):
        retries.from_environment()
