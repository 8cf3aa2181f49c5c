"""Which class of an earlier run each class of a new one is.

A person's name means something within its data set alone: "17" of one and "17" of another are two people, and so are
two folders "anna". So sets are paired first, then names within each pair. A set of the new run goes on with

1. the one that the run was told (`WarmStart.sets`);
2. else one of the same fingerprint: the very same data;
3. else one whose folder has the same name, which is a set that moved or grew;
4. else, where one set of each run is left, that one: a set that grew and was renamed.

By 3 and 4 names that are all numbers are not believed: packs number their classes from 0, whoever the people are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lgaf.heads.resharding import NEW_IDENTITY, match_identities
from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.mixture import Mixture
from pipeline.training.warm_start import ClassMatch, SetMatch

TOLD: Final = "warm_start.sets"
EQUAL: Final = "the same data"
SAME_NAME: Final = "the same folder name"
ONLY_ONES: Final = "the only sets left"
NONE: Final = "no set to go on with"


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSet:
    """One data set of a run: its manifest, and the place as the run was given it."""

    manifest: Manifest
    given: str

    def is_at(self, place: str) -> bool:
        """Whether a place is this set's."""
        return place in (self.manifest.uri, self.given)

    @property
    def folder(self) -> str:
        """Last part of its place."""
        return self.manifest.uri.rstrip("/").rsplit("/", 1)[-1]


def named_sets(data: Manifest | Mixture, given: Sequence[str]) -> list[NamedSet]:
    """The sets of some data in the order of their classes, each with the place that the run was given.

    Raises:
        ManifestError: A set lacks the names of its people.
    """
    manifests = data.manifests if isinstance(data, Mixture) else (data,)
    for manifest in manifests:
        unnamed = sum(not name for name in manifest.identities)
        if len(manifest.identities) != manifest.num_classes or unnamed:
            named = len(manifest.identities) - unnamed
            raise ManifestError(
                f"{manifest.uri}: {named} of its {manifest.num_classes} people have a name: people without one cannot "
                "be known again (warm_start.head)"
            )
    # Two places may have been packed into one set; then what was given says no more than the set's own place.
    names = given if len(given) == len(manifests) else [manifest.uri for manifest in manifests]
    return [NamedSet(manifest=manifest, given=name) for manifest, name in zip(manifests, names, strict=True)]


def match_classes(
    old: Sequence[NamedSet], new: Sequence[NamedSet], told: Mapping[str, str], data_fingerprint: str
) -> tuple[np.ndarray, ClassMatch]:
    """The old class id of each new class, int64 [C_new], -1 for a new person; and how many there are of each.

    Args:
        old: Sets of the old run, in the order of its classes.
        new: Sets of the new run, likewise.
        told: See `WarmStart.sets`.
        data_fingerprint: Of the new run's data.

    Raises:
        ValueError: Sets that cannot be paired, a name that stands twice in a set, or nobody who is in both runs.
    """
    pairs = _paired(old, new, told)
    first = np.concatenate([[0], np.cumsum([s.manifest.num_classes for s in old])])
    columns: list[np.ndarray] = []
    matches: list[SetMatch] = []
    for position, own in enumerate(new):
        partner, why = pairs[position]
        ids = np.full(own.manifest.num_classes, NEW_IDENTITY, np.int64)
        if partner is not None:
            ids = _ids(old[partner].manifest, own.manifest)
            ids[ids != NEW_IDENTITY] += first[partner]
        kept = int((ids != NEW_IDENTITY).sum())
        columns.append(ids)
        matches.append(
            SetMatch(
                new=own.manifest.uri,
                old="" if partner is None else old[partner].manifest.uri,
                why=why,
                num_kept=kept,
                num_new=len(ids) - kept,
            )
        )
    old_of_new = np.concatenate(columns)
    num_kept = sum(match.num_kept for match in matches)
    if not num_kept:
        raise ValueError(
            f"warm_start.head: nobody of {_listed(old)} is in {_listed(new)} by name; leave warm_start.head out to "
            "start with fresh centres"
        )
    return old_of_new, ClassMatch(
        data_fingerprint=data_fingerprint,
        num_kept=num_kept,
        num_new=len(old_of_new) - num_kept,
        num_dropped=int(first[-1]) - num_kept,
        sets=tuple(matches),
    )


