"""1:1 face verification: the k-fold protocol of LFW, as insightface publishes and everybody reports it.

Source: insightface ``recognition/arcface_torch/eval/verification.py`` (`calculate_roc`, `calculate_val`), itself after
David Sandberg's facenet. The published code loops over thresholds; here every pair is counted once, at the first
threshold that accepts it, and cumulative sums do the rest. The outcome is the same to the last digit.
"""

# Shape legend: P = pairs, 2P = images (rows 2i and 2i+1 are pair i), D = embedding, F = folds, T = thresholds,
# K = points of the ROC curve

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

FAR_TARGETS: Final = (1e-1, 1e-2, 1e-3, 1e-4)
VAL_FAR_TARGET: Final = 1e-3

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


# eq=False: a generated == would compare arrays for truth, which numpy refuses.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VerificationResult:
    """Outcome of one verification benchmark. Rates are fractions in [0, 1], thresholds are squared distances in [0, 4].

    Attributes:
        accuracy: Mean over the folds of the accuracy of the held-out fold.
        std: Population standard deviation of the same.
        thresholds: Per fold, the threshold chosen on the other folds.
        fold_accuracies: Per fold, the accuracy of its own pairs.
        val_at_far_1e3: insightface's VAL: mean TAR of held-out folds at the threshold interpolated for FAR = 1e-3.
        val_at_far_1e3_std: Population standard deviation of the same.
        tar_at_far: For every target of `FAR_TARGETS`, the largest TAR that any threshold reaches over all pairs with
            FAR <= target. Nothing is interpolated: a target below 1 / (number of different pairs) asks for FAR = 0.
        far: False accept rate of the ROC points over all pairs, float64 [K], ascending from 0 to 1.
        tar: True accept rate of the same points, float64 [K].
        correct: bool [P], whether pair i is right under the threshold chosen without its fold; for paired tests.
        num_folds: Number of folds.
        area_under_curve: Area under the ROC; ties between a same and a different pair count one half.
    """

    accuracy: float
    std: float
    thresholds: tuple[float, ...]
    fold_accuracies: tuple[float, ...]
    val_at_far_1e3: float
    val_at_far_1e3_std: float
    tar_at_far: dict[float, float]
    far: Floats
    tar: Floats
    correct: Bools
    num_folds: int
    area_under_curve: float


def verification_accuracy(
    embeddings_2P_D: ArrayLike, is_same_P: ArrayLike | Sequence[bool], num_folds: int = 10
) -> VerificationResult:
    """Score the embeddings of a verification benchmark.

    Rows are L2-normalised, the distance of a pair is the squared L2 distance, and a pair is accepted where it is
    strictly less than the threshold. Folds are contiguous in file order: the order of pairs is part of the protocol.

    Args:
        embeddings_2P_D: Un-normalised embeddings [2P, D]; rows 2i and 2i+1 are pair i. All maths is float64.
        is_same_P: bool (or 0/1) [P].
        num_folds: Number of folds F, 2 <= F <= P. LFW and its successors use 10.

    Raises:
        ValueError: Rows and pairs do not match, an embedding holds NaN or infinity or is zero (the first such row is
            named), fewer pairs than folds, or pairs of one kind alone.
    """
    embeddings, is_same = _checked(embeddings_2P_D, is_same_P, num_folds)
    distance_P = _pair_distances(embeddings)
    starts, fold_P = _contiguous_folds(len(is_same), num_folds)
    chosen_F = _choose_thresholds(distance_P, is_same, fold_P, num_folds)
    correct_P = np.less(distance_P, chosen_F[fold_P]) == is_same
    accuracy_F = np.add.reduceat(correct_P.astype(np.int64), starts) / np.diff([*starts, len(is_same)])
    val_F = _val_per_fold(distance_P, is_same, fold_P, num_folds)
    far_K, tar_K = _roc(distance_P, is_same)
    return VerificationResult(
        accuracy=float(np.mean(accuracy_F)),
        std=float(np.std(accuracy_F)),
        thresholds=tuple(chosen_F.tolist()),
        fold_accuracies=tuple(accuracy_F.tolist()),
        val_at_far_1e3=float(np.mean(val_F)),
        val_at_far_1e3_std=float(np.std(val_F)),
        tar_at_far={target: _tar_at_far(far_K, tar_K, target) for target in FAR_TARGETS},
        far=far_K,
        tar=tar_K,
        correct=correct_P,
        num_folds=num_folds,
        area_under_curve=float(np.sum(np.diff(far_K) * (tar_K[1:] + tar_K[:-1]) / 2)),
    )


def _checked(embeddings: ArrayLike, is_same: Any, num_folds: int) -> tuple[Floats, Bools]:
    rows, labels = np.asarray(embeddings, dtype=np.float64), np.asarray(is_same)
    if rows.ndim != 2 or len(rows) % 2:
        raise ValueError(
            f"embeddings of shape {rows.shape} must be [2P, D]: an even number of rows, two for every pair"
        )
    if labels.ndim != 1 or len(labels) * 2 != len(rows):
        raise ValueError(
            f"is_same of shape {labels.shape} does not match {len(rows)} embeddings: expected ({len(rows) // 2},)"
        )
    if labels.dtype != np.bool_ and not np.isin(labels, (0, 1)).all():
        raise ValueError(f"is_same must hold booleans (or 0 and 1), not {labels[~np.isin(labels, (0, 1))][0]!r}")
    if num_folds < 2:
        raise ValueError(
            f"num_folds={num_folds} must be at least 2: a threshold is never chosen on the pairs it scores"
        )
    if len(labels) < num_folds:
        raise ValueError(
            f"{len(labels)} pairs cannot make num_folds={num_folds} folds: give at least one pair per fold"
        )
    same = labels.astype(np.bool_)
    if same.all() or not same.any():
        kind = "same" if same.all() else "different"
        raise ValueError(f"all {len(same)} pairs are {kind} ones: verification needs same and different pairs")
    _name_bad_row(np.logical_not(np.isfinite(rows).all(axis=1)), "holds NaN or infinity")
    return rows, same


