"""The shard cache: bounded at every moment, least recently used first out, whole bytes under concurrency and kills."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.data import cache as cache_module
from pipeline.data.cache import LOCK, PARTIAL, CacheError, ShardCache

ROOT = Path(__file__).resolve().parents[3]


def shard(number: int, num_bytes: int = 1000) -> tuple[str, bytes]:
    """Name and bytes of a shard."""
    data = random.Random(number).randbytes(num_bytes)
    return hashlib.sha256(data).hexdigest(), data


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()


def put(cache: ShardCache, *numbers: int, num_bytes: int = 1000) -> None:
    for number in numbers:
        name, data = shard(number, num_bytes)
        assert cache.get(name, num_bytes, lambda data=data: data) == data


def is_hit(cache: ShardCache, number: int, num_bytes: int = 1000) -> bool:
    name, data = shard(number, num_bytes)
    fetched = []
    assert cache.get(name, num_bytes, lambda: fetched.append(1) or data) == data
    return not fetched


def names(*numbers: int) -> set[str]:
    return {shard(number)[0] for number in numbers}


def test_a_shard_is_fetched_once(tmp_path):
    cache = ShardCache(tmp_path / "a" / "cache", 3000)
    assert not is_hit(cache, 1)
    assert is_hit(cache, 1)
    assert is_hit(ShardCache(str(tmp_path / "a" / "cache"), 3000), 1)  # another process would see it too
    assert is_hit(pickle.loads(pickle.dumps(cache)), 1)


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    put(cache, 1, 2, 3)
    assert is_hit(cache, 1)
    put(cache, 4)
    assert entries(tmp_path) == names(1, 3, 4)
    put(cache, 5)
    assert entries(tmp_path) == names(1, 4, 5)


def test_as_many_go_as_are_needed_and_no_more(tmp_path):
    cache = ShardCache(tmp_path, 3500)
    put(cache, 1, 2, 3)
    put(cache, 9, num_bytes=1800)
    assert entries(tmp_path) == {shard(9, 1800)[0], *names(3)}
    put(cache, 4, num_bytes=700)
    assert entries(tmp_path) == {shard(9, 1800)[0], shard(4, 700)[0], *names(3)}


def test_a_bound_below_one_shard_is_an_error(tmp_path):
    cache = ShardCache(tmp_path, 999)
    name, data = shard(1)
    with pytest.raises(CacheError, match=r"max_bytes=999 .* smaller than one shard of 1000 bytes"):
        cache.get(name, 1000, lambda: data)
    with pytest.raises(CacheError, match=r"max_bytes=0 .*must be at least 1"):
        ShardCache(tmp_path, 0)
    assert is_hit(ShardCache(tmp_path, 1000), 1) is False
    assert is_hit(ShardCache(tmp_path, 1000), 1)  # exactly one fits


@pytest.mark.parametrize("name", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 65])
def test_a_name_that_is_no_sha256_is_refused(tmp_path, name):
    with pytest.raises(CacheError, match=r"64 lower-case hexadecimal digits"):
        ShardCache(tmp_path, 1000).get(name, 1, lambda: b"x")
    assert entries(tmp_path) == set()


def test_a_discarded_shard_is_fetched_again(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    put(cache, 1, 2)
    cache.discard(shard(1)[0])
    cache.discard(shard(1)[0])
    assert entries(tmp_path) == names(2)
    assert not is_hit(cache, 1)


def test_an_entry_of_another_size_is_replaced(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    put(cache, 1)
    name, data = shard(1)
    (tmp_path / name).write_bytes(data[:500])  # as a crash of the machine may leave it
    assert not is_hit(cache, 1)
    assert is_hit(cache, 1)


def test_fetched_bytes_of_another_size_are_not_kept(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    name, data = shard(1)
    assert cache.get(name, 1000, lambda: data[:999]) == data[:999]
    assert entries(tmp_path) == set()


def test_an_error_of_the_fetch_is_the_callers_and_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, 3000)

    def fail() -> bytes:
        raise OSError("no such shard")

    with pytest.raises(OSError, match=r"^no such shard$"):
        cache.get(shard(1)[0], 1000, fail)
    assert entries(tmp_path) == set()
    assert not is_hit(cache, 1)
    assert is_hit(cache, 1)  # and the cache still takes shards


def test_a_reader_gets_whole_bytes_of_an_entry_that_goes(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    put(cache, 1)
    name, data = shard(1)
    with (tmp_path / name).open("rb") as held:
        start = held.read(10)
        put(cache, 2)
        assert entries(tmp_path) == names(2)
        assert start + held.read() == data


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    monkeypatch.setattr(cache_module, "_refused", set())
    caplog.set_level(logging.WARNING, "pipeline.data.cache")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_read_only_disk_is_one_warning_and_its_entries_are_still_used(tmp_path, warnings_of):
    put(ShardCache(tmp_path, 3000), 1)
    user = os.geteuid()
    tmp_path.chmod(0o555)
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    (tmp_path / ".lock").chmod(0o444)
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        assert [is_hit(ShardCache(tmp_path, 3000), number) for number in (1, 2, 3, 2, 1)] == [True, *[False] * 3, True]
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
    assert len(warnings_of()) == 1
    assert str(tmp_path) in warnings_of()[0]
    assert "Permission denied" in warnings_of()[0]


def test_a_full_disk_is_one_warning_and_leaves_no_partial_file(tmp_path, warnings_of, monkeypatch):
    put(ShardCache(tmp_path, 3000), 1)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert [is_hit(ShardCache(tmp_path, 3000), number) for number in (2, 3, 1, 2)] == [False, False, True, False]
    assert entries(tmp_path) == names(1)
    assert len(warnings_of()) == 1
    assert "No space left on device" in warnings_of()[0]


def test_a_disk_that_breaks_in_mid_write_leaves_no_partial_file(tmp_path, warnings_of):
    # The kernel fails the write beyond the limit; taking the space would fail before that, so it is left out.
    script = (
        "import os, resource, signal, sys; from pipeline.data.cache import ShardCache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "os.posix_fallocate = lambda *_: None\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "data = bytes(1_000_000)\n"
        "assert ShardCache(sys.argv[1], 2_000_000).get('a' * 64, 1_000_000, lambda: data) == data\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0
    assert entries(tmp_path) == set()


KILLED = """
import sys, time
from pipeline.data.cache import ShardCache
data = bytes(300_000_000)
print("go", flush=True)
ShardCache(sys.argv[1], 400_000_000).get("a" * 64, len(data), lambda: data)
print("done", flush=True)
time.sleep(60)
"""


def kill_in_mid_put(folder: Path) -> bool:
    """Start a put of 300 MB and kill it as soon as its partial file is there; whether one was left."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 60
        while not any(name.endswith(PARTIAL) for name in entries(folder)):
            assert time.monotonic() < deadline
            if "a" * 64 in entries(folder):
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return any(name.endswith(PARTIAL) for name in entries(folder))


