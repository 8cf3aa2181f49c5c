"""Fixtures of a real S3 server (OpenStack Swift, `infra/local`) and of a fault proxy before it, one each a session.

A test module gets them with ``pytest_plugins = ("tests.s3",)``. The first session on a machine installs Swift.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.servers import LOCAL, free_port, start, stop

BUCKET = "faces"
# What would lead a client elsewhere, or change what it does.
FOREIGN = ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN", "MLFLOW_S3_ENDPOINT_URL")
# Quick to give up and to try again: a test's time is spent on the faults, not on waiting.
QUICK = {"LGAF_STORAGE_ATTEMPTS": "4", "LGAF_STORAGE_BACKOFF_S": "0.02", "LGAF_STORAGE_TIMEOUT_S": "1"}


@dataclass(frozen=True)
class Proxy:
    """The fault proxy: its address as an endpoint, and its controls (see `infra/local/s3_fault_proxy.py`)."""

    endpoint: str

    def control(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask its control address."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}/__faults", data=data, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def inject(self, kind: str, **fields: Any) -> None:
        """Add a fault."""
        self.control("POST", {"kind": kind, **fields})

    def clear(self) -> None:
        """Forget all faults and requests."""
        self.control("DELETE")

    def requests(self, *methods: str) -> list[str]:
        """The requests seen, each as its method and, where there was one, its fault; all methods if none is given."""
        seen = self.control("GET")["requests"]
        return [
            request["method"] + (f" {request['fault']}" if request["fault"] else "")
            for request in seen
            if not methods or request["method"] in methods
        ]


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of clients of a running server that has the bucket `BUCKET`, as the server printed them."""
    command = [str(LOCAL / "s3_server.py"), "--root", str(tmp_path_factory.mktemp("s3"))]
    process, lines = start(*command, "--port", str(free_port()), "--bucket", BUCKET)
    exports = (line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
    yield dict(exports)
    stop(process)


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process is a client of the server; the variables that make it one."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return s3_environment


@pytest.fixture(scope="session")
def running_proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    """The fault proxy before the server."""
    port, upstream = free_port(), s3_environment["AWS_ENDPOINT_URL"]
    process, _ = start(str(LOCAL / "s3_fault_proxy.py"), "--upstream", upstream, "--port", str(port))
    yield Proxy(f"http://127.0.0.1:{port}")
    stop(process)


@pytest.fixture
def s3_proxy(s3: dict[str, str], running_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """This process is a client of the server through the fault proxy, which is faultless yet, and tries again soon."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.endpoint)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    running_proxy.clear()
    yield running_proxy
    running_proxy.clear()
