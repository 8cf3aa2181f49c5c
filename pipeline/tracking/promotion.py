"""Whether a new model replaces the champion: a pure function of the two models' answers on the same pairs.

Two good models differ on a handful of the 6,000 pairs of LFW, so a difference of accuracies says nothing by itself.
Both models answer the same pairs, and the pairs that only one of them gets right (the discordant ones) carry all the
evidence: under "equally good" each is a fair coin, which is the exact test of McNemar (1947), here one-sided.
The test takes pairs as independent. Pairs that share faces are not quite, so a p-value just below the level is weak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lgaf.config import from_dict, require_in_range

# Accuracies are ratios of counts: 0.99 * 600 pairs must not miss a floor of 0.99 by one rounding error.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """The least accuracy that a champion must have on one benchmark, whatever the old champion had."""

    benchmark: str
    least_accuracy: float

    def __post_init__(self) -> None:
        require_in_range(f"floor of {self.benchmark}: least_accuracy", self.least_accuracy, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionPolicy:
    """What a candidate must show.

    Attributes:
        significance: One-sided level of the pooled McNemar test; at most 0.5, or two models could beat each other.
        non_inferiority_margin: How far (in accuracy) the candidate may fall below the champion on any one benchmark.
        floors: Least accuracies per benchmark.
    """

    significance: float = 0.05
    non_inferiority_margin: float = 0.01
    floors: tuple[Floor, ...] = ()

    def __post_init__(self) -> None:
        require_in_range("significance", self.significance, 1e-12, 0.5)
        require_in_range("non_inferiority_margin", self.non_inferiority_margin, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BenchmarkOutcome:
    """The answers of one model on one benchmark.

    Attributes:
        name: The benchmark's name, for people (``lfw``).
        fingerprint: SHA-256 of the benchmark file: two outcomes compare only if they come from the same file.
        correct: One boolean per pair, in the file's order; at least one.
    """

    name: str
    fingerprint: str
    correct: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        correct = np.asarray(self.correct, dtype=np.bool_)
        if correct.ndim != 1 or correct.size == 0:
            raise ValueError(f"benchmark {self.name}: correct has shape {correct.shape}; one value per pair is needed")
        object.__setattr__(self, "correct", correct)

    @property
    def accuracy(self) -> float:
        """The share of pairs answered rightly."""
        return int(self.correct.sum()) / self.correct.size


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkDifference:
    """Candidate against champion on one benchmark; the champion's side is None where there is no champion."""

    name: str
    fingerprint: str
    num_pairs: int
    candidate_accuracy: float
    champion_accuracy: float | None = None
    num_only_candidate_correct: int | None = None
    num_only_champion_correct: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionDecision:
    """The verdict, why (complete sentences), and the figures it rests on."""

    promote: bool
    reasons: tuple[str, ...]
    p_value: float | None = None
    differences: tuple[BenchmarkDifference, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> PromotionDecision:
        """The inverse of `to_json`.

        Raises:
            ValueError: An unknown or missing key, or a value of the wrong kind.
        """
        return from_dict(PromotionDecision, values)


def mcnemar_exact(candidate_correct: npt.ArrayLike, champion_correct: npt.ArrayLike) -> float:
    """One-sided exact McNemar p-value of "the candidate is no better than the champion".

    With b pairs that only the candidate gets right and c that only the champion does, it is P(X >= b) for
    X ~ Binomial(b + c, 1/2); 1 if no pair tells them apart. It is computed in integers up to the last division.

    Raises:
        ValueError: The two have different lengths.
    """
    candidate = np.asarray(candidate_correct, dtype=np.bool_)
    champion = np.asarray(champion_correct, dtype=np.bool_)
    if candidate.shape != champion.shape:
        raise ValueError(f"outcomes of {candidate.shape} and {champion.shape} pairs cannot be compared pair by pair")
    num_better = int(np.count_nonzero(candidate & ~champion))
    num_worse = int(np.count_nonzero(champion & ~candidate))
    return _at_least_heads(num_better, num_better + num_worse)


def _at_least_heads(num_heads: int, num_tosses: int) -> float:
    """P(at least ``num_heads`` heads in ``num_tosses`` tosses of a fair coin)."""
    # The shorter tail is summed from its far end: C(n, k+1) = C(n, k) (n-k) / (k+1), and by symmetry both start at 0.
    upper = num_heads > num_tosses // 2
    num_terms = num_tosses - num_heads + 1 if upper else num_heads
    total, term = 0, 1
    for k in range(num_terms):
        total += term
        term = term * (num_tosses - k) // (k + 1)
    ways = 1 << num_tosses
    return (total if upper else ways - total) / ways


def decide(
    candidate: Sequence[BenchmarkOutcome], champion: Sequence[BenchmarkOutcome] | None, policy: PromotionPolicy
) -> PromotionDecision:
    """Decide whether ``candidate`` becomes the champion.

    Without a champion the floors alone decide. With one, the candidate is promoted only if both were measured on the
    same benchmark files, it is significantly better over all pairs together, it is nowhere worse by more than the
    non-inferiority margin, and the floors hold. Every rule that fails gives its reason.

    Raises:
        ValueError: One side names a benchmark twice, or the candidate has none.
    """
    ours = _by_name("candidate", candidate)
    if not ours:
        raise ValueError("the candidate has no benchmark outcome: there is nothing to decide on")
    failures = _broken_floors(ours, policy)
    if champion is None:
        kept = f" and the candidate keeps all {len(policy.floors)} floors" if policy.floors else ""
        reasons = failures or [f"There is no champion yet{kept}."]
        differences = tuple(_difference(outcome, None) for outcome in ours.values())
        return PromotionDecision(promote=not failures, reasons=tuple(reasons), differences=differences)
    theirs = _by_name("champion", champion)
    incomparable = _incomparable(ours, theirs)
    if incomparable:
        return PromotionDecision(promote=False, reasons=tuple(failures + incomparable))
    differences = tuple(_difference(ours[name], theirs[name]) for name in ours)
    p_value = mcnemar_exact(
        np.concatenate([ours[name].correct for name in ours]), np.concatenate([theirs[name].correct for name in ours])
    )
    verdict = _verdict(differences, p_value, policy)
    failures += _inferior(differences, policy)
    if p_value >= policy.significance:
        failures.append(verdict)
    return PromotionDecision(
        promote=not failures, reasons=tuple(failures or [verdict]), p_value=p_value, differences=differences
    )


def _by_name(side: str, outcomes: Sequence[BenchmarkOutcome]) -> dict[str, BenchmarkOutcome]:
    named = {outcome.name: outcome for outcome in outcomes}
    if len(named) != len(outcomes):
        raise ValueError(f"the {side} has two outcomes of one benchmark: {sorted(item.name for item in outcomes)}")
    return named


def _difference(ours: BenchmarkOutcome, theirs: BenchmarkOutcome | None) -> BenchmarkDifference:
    figures: dict[str, Any] = {}
    if theirs is not None:
        figures = {
            "champion_accuracy": theirs.accuracy,
            "num_only_candidate_correct": int(np.count_nonzero(ours.correct & ~theirs.correct)),
            "num_only_champion_correct": int(np.count_nonzero(theirs.correct & ~ours.correct)),
        }
    return BenchmarkDifference(
        name=ours.name,
        fingerprint=ours.fingerprint,
        num_pairs=ours.correct.size,
        candidate_accuracy=ours.accuracy,
        **figures,
    )


def _broken_floors(ours: Mapping[str, BenchmarkOutcome], policy: PromotionPolicy) -> list[str]:
    reasons = []
    for floor in policy.floors:
        outcome = ours.get(floor.benchmark)
        if outcome is None:
            reasons.append(f"The policy has a floor for {floor.benchmark}, on which the candidate was not evaluated.")
        elif outcome.accuracy < floor.least_accuracy - _ROUNDING:
            reasons.append(
                f"On {floor.benchmark} the candidate's accuracy of {outcome.accuracy:.4%} "
                f"is below the floor of {floor.least_accuracy:.4%}."
            )
    return reasons


def _incomparable(ours: Mapping[str, BenchmarkOutcome], theirs: Mapping[str, BenchmarkOutcome]) -> list[str]:
    reasons = []
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name), theirs.get(name)
        if mine is None or other is None:
            absent = "candidate" if mine is None else "champion"
            reasons.append(f"The models are not comparable on {name}: the {absent} was not evaluated on it.")
        elif mine.fingerprint != other.fingerprint:
            reasons.append(
                f"The models are not comparable on {name}: they were evaluated on different files "
                f"({mine.fingerprint[:12]} and {other.fingerprint[:12]})."
            )
        elif mine.correct.size != other.correct.size:
            reasons.append(
                f"The models are not comparable on {name}: "
                f"the candidate has {mine.correct.size} answers, the champion {other.correct.size}."
            )
    return reasons