def test_what_a_killed_writer_leaves_is_no_entry_and_is_swept(tmp_path):
    for _ in range(5):
        if kill_in_mid_put(tmp_path):
            break
        ShardCache(tmp_path, 400_000_000).discard("a" * 64)
    else:
        pytest.fail("the writer was never caught in the middle")
    assert "a" * 64 not in entries(tmp_path)
    cache = ShardCache(tmp_path, 400_000_000)
    put(cache, 1)
    assert entries(tmp_path) == names(1)


def test_the_partial_file_of_a_living_writer_counts_and_stays(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    put(cache, 1)
    with cache._lock():
        number, partial = cache._take_space(tmp_path / shard(9)[0], 2000)
    try:
        assert partial.stat().st_size == 2000  # the whole space at once
        put(cache, 2)  # 1 must go, the writer must not
        assert entries(tmp_path) == {partial.name, *names(2)}
        put(cache, 3, num_bytes=1500)  # no room beside the writer: not kept
        assert not is_hit(cache, 3, 1500)
    finally:
        os.close(number)
    put(cache, 4)
    assert partial.name not in entries(tmp_path)


def test_space_is_given_out_to_one_at_a_time(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    put(cache, 1)
    writer = threading.Thread(target=put, args=(cache, 2))
    with (tmp_path / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process that gives out space
        writer.start()
        writer.join(0.3)
        assert entries(tmp_path) == names(1)
        assert is_hit(cache, 1)  # readers do not wait
    writer.join(10)
    assert entries(tmp_path) == names(1, 2)


def work(folder: str, max_bytes: int, seed: int, count: int, failures: multiprocessing.SimpleQueue) -> None:
    cache, draw = ShardCache(folder, max_bytes), random.Random(seed)
    hits = 0
    for _ in range(count):
        number = min(draw.randrange(12), draw.randrange(12))  # some more wanted than others
        name, data = shard(number, 20_000 + 1000 * number)
        fetched = []
        if cache.get(name, len(data), lambda data=data, fetched=fetched: fetched.append(1) or data) != data:
            failures.put(f"wrong bytes of {number}")
        hits += not fetched
        if draw.random() < 0.05:
            cache.discard(name)
    failures.put(hits)


def test_many_processes_get_whole_shards_and_hold_the_bound_at_every_moment(tmp_path):
    # Slots for about five of the twelve shards, four processes that each fill one at a time.
    max_bytes, context = 130_000, multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=work, args=(str(tmp_path), max_bytes, seed, 600, queue)) for seed in range(4)]
    for worker in workers:
        worker.start()
    most = polls = 0
    while any(worker.is_alive() for worker in workers):
        total = 0
        for name in os.listdir(tmp_path):  # one system call for so few names: all were there at one moment
            try:
                total += os.stat(tmp_path / name).st_size
            except FileNotFoundError:
                continue
        most, polls = max(most, total), polls + 1
    for worker in workers:
        worker.join()
    results = [queue.get() for _ in workers]
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert all(isinstance(result, int) and result > 50 for result in results), results
    assert queue.empty()
    assert 90_000 < most <= max_bytes, (most, polls)
    assert polls > 100
    assert not any(name.endswith(PARTIAL) for name in entries(tmp_path))


class CacheMachine(RuleBasedStateMachine):
    """The cache against an ordered dict that does the same by hand."""

    @initialize(max_bytes=st.integers(40, 200))
    def start(self, max_bytes: int) -> None:
        self.folder = Path(os.environ["TEST_CACHE_FOLDER"]) / os.urandom(8).hex()
        self.cache, self.max_bytes = ShardCache(self.folder, max_bytes), max_bytes
        self.model: OrderedDict[str, int] = OrderedDict()

    @rule(number=st.integers(0, 7))
    def get(self, number: int) -> None:
        name, data = shard(number, 5 * number + 3)
        hit = name in self.model
        assert is_hit(self.cache, number, len(data)) == hit
        if hit:
            self.model.move_to_end(name)
            return
        while sum(self.model.values()) + len(data) > self.max_bytes:
            self.model.popitem(last=False)
        self.model[name] = len(data)
        assert entries(self.folder) == set(self.model)  # what dead writers left goes when somebody puts

    @rule(number=st.integers(0, 7))
    def discard(self, number: int) -> None:
        name, _ = shard(number, 5 * number + 3)
        self.cache.discard(name)
        self.model.pop(name, None)

    @rule(num_bytes=st.integers(1, 30))
    def a_writer_dies(self, num_bytes: int) -> None:
        if self.folder.is_dir():
            (self.folder / f"{'b' * 64}.{os.urandom(4).hex()}{PARTIAL}").write_bytes(bytes(num_bytes))

    @invariant()
    def the_entries_are_those_of_the_model(self) -> None:
        if hasattr(self, "folder"):
            found = {path for path in entries(self.folder) if not path.endswith(PARTIAL)}
            assert found == set(self.model)
            assert sum((self.folder / name).stat().st_size for name in found) <= self.max_bytes


def test_the_cache_does_what_an_ordered_dict_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_CACHE_FOLDER", str(tmp_path))
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=60, stateful_step_count=30))
