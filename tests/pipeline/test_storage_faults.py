"""What reading and writing make of each fault of a real S3 server behind a proxy: bytes, message, number of requests.

Four attempts, a tenth of a second apart at most, a time-out of one second (`tests.s3.QUICK`).
"""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import time

import pytest

from pipeline import storage
from pipeline.data.cache import ShardCache
from pipeline.data.shards import ShardError, read_shard
from pipeline.storage import MissingError, StorageError
from tests.pipeline.data.writers import jpeg, shard_info, tar_bytes

pytest_plugins = ("tests.s3",)

NUM_SAMPLES, NUM_CLASSES = 40, 5
URI = "s3://faces/faults/shard-000000.tar"
TAR = tar_bytes([(f"{i:09d}", jpeg(i), str(i % NUM_CLASSES).encode()) for i in range(NUM_SAMPLES)])
INFO = shard_info("shard-000000.tar", TAR, NUM_SAMPLES)
MIDDLE = len(TAR) // 2


@pytest.fixture
def proxy(s3_proxy):
    """The proxy, with one shard behind it and no request seen yet."""
    storage.write_bytes(URI, TAR)
    s3_proxy.clear()
    return s3_proxy


def assert_exact(proxy, *requests: str) -> None:
    """The shard is read without a sample lost, doubled or changed, with exactly these requests."""
    shard = read_shard(URI, INFO, NUM_CLASSES)
    assert list(shard.images) == [jpeg(i) for i in range(NUM_SAMPLES)]
    assert shard.labels.tolist() == [i % NUM_CLASSES for i in range(NUM_SAMPLES)]
    assert proxy.requests() == list(requests)


