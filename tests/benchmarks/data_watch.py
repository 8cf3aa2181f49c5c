"""Starts the measured processes of the data benchmark and watches their memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.benchmarks.data_arms import ARMS, MARK
from tests.benchmarks.data_measure import Measurement

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_S = 1.0
STREAMING = "streaming-community==0.14.2"
# What the rivals' environment has in common with ours, in our versions.
SHARED = ("torch", "numpy", "opencv-python-headless", "simplejpeg", "pillow", "psutil")


class ArmError(RuntimeError):
    """A measured process that failed; the message has the end of what it said."""


@dataclass
class Watched:
    """What a process measured, and its memory: (wall clock, bytes of the whole process tree), once a second.

    The bytes are proportional set sizes: pages that processes share count once.
    """

    result: Measurement
    started: float
    memory: list[tuple[float, int]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes."""
        return max((size for _, size in self.memory), default=0)

    def memory_between(self, start: float, end: float) -> np.ndarray:
        """Bytes of each sample in a stretch of time."""
        return np.array([size for when, size in self.memory if start <= when <= end])


def run_arm(name: str, folder: Path, option: str = "", python: str = sys.executable, timeout: float = 900) -> Watched:
    """Run an arm in a fresh process.

    Raises:
        ArmError: It failed, or took longer than ``timeout`` seconds.
    """
    command = [python, "-m", "tests.benchmarks.data_arms", name, str(folder), option]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        try:
            memory = _watch(process, started + timeout)
        finally:
            _end(process)
        output.seek(0)
        errors.seek(0)
        lines, complaint = output.read().splitlines(), errors.read()
    found = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    if process.returncode or not found:
        raise ArmError(f"{name}: exit code {process.returncode}: {' / '.join(complaint.strip().splitlines()[-3:])}")
    content = json.loads(found[-1])
    content.pop("rate")
    return Watched(Measurement(**content), started, memory)


def _watch(process: subprocess.Popen[bytes], deadline: float) -> list[tuple[float, int]]:
    memory: list[tuple[float, int]] = []
    root = psutil.Process(process.pid)
    while process.poll() is None:
        if time.time() > deadline:
            raise ArmError(f"{process.args!r}: did not end in time")
        memory.append((time.time(), _tree_bytes(root)))
        try:
            process.wait(SAMPLE_S)
        except subprocess.TimeoutExpired:
            continue
    return memory


def _tree_bytes(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # ended since it was listed
    except psutil.NoSuchProcess:
        pass
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there, and its children."""
    if process.poll() is not None:
        return
    own = [psutil.Process(process.pid)]
    own += own[0].children(recursive=True)
    for each in own:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def rivals_python(folder: Path) -> str:
    """The interpreter of an environment with MosaicML Streaming and torchvision, made there where it is absent.

    Raises:
        ArmError: It could not be made; the message says why.
    """
    python = folder / "bin" / "python"
    sign = folder / STREAMING
    if sign.exists():
        return str(python)
    versions = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in SHARED]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        # torch first and alone, so that streaming's torchvision is chosen to go with it, and not the other way round.
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [*pip, *versions],
            [*pip, *versions, "torchvision", STREAMING],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ArmError(f"{folder}: no environment for MosaicML Streaming: {error.stderr.strip()[-500:]}") from error
    sign.touch()
    return str(python)


def make_mds(folder: Path, python: str) -> None:
    """Write MosaicML's shards where they are absent.

    Raises:
        ArmError: Its environment cannot.
    """
    if (folder / "mds" / "index.json").exists():
        return
    code = (
        "from tests.benchmarks.data_torchvision import declare_operators; kept = declare_operators();"
        "import sys; from pathlib import Path; from tests.benchmarks import data_set;"
        "data_set.write_mds(data_set.load_set(Path(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", code, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ArmError(f"MosaicML's shards were not written: {done.stderr.strip()[-500:]}")


def needs_rivals(names: list[str]) -> bool:
    """Whether any of the arms runs in the rivals' environment."""
    return any(ARMS[name].rivals_python for name in names)
