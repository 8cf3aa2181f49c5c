"""Two groups of workers with one run: the newest has it, the others end, and what they still wrote does not count."""

from __future__ import annotations

import socket
import tempfile
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.training.attempts import (
    Attempt,
    SupersededError,
    attempts_of,
    begin_attempt,
    check_newest,
    check_not_superseded,
    controller_of,
    newest_of,
)
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.commits import MARKER, checkpoint_uri, committed_steps, latest_step, prune
from pipeline.training.metrics_log import MetricsLog, read_metrics
from tests.distributed import run_distributed
from tests.pipeline.training.test_checkpoint import _scramble, _train_step
from tests.pipeline.training.test_metrics_log import _line

MINE, OTHER = controller_of("mine", 1), controller_of("other", 1)


def _commit(run_uri: str, step: int, attempt: Attempt | None) -> None:
    """A marker alone, as late as it may come."""
    said = {"attempt": str(attempt)} if attempt is not None else {}
    storage.write_json(storage.join(checkpoint_uri(run_uri, step), MARKER), said)


@pytest.fixture(params=["file", "memory"])
def run_uri(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "file" else f"memory://attempts{tmp_path.name}"


def test_each_start_is_noted_and_the_newest_has_the_run(run_uri):
    assert attempts_of(run_uri) == []
    first = begin_attempt(run_uri, MINE, 0)
    check_newest(run_uri, first)
    second = begin_attempt(run_uri, MINE, 120)
    assert attempts_of(run_uri) == [first, second] == [Attempt(1, 0, MINE), Attempt(2, 120, MINE)]
    assert newest_of(run_uri, MINE) == second
    check_newest(run_uri, second)
    with pytest.raises(SupersededError):
        check_newest(run_uri, first)


def test_another_job_takes_the_run_over_and_this_one_never_takes_it_back(run_uri):
    mine = begin_attempt(run_uri, MINE, 0)
    check_not_superseded(run_uri, MINE)
    check_not_superseded(run_uri, OTHER)  # it has not begun
    begin_attempt(run_uri, OTHER, 40)
    told = rf"another job on {socket.gethostname()} took this run over at 20\d\d-.*from step 40.*--run-name"
    for claimant in (MINE, controller_of("mine", 2)):  # another controller of the same job is no way back
        with pytest.raises(SupersededError, match=told):
            begin_attempt(run_uri, claimant, 40)
    with pytest.raises(SupersededError, match=told):
        check_newest(run_uri, mine)
    assert len(attempts_of(run_uri)) == 2
    begin_attempt(run_uri, controller_of("other", 2), 45)
    assert newest_of(run_uri, OTHER).first_step == 40


def test_two_that_begin_in_the_same_moment_are_told_apart_by_all_alike(run_uri):
    both = [Attempt(1, 0, MINE), Attempt(1, 0, OTHER)]
    for attempt in both:
        storage.write_json(storage.join(run_uri, "attempts", f"{attempt}.json"), {"began": "now", "host": "here"})
    assert attempts_of(run_uri) == both
    check_newest(run_uri, both[1])
    with pytest.raises(SupersededError):
        check_newest(run_uri, both[0])


def test_a_late_checkpoint_does_not_count_and_is_swept(run_uri, caplog):
    mine = begin_attempt(run_uri, MINE, 0)
    _commit(run_uri, 5, mine)
    other = begin_attempt(run_uri, OTHER, latest_step(run_uri))
    _commit(run_uri, 10, mine)  # between its look and its write, the other began
    assert latest_step(run_uri) == 5
    assert "step_00000010: does not count, the run went on without it" in caplog.text
    _commit(run_uri, 15, other)
    assert latest_step(run_uri) == 15
    prune(run_uri, keep=2, newest=15)
    assert committed_steps(run_uri) == [5, 15], "it takes no other's place"


def test_checkpoints_of_versions_that_did_not_say_count(run_uri):
    _commit(run_uri, 5, None)
    assert latest_step(run_uri) == 5
    begin_attempt(run_uri, MINE, 5)
    assert latest_step(run_uri) == 5


class _Written(NamedTuple):
    step: int
    by: int  # place of the attempt


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["begin", "commit"]), st.integers(0, 7), st.integers(1, 4)), max_size=14))
def test_whoever_commits_whenever_the_newest_goes_on_from_its_own_line(events):
    """No attempt looks before it commits here: the worst that can happen between its look and its write."""
    with tempfile.TemporaryDirectory() as run_uri:
        attempts: list[Attempt] = []
        lines: list[set[_Written]] = []  # the checkpoints that each attempt's state descends from
        there: dict[int, _Written] = {}
        for kind, which, ahead in events:
            if kind == "begin":
                first = latest_step(run_uri)
                parent = there.get(first)
                attempts.append(begin_attempt(run_uri, controller_of(f"job{len(attempts)}", 1), first))
                before = {w for w in lines[parent.by] if w.step <= first} if parent else set()
                lines.append(before)
            elif attempts:
                place = which % len(attempts)
                own = [w.step for w in lines[place] if w.by == place]
                step = max(own, default=attempts[place].first_step) + ahead
                written = _Written(step, place)
                lines[place].add(written)
                there[step] = written
                _commit(run_uri, step, attempts[place])
        on_line = [step for step, written in there.items() if attempts and written in lines[-1]]
        assert latest_step(run_uri) == max(on_line, default=0)


