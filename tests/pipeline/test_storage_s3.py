"""Storage and packing on a real S3 server (OpenStack Swift with its S3 API), which checks every signature."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_shard
from pipeline.storage import MissingError, SizeError, StorageError

pytest_plugins = ("tests.s3",)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("length", [0, 7, 9_000_000], ids=["empty", "small", "multipart"])
def test_bytes_round_trip(s3, length):
    data, uri = os.urandom(length), f"s3://faces/round/trip-{length}.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, data)
    assert storage.exists(uri)
    assert storage.size(uri) == length
    assert storage.read_bytes(uri) == data
    assert storage.read_whole(uri, length) == data
    assert storage.read_range(uri, min(3, length), 4) == data[3:7]
    with storage.open_read(uri) as stream:
        assert stream.read() == data
        assert stream.seek(-min(length, 3), io.SEEK_END) == max(0, length - 3)
        assert stream.read(2) == data[-3:][:2]
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
    assert all(abs(info.modified_ns / 1e9 - time.time()) < 3600 for info in listed)
    assert storage.list_folder(base) == ((), ("d", "d2"))
    assert storage.list_folder(f"{base}/d/") == (("a", "b"), ("e",))
    assert storage.list_folder(f"{base}/d/a") == (None, ())
    assert storage.list_files("s3://faces/absent") == []
    with pytest.raises(MissingError, match=r"^s3://faces/absent: does not exist$"):
        storage.list_folder("s3://faces/absent")
    storage.delete_file(f"{base}/d/a")
    storage.delete_file(f"{base}/d/a")
    storage.delete_tree(f"{base}/d")
    storage.delete_tree(f"{base}/d")
    assert [info.uri for info in storage.list_files(base)] == [f"{base}/d2/x"]


@pytest.mark.parametrize("uri", ["s3://faces/no/such.object", "s3://no-such-bucket/key"])
def test_a_missing_object_is_named(s3, uri):
    for action in (storage.read_bytes, storage.size, storage.read_json, storage.list_folder, storage.open_read):
        with pytest.raises(MissingError) as caught:
            action(uri)
        assert str(caught.value) == f"{uri}: does not exist"


def test_an_object_of_another_size_is_told_before_it_is_read(s3):
    storage.write_bytes("s3://faces/sized", b"12345")
    with pytest.raises(SizeError, match=r"^s3://faces/sized: has 5 bytes, 6 were expected$") as caught:
        storage.read_whole("s3://faces/sized", 6)
    assert (caught.value.found, caught.value.expected) == (5, 6)


def test_a_write_to_a_bucket_that_does_not_exist_is_named(s3):
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/key: cannot write after 1 attempt: .*NO_SUCH_BUCKET"):
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
    assert all(" after 1 attempt: " in line for line in lines), lines  # it would not help to try again
    assert storage.read_bytes("s3://faces/secret") == b"x"


PACK = """
import json, sys
from pipeline.data.pack import PackSettings, pack
from pipeline.data.sources import SourceSpec, SyntheticConfig
from pipeline.runtime import ray_session
size = SyntheticConfig(num_identities=4, images_per_identity=3)
spec = SourceSpec(format="synthetic", seed=3, synthetic=size)
with ray_session():
    settings = PackSettings(samples_per_shard=5, seed=1)
    packed = [pack(spec, place, settings).fingerprint for place in sys.argv[1:]]
print(json.dumps(packed))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_pack_on_s3_equals_a_local_one(s3, tmp_path):
    # A Ray cluster of its own: workers take the server's address from the environment in which the cluster started.
    done = run_python(PACK, s3, "s3://faces/packed", str(tmp_path / "packed"))
    assert done.returncode == 0, done.stderr[-3000:]
    fingerprints = json.loads(done.stdout.splitlines()[-1])
    remote, local = Manifest.load("s3://faces/packed"), Manifest.load(str(tmp_path / "packed"))
    assert [remote.fingerprint, local.fingerprint] == fingerprints
    assert remote.fingerprint == local.fingerprint
    assert remote.shards == local.shards
    (names, folders), (local_names, local_folders) = (
        storage.list_folder(place) for place in ("s3://faces/packed", local.uri)
    )
    assert names == tuple(name for name in local_names if not name.startswith("."))  # a lock is local
    assert [name for name in names if name.endswith(".tar")] == [shard.name for shard in local.shards]
    assert folders == local_folders
    for number, info in enumerate(remote.shards):
        one = read_shard(remote.shard_uri(number), info, 4)
        two = read_shard(local.shard_uri(number), info, 4)
        assert one.images == two.images
        assert one.labels.tolist() == two.labels.tolist()
    assert sum(info.num_samples for info in remote.shards) == 12
