"""Storage on file:// and memory://: round trips, atomic writes, and errors that name the URI."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.storage import MissingError, SizeError, StorageError

SEGMENT = st.text("abcXYZ019_-. ", min_size=1, max_size=8).filter(lambda s: s.strip(".") and s == s.strip())


@pytest.fixture(params=["file", "memory"])
def base(request, tmp_path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("data", [b"", b"\x00\xff\n", os.urandom(9 * 1024 * 1024)], ids=["empty", "small", "9MiB"])
def test_bytes_round_trip(base, data):
    uri = f"{base}/a/b/c.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, data)
    assert storage.exists(uri)
    assert storage.size(uri) == len(data)
    assert storage.read_bytes(uri) == data
    storage.write_bytes(uri, data[::-1][:7])
    assert storage.read_bytes(uri) == data[::-1][:7]  # replaced, not appended to or overlaid


def test_json_round_trip(base):
    value = {"b": [1, 2.5, None, True], "a": {"ü": "é"}}
    storage.write_json(f"{base}/x.json", value)
    assert storage.read_json(f"{base}/x.json") == value


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe\x00", b"{'a': 1}", b"[1,]"])
def test_garbage_is_not_json(base, garbage):
    storage.write_bytes(f"{base}/x.json", garbage)
    with pytest.raises(StorageError, match=r"x\.json: is not valid JSON") as caught:
        storage.read_json(f"{base}/x.json")
    assert f"{base}/x.json" in str(caught.value)


@pytest.mark.parametrize(
    "action",
    [
        storage.read_bytes,
        storage.read_json,
        storage.size,
        lambda uri: storage.read_range(uri, 0, 1),
    ],
    ids=["read_bytes", "read_json", "size", "read_range"],
)
def test_a_missing_file_is_named(base, action):
    uri = f"{base}/no/such.file"
    with pytest.raises(StorageError) as caught:
        action(uri)
    assert str(caught.value) == f"{uri}: does not exist"


def test_a_folder_is_not_a_file(base):
    storage.write_bytes(f"{base}/folder/x", b"1")
    assert storage.exists(f"{base}/folder")
    with pytest.raises(StorageError, match=r"folder: is a folder, a file was expected"):
        storage.size(f"{base}/folder")
    with pytest.raises(StorageError, match=r"folder"):
        storage.read_bytes(f"{base}/folder")


@given(data=st.binary(max_size=300), start=st.integers(0, 300), length=st.integers(0, 300))
def test_read_range_is_a_slice(tmp_path_factory, data, start, length):
    start = min(start, len(data))
    for uri in (f"file://{tmp_path_factory.getbasetemp()}/range.bin", "memory://range/range.bin"):
        storage.write_bytes(uri, data)
        assert storage.read_range(uri, start, length) == data[start : start + length]


def test_list_files_is_sorted_recursive_and_exact(base):
    for name in ("z", "d/b", "d/a", "d/e/f", "d-2/x", "d2/x"):
        storage.write_bytes(f"{base}/{name}", name.encode())
    listed = storage.list_files(f"{base}/d")
    assert [info.uri for info in listed] == [f"{base}/d/{name}" for name in ("a", "b", "e/f")]
    assert [info.num_bytes for info in listed] == [3, 3, 5]
    assert storage.list_files(f"{base}/d/") == listed
    everything = [info.uri for info in storage.list_files(base)]
    assert everything == sorted(everything)
    assert len(everything) == 6
    for uri in everything:  # what is listed can be read back by its URI
        assert storage.read_bytes(uri) == uri.removeprefix(base + "/").encode()


def test_list_folder_gives_names_of_one_level(base):
    for name in ("d/b", "d/a", "d/e/f", "d/e/g/h", "d2/x"):
        storage.write_bytes(f"{base}/{name}", b"1")
    assert storage.list_folder(f"{base}/d") == (("a", "b"), ("e",))
    assert storage.list_folder(f"{base}/d/") == (("a", "b"), ("e",))
    assert storage.list_folder(base) == ((), ("d", "d2"))
    assert storage.list_folder(f"{base}/d/a") == (None, ())
    with pytest.raises(MissingError) as caught:
        storage.list_folder(f"{base}/d3")
    assert str(caught.value) == f"{base}/d3: does not exist"


def test_files_have_the_time_of_their_change(base):
    before = time.time_ns()
    storage.write_bytes(f"{base}/d/x", b"1")
    (info,) = storage.list_files(f"{base}/d")
    # File systems take the time of the last tick of the kernel's clock.
    assert before - 20_000_000 <= info.modified_ns <= time.time_ns()


@pytest.mark.parametrize("length", [0, 5, 100_000])
def test_a_stream_reads_and_seeks_as_a_file_does(base, length, monkeypatch):
    monkeypatch.setattr(storage, "READ_BUFFER_BYTES", 7000)
    data, uri = os.urandom(length), f"{base}/stream.bin"
    storage.write_bytes(uri, data)
    with storage.open_read(uri) as stream, io.BytesIO(data) as model:
        assert isinstance(stream, io.BufferedIOBase)
        assert stream.readable()
        assert stream.seekable()
        for offset, whence, count in [(0, 0, 1), (0, 1, 8000), (3, 1, 14_000), (-50, 2, 60), (9, 0, 0), (0, 0, -1)]:
            if whence != io.SEEK_END or length >= 50:
                assert stream.seek(offset, whence) == model.seek(offset, whence)
            assert stream.read(count) == model.read(count)
            assert stream.tell() == model.tell()
        assert stream.read(1) == b""
        assert stream.seek(length + 10) == length + 10
        assert stream.read() == b""
        with pytest.raises((ValueError, OSError)):
            stream.seek(-1)
    assert stream.closed


def test_a_stream_of_a_missing_file_or_a_folder_is_refused(base):
    with pytest.raises(MissingError, match=r"none: does not exist$"):
        storage.open_read(f"{base}/none")
    storage.write_bytes(f"{base}/folder/x", b"1")
    with pytest.raises(StorageError, match=r"/folder: cannot read"):
        storage.open_read(f"{base}/folder")


def test_read_whole_tells_another_size(base):
    uri = f"{base}/x"
    storage.write_bytes(uri, b"12345")
    assert storage.read_whole(uri, 5) == b"12345"
    for expected in (0, 4, 6):
        with pytest.raises(SizeError) as caught:
            storage.read_whole(uri, expected)
        assert str(caught.value) == f"{uri}: has 5 bytes, {expected} were expected"
        copied = pickle.loads(pickle.dumps(caught.value))  # Ray sends errors between processes
        assert (str(copied), copied.found, copied.expected) == (str(caught.value), 5, expected)
    with pytest.raises(MissingError, match=r"none: does not exist$"):
        storage.read_whole(f"{base}/none", 5)


def test_an_absent_folder_lists_empty(base):
    assert storage.list_files(f"{base}/no/such/folder") == []


def test_delete_file_and_tree(base):
    for name in ("d/a", "d/b/c", "d2/x", "dx"):
        storage.write_bytes(f"{base}/{name}", b"1")
    storage.delete_file(f"{base}/d/a")
    storage.delete_file(f"{base}/d/a")  # absent: fine
    assert [info.uri for info in storage.list_files(f"{base}/d")] == [f"{base}/d/b/c"]
    storage.delete_tree(f"{base}/d")
    storage.delete_tree(f"{base}/d")
    assert not storage.exists(f"{base}/d/b/c")
    assert [info.uri for info in storage.list_files(base)] == [f"{base}/d2/x", f"{base}/dx"]


@pytest.mark.parametrize("uri", ["ftp://host/x", "http://host/x", "hdfs://x", "://x", "gcs://b/k"])
def test_an_unknown_scheme_is_refused(uri):
    for action in (storage.normalise, storage.exists, storage.read_bytes, storage.list_files):
        with pytest.raises(StorageError, match=r"unknown scheme") as caught:
            action(uri)
        assert str(caught.value).startswith(f"{uri}: ")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "gs://", "az:///key", "abfs://"])
def test_a_bucket_is_needed(uri):
    with pytest.raises(StorageError, match=r"names a bucket"):
        storage.normalise(uri)


def test_normalise_plain_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    here = f"file://{tmp_path}"
    assert storage.normalise("a/b") == f"{here}/a/b"
    assert storage.normalise("./a/../b/") == f"{here}/b"
    assert storage.normalise(".") == here
    assert storage.normalise(Path("x")) == f"{here}/x"
    assert storage.normalise("~/data/") == f"{here}/someone/data"
    assert storage.normalise("/x/") == "file:///x"
    assert storage.normalise("file:///x/y//") == "file:///x/y"
    assert storage.normalise("s3://bucket/") == "s3://bucket"
    assert storage.join("s3://bucket/a/", "/b/", "c") == "s3://bucket/a/b/c"
    assert storage.local_path("a/b") == tmp_path / "a" / "b"
    with pytest.raises(StorageError, match=r"s3://b/k: not a local path"):
        storage.local_path("s3://b/k")


@given(st.lists(SEGMENT, min_size=1, max_size=5), st.booleans(), st.sampled_from(["", "/", "file:///", "memory://"]))
def test_normalise_is_idempotent_and_join_is_associative(parts, slash, prefix):
    text = prefix + "/".join(parts) + ("/" if slash else "")
    once = storage.normalise(text)
    assert storage.normalise(once) == once
    assert not once.endswith("/")
    assert storage.join(text, "x", "y") == storage.join(storage.join(text, "x"), "y")


@pytest.mark.parametrize("root", ["/", "file:///", "memory://", "memory:///"])
def test_the_root_of_a_scheme_keeps_its_scheme(root):
    once = storage.normalise(root)
    assert storage.normalise(once) == once
    scheme = "memory" if root.startswith("memory") else "file"
    assert storage.join(root, "x").startswith(f"{scheme}://")


@pytest.mark.parametrize("uri", ["FILE:///tmp/x", "Memory://x/y"])
def test_the_scheme_is_case_insensitive(uri):
    scheme, rest = uri.split("://")
    assert storage.normalise(uri) == f"{scheme.lower()}://{rest}"


def test_a_write_onto_a_directory_changes_nothing(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_bytes(b"kept")
    with pytest.raises(StorageError, match=r"target: cannot write"):
        storage.write_bytes(f"file://{tmp_path}/target", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "kept").read_bytes() == b"kept"


def test_a_write_below_a_file_changes_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(StorageError, match=r"file/x: cannot write"):
        storage.write_bytes(f"file://{tmp_path}/file/x", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_an_unwritable_folder_is_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(StorageError, match=r"x: cannot write: .*Permission"):
            storage.write_bytes(f"file://{folder}/x", b"data")
    finally:
        os.seteuid(user)
    assert list(folder.iterdir()) == []


def test_a_write_that_fails_half_way_keeps_the_old_content(tmp_path):
    uri = f"file://{tmp_path}/x"
    storage.write_bytes(uri, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk: the write stops in the middle
    try:
        with pytest.raises(StorageError, match=r"x: cannot write: .*File too large"):
            storage.write_bytes(uri, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes(uri) == b"old"


def test_a_process_killed_in_the_middle_of_a_write_keeps_the_old_content(tmp_path):
    uri = f"file://{tmp_path}/x"
    storage.write_bytes(uri, b"old")
    script = (
        "import resource, signal, sys; from pipeline import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "storage.write_bytes(sys.argv[1], bytes(1_000_000))\n"
    )
    root = Path(__file__).resolve().parents[2]
    code = subprocess.run([sys.executable, "-c", script, uri], cwd=root, check=False, timeout=60).returncode
    assert code == -signal.SIGXFSZ  # it died at the write, by the kernel's hand
    assert storage.read_bytes(uri) == b"old"
    assert [path for path in tmp_path.iterdir() if path.name == "x" or not path.name.startswith(".")] == [
        tmp_path / "x"
    ]


def test_readers_see_whole_contents_while_a_writer_replaces_them(tmp_path):
    uri, length, stop = f"file://{tmp_path}/x", 1_000_000, threading.Event()
    storage.write_bytes(uri, bytes([0]) * length)

    def write() -> None:
        version = 0
        while not stop.is_set():
            version = (version + 1) % 256
            storage.write_bytes(uri, bytes([version]) * (length + version))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen, deadline = set(), time.monotonic() + 20
        while len(seen) < 5 and time.monotonic() < deadline:
            data = storage.read_bytes(uri)
            assert data == bytes([data[0]]) * (length + data[0])
            seen.add(data[0])
    finally:
        stop.set()
        writer.join()
    assert len(seen) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_fingerprint_is_canonical():
    assert storage.fingerprint({"a": 1, "b": [1, 2]}) == storage.fingerprint({"b": (1, 2), "a": 1})
    assert storage.fingerprint({"a": [1, 2]}) == hashlib.sha256(b'{"a":[1,2]}').hexdigest()
    different = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": None}, [], {}, [1, 2], [2, 1]]
    assert len({storage.fingerprint(value) for value in different}) == len(different)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6), st.randoms())
def test_fingerprint_ignores_the_order_of_keys(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert storage.fingerprint(dict(items)) == storage.fingerprint(value)
    assert storage.fingerprint(value | {"another key": 1}) != storage.fingerprint(value)


def test_plain_json_is_what_comes_back_from_a_file(base):
    value = {"a": (1, (2, 3)), "b": {"c": None}}
    storage.write_json(f"{base}/x", value)
    assert storage.plain_json(value) == storage.read_json(f"{base}/x") == {"a": [1, [2, 3]], "b": {"c": None}}
