"""The jobs as Ray jobs, on a real head with ports and a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.training.metrics_log import read_metrics
from tests.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
SMALL = ["--epochs", "2", "--batch-size", "32", "--model.backbone", "micro", "--model.embedding-dim", "16"]
SMALL += ["--pack.synthetic.num-identities", "8", "--pack.synthetic.images-per-identity", "16"]
SMALL += ["--pack.samples-per-shard", "20", "--pack.benchmark-pairs", "40", "--stream.block-rows", "16"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment to reach a head that this test started, and ends by its process group."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "RAY_AUTH_MODE": "disabled"}
    dashboard = _free_port()
    # Sockets live in the folder: pytest's own path would be too long for them.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
        command += [f"--port={_free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}"]
        with Path(folder, "head.log").open("w") as log:
            head = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
            _wait_for_head(head, environment, Path(folder, "head.log"))
            yield environment
        finally:
            if head.poll() is None:
                os.killpg(head.pid, signal.SIGTERM)
                head.wait(60)


def _wait_for_head(head: subprocess.Popen, environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while subprocess.run([str(BIN / "ray"), "job", "list"], env=environment, capture_output=True).returncode:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)


def _submit(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [str(BIN / "ray"), "job", "submit", *arguments]
    return subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=400)


def test_with_the_checkout_as_working_directory(cluster, tmp_path):
    place = ["--storage", str(tmp_path), "--run-name", "shipped"]
    done = _submit(cluster, "--working-dir", ".", "--", "python", "jobs/train_demo.py", *SMALL, *place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "promoted" in done.stdout
    assert len(read_metrics(str(tmp_path / "shipped"))) == 8


def test_the_literal_file_where_the_package_is_installed(cluster, tmp_path):
    done = _submit(cluster, "--", "jobs/train_demo.py", *SMALL, "--storage", str(tmp_path), "--run-name", "literal")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(str(tmp_path / "literal"))) == 8


def test_a_failing_job_is_a_failed_job(cluster, tmp_path):
    done = _submit(cluster, "--", "jobs/train_demo.py", "--data", "nowhere", "--storage", str(tmp_path))
    assert done.returncode != 0
    assert "nowhere: does not exist" in (done.stdout + done.stderr).replace("\n", "")
