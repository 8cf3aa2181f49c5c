"""A training job in a process of its own, which tests hurt; what became of its steps is read from ``metrics.jsonl``."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.order import epoch_order, plan
from pipeline.training.metrics_log import read_metrics
from tests.conftest import ROOT

BATCH, STREAMS = 32, 4
PEOPLE, IMAGES = 8, 17
STEPS_PER_EPOCH = PEOPLE * IMAGES // BATCH
SAVE_EVERY = 5


@dataclass
class Seen:
    """How far a run was, at each moment when it got on: (seconds, steps with a line)."""

    at: list[tuple[float, int]] = field(default_factory=list)

    def steps_by(self, moment: float) -> int:
        """The most steps that the file had by a moment."""
        return max((steps for seconds, steps in self.at if seconds <= moment), default=0)


class Job:
    """``jobs/train_demo.py`` at its smallest, with an own local Ray unless ``environment`` names a cluster."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        epochs: int,
        name: str = "run",
        environment: dict[str, str] | None = None,
        storage_uri: str = "",
    ) -> None:
        self.folder, self.epochs, self.name = folder, epochs, name
        self.storage_uri = storage_uri or str(folder)
        self.run_uri = storage.join(self.storage_uri, name)
        self.flags = [*flags]
        self.environment = environment or {}
        self.seen = Seen()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / f"{name}.log"
        self._over = threading.Event()

    @property
    def total_steps(self) -> int:
        return self.epochs * STEPS_PER_EPOCH

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def command(self) -> list[str]:
        return [
            *(sys.executable, str(ROOT / "jobs" / "train_demo.py"), "--storage", self.storage_uri),
            *("--run-name", self.name, "--epochs", str(self.epochs), "--batch-size", str(BATCH)),
            *("--model.backbone", "micro", "--model.embedding-dim", "16", "--stream.num-streams", str(STREAMS)),
            *("--pack.samples-per-shard", "20", "--pack.synthetic.num-identities", str(PEOPLE)),
            *("--pack.synthetic.images-per-identity", str(IMAGES), "--pack.benchmark-pairs", "40"),
            *("--stream.block-rows", "16", "--workers.log-every-steps", "1"),
            *("--workers.checkpoint-every-steps", str(SAVE_EVERY), *self.flags),
        ]

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env=os.environ | self.environment, cwd=ROOT
            )
        if len(self.seen.at) == 0:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            try:
                steps = len(read_metrics(self.run_uri))
            except Exception:  # a store that is made to fail
                continue
            if not self.seen.at or self.seen.at[-1][1] != steps:
                self.seen.at.append((time.monotonic(), steps))

    def wait_for_steps(self, steps: int, timeout_s: float = 240.0) -> None:
        self.wait_until(lambda: bool(self.seen.at) and self.seen.at[-1][1] >= steps, timeout_s)

    def wait_until(self, condition, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the job ended with {self.process.poll()}:\n{self.log()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.log()}"
            time.sleep(0.05)

    def finish(self, timeout_s: float = 300.0) -> int:
        return self.process.wait(timeout_s)

    def log(self) -> str:
        return self._log.read_text()[-6000:]

    def processes(self, title: str) -> list[psutil.Process]:
        """Its Ray processes of a kind (Ray writes it into the process's title), of its own local Ray."""
        return find_processes(self.process.pid, title)

    def end(self) -> None:
        """Let nothing of it live on."""
        self._over.set()
        if self._process is None or self._process.poll() is not None:
            return
        family = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(30)


def find_processes(ancestor: int, title: str) -> list[psutil.Process]:
    """Descendants of a process whose title begins so."""
    found = []
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            command = process.cmdline()
            if command and command[0].startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def planned_digests(data_uri: str, epochs: int) -> list[str]:
    """The digests that a run must have, from the pure order alone."""
    manifest = Manifest.load(data_uri)
    digests = []
    for epoch in range(epochs):
        samples = plan(epoch_order(manifest, 0, epoch, STREAMS), 1, 0, BATCH)
        batches = (manifest.offsets[samples.shard] + samples.row).reshape(-1, BATCH)
        digests += [hashlib.sha256(batch.astype("<i8").tobytes()).hexdigest() for batch in batches]
    return digests


@dataclass(frozen=True)
class Verdict:
    """What a fault did to a run.

    Attributes:
        fault: What was done.
        tried: How often.
        survived: After how many of these the run went on, by its lines.
        repeated: Steps whose lines were there and that were trained again, by fault.
        wrong_samples: Samples lost or doubled in the whole run: lines missing or twice, or of other samples than
            planned, times the batch.
        seconds: The longest standstill after each fault: between two new lines, or the fault and the first of them.
    """

    fault: str
    tried: int
    survived: int
    repeated: list[int]
    wrong_samples: int
    seconds: list[float]

    def of(self, place: int, name: str) -> Verdict:
        """Of one of the faults alone; lost and doubled samples are those of the whole run."""
        return Verdict(name, 1, 1, [self.repeated[place]], self.wrong_samples, [self.seconds[place]])

    def row(self) -> str:
        repeated = f"{min(self.repeated)} to {max(self.repeated)}" if self.repeated else "-"
        if self.repeated and min(self.repeated) == max(self.repeated):
            repeated = str(self.repeated[0])
        middle = f"{sorted(self.seconds)[len(self.seconds) // 2]:.1f}" if self.seconds else "-"
        most = f" (most {max(self.seconds):.1f})" if len(self.seconds) > 1 else ""
        return f"| {self.fault} | {self.tried} | {self.survived} | {repeated} | {self.wrong_samples} | {middle}{most} |"


HEADER = (
    "| fault | tried | survived | steps repeated | samples lost or doubled | longest standstill, s, median |\n"
    "|---|---|---|---|---|---|"
)


def judge(fault: str, job: Job, moments: list[float], data_uri: str) -> Verdict:
    """Read from the run's lines, and from when they came, what the faults at these moments did."""
    lines = read_metrics(job.run_uri)
    planned = planned_digests(data_uri, job.epochs)
    by_step: dict[int, list[str]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line["samples_digest"])
    wrong = sum(by_step.get(step, []) != [digest] for step, digest in enumerate(planned))
    wrong += sum(step >= len(planned) for step in by_step)
    survived, repeated, seconds = 0, [], []
    for moment, until in zip(moments, [*moments[1:], float("inf")], strict=True):
        before = job.seen.steps_by(moment)
        after = [(at, steps) for at, steps in job.seen.at if moment < at < until]
        # An attempt that starts first drops the lines of the steps that it will do again.
        lowest = min([before, *(steps for _, steps in after)])
        begun = next((at for at, steps in after if steps == lowest), moment)
        if any(at > begun and steps > lowest for at, steps in after):
            survived += 1
            repeated.append(before - lowest)
            rises = [at for (_, less), (at, steps) in itertools.pairwise([(moment, before), *after]) if steps > less]
            seconds.append(max(later - earlier for earlier, later in itertools.pairwise([moment, *rises])))
    return Verdict(fault, len(moments), survived, repeated, wrong * BATCH, seconds)


def data_of(job: Job) -> str:
    """Where the job's packed data lie."""
    (found,) = [path for path in (job.folder / "data").iterdir() if path.is_dir()]
    return str(found)


def kill(process: psutil.Process) -> float:
    """Kill -9; the moment."""
    moment = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    return moment
