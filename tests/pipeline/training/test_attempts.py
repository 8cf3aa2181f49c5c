"""Two groups of workers with one run: the newest has it, the others end, and what they still wrote does not count."""

from __future__ import annotations

import errno
import itertools
import socket
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import user_error
from pipeline.storage import StorageError
from pipeline.training import attempts as notes
from pipeline.training import commits
from pipeline.training.attempts import (
    Attempt,
    SupersededError,
    attempts_of,
    check_newest,
    check_not_superseded,
    controller_of,
)
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.commits import (
    MARKER,
    Checkpoint,
    begin_attempt,
    checkpoint_uri,
    committed,
    committed_steps,
    latest_checkpoint,
    latest_step,
    prune,
)
from pipeline.training.failure import record_fatal
from pipeline.training.metrics_log import MetricsLog, read_metrics
from tests.distributed import run_distributed
from tests.pipeline.training.test_checkpoint import _scramble, _train_step
from tests.pipeline.training.test_metrics_log import _line

MINE, OTHER = controller_of("mine", 1), controller_of("other", 1)


def _begin(run_uri: str, claimant: str, patience_s: float = 0.0) -> Attempt:
    return begin_attempt(run_uri, claimant, patience_s).attempt


def _commit(run_uri: str, step: int, attempt: Attempt | None) -> Checkpoint:
    """A marker alone, as late as it may come."""
    writer = attempt.writer if attempt else ""
    uri = checkpoint_uri(run_uri, step, writer)
    storage.write_json(storage.join(uri, MARKER), {"step": step})
    return Checkpoint(step, writer, uri)


def _all_files(run_uri: str) -> dict[str, bytes]:
    return {info.uri: storage.read_bytes(info.uri) for info in storage.list_files(run_uri)}


@pytest.fixture(params=["file", "memory"])
def run_uri(request, tmp_path) -> str:
    return storage.normalise(tmp_path if request.param == "file" else f"memory://attempts{tmp_path.name}")


def test_each_start_is_noted_and_the_newest_has_the_run(run_uri):
    assert attempts_of(run_uri) == []
    first = begin_attempt(run_uri, MINE)
    assert (first.first_step, first.checkpoint) == (0, None)
    check_newest(run_uri, first.attempt)
    written = _commit(run_uri, 120, first.attempt)
    second = begin_attempt(run_uri, MINE)
    assert (second.first_step, second.checkpoint) == (120, written)
    assert attempts_of(run_uri) == [first.attempt, second.attempt] == [Attempt(1, MINE, 0), Attempt(2, MINE, 120)]
    check_newest(run_uri, second.attempt)
    with pytest.raises(SupersededError):
        check_newest(run_uri, first.attempt)


def test_another_job_takes_the_run_over_and_this_one_never_takes_it_back(run_uri):
    mine = _begin(run_uri, MINE)
    _commit(run_uri, 40, mine)
    check_not_superseded(run_uri, MINE)
    check_not_superseded(run_uri, OTHER)  # it has not begun
    _begin(run_uri, OTHER)
    told = rf"took this run over, from step 40 \(at 20\d\d-.*by {socket.gethostname()}\).*another --run-name"
    for claimant in (MINE, controller_of("mine", 2)):  # another controller of the same job is no way back
        with pytest.raises(SupersededError, match=told):
            begin_attempt(run_uri, claimant, patience_s=100)
    with pytest.raises(SupersededError, match=told) as error:
        check_newest(run_uri, mine)
    assert user_error(error.value) is error.value
    assert len(attempts_of(run_uri)) == 2
    _begin(run_uri, controller_of("other", 2))


def test_a_note_that_someone_deleted_is_put_back(run_uri):
    mine = _begin(run_uri, MINE)
    storage.delete_tree(storage.join(run_uri, "attempts"))
    check_newest(run_uri, mine)
    assert [(attempt, attempt.began) for attempt in attempts_of(run_uri)] == [(mine, True)]


