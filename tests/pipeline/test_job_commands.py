"""The jobs as a user starts them: by path, in processes of their own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from pipeline import cli, presets
from tests.conftest import ROOT
from tests.pipeline.test_cli import _plain

JOBS = ("train_demo", "train_webface4m", "pack_dataset")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "jobs").glob("[!_]*.py")))
def test_jobs_are_thin_executables(name):
    path = ROOT / "jobs" / f"{name}.py"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#!")
    assert "python" in lines[0]
    assert len(lines) <= 40
    assert path.stat().st_mode & stat.S_IXUSR


COMMANDS = {
    **{name: [f"jobs/{name}.py", "--help"] for name in JOBS},
    "mistake": ["jobs/train_demo.py", "--model.bakbone", "tiny"],
    "name": ["-c", "from pipeline import cli, presets; print(cli._with_place(presets.demo()).run_name)"],
}


@pytest.fixture(scope="module")
def processes() -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, run as a user does: by path, from the repository, not installed.

    All at once: each spends seconds on imports. Hashes of strings are seeded differently from this process.
    """
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    running = {
        name: subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, command in COMMANDS.items()
    }
    outputs = {name: process.communicate(timeout=240) for name, process in running.items()}
    return {name: (running[name].returncode, *output) for name, output in outputs.items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_demo", ["--data", "--model.backbone", "--num-workers", "default: 128"]),
        ("train_webface4m", ["--data", "--benchmarks", "default: iresnet100", "default: 512"]),
        ("pack_dataset", ["--source", "--output", "--format", "required"]),
    ],
)
def test_help_of_each_job(name, words, processes):
    code, out, err = processes[name]
    assert code == 0, err
    for word in words:
        assert word in _plain(out)


def test_a_mistake_on_the_real_command_line(processes):
    code, out, err = processes["mistake"]
    assert code != 0
    assert "--model.bakbone" in err
    assert "--model.backbone" in err
    assert "Traceback" not in out + err


def test_another_process_gives_the_same_default_run_name(processes):
    code, out, err = processes["name"]
    assert code == 0, err
    assert out.strip() == cli._with_place(presets.demo()).run_name
