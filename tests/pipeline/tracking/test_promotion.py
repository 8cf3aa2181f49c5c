import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tracking.promotion import (
    BenchmarkOutcome,
    Floor,
    PromotionDecision,
    PromotionPolicy,
    decide,
    mcnemar_exact,
)

POLICY = PromotionPolicy(floors=(Floor(benchmark="lfw", least_accuracy=0.5),))


def outcome(correct, name="lfw", fingerprint="f" * 64):
    return BenchmarkOutcome(name=name, fingerprint=fingerprint, correct=correct)


def answers(num_pairs, num_wrong, start=0):
    correct = np.ones(num_pairs, dtype=bool)
    correct[start : start + num_wrong] = False
    return correct


@st.composite
def two_models(draw):
    """Two models on one to three benchmarks; the candidate is biased to be better, so that promotions do occur."""
    candidate, champion = [], []
    for i in range(draw(st.integers(1, 3))):
        num_pairs = draw(st.integers(1, 60))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        ours, theirs = draw(st.floats(0.5, 1.0)), draw(st.floats(0.1, 1.0))
        candidate.append(outcome(rng.random(num_pairs) < ours, f"b{i}"))
        champion.append(outcome(rng.random(num_pairs) < theirs, f"b{i}"))
    return candidate, champion


policies = st.builds(
    PromotionPolicy,
    significance=st.sampled_from([0.001, 0.05, 0.3, 0.5]),
    non_inferiority_margin=st.sampled_from([0.0, 0.01, 0.2]),
    floors=st.sampled_from([(), (Floor(benchmark="b0", least_accuracy=0.6),)]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=200), st.integers(0, 2**32 - 1))
def test_p_value_is_scipys(candidate, seed):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    candidate = np.array(candidate, dtype=bool)
    champion = np.random.default_rng(seed).random(candidate.size) < 0.6
    better, worse = int((candidate & ~champion).sum()), int((champion & ~candidate).sum())
    expected = binomtest(better, better + worse, alternative="greater").pvalue if better + worse else 1.0
    assert mcnemar_exact(candidate, champion) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("better", "worse"), [(1000, 900), (900, 1000), (5000, 5000), (3, 0), (0, 3), (3000, 0)])
def test_p_value_with_many_discordant_pairs(better, worse):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    candidate = np.array([True] * better + [False] * worse)
    expected = binomtest(better, better + worse, alternative="greater").pvalue
    assert mcnemar_exact(candidate, ~candidate) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(two_models(), st.integers(0, 2**32 - 1))
def test_p_value_ignores_the_order_of_the_pairs(models, seed):
    candidate, champion = models[0][0].correct, models[1][0].correct
    order = np.random.default_rng(seed).permutation(candidate.size)
    assert mcnemar_exact(candidate[order], champion[order]) == mcnemar_exact(candidate, champion)


@settings(max_examples=300, deadline=None)
@given(two_models(), policies, st.data())
def test_one_more_right_answer_never_turns_promotion_into_rejection(models, policy, data):
    candidate, champion = models
    wrong = [(i, j) for i, item in enumerate(candidate) for j in np.flatnonzero(~item.correct)]
    if not wrong:
        return
    i, j = data.draw(st.sampled_from(wrong))
    improved = candidate[i].correct.copy()
    improved[j] = True
    better = [*candidate[:i], dataclasses.replace(candidate[i], correct=improved), *candidate[i + 1 :]]
    for rival in (champion, None):
        before, after = decide(candidate, rival, policy), decide(better, rival, policy)
        assert after.promote >= before.promote
        if rival is not None:
            assert after.p_value <= before.p_value


@settings(max_examples=300, deadline=None)
@given(two_models(), policies)
def test_two_models_never_replace_each_other(models, policy):
    candidate, champion = models
    assert not (decide(candidate, champion, policy).promote and decide(champion, candidate, policy).promote)


@settings(max_examples=50, deadline=None)
@given(two_models(), policies)
def test_a_model_never_replaces_itself(models, policy):
    decision = decide(models[0], models[0], policy)
    assert not decision.promote
    assert decision.p_value == 1.0