@pytest.mark.parametrize("dies", ["killed", "error"])
def test_a_start_that_dies_before_it_is_certain_discards_nothing(run_uri, monkeypatch, dies):
    """After its note another committed, and swept what it had seen."""
    mine = _begin(run_uri, MINE)
    base = _commit(run_uri, 5, mine)
    write = commits.write_note

    def last(uri, attempt):
        write(uri, attempt)
        newest = _commit(uri, 10, mine)
        prune(uri, keep=1, newest=newest)
        storage.delete_tree(base.uri)  # and if it had listed the notes before this one
        monkeypatch.undo()
        if dies == "killed":
            monkeypatch.setattr(commits, "delete_note", lambda *_: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(commits, "write_note", last)
    with pytest.raises(KeyboardInterrupt):
        begin_attempt(run_uri, OTHER)
    assert latest_step(run_uri) == 10
    assert len(attempts_of(run_uri)) == (2 if dies == "killed" else 1)
    assert begin_attempt(run_uri, controller_of("third", 1)).first_step == 10


def test_a_note_that_is_taken_back_while_it_is_read_is_still_another_job(run_uri, monkeypatch):
    mine = _begin(run_uri, MINE)
    monkeypatch.setattr(notes, "attempts_of", lambda uri: [mine, Attempt(2, OTHER, 0)])
    with pytest.raises(SupersededError, match="took this run over, from step 0; these end"):
        check_newest(run_uri, mine)


def test_two_that_begin_in_the_same_moment_are_told_apart_by_all_alike(run_uri, monkeypatch):
    """Both look before either has its note."""
    look, others = commits.attempts_of, []

    def both_look(uri):
        found = look(uri)
        if not others:
            others.append(Attempt(1, OTHER, 0))
            notes.write_note(uri, others[0])
        return found

    monkeypatch.setattr(commits, "attempts_of", both_look)
    with pytest.raises(SupersededError):  # "mine" sorts before "other"
        begin_attempt(run_uri, MINE)
    assert attempts_of(run_uri) == others, "the other never hears of it"
    check_newest(run_uri, others[0])


def test_what_was_committed_between_the_look_and_the_note_is_not_discarded(run_uri, monkeypatch):
    mine = _begin(run_uri, MINE)
    _commit(run_uri, 5, mine)
    write, late = commits.write_note, [10, 15]

    def slow(uri, attempt):
        if late:
            _commit(uri, late.pop(0), mine)
        write(uri, attempt)

    monkeypatch.setattr(commits, "write_note", slow)
    started = begin_attempt(run_uri, OTHER)
    assert started.first_step == latest_step(run_uri) == 15
    assert attempts_of(run_uri) == [mine, started.attempt], "the notes that came to nothing are gone"


def test_a_late_checkpoint_does_not_count_and_is_swept(run_uri, caplog):
    mine = _begin(run_uri, MINE)
    _commit(run_uri, 5, mine)
    other = _begin(run_uri, OTHER)
    late = _commit(run_uri, 10, mine)  # between its look and its marker, the other began
    assert latest_step(run_uri) == 5
    assert f"{late.uri}: came late, the run had gone on without it" in caplog.text
    newest = _commit(run_uri, 15, other)
    assert latest_step(run_uri) == 15
    prune(run_uri, keep=2, newest=newest)
    assert committed_steps(run_uri) == [5, 15], "it takes no other's place"


def test_workers_that_wake_up_after_their_marker_delete_nothing(run_uri):
    mine = _begin(run_uri, MINE)
    _commit(run_uri, 5, mine)
    other = _begin(run_uri, OTHER)
    theirs = [_commit(run_uri, step, other) for step in (10, 15, 20)]
    late = _commit(run_uri, 10, mine)
    prune(run_uri, keep=1, newest=late)
    assert set(theirs) < set(committed(run_uri))
    assert latest_checkpoint(run_uri) == theirs[-1]


def test_a_base_that_is_gone_is_no_beginning(run_uri):
    """What there is came late, and what the newest attempt began with was deleted: people decide."""
    mine = _begin(run_uri, MINE)
    base = _commit(run_uri, 5, mine)
    _begin(run_uri, OTHER)
    _commit(run_uri, 10, mine)
    storage.delete_tree(base.uri)
    with pytest.raises(
        StorageError, match=r"step_00000010-000001-mine\.1: came late.*no checkpoint of the run is whole"
    ):
        latest_checkpoint(run_uri)
    storage.delete_tree(storage.join(run_uri, "checkpoints"))  # as the message says
    assert begin_attempt(run_uri, controller_of("third", 1)).checkpoint is None


def test_late_ones_alone_stop_nobody_who_began_at_the_beginning(run_uri):
    mine = _begin(run_uri, MINE)
    _begin(run_uri, OTHER)
    _commit(run_uri, 5, mine)
    assert begin_attempt(run_uri, controller_of("third", 1)).checkpoint is None


def test_checkpoints_of_versions_that_did_not_say_count(run_uri):
    before = _commit(run_uri, 5, None)
    assert begin_attempt(run_uri, MINE).checkpoint == before


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "commit", "prune"]), st.integers(0, 7), st.integers(1, 4)), max_size=16
    )
)
def test_whoever_commits_whenever_the_newest_goes_on_from_its_own_line(events):
    """No attempt looks before it commits here: the worst that can happen between its look and its marker."""
    with tempfile.TemporaryDirectory() as folder:
        run_uri = storage.normalise(folder)
        begun: list[Attempt] = []
        lines: list[list[Checkpoint]] = []  # what each attempt's state descends from, rising
        for kind, which, ahead in events:
            if kind == "begin":
                start = begin_attempt(run_uri, controller_of(f"job{len(begun)}", 1))
                begun.append(start.attempt)
                parents = [line for line in lines if start.checkpoint in line]
                line = parents[0] if parents else []
                lines.append([entry for entry in line if entry <= start.checkpoint] if start.checkpoint else [])
            elif begun:
                place = which % len(begun)
                own = [entry for entry in lines[place] if entry.writer == begun[place].writer]
                if kind == "commit":
                    step = (own[-1].step if own else begun[place].first_step) + ahead
                    lines[place].append(_commit(run_uri, step, begun[place]))
                elif own:
                    prune(run_uri, keep=1 + ahead // 3, newest=own[-1])
        expected = lines[-1][-1:] if begun else []
        assert latest_checkpoint(run_uri) == (expected[0] if expected else None), "the newest of the newest's line"


def _fenced(group, run_uri: str, mine: Attempt) -> None:
    step = _train_step(group)
    _scramble(step, 1)
    step.num_steps_done = 5
    Checkpointer(run_uri, step, writer=mine.writer, keep=2, check_newest=lambda: check_newest(run_uri, mine)).save_now(
        30
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_whose_run_others_have_neither_commit_nor_delete(tmp_path, world_size):
    run_uri = str(tmp_path)
    mine = _begin(run_uri, MINE)
    _commit(run_uri, 5, _begin(run_uri, OTHER))
    before = _all_files(run_uri)
    if world_size == 1:
        with pytest.raises(SupersededError, match="took this run over"):
            _fenced(None, run_uri, mine)
    else:
        with pytest.raises(AssertionError, match="took this run over"):  # of the ranks
            run_distributed(world_size, _fenced, run_uri, mine)
    assert _all_files(run_uri) == before


def test_a_run_that_is_taken_over_while_files_are_written_is_not_committed(tmp_path, monkeypatch):
    """And the other, which gets to the same step meanwhile, keeps every byte."""
    run_uri = str(tmp_path)
    mine = _begin(run_uri, MINE)
    write, theirs = Checkpointer._write_files, {}

    def taken_over(own, staged, folder):
        if not theirs:
            theirs["begun"] = other = _begin(run_uri, OTHER)
            _fenced(None, run_uri, other)
            theirs.update(_all_files(checkpoint_uri(run_uri, 5, other.writer)))
        write(own, staged, folder)

    monkeypatch.setattr(Checkpointer, "_write_files", taken_over)
    with pytest.raises(SupersededError):
        _fenced(None, run_uri, mine)
    other = theirs.pop("begun")
    assert [checkpoint.writer for checkpoint in committed(run_uri)] == [other.writer]
    assert _all_files(checkpoint_uri(run_uri, 5, other.writer)) == theirs


def test_lines_of_a_run_that_others_have_are_not_touched(run_uri):
    mine = _begin(run_uri, MINE)
    log = MetricsLog(run_uri, 0, lambda: check_newest(run_uri, mine))
    log.write([_line(0), _line(1)])
    log.make_durable()
    _begin(run_uri, OTHER)
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


def test_a_full_disk_is_waited_for_and_damage_is_not(tmp_path, monkeypatch, caplog):
    run_uri = str(tmp_path)
    monkeypatch.setattr(commits, "RETRY_S", 0.01)
    tries = itertools.count()

    def full(uri, attempt):
        if next(tries) < 3:
            raise StorageError(f"{uri}: cannot write") from OSError(errno.ENOSPC, "No space left on device")
        notes.write_note(uri, attempt)

    monkeypatch.setattr(commits, "write_note", full)
    with pytest.raises(StorageError, match="cannot write"):
        begin_attempt(run_uri, MINE)
    mine = _begin(run_uri, MINE, patience_s=30)
    assert mine.number == 1
    assert caplog.text.count("the workers wait for the storage") == 2
    damaged = checkpoint_uri(run_uri, 5, mine.writer)
    storage.write_json(storage.join(damaged, MARKER), {"files": {"a": {"num_bytes": 3}}})
    with pytest.raises(StorageError, match="no checkpoint of the run is whole"):
        begin_attempt(run_uri, MINE, patience_s=1e9)


def test_a_noted_failure_ends_the_run(tmp_path):
    record_fatal(str(tmp_path), storage.MissingError("shard-7.tar: does not exist"))
    with pytest.raises(RuntimeError, match="shard-7"):
        begin_attempt(str(tmp_path), MINE)
    assert attempts_of(str(tmp_path)) == []
