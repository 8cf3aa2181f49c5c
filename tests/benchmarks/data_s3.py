"""A real S3 server for the data benchmark, holding the packed set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import storage
from tests.benchmarks.data_set import DataSet
from tests.benchmarks.data_watch import ROOT, ArmError

SERVER = ROOT / "infra" / "local" / "s3_server.py"
BUCKET = "bench"
# What would lead a client elsewhere.
FOREIGN = ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "MLFLOW_S3_ENDPOINT_URL")


@contextmanager
def uploaded(data: DataSet) -> Iterator[str]:
    """URI of the packed set on a server that runs as long as the context; this process's children are its clients.

    Raises:
        ArmError: The server does not start; the message has what it said.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(dir=data.folder) as root:
        command = [sys.executable, str(SERVER), "--root", root, "--port", str(_free_port()), "--bucket", BUCKET]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for name in FOREIGN:
                os.environ.pop(name, None)
            os.environ.update(_exports(server))
            uri = storage.join(f"s3://{BUCKET}", "packed")
            for path in sorted(data.packed.iterdir()):
                storage.write_bytes(storage.join(uri, path.name), path.read_bytes())
            yield uri
        finally:
            os.environ.clear()
            os.environ.update(before)
            server.terminate()
            server.wait()


def _exports(server: subprocess.Popen[str]) -> dict[str, str]:
    """The variables that the server prints for its clients, once it is ready."""
    assert server.stdout is not None
    said: list[str] = []
    for line in server.stdout:
        said.append(line.strip())
        if line.startswith("# ready"):
            # What it says later must not fill the pipe.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            exports = (text.removeprefix("export ").split("=", 1) for text in said if text.startswith("export "))
            return {each[0]: each[1] for each in exports}
    raise ArmError(f"{SERVER}: ended with code {server.wait()}: {' / '.join(said[-3:])}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
