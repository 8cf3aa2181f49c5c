"""Who holds a run up, and a stop that all ranks make at one step."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lgaf.distributed import rank_in
from pipeline.training.pulse import PHASES, SILENT_S, Hang, Position, StopVote, _Board, find_hang
from tests.distributed import run_distributed

TIMEOUT_S = 100.0


def _place(rank: int, step: int = 7, phase: str = "step", for_s: float = 200.0, heard: float = 1000.0, **changes):
    known = {"world_size": 3, "group": 1, "process": f"pid {rank} on here"}
    return Position(rank=rank, step=step, phase=phase, for_s=for_s, heard=heard, **(known | changes))


def _find(*places: Position, now: float = 1001.0) -> Hang | None:
    return find_hang(places, now, TIMEOUT_S)


def test_the_rank_that_the_others_wait_for_is_named_with_what_it_does():
    late = _place(1, phase="data", stack="  File loader.py, line 3, in read\n    wait_for_ever()\n")
    hang = _find(_place(0), late, _place(2))
    assert hang.ranks == (1,)
    assert "no step for 201 s; rank 1: the others wait for it" in hang.diagnosis
    assert "rank 1 (pid 1 on here): step 7, in 'data' for 201 s, last heard of 1 s ago" in hang.diagnosis
    assert "    wait_for_ever()" in hang.diagnosis


def test_a_rank_a_step_behind_holds_up_those_that_read_already():
    assert _find(_place(0, step=8, phase="data"), _place(1, step=8, phase="data"), _place(2)).ranks == (2,)


def test_a_rank_that_is_silent_is_the_one_whatever_it_did_last():
    hang = _find(_place(0, heard=1200.0), _place(1, phase="save", for_s=1.0), _place(2, heard=1200.0), now=1200.0)
    assert hang.ranks == (1,)
    assert "rank 1: not heard of (stopped, or its node is lost)" in hang.diagnosis


def test_where_all_are_silent_the_group_has_ended():
    assert _find(*(_place(rank, heard=900.0) for rank in range(3))) is None


def test_where_all_are_at_the_same_place_all_are_named():
    hang = _find(_place(0), _place(1), _place(2))
    assert hang.ranks == (0, 1, 2)
    assert "none is behind the others" in hang.diagnosis


def test_a_group_that_is_still_starting_is_not_hung():
    assert _find() is None
    assert _find(_place(0), _place(1)) is None


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(900, 1000), st.sampled_from(PHASES)), min_size=3, max_size=3))
def test_one_rank_that_got_on_is_enough(places):
    known = [_place(rank, for_s=for_s, heard=heard, phase=phase) for rank, (for_s, heard, phase) in enumerate(places)]
    still = [place.for_s + 1000.0 - place.heard for place in known]
    hang = find_hang(known, 1000.0, TIMEOUT_S)
    all_silent = all(1000.0 - place.heard > SILENT_S for place in known)
    assert (hang is None) == (min(still) < TIMEOUT_S or all_silent)
    assert hang is None or hang.ranks


def test_the_board_forgets_a_group_that_was_replaced():
    board = _Board()
    for rank in range(3):
        assert not board.beat(_place(rank, group=1), None, [])
    board.beat(_place(0, group=-2, world_size=2), None, ["careful"])
    assert [(place.rank, place.group) for place in board.look().positions] == [(0, -2)]
    board.beat(_place(1, group=1), None, [])  # of the old group, on its way out
    assert [(place.rank, place.group) for place in board.look().positions] == [(0, -2)]


def test_a_group_that_was_replaced_meanwhile_is_not_given_up():
    board = _Board()
    board.beat(_place(0, group=1), None, [])
    board.beat(_place(0, group=2), "a handle that ray.kill would refuse", [])
    board.give_up(1, (0,))
    assert [place.group for place in board.look().positions] == [2]


def test_warnings_are_told_once():
    board = _Board()
    board.beat(_place(0), None, ["one", "two"])
    assert board.look().warnings == ("one", "two")
    assert board.look().warnings == ()


def test_the_board_tells_all_to_stop_once_asked():
    board = _Board()
    assert not board.beat(_place(0), None, [])
    board.ask_to_stop()
    assert board.beat(_place(0), None, [])
    assert board.beat(_place(1), None, [])


def _vote(group, asked: dict[int, int]) -> None:
    vote, rank = StopVote(group), rank_in(group)
    decided = []
    for step in range(10):
        if vote.cast(step >= asked.get(rank, 99)):
            decided.append(step)
            break
        dist.barrier(group)  # a step's own collectives, between the votes
    first = min(asked.values())
    assert decided == [first + 1]


@pytest.mark.parametrize("asked", [{0: 3}, {2: 0}, {1: 5, 2: 7}])
def test_all_ranks_stop_at_the_same_step_whoever_was_asked(asked):
    run_distributed(3, _vote, asked)


def test_alone_a_rank_stops_at_the_step_after():
    vote = StopVote(None)
    assert [vote.cast(step == 2) for step in range(5)] == [False, False, False, True, False]
