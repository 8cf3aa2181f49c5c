"""The protocol against a literal, plain-loop port of the published algorithm, and what it must not depend on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgaf.evaluation.verification import verification_accuracy

# ---- the oracle: the published algorithm, one pair and one threshold at a time -----------------------------------


def oracle_folds(num_pairs: int, num_folds: int) -> list[tuple[list[int], list[int]]]:
    """Train and test indices, as sklearn documents KFold without shuffling."""
    folds, start = [], 0
    for fold in range(num_folds):
        stop = start + num_pairs // num_folds + (1 if fold < num_pairs % num_folds else 0)
        test = list(range(start, stop))
        folds.append(([i for i in range(num_pairs) if i not in test], test))
        start = stop
    return folds


def oracle_distances(embeddings: np.ndarray) -> list[float]:
    """Squared L2 distances of unit rows, with sklearn's order of summation (normalisation by einsum)."""
    rows = np.zeros(embeddings.shape)
    rows[:] = embeddings
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, np.newaxis]
    return list(np.sum(np.square(np.subtract(rows[0::2], rows[1::2])), 1))


def oracle_accuracy(threshold: float, dist: list[float], same: list[bool]) -> float:
    tp = tn = 0
    for d, s in zip(dist, same, strict=True):
        accepted = d < threshold
        tp += accepted and s
        tn += (not accepted) and (not s)
    return float(tp + tn) / len(dist)


def oracle_ten_fold(dist: list[float], same: list[bool], num_folds: int) -> tuple[list[float], list[float], list[bool]]:
    thresholds = np.arange(0, 4, 0.01)
    accuracies, chosen, correct = [], [], []
    for train, test in oracle_folds(len(same), num_folds):
        best, best_accuracy = 0, -1.0
        for index, threshold in enumerate(thresholds):
            accuracy = oracle_accuracy(threshold, [dist[i] for i in train], [same[i] for i in train])
            if accuracy > best_accuracy:  # the first maximum wins
                best, best_accuracy = index, accuracy
        accuracies.append(oracle_accuracy(thresholds[best], [dist[i] for i in test], [same[i] for i in test]))
        chosen.append(float(thresholds[best]))
        correct += [bool((dist[i] < thresholds[best]) == same[i]) for i in test]
    return accuracies, chosen, correct


def oracle_interpolate(target: float, x: list[float], y: list[float]) -> float:
    """Linear between knots; from the last knot of a plateau, as scipy before 1.5 did."""
    last = max(i for i in range(len(x)) if x[i] <= target)
    if x[last] == target:
        return y[last]
    return (y[last + 1] - y[last]) / (x[last + 1] - x[last]) * (target - x[last]) + y[last]


def oracle_val(dist: list[float], same: list[bool], num_folds: int, far_target: float = 1e-3) -> list[float]:
    thresholds = [float(t) for t in np.arange(0, 4, 0.001)]
    values = []
    for train, test in oracle_folds(len(same), num_folds):
        positives, negatives = [dist[i] for i in test if same[i]], np.array([dist[i] for i in train if not same[i]])
        if not positives or not len(negatives):
            continue
        far = [int(np.sum(np.less(negatives, t))) / len(negatives) for t in thresholds]
        threshold = oracle_interpolate(far_target, far, thresholds) if max(far) >= far_target else 0.0
        values.append(sum(d < threshold for d in positives) / len(positives))
    return values


