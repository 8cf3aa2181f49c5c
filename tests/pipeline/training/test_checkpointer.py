"""Saving beside the training: what is saved, what it waits for, and a storage that is full or away."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lgaf.distributed import rank_in
from lgaf.state import training_state
from pipeline import storage
from pipeline.training import checkpointer as saving
from pipeline.training.checkpoint import restore_checkpoint
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.commits import checkpoint_uri, committed_steps, latest_step, read_marker
from tests.distributed import run_distributed
from tests.pipeline.training.test_checkpoint import _checkpoint, _flat, _scramble, _train_step

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(saving, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(saving, "LONGEST_DELAY_S", 0.1)


class _Gate:
    """Holds the writing of files until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        write = Checkpointer._write_files

        def held(own, staged, folder):
            self.entered.set()
            assert self.open.wait(30)
            write(own, staged, folder)

        monkeypatch.setattr(Checkpointer, "_write_files", held)


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == saving.__name__]


def _at(step: int):
    train_step = _train_step()
    _scramble(train_step, step)
    train_step.num_steps_done = step
    return train_step


def test_what_is_saved_is_the_state_at_the_call_however_far_training_is_by_then(tmp_path, monkeypatch):
    gate, train_step = _Gate(monkeypatch), _at(5)
    expected = {name: value.clone() for name, value in _flat(train_step).items()}
    checkpointer = Checkpointer(str(tmp_path), train_step, keep=2)
    assert checkpointer.save(loss=1.5)
    assert gate.entered.wait(30)
    _scramble(train_step, 6)  # training went on
    assert committed_steps(str(tmp_path)) == []
    gate.open.set()
    _wait_for(lambda: committed_steps(str(tmp_path)) == [5])
    assert read_marker(checkpoint_uri(str(tmp_path), 5))["loss"] == 1.5
    restored = _train_step()
    restore_checkpoint(_checkpoint(str(tmp_path), 5), restored)
    assert all(torch.equal(value, expected[name]) for name, value in _flat(restored).items())


def test_one_is_under_way_at_most_and_nobody_waits_for_it(tmp_path, monkeypatch):
    gate, train_step = _Gate(monkeypatch), _at(5)
    checkpointer = Checkpointer(str(tmp_path), train_step, keep=2)
    assert checkpointer.save()
    train_step.num_steps_done = 6
    started = time.monotonic()
    assert not checkpointer.save()
    assert time.monotonic() - started < 1
    gate.open.set()
    _wait_for(checkpointer.save)
    _wait_for(lambda: committed_steps(str(tmp_path)) == [5, 6])


def test_lines_that_a_checkpoint_counts_on_are_safe_before_it_counts(tmp_path):
    seen = []
    lines = lambda: seen.append(committed_steps(str(tmp_path)))  # noqa: E731
    Checkpointer(str(tmp_path), _at(5), keep=2, before_commit=lines).save_now(30)
    assert seen == [[]]
    assert latest_step(str(tmp_path)) == 5


@pytest.mark.parametrize("where", ["files", "lines", "marker"])
def test_a_full_disk_stops_nothing_and_the_same_state_is_written_when_it_is_not(tmp_path, monkeypatch, caplog, where):
    is_full = True

    def fails(work):
        def attempt(*arguments, **named):
            if is_full:
                raise FULL
            return work(*arguments, **named)

        return attempt

    if where == "files":
        monkeypatch.setattr(FileSystemWriter, "write_data", fails(FileSystemWriter.write_data))
    if where == "marker":
        monkeypatch.setattr(storage, "write_json", fails(storage.write_json))
    train_step = _at(5)
    expected = {name: value.clone() for name, value in _flat(train_step).items()}
    lines = fails(lambda: None) if where == "lines" else lambda: None
    checkpointer = Checkpointer(str(tmp_path), train_step, keep=2, before_commit=lines)
    with caplog.at_level(logging.WARNING):
        assert checkpointer.save()
        _wait_for(lambda: len(_warnings(caplog)) > 2)
    assert "step_00000005: the checkpoint is not written, training goes on: rank 0" in _warnings(caplog)[0]
    assert "No space left" in _warnings(caplog)[0]
    _scramble(train_step, 6)
    assert committed_steps(str(tmp_path)) == []
    is_full = False
    _wait_for(lambda: committed_steps(str(tmp_path)) == [5])
    restored = _train_step()
    restore_checkpoint(_checkpoint(str(tmp_path), 5), restored)
    assert all(torch.equal(value, expected[name]) for name, value in _flat(restored).items())