def _fenced(group, run_uri: str) -> None:
    step = _train_step(group)
    _scramble(step, 1)
    step.num_steps_done = 5
    mine = newest_of(run_uri, MINE)
    Checkpointer(run_uri, step, keep=2, check_newest=lambda: check_newest(run_uri, mine)).save_now(30)


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_whose_run_others_have_neither_commit_nor_delete(tmp_path, world_size):
    run_uri = str(tmp_path)
    begin_attempt(run_uri, MINE, 0)
    other = begin_attempt(run_uri, OTHER, 0)
    _commit(run_uri, 5, other)
    before = {info.uri: storage.read_bytes(info.uri) for info in storage.list_files(run_uri)}
    if world_size == 1:
        with pytest.raises(SupersededError, match="another job"):
            _fenced(None, run_uri)
    else:
        with pytest.raises(AssertionError, match="another job"):  # of the ranks
            run_distributed(world_size, _fenced, run_uri)
    assert {info.uri: storage.read_bytes(info.uri) for info in storage.list_files(run_uri)} == before


def test_a_run_that_is_taken_over_while_files_are_written_is_not_committed(tmp_path, monkeypatch):
    run_uri = str(tmp_path)
    begin_attempt(run_uri, MINE, 0)
    write = Checkpointer._write_files

    def taken_over(own, staged, folder):
        write(own, staged, folder)
        begin_attempt(run_uri, OTHER, 0)

    monkeypatch.setattr(Checkpointer, "_write_files", taken_over)
    with pytest.raises(SupersededError):
        _fenced(None, run_uri)
    assert committed_steps(run_uri) == []


def test_lines_of_a_run_that_others_have_are_not_touched(run_uri):
    mine = begin_attempt(run_uri, MINE, 0)
    log = MetricsLog(run_uri, 0, lambda: check_newest(run_uri, mine))
    log.write([_line(0), _line(1)])
    log.make_durable()
    begin_attempt(run_uri, OTHER, 1)
    theirs = MetricsLog(run_uri, 1)
    theirs.write([_line(1, loss=0.25)])
    theirs.make_durable()
    if storage.is_local(run_uri):
        with pytest.raises(SupersededError):
            log.write([_line(2)])
    with pytest.raises(SupersededError):
        log.make_durable()
    with pytest.raises(SupersededError):
        MetricsLog(run_uri, 0, lambda: check_newest(run_uri, mine))
    assert [(line["step"], line["loss"]) for line in read_metrics(run_uri)] == [(0, 1.5), (1, 0.25)]
