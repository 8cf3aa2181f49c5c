"""The local S3 server and its fault proxy, as their commands are used."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import ModuleType

import pytest

from pipeline import storage
from tests.servers import LOCAL, free_port, start, stop

pytest_plugins = ("tests.s3",)


def load(name: str) -> ModuleType:
    """A script of infra/local as a module."""
    spec = importlib.util.spec_from_file_location(name, LOCAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def processes_with(text: str) -> list[int]:
    """Ids of the processes whose command line has the text."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/cmdline", "rb") as file:
                    command = file.read()
            except OSError:
                continue
            if text.encode() in command and int(folder) != os.getpid():
                found.append(int(folder))
    return found


@pytest.mark.slow
def test_objects_survive_a_kill_of_the_server_and_no_process_is_left(s3, tmp_path, monkeypatch):
    root, port = tmp_path / "objects", str(free_port())
    command = [str(LOCAL / "s3_server.py"), "--root", str(root), "--port", port, "--bucket", "one", "--bucket", "two"]
    process, lines = start(*command)
    assert f"export AWS_ENDPOINT_URL=http://127.0.0.1:{port}" in lines
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    data = os.urandom(6_000_000)
    storage.write_bytes("s3://one/a", data)
    storage.write_bytes("s3://two/b", b"small")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 15
    while processes_with(str(root)):
        assert time.monotonic() < deadline, processes_with(str(root))
        time.sleep(0.1)
    process, _ = start(*command)
    try:
        assert storage.read_bytes("s3://one/a") == data
        assert storage.read_bytes("s3://two/b") == b"small"
    finally:
        stop(process)
    assert process.returncode == 0
    assert processes_with(str(root)) == []


def test_a_port_in_use_is_an_error_that_says_so(s3, tmp_path):
    port = s3["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]
    command = [sys.executable, str(LOCAL / "s3_server.py"), "--root", str(tmp_path), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr.splitlines()[-1]
    assert "export" not in done.stdout


@pytest.mark.slow
def test_an_environment_left_unfinished_is_made_again_by_one_of_two_that_want_it(tmp_path):
    folder = tmp_path / "swift"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("not finished")
    script = f"import sys; sys.path.insert(0, {str(LOCAL)!r}); import pathlib, s3_server\n"
    script += f"print(s3_server.ensure_venv(pathlib.Path({str(folder)!r})))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [out.splitlines()[-1] for out, _ in answers] == [str(folder / "bin" / "python")] * 2
    assert sum("installing swift" in err for _, err in answers) == 1
    subprocess.run([folder / "bin" / "python", "-c", "import swift.proxy.server, eventlet, pyeclib"], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "fire"}, "kind='fire' is not valid; choose one of: status"),
        ({"kind": "status", "statuss": 1}, "unknown field 'statuss'; the fields are: kind, match"),
        ({"kind": "status", "status": 200}, r"status=200 must lie in [400, 599]"),
        ({"kind": "reset", "rate": 1.5}, r"rate=1.5 must lie in [0, 1]"),
        ({"kind": "stall", "delay_s": -1}, "delay_s and after_bytes must be at least 0"),
        ({"kind": "slow", "bytes_per_s": 0}, "bytes_per_s=0 must be at least 1"),
        ({"kind": "reset", "match": "("}, "missing ), unterminated subpattern"),
        ({"match": "."}, "kind"),
    ],
    ids=str,
)
def test_a_fault_that_makes_no_sense_is_refused(running_proxy, fields, message):
    running_proxy.clear()
    with pytest.raises(urllib.error.HTTPError) as caught:
        running_proxy.control("POST", fields)
    assert caught.value.code == 400
    assert message in caught.value.read().decode()
    assert running_proxy.control("GET")["faults"] == []


def test_faults_are_chosen_by_path_method_number_and_chance(running_proxy):
    def status_of(path: str, method: str = "GET") -> int:
        request = urllib.request.Request(f"{running_proxy.endpoint}/{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    running_proxy.clear()
    running_proxy.inject("status", status=503, match=r"a\?b", times=1)
    running_proxy.inject("status", status=500, methods=["HEAD"])
    running_proxy.inject("status", status=429, match="often", rate=0.5)
    assert [status_of("healthcheck") for _ in range(2)] == [200, 200]
    assert [status_of("healthcheck?a"), status_of("a?b"), status_of("healthcheck?a?b")] == [200, 503, 200]
    assert status_of("healthcheck", "HEAD") == 500
    often = [status_of("healthcheck?often") for _ in range(60)]
    assert 10 < often.count(429) < 50
    assert often.count(429) + often.count(200) == 60
    state = running_proxy.control("GET")
    assert [fault["left"] for fault in state["faults"]] == [0, -1, -1]
    assert len(state["requests"]) == 66
    assert state["requests"][3] == {"method": "GET", "path": "/a?b", "range": None, "fault": "status"}
    running_proxy.clear()
    assert running_proxy.control("GET") == {"faults": [], "requests": []}


def test_the_command_in_the_documentation_is_a_fault():
    proxy = load("s3_fault_proxy")
    command = next(line for line in proxy.__doc__.splitlines() if "-d '" in line)
    text = command.partition("-d '")[2].rstrip("'")
    assert proxy.Fault.from_json(text) == proxy.Fault(**json.loads(text))
