"""A real S3 server on this machine, for tests and for people without a cloud: OpenStack Swift with its S3 API.

It checks every signature, keeps its objects as plain files and listens on the loopback address alone. Swift lives in an
environment of its own, made on the first start (about 12 s, from PyPI) and kept for all later ones.

    python infra/local/s3_server.py --root DIR --port 9000 --bucket faces

prints the variables to export and runs until it is stopped. For tests and laptops: one disk, one copy, no TLS.
"""

# ruff: noqa: T201  (what it prints is for the shell that started it)

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

VERSION: Final = "2.38.3"
# Pinned beside it: what decides whether it starts.
REQUIREMENTS: Final = (f"swift=={VERSION}", "eventlet==0.41.3", "pyeclib==1.8.0")
REGION: Final = "us-east-1"
LAUNCHER: Final = Path(__file__).with_name("swift_launcher.py")
INSTALL_TIMEOUT_S: Final = 600
START_TIMEOUT_S: Final = 120


def default_venv() -> Path:
    """Where Swift's environment is kept: one for each version and user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lgaf-on-ray" / f"swift-{VERSION}"


def ensure_venv(folder: Path) -> Path:
    """Give the Python of Swift's environment; make it if it is missing or was left unfinished.

    Several processes may ask at once: one makes it, the others wait.

    Raises:
        subprocess.CalledProcessError: Swift cannot be installed; pip has said why.
    """
    python, done = folder / "bin" / "python", folder / ".installed"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.is_file() and python.exists():
            return python
        print(f"installing {', '.join(REQUIREMENTS)} into {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S, stdout=sys.stderr)
        done.touch()
    return python


def environment(port: int, key: str, secret: str) -> dict[str, str]:
    """The variables that make a client of the server: the standard ones of AWS."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


def require_free(port: int) -> None:
    """Raise ``RuntimeError`` if somebody listens on a port: their answers would be taken for the new server's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError(f"port {port} of 127.0.0.1 cannot be used: {error.strerror}") from None


def wait_until_up(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait for the server's first answer.

    Raises:
        RuntimeError: It has ended, or gave none in `START_TIMEOUT_S`.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None:
                raise RuntimeError(f"the S3 server ended with code {server.returncode}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server gave no answer in {START_TIMEOUT_S} s: {error}") from None
            time.sleep(0.1)


def create_buckets(variables: dict[str, str], names: Sequence[str]) -> None:
    """Create buckets; those that are there stay as they are."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        region_name=REGION,
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in names:
        if name not in there:
            client.create_bucket(Bucket=name)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="s3_server.py"
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the objects; made if missing")
    parser.add_argument("--port", type=int, default=9000, help="on 127.0.0.1 (default %(default)s)")
    parser.add_argument("--venv", type=Path, default=default_venv(), help="Swift's environment (default %(default)s)")
    parser.add_argument("--access-key", default="test:tester", help="ACCOUNT:USER (default %(default)s)")
    parser.add_argument("--secret-key", default="testing", help="(default %(default)s)")
    parser.add_argument("--bucket", action="append", default=[], help="create this bucket; may be repeated")
    parsed = parser.parse_args(argv)
    if parsed.access_key.count(":") != 1 or not all(parsed.access_key.split(":")):
        parser.error(f"--access-key {parsed.access_key!r} must be of the form ACCOUNT:USER")
    return parsed


def run(arguments: argparse.Namespace) -> int:
    """Run the server until it is stopped; the exit code.

    Raises:
        RuntimeError: It does not start.
    """
    require_free(arguments.port)
    python = ensure_venv(arguments.venv)
    command = [str(python), str(LAUNCHER), str(arguments.root), str(arguments.port)]
    server = subprocess.Popen([*command, arguments.access_key, arguments.secret_key])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.terminate())
    try:
        wait_until_up(arguments.port, server)
        variables = environment(arguments.port, arguments.access_key, arguments.secret_key)
        create_buckets(variables, arguments.bucket)
        for name, value in variables.items():
            print(f"export {name}={value}")
        print(f"# ready: objects in {arguments.root.resolve()}; stop with Ctrl-C", flush=True)
        code = server.wait()
        return 0 if code in (0, -signal.SIGTERM, -signal.SIGINT) else code
    finally:
        server.terminate()
        server.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is stopped; the exit code."""
    try:
        return run(_arguments(argv))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