def _name_bad_row(bad_2P: Any, fault: str) -> None:
    if bad_2P.any():
        row = int(np.argmax(bad_2P))
        raise ValueError(
            f"embeddings row {row} (image {row % 2} of pair {row // 2}) {fault}; "
            f"{int(bad_2P.sum())} of {len(bad_2P)} rows do. A model that has diverged gives such rows."
        )


def _pair_distances(rows_2P_D: Floats) -> Floats:
    # einsum, then sqrt, as sklearn's `normalize` does: another summation order would change last digits.
    norm_2P = np.sqrt(np.einsum("nd,nd->n", rows_2P_D, rows_2P_D))
    _name_bad_row(~(norm_2P > 0), "has norm 0 and no direction")
    _name_bad_row(~np.isfinite(norm_2P), "has a norm beyond float64")
    unit_2P_D = rows_2P_D / norm_2P[:, None]
    distance_P: Floats = np.sum(np.square(unit_2P_D[0::2] - unit_2P_D[1::2]), axis=1)
    return distance_P


def _contiguous_folds(num_pairs: int, num_folds: int) -> tuple[Ints, Ints]:
    """First pair of each fold, and the fold of each pair: sklearn's ``KFold(shuffle=False)``, larger folds first."""
    sizes = np.full(num_folds, num_pairs // num_folds, dtype=np.int64)
    sizes[: num_pairs % num_folds] += 1
    return np.cumsum(sizes) - sizes, np.repeat(np.arange(num_folds, dtype=np.int64), sizes)


def _accepted_counts(
    distance_P: Floats, is_same_P: Bools, fold_P: Ints, thresholds_T: Floats, num_folds: int
) -> tuple[Ints, Ints]:
    """Accepted same and different pairs, int64 [F, T] each: of fold f, those with distance < threshold t."""
    # side="right" finds the first threshold strictly above the distance: the first to accept the pair.
    first_P = np.searchsorted(thresholds_T, distance_P, side="right")
    width = len(thresholds_T) + 1  # the last column holds pairs that no threshold accepts
    cell_P = fold_P * width + first_P
    counts = [
        np.bincount(cell_P[kind], minlength=num_folds * width).reshape(num_folds, width)[:, :-1].cumsum(axis=1)
        for kind in (is_same_P, ~is_same_P)
    ]
    return counts[0], counts[1]


def _choose_thresholds(distance_P: Floats, is_same_P: Bools, fold_P: Ints, num_folds: int) -> Floats:
    """For each fold [F], the threshold that is right for most of the other folds' pairs."""
    # 400 thresholds, as published: the step limits what accuracy can be reached, so it is part of the protocol too.
    thresholds_T = np.arange(0, 4, 0.01)
    same_FT, different_FT = _accepted_counts(distance_P, is_same_P, fold_P, thresholds_T, num_folds)
    # Right decisions: accepted same pairs and refused different ones (a constant less the accepted ones).
    right_FT = same_FT - different_FT
    # argmax gives the first maximum: the smallest of equally good thresholds.
    chosen_F: Floats = thresholds_T[np.argmax(right_FT.sum(axis=0) - right_FT, axis=1)]
    return chosen_F


def _val_per_fold(distance_P: Floats, is_same_P: Bools, fold_P: Ints, num_folds: int) -> Floats:
    """VAL@FAR=1e-3 of each fold, as insightface defines it.

    The published code interpolates threshold over FAR with scipy's "slinear", which newer scipy refuses where FARs
    repeat, as they always do (insightface issue 2152). `np.interp` leaves such a plateau from its last threshold.
    Folds without same pairs, or with no different pair outside, have no VAL (the published code divides by zero):
    they are left out. At least one fold always remains.
    """
    thresholds_T = np.arange(0, 4, 0.001)
    _, different_FT = _accepted_counts(distance_P, is_same_P, fold_P, thresholds_T, num_folds)
    train_FT = different_FT.sum(axis=0) - different_FT
    num_different_F = np.bincount(fold_P[~is_same_P], minlength=num_folds)
    values = []
    for fold, num_train in enumerate(num_different_F.sum() - num_different_F):
        same_pairs = distance_P[(fold_P == fold) & is_same_P]
        if len(same_pairs) == 0 or num_train == 0:
            continue
        far_T = train_FT[fold] / num_train
        threshold = np.interp(VAL_FAR_TARGET, far_T, thresholds_T) if far_T[-1] >= VAL_FAR_TARGET else 0.0
        values.append(np.count_nonzero(same_pairs < threshold) / len(same_pairs))
    return np.array(values, dtype=np.float64)


def _roc(distance_P: Floats, is_same_P: Bools) -> tuple[Floats, Floats]:
    """FAR and TAR [K] of every different decision that a threshold can make, from (0, 0) to (1, 1)."""
    levels, level_P = np.unique(distance_P, return_inverse=True)
    rates = [
        np.concatenate(([0], np.bincount(level_P[kind], minlength=len(levels)).cumsum())) / np.count_nonzero(kind)
        for kind in (~is_same_P, is_same_P)
    ]
    return rates[0], rates[1]


def _tar_at_far(far_K: Floats, tar_K: Floats, target: float) -> float:
    return float(tar_K[np.searchsorted(far_K, target, side="right") - 1])
