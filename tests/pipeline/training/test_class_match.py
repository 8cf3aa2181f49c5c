"""Who is known again: sets are paired by rules that can be told, names count within a pair alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.mixture import Mixture
from pipeline.training.class_match import EQUAL, NONE, ONLY_ONES, SAME_NAME, TOLD, match_classes, named_sets
from tests.pipeline.training.old_run import packed


def _match(old: list[Manifest], new: list[Manifest], told: dict[str, str] | None = None):
    sides = []
    for manifests in (old, new):
        data = Mixture(manifests=tuple(manifests), weights=(1.0,) * len(manifests))
        sides.append(named_sets(data, [f"given/{manifest.uri.rsplit('/', 1)[-1]}" for manifest in manifests]))
    old_of_new, classes = match_classes(*sides, told or {}, "new-data")
    assert old_of_new.dtype == np.int64
    assert classes.data_fingerprint == "new-data"
    assert classes.num_kept == (old_of_new >= 0).sum() == sum(entry.num_kept for entry in classes.sets)
    assert classes.num_new == (old_of_new < 0).sum() == sum(entry.num_new for entry in classes.sets)
    assert classes.num_dropped == sum(manifest.num_classes for manifest in old) - classes.num_kept
    return old_of_new.tolist(), [(entry.old.rsplit("/", 1)[-1], entry.why) for entry in classes.sets]


@pytest.fixture
def at(tmp_path):
    return lambda place, names, content="": packed(tmp_path / place, names.split(), content)


def test_one_set_that_grew_and_was_renamed(at):
    ids, sets = _match([at("v1", "ann bea cid")], [at("v2", "cid dov ann bea eva")])
    assert ids == [2, -1, 0, 1, -1]
    assert sets == [("v1", ONLY_ONES)]


def test_a_name_counts_within_its_own_set(at):
    old = [at("a/x", "ann bea"), at("a/y", "ann cid")]
    ids, sets = _match(old, [at("b/y", "cid ann new", "grown"), at("b/x", "bea ann", "grown")])
    assert ids == [3, 2, -1, 1, 0]
    assert sets == [("y", SAME_NAME), ("x", SAME_NAME)]


def test_equal_data_come_before_equal_folder_names(at):
    old = [at("a/x", "ann bea", "one"), at("a/y", "ann cid", "two")]
    ids, sets = _match(old, [at("b/x", "ann cid", "two"), at("b/y", "bea ann", "three")])
    assert ids == [2, 3, 1, 0]
    assert sets == [("y", EQUAL), ("x", ONLY_ONES)]


def test_a_set_more_has_new_people_and_a_set_less_drops_them(at):
    base, more = at("base", "ann bea"), at("more", "ann dov")
    assert _match([base], [base, more]) == ([0, 1, -1, -1], [("base", EQUAL), ("", NONE)])
    assert _match([more, base], [base]) == ([2, 3], [("base", EQUAL)])


def test_what_was_told_counts_first_by_either_place(at):
    old = [at("a/x", "ann bea"), at("a/y", "ann cid")]
    new = [at("b/x", "ann bea"), at("b/y", "cid ann", "grown")]
    ids, sets = _match(old, new, {"given/x": old[1].uri, new[1].uri: ""})
    assert ids == [2, -1, -1, -1]
    assert sets == [("y", TOLD), ("", TOLD)]


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"nowhere": "given/x"}, r"warm_start\.sets: nowhere is no data set of this run; there are: file.*b/x"),
        ({"given/x": "nowhere"}, r"warm_start\.sets: nowhere is no data set of the run of warm_start\.head"),
        ({"given/x": "given/x", "given/y": "given/x"}, r"given/x stands twice"),
    ],
)
def test_what_was_told_wrongly_is_named(at, told, text):
    old = [at("a/x", "ann bea"), at("a/y", "ann cid")]
    with pytest.raises(ValueError, match=text):
        _match(old, [at("b/x", "ann bea"), at("b/y", "cid ann", "grown")], told)


def test_sets_that_could_go_on_in_several_are_asked_for(at):
    old, new = [at("faces", "ann bea")], [at("faces-v2", "ann bea cid"), at("others", "ann dov")]
    with pytest.raises(ValueError, match=r"which of .*faces-v2, .*others goes on with which of .*--warm-start\.sets"):
        _match(old, new)
    assert _match(old, new, {"given/others": ""})[0] == [0, 1, -1, -1, -1]
    assert _match(old, new, {"given/faces-v2": "given/faces"})[0] == [0, 1, -1, -1, -1]


@pytest.mark.parametrize("place", ["a/x", "a/other"])
def test_numbers_of_different_packs_are_not_believed(at, place):
    old, new = [at("a/x", "0 1 2")], [at(f"b/{place}", "0 1 2 3")]
    with pytest.raises(ValueError, match=r"are numbers, which say nothing.*--warm-start\.sets file.*b/.* ''"):
        _match(old, new)
    assert _match(old, new, {new[0].uri: old[0].uri})[0] == [0, 1, 2, -1]
    equal = [at("b/copy", "0 1 2")]
    assert _match(old, equal) == ([0, 1, 2], [("x", EQUAL)])


def test_nobody_known_is_an_error(at):
    with pytest.raises(ValueError, match=r"nobody of .*v1 is in .*v2 by name; leave warm_start\.head out"):
        _match([at("v1", "ann bea")], [at("v2", "cid dov")])


def test_a_name_that_stands_twice_is_named(at):
    with pytest.raises(ValueError, match=r"people of .*v1 and .*v2: the new identity 'ann' stands twice"):
        _match([at("v1", "ann bea")], [at("v2", "ann dov ann")])


@pytest.mark.parametrize("names", [("ann", ""), ("ann",), ()])
def test_people_without_a_name_are_told(at, names):
    manifest = at("v1", "ann bea")
    object.__setattr__(manifest, "identities", names)
    with pytest.raises(ManifestError, match=rf"v1: {sum(map(bool, names))} of its 2 people have a name"):
        named_sets(manifest, [manifest.uri])