def assert_equals_oracle(embeddings: np.ndarray, is_same: np.ndarray, num_folds: int) -> None:
    result = verification_accuracy(embeddings, is_same, num_folds)
    dist, same = oracle_distances(embeddings), [bool(s) for s in is_same]
    accuracies, chosen, correct = oracle_ten_fold(dist, same, num_folds)
    assert result.accuracy == float(np.mean(accuracies))
    assert result.std == float(np.std(accuracies))
    assert result.fold_accuracies == tuple(accuracies)
    assert result.thresholds == tuple(chosen)
    assert result.correct.tolist() == correct
    val = oracle_val(dist, same, num_folds)
    assert (result.val_at_far_1e3, result.val_at_far_1e3_std) == (float(np.mean(val)), float(np.std(val)))
    # "Any threshold": just above each distance, where decisions change, and one that accepts nothing.
    cuts = [0.0, *(np.nextafter(d, np.inf) for d in dist)]
    num_same, num_different = sum(same), len(same) - sum(same)
    points = [
        (
            sum(d < cut and not s for d, s in zip(dist, same, strict=True)) / num_different,
            sum(d < cut and s for d, s in zip(dist, same, strict=True)) / num_same,
        )
        for cut in cuts
    ]
    for target, tar in result.tar_at_far.items():
        assert tar == max(t for f, t in points if f <= target)
    positives = [d for d, s in zip(dist, same, strict=True) if s]
    negatives = [d for d, s in zip(dist, same, strict=True) if not s]
    wins = sum((p < n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert result.area_under_curve == pytest.approx(wins / (num_same * num_different), abs=1e-12)


@st.composite
def benchmarks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    num_folds = draw(st.integers(2, 5))
    num_pairs = draw(st.integers(max(num_folds, 2), 23))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):  # few directions: distances 0, 2 and 4 exactly on thresholds, and many ties
        rows = np.eye(3)[rng.integers(0, 3, 2 * num_pairs)] * rng.choice([-1.0, 1.0], (2 * num_pairs, 1))
    else:
        rows = rng.normal(size=(2 * num_pairs, 4)).astype(np.float32)
    is_same = rng.random(num_pairs) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    is_same[:2] = [True, False]  # both kinds; first and second fold may lack one, which is the point
    return rows, rng.permutation(is_same), num_folds


@settings(max_examples=40, deadline=None)
@given(benchmarks())
def test_equals_the_published_algorithm_to_the_last_digit(benchmark):
    assert_equals_oracle(*benchmark)


@pytest.mark.parametrize(("num_pairs", "num_folds"), [(600, 10), (607, 10), (250, 5)])
def test_equals_the_published_algorithm_on_a_plausible_model(num_pairs, num_folds):
    rng = np.random.default_rng(num_pairs)
    is_same = (np.arange(num_pairs) // 30) % 2 == 0  # blocks of same and different pairs, as LFW's file has
    first = rng.normal(size=(num_pairs, 16))
    second = np.where(is_same[:, None], first + rng.normal(size=first.shape), rng.normal(size=first.shape))
    rows = np.stack([first, second], axis=1).reshape(-1, 16).astype(np.float32)
    assert_equals_oracle(rows, is_same, num_folds)


@pytest.mark.parametrize(("num_pairs", "num_folds"), [(10, 10), (23, 10), (7000, 10), (11, 3)])
def test_folds_and_normalisation_equal_sklearn(num_pairs, num_folds):
    model_selection = pytest.importorskip("sklearn.model_selection")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    expected = [
        test.tolist() for _, test in model_selection.KFold(num_folds, shuffle=False).split(np.arange(num_pairs))
    ]
    if num_pairs < 100:
        assert [test for _, test in oracle_folds(num_pairs, num_folds)] == expected
    rng = np.random.default_rng(0)
    rows, is_same = rng.normal(size=(2 * num_pairs, 8)), np.arange(num_pairs) % 2 == 0
    result = verification_accuracy(rows, is_same, num_folds)
    assert list(result.fold_accuracies) == [np.mean(result.correct[test]) for test in expected]
    unit = preprocessing.normalize(rows)
    dist = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    threshold_P = np.concatenate([[t] * len(test) for t, test in zip(result.thresholds, expected, strict=True)])
    assert np.array_equal((dist < threshold_P) == is_same, result.correct)


def random_benchmark(seed: int = 0, num_pairs: int = 101) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    is_same = rng.random(num_pairs) < 0.5
    first = rng.normal(size=(num_pairs, 8))
    second = first * is_same[:, None] * 0.7 + rng.normal(size=first.shape)
    return np.stack([first, second], axis=1).reshape(-1, 8), is_same


def assert_same_result(a, b) -> None:
    for field in dataclasses.fields(a):
        np.testing.assert_equal(getattr(a, field.name), getattr(b, field.name))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_length_of_an_embedding_does_not_matter(seed):
    rows, is_same = random_benchmark(seed)
    # Powers of two scale without rounding, so the result must be identical.
    scale = 2.0 ** np.random.default_rng(seed).integers(-20, 20, size=(len(rows), 1))
    assert_same_result(verification_accuracy(rows, is_same), verification_accuracy(rows * scale, is_same))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_two_images_of_a_pair_can_be_swapped(seed):
    rows, is_same = random_benchmark(seed)
    swap = np.random.default_rng(seed).random(len(is_same)) < 0.5
    pairs = rows.reshape(len(is_same), 2, -1).copy()
    pairs[swap] = pairs[swap, ::-1]
    assert_same_result(verification_accuracy(rows, is_same), verification_accuracy(pairs.reshape(rows.shape), is_same))


def test_the_order_of_pairs_is_part_of_the_protocol():
    rows, is_same = random_benchmark(3)
    order = np.random.default_rng(0).permutation(len(is_same))
    shuffled = rows.reshape(len(is_same), 2, -1)[order].reshape(rows.shape)
    result, other = verification_accuracy(rows, is_same), verification_accuracy(shuffled, is_same[order])
    assert result.fold_accuracies != other.fold_accuracies
    assert result.area_under_curve == other.area_under_curve  # the ROC has no folds


def test_a_perfect_and_a_hopeless_model():
    is_same = np.arange(40) % 2 == 0
    first = np.tile([1.0, 0.0], (40, 1))
    perfect = np.stack([first, np.where(is_same[:, None], first, -first)], axis=1).reshape(-1, 2)
    result = verification_accuracy(perfect, is_same)
    assert (result.accuracy, result.std, result.area_under_curve) == (1.0, 0.0, 1.0)
    assert set(result.thresholds) == {0.01}  # strict "<": a distance of 0 is refused at threshold 0
    assert result.tar_at_far == {1e-1: 1.0, 1e-2: 1.0, 1e-3: 1.0, 1e-4: 1.0}
    # Every FAR is 0 up to the last threshold (distance 4 is never < 3.999): the published rule then accepts nothing.
    assert result.val_at_far_1e3 == 0.0
    assert verification_accuracy(np.ones((80, 2)), is_same).area_under_curve == 0.5


def test_roc_is_a_curve_from_nothing_to_everything():
    result = verification_accuracy(*random_benchmark(1))
    assert (result.far[0], result.tar[0], result.far[-1], result.tar[-1]) == (0, 0, 1, 1)
    assert (np.diff(result.far) >= 0).all()
    assert (np.diff(result.tar) >= 0).all()


def with_row(row: int, value: float) -> np.ndarray:
    rows = np.ones((40, 3))
    rows[row] = value
    return rows


BOTH = np.arange(20) % 2 == 0


@pytest.mark.parametrize(
    ("embeddings", "is_same", "num_folds", "message"),
    [
        (np.ones((39, 3)), BOTH, 10, r"\(39, 3\).*even number of rows"),
        (np.ones(40), BOTH, 10, r"\(40,\) must be \[2P, D\]"),
        (np.ones((40, 3)), BOTH[:19], 10, r"\(19,\) does not match 40 embeddings: expected \(20,\)"),
        (np.ones((40, 3)), np.arange(20), 10, "booleans.*not.*2"),
        (with_row(7, np.nan), BOTH, 10, r"row 7 \(image 1 of pair 3\) holds NaN.*1 of 40"),
        (with_row(8, np.inf), BOTH, 10, r"row 8 \(image 0 of pair 4\) holds NaN or infinity"),
        (with_row(5, 0.0), BOTH, 10, r"row 5 .*norm 0"),
        (with_row(5, 1e200), BOTH, 10, r"row 5 .*beyond float64"),
        (np.ones((40, 3)), BOTH, 21, "20 pairs cannot make num_folds=21"),
        (np.ones((40, 3)), BOTH, 1, "num_folds=1 must be at least 2"),
        (np.ones((40, 3)), np.ones(20, bool), 10, "all 20 pairs are same ones"),
        (np.ones((40, 3)), np.zeros(20, int), 10, "all 20 pairs are different ones"),
    ],
)
def test_bad_input_is_named(embeddings, is_same, num_folds, message):
    with pytest.raises(ValueError, match=message):
        verification_accuracy(embeddings, is_same, num_folds)