def _inferior(differences: Sequence[BenchmarkDifference], policy: PromotionPolicy) -> list[str]:
    reasons = []
    for item in differences:
        fall = (item.champion_accuracy or 0.0) - item.candidate_accuracy
        if fall > policy.non_inferiority_margin + _ROUNDING:
            reasons.append(
                f"On {item.name} the candidate is {fall:.4%} below the champion "
                f"({item.candidate_accuracy:.4%} against {item.champion_accuracy:.4%}), "
                f"more than the margin of {policy.non_inferiority_margin:.4%}."
            )
    return reasons


def _verdict(differences: Sequence[BenchmarkDifference], p_value: float, policy: PromotionPolicy) -> str:
    num_pairs = sum(item.num_pairs for item in differences)
    num_better = sum(item.num_only_candidate_correct or 0 for item in differences)
    num_worse = sum(item.num_only_champion_correct or 0 for item in differences)
    holds = "significantly better than" if p_value < policy.significance else "not significantly better than"
    sign = "<" if p_value < policy.significance else ">="
    return (
        f"Over {num_pairs} pairs the candidate is {holds} the champion: "
        f"{num_better} pairs only it gets right, {num_worse} only the champion does "
        f"(exact one-sided McNemar p = {p_value:.4g} {sign} {policy.significance:g})."
    )