@settings(max_examples=50, deadline=None)
@given(two_models(), policies)
def test_decision_survives_json(models, policy):
    for champion in (models[1], None):
        decision = decide(models[0], champion, policy)
        assert PromotionDecision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def test_significantly_better_is_promoted_with_figures():
    decision = decide([outcome(answers(600, 3))], [outcome(answers(600, 13))], POLICY)
    assert decision.promote
    assert decision.p_value == pytest.approx(0.5**10)
    assert decision.reasons == (
        "Over 600 pairs the candidate is significantly better than the champion: "
        "10 pairs only it gets right, 0 only the champion does (exact one-sided McNemar p = 0.0009766 < 0.05).",
    )
    (difference,) = decision.differences
    assert (difference.num_pairs, difference.num_only_candidate_correct) == (600, 10)
    assert difference.candidate_accuracy == pytest.approx(0.995)


def test_a_few_more_pairs_are_not_enough():
    decision = decide([outcome(answers(6000, 10))], [outcome(answers(6000, 13))], POLICY)
    assert not decision.promote
    assert "p = 0.125 >= 0.05" in decision.reasons[0]


def test_better_overall_but_worse_on_one_benchmark_is_rejected():
    candidate = [outcome(answers(1000, 10)), outcome(answers(100, 12), "xqlfw")]
    champion = [outcome(answers(1000, 90)), outcome(answers(100, 10), "xqlfw")]
    decision = decide(candidate, champion, POLICY)
    assert decision.p_value < 1e-6
    assert decision.reasons == (
        "On xqlfw the candidate is 2.0000% below the champion (88.0000% against 90.0000%), "
        "more than the margin of 1.0000%.",
    )
    relaxed = dataclasses.replace(POLICY, non_inferiority_margin=0.02)
    assert decide(candidate, champion, relaxed).promote, "a fall of exactly the margin is allowed"


def test_first_champion_needs_only_the_floors():
    policy = PromotionPolicy(floors=(Floor(benchmark="lfw", least_accuracy=0.99),))
    assert decide([outcome(answers(600, 6))], None, policy).promote
    decision = decide([outcome(answers(600, 7))], None, policy)
    assert not decision.promote
    assert decision.reasons == ("On lfw the candidate's accuracy of 98.8333% is below the floor of 99.0000%.",)


def test_floor_of_a_benchmark_that_was_not_run():
    policy = PromotionPolicy(floors=(Floor(benchmark="tinyface", least_accuracy=0.1),))
    decision = decide([outcome(answers(600, 0))], None, policy)
    assert not decision.promote
    assert "tinyface" in decision.reasons[0]


@pytest.mark.parametrize(
    ("champion", "says"),
    [
        ([outcome(answers(600, 90), fingerprint="0" * 64)], "lfw: they were evaluated on different files"),
        ([outcome(answers(599, 90))], "lfw: the candidate has 600 answers, the champion 599"),
        ([outcome(answers(600, 90), "cplfw")], "cplfw: the candidate was not evaluated on it"),
        ([outcome(answers(600, 90)), outcome(answers(600, 90), "agedb")], "agedb: the candidate was not evaluated"),
    ],
)
def test_only_the_same_benchmarks_are_compared(champion, says):
    decision = decide([outcome(answers(600, 0))], champion, POLICY)
    assert not decision.promote
    assert decision.p_value is None
    assert any("not comparable" in reason and says in reason for reason in decision.reasons)


def test_every_broken_rule_is_named():
    policy = PromotionPolicy(floors=(Floor(benchmark="lfw", least_accuracy=0.999),))
    decision = decide([outcome(answers(600, 60))], [outcome(answers(600, 10))], policy)
    assert len(decision.reasons) == 3


def test_user_errors():
    with pytest.raises(ValueError, match=r"significance=0\.6"):
        PromotionPolicy(significance=0.6)
    with pytest.raises(ValueError, match="floor of lfw"):
        Floor(benchmark="lfw", least_accuracy=99.0)
    with pytest.raises(ValueError, match="one value per pair"):
        outcome([])
    with pytest.raises(ValueError, match="nothing to decide on"):
        decide([], None, POLICY)
    with pytest.raises(ValueError, match="two outcomes of one benchmark"):
        decide([outcome([True]), outcome([True])], None, POLICY)
    with pytest.raises(ValueError, match="pair by pair"):
        mcnemar_exact([True], [True, False])