def failure(kind: type[Exception] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        read_shard(URI, INFO, NUM_CLASSES)
    return str(caught.value)


def test_without_a_fault_a_shard_is_one_look_and_one_read(proxy):
    assert_exact(proxy, "HEAD", "GET")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_two_server_errors_are_ridden_out(proxy, status):
    proxy.inject("status", status=status, times=2, methods=["GET"])
    assert_exact(proxy, "HEAD", "GET status", "HEAD", "GET status", "HEAD", "GET")


def test_server_errors_of_the_look_are_ridden_out_too(proxy):
    proxy.inject("status", status=503, times=2)
    assert_exact(proxy, "HEAD status", "HEAD status", "HEAD", "GET")


def test_server_errors_for_ever_end_after_all_attempts(proxy, caplog):
    proxy.inject("status", status=503, methods=["GET"])
    with caplog.at_level(logging.WARNING, "pipeline.retries"):
        message = failure()
    assert message.startswith(f"{URI}: cannot read after 4 attempts: AWS Error SLOW_DOWN during GetObject")
    assert proxy.requests() == ["HEAD", "GET status"] * 4
    assert [re.sub(r"next.*", "", record.getMessage()) for record in caplog.records] == [
        f"{URI}: attempt {number} of 4 failed, " for number in (1, 2, 3)
    ]


def test_a_reset_connection_is_opened_again(proxy):
    proxy.inject("reset", times=2, methods=["GET"])  # curl itself asks once more where a kept connection breaks
    shard = read_shard(URI, INFO, NUM_CLASSES)
    assert list(shard.images) == [jpeg(i) for i in range(NUM_SAMPLES)]
    assert proxy.requests("GET") == ["GET reset", "GET reset", "GET"]


def test_a_connection_that_is_reset_in_the_middle_of_a_body_is_opened_again(proxy):
    proxy.inject("reset", after_bytes=MIDDLE, times=1, methods=["GET"])
    assert_exact(proxy, "HEAD", "GET reset", "HEAD", "GET")


def test_resets_for_ever_end_after_all_attempts(proxy):
    proxy.inject("reset", after_bytes=MIDDLE, methods=["GET"])
    assert failure().startswith(f"{URI}: cannot read after 4 attempts: AWS Error NETWORK_CONNECTION during GetObject")
    assert proxy.requests("GET") == ["GET reset"] * 4


def test_a_stalled_answer_is_given_up_after_the_time_out_and_asked_for_again(proxy):
    proxy.inject("stall", delay_s=30, times=1, methods=["GET"])
    start = time.monotonic()
    assert_exact(proxy, "HEAD", "GET stall", "HEAD", "GET")
    assert 0.9 < time.monotonic() - start < 6


@pytest.mark.slow
def test_a_body_that_stalls_in_the_middle_is_given_up_some_seconds_later(proxy):
    # curl looks at the mean rate of the last seconds, so this takes about 6 s more than the time-out.
    proxy.inject("stall", delay_s=60, after_bytes=MIDDLE, times=1, methods=["GET"])
    start = time.monotonic()
    assert_exact(proxy, "HEAD", "GET stall", "HEAD", "GET")
    assert 1 < time.monotonic() - start < 15


def test_a_truncated_body_is_noticed_and_read_again(proxy):
    proxy.inject("truncate", after_bytes=MIDDLE, times=2, methods=["GET"])
    assert_exact(proxy, "HEAD", "GET truncate", "HEAD", "GET truncate", "HEAD", "GET")


def test_a_body_truncated_for_ever_is_no_half_shard(proxy):
    proxy.inject("truncate", after_bytes=len(TAR) - 1, methods=["GET"])
    message = failure()
    assert message.startswith(f"{URI}: cannot read after 4 attempts: ")
    assert "1 bytes missing" in message
    assert proxy.requests("GET") == ["GET truncate"] * 4


@pytest.mark.parametrize("place", [0, MIDDLE, len(TAR) - 1], ids=["first", "middle", "last"])
def test_a_byte_flipped_on_the_way_is_noticed_by_the_checksum(proxy, place):
    proxy.inject("corrupt", after_bytes=place, times=1, methods=["GET"])
    damaged = storage.read_bytes(URI)  # storage cannot know
    assert len(damaged) == len(TAR)
    assert [i for i in range(len(TAR)) if damaged[i] != TAR[i]] == [place]
    proxy.clear()
    proxy.inject("corrupt", after_bytes=place, methods=["GET"])
    assert failure(ShardError).startswith(f"{URI}: corrupt")
    assert set(proxy.requests("GET")) == {"GET corrupt"}


def test_a_flipped_byte_does_not_come_to_stay_in_the_cache(proxy, tmp_path):
    proxy.inject("corrupt", after_bytes=MIDDLE, times=1, methods=["GET"])
    cache = ShardCache(tmp_path, 10 * len(TAR))
    for _ in range(3):
        try:
            shard = read_shard(URI, INFO, NUM_CLASSES, cache)
        except ShardError:
            continue
        assert list(shard.images) == [jpeg(i) for i in range(NUM_SAMPLES)]
    proxy.clear()
    assert read_shard(URI, INFO, NUM_CLASSES, cache).labels.size == NUM_SAMPLES
    assert proxy.requests() == []  # from the disk, and right


def test_a_forbidden_object_is_an_error_at_once(proxy):
    proxy.inject("status", status=403)
    assert failure().startswith(f"{URI}: cannot read after 1 attempt: ")
    assert "ACCESS_DENIED" in failure()
    assert proxy.requests() == ["HEAD status"] * 2  # one for each of the two calls above


def test_a_missing_object_is_an_error_at_once(proxy):
    uri = "s3://faces/faults/none.tar"
    with pytest.raises(MissingError) as caught:
        read_shard(uri, INFO, NUM_CLASSES)
    assert str(caught.value) == f"{uri}: does not exist"
    assert len(proxy.requests()) <= 2  # pyarrow looks for a folder of that name too
    assert "GET status" not in proxy.requests()


def test_an_object_that_goes_between_look_and_read_is_missing(proxy):
    proxy.inject("status", status=404, methods=["GET"])
    assert failure(MissingError) == f"{URI}: does not exist"
    assert proxy.requests() == ["HEAD", "GET status"]


def test_an_object_of_another_size_is_not_read_at_all(proxy):
    storage.write_bytes(URI, TAR[:-512])
    proxy.clear()
    assert f"{len(TAR) - 512} bytes, the manifest says {len(TAR)}" in failure(ShardError)
    assert proxy.requests() == ["HEAD"]


def test_a_slow_link_is_waited_for_beyond_the_time_out(proxy):
    proxy.inject("slow", bytes_per_s=len(TAR) // 2, methods=["GET"])
    start = time.monotonic()
    assert_exact(proxy, "HEAD", "GET slow")
    assert time.monotonic() - start > 1.5  # the time-out is 1 s of silence, not of work


def test_a_late_answer_within_the_time_out_is_waited_for(proxy):
    proxy.inject("latency", delay_s=0.3)
    assert_exact(proxy, "HEAD latency", "GET latency")


def test_a_server_that_is_down_is_named_with_the_attempts(s3_proxy, monkeypatch):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        message = failure()
    assert message.startswith(f"{URI}: cannot read after 4 attempts: ")
    assert "Could not connect" in message


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 503}, {"kind": "reset"}], ids=["503", "reset"])
@pytest.mark.parametrize("num_bytes", [1000, 12_000_000], ids=["one_put", "multipart"])
def test_writes_are_tried_again_and_whole(proxy, fault, num_bytes):
    data, uri = os.urandom(num_bytes), f"s3://faces/faults/written-{num_bytes}"
    proxy.inject(**fault, times=2, methods=["PUT", "POST"])
    storage.write_bytes(uri, data)
    assert sum(fault["kind"] in request for request in proxy.requests()) == 2
    assert storage.read_bytes(uri) == data


