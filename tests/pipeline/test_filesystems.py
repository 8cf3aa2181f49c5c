"""The seam to fsspec: gs:// and az:// with fsspec's memory filesystem in the place of Google's and Azure's.

No server of either is asked here: this shows that the URIs reach fsspec, not that their packages work with a cloud.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import uuid
from typing import ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from pipeline import filesystems, storage
from pipeline.filesystems import modified_ns
from pipeline.storage import MissingError, SizeError, StorageError


class CloudError(Exception):
    """As gcsfs raises: no OSError, the HTTP status in ``code``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"HTTP {code}")
        self.code = code


class Cloud(MemoryFileSystem):
    """Objects in memory under another scheme, with failures on order and a count of what was asked."""

    protocol = ("gs", "az", "abfs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[Exception]] = []
    asked: ClassVar[list[str]] = []

    def _fail(self, operation: str) -> None:
        Cloud.asked.append(operation)
        if Cloud.failures:
            raise Cloud.failures.pop(0)

    def cat_file(self, path, start=None, end=None, **options):
        self._fail("cat")
        data = super().cat_file(path, start=start, end=end, **options)
        return data[: len(data) // 2] if "cut" in path and len(Cloud.asked) < 4 else data

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._fail("pipe")
        return super().pipe_file(path, value, mode=mode, **options)

    def invalidate_cache(self, path=None):
        Cloud.asked.append("invalidate")


@pytest.fixture(params=["gs", "az", "abfs"])
def base(request, monkeypatch):
    """A folder in a bucket of such a cloud."""
    monkeypatch.setitem(_registry, request.param, Cloud)  # fsspec can register a scheme but not forget it
    monkeypatch.setenv("LGAF_STORAGE_BACKOFF_S", "0")
    monkeypatch.setenv("LGAF_STORAGE_ATTEMPTS", "3")
    filesystems._fsspec.cache_clear()
    Cloud.failures, Cloud.asked = [], []
    yield f"{request.param}://bucket/{uuid.uuid4().hex}"
    filesystems._fsspec.cache_clear()
    Cloud.clear_instance_cache()


def test_everything_works_through_fsspec(base):
    data = os.urandom(300_000)
    storage.write_bytes(f"{base}/d/x", data)
    storage.write_json(f"{base}/d/e/y", {"a": 1})
    assert storage.exists(f"{base}/d/x")
    assert storage.size(f"{base}/d/x") == len(data)
    assert storage.read_bytes(f"{base}/d/x") == data
    assert storage.read_whole(f"{base}/d/x", len(data)) == data
    assert storage.read_range(f"{base}/d/x", 7, 11) == data[7:18]
    assert storage.read_json(f"{base}/d/e/y") == {"a": 1}
    with storage.open_read(f"{base}/d/x") as stream:
        stream.seek(100_000)
        assert stream.read(10) == data[100_000:100_010]
    assert [info.uri for info in storage.list_files(base)] == [f"{base}/d/e/y", f"{base}/d/x"]
    assert all(info.modified_ns > 0 for info in storage.list_files(base))
    assert storage.list_folder(f"{base}/d") == (("x",), ("e",))
    storage.delete_file(f"{base}/d/x")
    assert not storage.exists(f"{base}/d/x")
    storage.delete_tree(f"{base}/d")
    assert storage.list_files(base) == []


def test_a_whole_read_is_one_request(base):
    storage.write_bytes(f"{base}/x", bytes(20_000_000))
    Cloud.asked.clear()
    assert storage.read_whole(f"{base}/x", 20_000_000) == bytes(20_000_000)
    assert Cloud.asked == ["invalidate", "cat"]  # what others wrote meanwhile is seen


def test_errors_name_the_uri(base):
    storage.write_bytes(f"{base}/d/x", b"1")
    for action in (storage.read_bytes, storage.size, storage.open_read, storage.list_folder):
        with pytest.raises(MissingError) as caught:
            action(f"{base}/none")
        assert str(caught.value) == f"{base}/none: does not exist"
    with pytest.raises(StorageError, match=rf"^{base}/d: cannot read after 1 attempt: .*is a folder"):
        storage.read_bytes(f"{base}/d")
    with pytest.raises(SizeError, match=r"has 1 bytes, 2 were expected"):
        storage.read_whole(f"{base}/d/x", 2)


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(base):
    Cloud.failures = [CloudError(503), ConnectionResetError("reset")]
    storage.write_bytes(f"{base}/x", b"data")
    Cloud.failures = [CloudError(429), TimeoutError("late")]
    assert storage.read_bytes(f"{base}/x") == b"data"
    Cloud.failures = [CloudError(500)] * 3
    with pytest.raises(StorageError, match=rf"^{base}/x: cannot read after 3 attempts: HTTP 500$"):
        storage.read_bytes(f"{base}/x")
    Cloud.failures = [CloudError(403)]
    with pytest.raises(StorageError, match=rf"^{base}/x: cannot read after 1 attempt: HTTP 403$"):
        storage.read_bytes(f"{base}/x")


def test_a_short_answer_is_asked_for_again(base):
    storage.write_bytes(f"{base}/cut", b"12345678")
    Cloud.asked.clear()
    assert storage.read_bytes(f"{base}/cut") == b"12345678"
    assert Cloud.asked.count("cat") == 3


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs")])
def test_a_package_that_is_not_installed_is_named(scheme, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    extra = "gs" if scheme == "gs" else "az"
    for action in (storage.read_bytes, storage.exists, storage.list_files, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(StorageError) as caught:
            action(f"{scheme}://bucket/x")
        assert str(caught.value) == (
            f"{scheme}://bucket/x: {scheme}:// needs the package {package}, which is not installed: "
            f'pip install "lgaf-on-ray[{extra}]"'
        )


def test_times_of_change_in_all_their_forms():
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    expected = int(moment.timestamp()) * 1_000_000_000
    assert modified_ns({"mtime": moment}) == expected
    assert modified_ns({"updated": "2026-01-02T03:04:05Z"}) == expected
    assert modified_ns({"last_modified": moment, "created": moment.replace(year=2025)}) == expected
    assert modified_ns({"created": moment.timestamp()}) == expected
    assert modified_ns({"mtime": None}) == modified_ns({}) == modified_ns({"updated": "yesterday"}) == 0