def _ids(old: Manifest, new: Manifest) -> np.ndarray:
    try:
        return match_identities(old.identities, new.identities).numpy()
    except ValueError as error:
        raise ValueError(f"warm_start.head: people of {old.uri} and {new.uri}: {error}") from error


def _paired(old: Sequence[NamedSet], new: Sequence[NamedSet], told: Mapping[str, str]) -> list[tuple[int | None, str]]:
    """For each new set the old one that it goes on with, and why."""
    found = _told(old, new, told)
    for why, keys in (
        (EQUAL, lambda s: s.manifest.fingerprint),
        (SAME_NAME, lambda s: s.folder),
        (ONLY_ONES, lambda s: ""),
    ):
        old_left = [i for i in range(len(old)) if i not in {partner for partner, _ in found.values()}]
        new_left = [i for i in range(len(new)) if i not in found]
        old_counts, new_counts = (Counter(keys(s[i]) for i in left) for s, left in ((old, old_left), (new, new_left)))
        for i in new_left:
            key = keys(new[i])
            if old_counts[key] == new_counts[key] == 1:
                found[i] = next(j for j in old_left if keys(old[j]) == key), why
        if why != EQUAL:
            _check_names(old, new, found, why)
    old_left = [i for i in range(len(old)) if i not in {partner for partner, _ in found.values()}]
    new_left = [i for i in range(len(new)) if i not in found]
    if old_left and new_left:
        raise ValueError(
            f"warm_start.head: which of {_listed([new[i] for i in new_left])} goes on with which of "
            f"{_listed([old[i] for i in old_left])} cannot be told; say it by --warm-start.sets NEW OLD (or NEW '')"
        )
    return [found.get(i, (None, NONE)) for i in range(len(new))]


def _told(
    old: Sequence[NamedSet], new: Sequence[NamedSet], told: Mapping[str, str]
) -> dict[int, tuple[int | None, str]]:
    found: dict[int, tuple[int | None, str]] = {}
    for new_place, old_place in told.items():
        own = _position(new, new_place, "this run")
        partner = _position(old, old_place, "the run of warm_start.head") if old_place else None
        if partner is not None and partner in {other for other, _ in found.values()}:
            raise ValueError(f"warm_start.sets: {old_place} stands twice; a set goes on in one set")
        found[own] = partner, TOLD
    return found


def _position(sets: Sequence[NamedSet], place: str, whose: str) -> int:
    for position, named in enumerate(sets):
        if named.is_at(place):
            return position
    raise ValueError(f"warm_start.sets: {place} is no data set of {whose}; there are: {_listed(sets)}")


def _check_names(
    old: Sequence[NamedSet], new: Sequence[NamedSet], found: Mapping[int, tuple[int | None, str]], why: str
) -> None:
    for position, (partner, reason) in found.items():
        if reason != why or partner is None:
            continue
        ours, theirs = new[position].manifest, old[partner].manifest
        if all(name.isdigit() for name in (*ours.identities, *theirs.identities)):
            raise ValueError(
                f"warm_start.head: people of {ours.uri} and {theirs.uri} are numbers, which say nothing from one set "
                f"to another. If the same number is the same person in both: --warm-start.sets {ours.uri} "
                f"{theirs.uri}; "
                f"if all are new people: --warm-start.sets {ours.uri} ''"
            )


def _listed(sets: Sequence[NamedSet]) -> str:
    return ", ".join(named.manifest.uri for named in sets)
