"""Starting and stopping the servers of `infra/local` as their users do: by their commands."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

LOCAL = Path(__file__).resolve().parents[1] / "infra" / "local"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(*command: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a server of `infra/local` and wait for the line that says that it is ready; all lines up to it."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("# ready"):
            # What it says later must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, lines
    pytest.fail(f"{' '.join(command)} ended with code {process.wait()}: {lines}")


def stop(process: subprocess.Popen[str]) -> None:
    """Stop a server."""
    process.terminate()
    process.wait(timeout=30)