def test_a_write_that_fails_for_ever_keeps_the_old_object(proxy, monkeypatch):
    monkeypatch.setenv("LGAF_STORAGE_ATTEMPTS", "2")
    proxy.inject("status", status=503, methods=["PUT", "POST"])
    with pytest.raises(StorageError, match=rf"^{re.escape(URI)}: cannot write after 2 attempts: .*SLOW_DOWN"):
        storage.write_bytes(URI, b"new")
    assert proxy.requests() == ["PUT status"] * 2 * storage.WRITE_SDK_ATTEMPTS
    proxy.clear()
    proxy.inject("status", status=403, methods=["PUT", "POST"])
    with pytest.raises(StorageError, match=rf"^{re.escape(URI)}: cannot write after 1 attempt: .*ACCESS_DENIED"):
        storage.write_bytes(URI, b"new")
    assert proxy.requests() == ["PUT status"]
    proxy.clear()
    assert storage.read_bytes(URI) == TAR


@pytest.mark.parametrize(
    "action",
    [
        storage.exists,
        storage.size,
        storage.list_files,
        storage.list_folder,
        storage.read_json,
        storage.delete_file,
        storage.delete_tree,
    ],
    ids=lambda action: action.__name__,
)
def test_every_operation_rides_out_server_errors_and_gives_up_in_the_end(proxy, action):
    uri = "s3://faces/operations/one.json"
    storage.write_bytes(uri, b"{}")
    folder_actions = (storage.list_files, storage.list_folder, storage.delete_tree)
    place = uri.rsplit("/", 1)[0] if action in folder_actions else uri
    proxy.clear()
    expected = action(place)
    if action in (storage.delete_file, storage.delete_tree):
        storage.write_bytes(uri, b"{}")
    proxy.clear()
    proxy.inject("status", status=503, times=2)
    assert action(place) == expected
    assert sum("status" in request for request in proxy.requests()) == 2
    proxy.inject("status", status=503)
    with pytest.raises(StorageError, match=rf"^{re.escape(place)}: cannot [a-z ]+ after 4 attempts: ") as caught:
        action(place)
    assert not isinstance(caught.value, MissingError)


def test_a_stream_rides_out_faults_between_its_ranges(proxy, monkeypatch):
    monkeypatch.setattr(storage, "READ_BUFFER_BYTES", 10_000)
    with storage.open_read(URI) as stream:
        start = stream.read(15_000)
        proxy.inject("truncate", after_bytes=100, times=1, methods=["GET"])
        middle = stream.read(10_000)
        proxy.inject("status", status=503, times=2, methods=["GET"])
        assert start + middle + stream.read() == TAR
        stream.seek(7)
        assert stream.read(5) == TAR[7:12]
        stream.seek(-4, io.SEEK_END)
        assert stream.read(10) == TAR[-4:]
        assert proxy.requests("HEAD") == ["HEAD"]  # the size is asked for once
        proxy.inject("status", status=503)
        stream.seek(0)
        with pytest.raises(StorageError, match=rf"^{re.escape(URI)}: cannot read after 4 attempts: "):
            stream.read(20_000)
