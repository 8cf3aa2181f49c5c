"""Storage and packing on a real S3 server (OpenStack Swift with its S3 API), which checks every signature."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_shard
from pipeline.storage import StorageError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT.parent / "shared" / "tools"
KEY, SECRET = "test:tester", "testing"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TOOLS / "swift_s3.py").is_file(), reason=f"{TOOLS} is not here"),
]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """Environment of clients of a running server that has the bucket ``faces``."""
    folder = tmp_path_factory.mktemp("swift")
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "swift"], check=True, timeout=400)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [python, str(TOOLS / "swift_s3.py"), str(folder / "data"), str(port), KEY, SECRET],
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(TOOLS)},
        )
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
                patch.delenv(name, raising=False)
            wait_until_up(f"{endpoint}/healthcheck", server, folder / "log")
            create_bucket(endpoint, "faces")
            yield environment
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.3)


def create_bucket(endpoint: str, name: str) -> None:
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"})
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config).create_bucket(Bucket=name)


@pytest.mark.parametrize("length", [0, 7, 9_000_000], ids=["empty", "small", "multipart"])
def test_bytes_round_trip(s3, length):
    data, uri = os.urandom(length), f"s3://faces/round/trip-{length}.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, data)
    assert storage.exists(uri)
    assert storage.size(uri) == length
    assert storage.read_bytes(uri) == data
    assert storage.read_range(uri, min(3, length), 4) == data[3:7]
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


def test_json_list_and_delete(s3):
    base = "s3://faces/tree"
    for name in ("d/b", "d/a", "d/e/f", "d2/x"):
        storage.write_json(f"{base}/{name}", {"name": name})
    assert storage.read_json(f"{base}/d/e/f") == {"name": "d/e/f"}
    listed = storage.list_files(f"{base}/d")
    assert [info.uri for info in listed] == [f"{base}/d/a", f"{base}/d/b", f"{base}/d/e/f"]
    assert [info.num_bytes for info in listed] == [storage.size(info.uri) for info in listed]
    assert storage.list_files("s3://faces/absent") == []
    storage.delete_file(f"{base}/d/a")
    storage.delete_file(f"{base}/d/a")
    storage.delete_tree(f"{base}/d")
    storage.delete_tree(f"{base}/d")
    assert [info.uri for info in storage.list_files(base)] == [f"{base}/d2/x"]


@pytest.mark.parametrize("uri", ["s3://faces/no/such.object", "s3://no-such-bucket/key"])
def test_a_missing_object_is_named(s3, uri):
    for action in (storage.read_bytes, storage.size, storage.read_json):
        with pytest.raises(StorageError) as caught:
            action(uri)
        assert str(caught.value) == f"{uri}: does not exist"


def test_a_write_to_a_bucket_that_does_not_exist_is_named(s3):
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/key: "):
        storage.write_bytes("s3://no-such-bucket/key", b"x")


def run_python(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_a_wrong_secret_is_an_error_that_names_the_uri(s3):
    # In a process of its own: S3 clients are kept for the life of a process.
    storage.write_bytes("s3://faces/secret", b"x")
    script = (
        "import sys; from pipeline import storage\n"
        "write = lambda uri: storage.write_bytes(uri, b'')\n"
        "for action in (storage.read_bytes, storage.size, storage.list_files, write):\n"
        "    try: action('s3://faces/secret')\n"
        "    except storage.StorageError as error: print(error)\n"
    )
    done = run_python(script, s3 | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == 4
    assert all(line.startswith("s3://faces/secret: cannot ") for line in lines), lines
    assert storage.read_bytes("s3://faces/secret") == b"x"


PACK = """
import json, sys
from pipeline.data.pack import pack
from pipeline.data.sources import SourceSpec, SyntheticConfig
from pipeline.runtime import ray_session
size = SyntheticConfig(num_identities=4, images_per_identity=3)
spec = SourceSpec(format="synthetic", seed=3, synthetic=size)
with ray_session():
    packed = [pack(spec, place, samples_per_shard=5, seed=1).fingerprint for place in sys.argv[1:]]
print(json.dumps(packed))
"""


@pytest.mark.ray
def test_a_pack_on_s3_equals_a_local_one(s3, tmp_path):
    # A Ray cluster of its own: workers take the server's address from the environment in which the cluster started.
    done = run_python(PACK, s3, "s3://faces/packed", str(tmp_path / "packed"))
    assert done.returncode == 0, done.stderr[-3000:]
    fingerprints = json.loads(done.stdout.splitlines()[-1])
    remote, local = Manifest.load("s3://faces/packed"), Manifest.load(str(tmp_path / "packed"))
    assert [remote.fingerprint, local.fingerprint] == fingerprints
    assert remote.fingerprint == local.fingerprint
    assert remote.shards == local.shards
    assert [info.uri.rsplit("/", 1)[1] for info in storage.list_files("s3://faces/packed")] == [
        "manifest.json",
        *(shard.name for shard in local.shards),
    ]
    for number, info in enumerate(remote.shards):
        one = read_shard(remote.shard_uri(number), info, 4)
        two = read_shard(local.shard_uri(number), info, 4)
        assert one.images == two.images
        assert one.labels.tolist() == two.labels.tolist()
    assert sum(info.num_samples for info in remote.shards) == 12