def test_a_newer_state_takes_the_place_of_one_that_could_not_be_written(tmp_path, monkeypatch):
    is_full = True
    write = FileSystemWriter.write_data

    def attempt(own, plan, planner):
        if is_full:
            raise FULL
        return write(own, plan, planner)

    monkeypatch.setattr(FileSystemWriter, "write_data", attempt)
    train_step = _at(5)
    checkpointer = Checkpointer(str(tmp_path), train_step, keep=2)
    assert checkpointer.save()
    _wait_for(lambda: checkpointer._failed)
    train_step.num_steps_done = 10
    _wait_for(checkpointer.save)
    is_full = False
    _wait_for(lambda: committed_steps(str(tmp_path)) == [10])


def test_the_end_of_a_run_waits_as_long_as_it_was_told_and_then_says_why(tmp_path, monkeypatch):
    def attempt(own, plan, planner):
        raise FULL

    monkeypatch.setattr(FileSystemWriter, "write_data", attempt)
    started = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"step_00000005: was not written within 0.5 s: .*No space left"):
        Checkpointer(str(tmp_path), _at(5), keep=2).save_now(0.5)
    assert time.monotonic() - started < 10
    assert committed_steps(str(tmp_path)) == []


def test_an_error_of_the_code_is_not_taken_for_one_of_the_storage(tmp_path, monkeypatch):
    def attempt(own, plan, planner):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(FileSystemWriter, "write_data", attempt)
    checkpointer = Checkpointer(str(tmp_path), _at(5), keep=2)
    with pytest.raises(BaseException, match="a bug"):
        checkpointer.save_now(30)


def test_the_best_stay_beside_the_newest(tmp_path):
    train_step = _at(0)
    checkpointer = Checkpointer(str(tmp_path), train_step, keep=2, keep_best=1)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 5.0), (6, 4.0)]:
        train_step.num_steps_done = step
        checkpointer.save_now(30, loss)
    assert committed_steps(str(tmp_path)) == [2, 5, 6]


def _save_in_half_failing_ranks(group, run_uri: str) -> None:
    """Rank 1's disk is full at first: nothing is committed, on no rank, and then all of it is."""
    saving.FIRST_DELAY_S = 0.05
    write, failures = FileSystemWriter.write_data, [2 if rank_in(group) == 1 else 0]

    def attempt(own, plan, planner):
        if failures[0]:
            failures[0] -= 1
            raise FULL
        return write(own, plan, planner)

    FileSystemWriter.write_data = attempt
    step = _train_step(group)
    _scramble(step, 7)
    step.num_steps_done = 4
    checkpointer = Checkpointer(run_uri, step, keep=1)
    assert checkpointer.save()
    for _ in range(3):  # the training's own collectives go on meanwhile
        training_state(step)
        torch.distributed.barrier(group)
    checkpointer.save_now(60)
    assert checkpointer.committed == 4
    assert failures == [0]
    assert latest_step(run_uri) == 4


def test_ranks_fail_and_try_again_together(tmp_path):
    run_distributed(2, _save_in_half_failing_ranks, str(tmp_path))
    restored, expected = _train_step(), _train_step()
    restore_checkpoint(_checkpoint(str(tmp_path), 4), restored)
    _scramble(expected, 7)
    assert torch.equal(restored.head.weight, expected.head.weight)


def test_a_checkpoint_that_is_deleted_by_hand_is_not_missed(tmp_path):
    train_step = _at(1)
    checkpointer = Checkpointer(str(tmp_path), train_step, keep=2)
    checkpointer.save_now(30)
    shutil.rmtree(storage.local_path(checkpoint_uri(str(tmp_path), 1)))
    train_step.num_steps_done = 2
    checkpointer.save_now(30)
    assert committed_steps(str(tmp_path)) == [2]
