"""Sample screening: finds a peak of wrong samples, leaves everything else alone, is the same on any number of ranks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lgaf.config import from_dict
from lgaf.heads.margins import create_margin
from lgaf.heads.screening import NUM_BINS, SampleScreening, fit_peaks
from lgaf.heads.sharded import ShardedMarginHead
from tests.distributed import run_distributed

BATCH = 256


def _draw(generator, wrong_share: float, right_mean: float = 0.6):
    """Cosines and which of them are wrong: right ones around `right_mean`, wrong ones around 0."""
    wrong = torch.rand(BATCH, generator=generator) < wrong_share
    cosine = torch.where(wrong, 0.0, right_mean) + 0.1 * torch.randn(BATCH, generator=generator)
    return cosine.clamp(-1, 1), wrong


def _settled(screening: SampleScreening, wrong_share: float, right_mean: float = 0.6, norm=None, steps: int = 60):
    generator = torch.Generator().manual_seed(0)
    state = screening.initial_state()
    for _ in range(steps):
        cosine, wrong = _draw(generator, wrong_share, right_mean)
        norms = torch.full_like(cosine, 20.0) if norm is None else norm(wrong, generator)
        state = {**state, **screening.next_state(state, cosine, norms)}
    return state


def _weights(screening, state, cosine, norm=20.0):
    return screening.weights(state, torch.tensor(cosine), torch.full((len(cosine),), norm))


def test_wrong_samples_lose_their_weight_and_hard_ones_keep_most():
    screening = SampleScreening()
    state = _settled(screening, wrong_share=0.25)
    wrong, low, hard, easy = _weights(screening, state, [0.0, 0.15, 0.4, 0.6]).tolist()
    assert wrong == pytest.approx(0.1, abs=0.01), "what strength 0.9 leaves"
    assert low < 0.4
    assert hard > 0.95
    assert easy > 0.999


@pytest.mark.parametrize("right_mean", [0.0, 0.3, 0.6])
def test_without_noise_nobody_is_screened(right_mean):
    screening = SampleScreening()
    state = _settled(screening, wrong_share=0.0, right_mean=right_mean)
    cosines, _ = _draw(torch.Generator().manual_seed(1), 0.0, right_mean)
    assert _weights(screening, state, cosines.tolist()).mean() > 0.98


def test_the_hard_samples_of_clean_data_keep_their_weight():
    # A fifth of the samples at 0.3 where the others are at 0.6: two peaks, none of them where strangers lie.
    screening = SampleScreening()
    state, generator = screening.initial_state(), torch.Generator().manual_seed(0)
    for _ in range(60):
        hard = torch.rand(BATCH, generator=generator) < 0.2
        cosine = torch.where(hard, 0.3, 0.6) + 0.08 * torch.randn(BATCH, generator=generator)
        state = {**state, **screening.next_state(state, cosine, torch.full_like(cosine, 20.0))}
    assert _weights(screening, state, [0.3]).item() > 0.9


def test_peaks_that_overlap_screen_nobody():
    screening = SampleScreening()
    state = _settled(screening, wrong_share=0.25, right_mean=0.1)
    assert (_weights(screening, state, [-0.2, 0.0, 0.1, 0.3]) > 0.999).all()


def test_what_most_samples_are_is_not_wrong():
    # A long tail of people that are not learned yet, beside a few that are: no noise.
    screening = SampleScreening()
    state, generator = screening.initial_state(), torch.Generator().manual_seed(0)
    for _ in range(60):
        unlearned = torch.rand(BATCH, generator=generator) < 0.6
        cosine = torch.where(unlearned, 0.03, 0.6) + 0.08 * torch.randn(BATCH, generator=generator)
        state = {**state, **screening.next_state(state, cosine, torch.full_like(cosine, 20.0))}
    assert (_weights(screening, state, [0.0, 0.05, 0.6]) > 0.999).all()


def test_no_sample_loses_all_of_its_weight():
    with pytest.raises(ValueError, match=r"screening\.strength=1\.0 must lie in \[0\.0, 0\.95\]"):
        SampleScreening(strength=1.0)


def test_before_the_first_step_nobody_is_screened():
    screening = SampleScreening()
    assert (_weights(screening, screening.initial_state(), [-1.0, 0.0, 1.0]) == 1).all()


def test_strength_bounds_the_loss_of_weight():
    whole, half = SampleScreening(strength=0.8), SampleScreening(strength=0.4)
    state = _settled(whole, wrong_share=0.25)
    cosines = torch.linspace(-1, 1, 21).tolist()
    torch.testing.assert_close(
        1 - _weights(half, state, cosines), 0.5 * (1 - _weights(whole, state, cosines)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_run_tells_what_the_norm_means(sign):
    # Whether wrong samples have the lower norms or the higher ones: theirs costs weight in both.
    def norms(wrong, generator):
        return 20.0 + sign * torch.where(wrong, -4.0, 1.0) + torch.randn(len(wrong), generator=generator)

    screening = SampleScreening(norm_share=1.0)
    state = _settled(screening, wrong_share=0.25, norm=norms)
    like_wrong, like_right = (_weights(screening, state, [0.3], 20.0 + sign * d).item() for d in (-4.0, 1.0))
    assert like_wrong < 0.5 < like_right
    blind = SampleScreening(norm_share=0.0)
    state = _settled(blind, wrong_share=0.25, norm=norms)
    assert _weights(blind, state, [0.3], 16.0) == _weights(blind, state, [0.3], 24.0)


@given(st.lists(st.floats(0, 1), min_size=NUM_BINS, max_size=NUM_BINS), st.floats(0, 40))
def test_weights_lie_in_their_range_and_rise_with_the_cosine(histogram, norm):
    screening = SampleScreening(strength=0.9)
    state = {**_settled(screening, 0.25, steps=1), "histogram": torch.tensor(histogram)}
    weights = _weights(screening, state, torch.linspace(-1, 1, 101).tolist(), norm)
    assert torch.isfinite(weights).all()
    assert ((weights >= 0.1 - 1e-5) & (weights <= 1 + 1e-6)).all()
    peaks = fit_peaks(state["histogram"], 0.05)
    if peaks.std[0] == peaks.std[1] or peaks.separation() > 2:
        assert (weights.diff() >= -1e-4).all()


def test_the_fit_finds_the_peaks_that_were_drawn():
    state = _settled(SampleScreening(norm_share=0.0), wrong_share=0.25, steps=200)
    peaks = fit_peaks(state["histogram"], 0.05)
    torch.testing.assert_close(peaks.share, torch.tensor([0.25, 0.75]), atol=0.03, rtol=0)
    torch.testing.assert_close(peaks.mean, torch.tensor([0.0, 0.6]), atol=0.02, rtol=0)
    torch.testing.assert_close(peaks.std, torch.tensor([0.1, 0.1]), atol=0.02, rtol=0)


class TestInTheHead:
    def _head(self, group=None, screening=None):
        head = ShardedMarginHead(6, 6, create_margin("cosface", scale=8.0), group=group, screening=screening).double()
        with torch.no_grad():
            head.weight.copy_(torch.eye(6, dtype=torch.float64)[head.classes.start : head.classes.stop])
        return head

    @staticmethod
    def _batch(rows: int = 40):
        generator = torch.Generator().manual_seed(3)
        labels = torch.randint(0, 6, (rows,), generator=generator)
        x = torch.eye(6, dtype=torch.float64)[labels] + 0.1 * torch.randn(rows, 6, generator=generator).double()
        labels[::4] = (labels[::4] + 1) % 6  # a quarter mislabelled
        return 20 * x, labels

    def test_mislabelled_rows_lose_their_gradient(self):
        x, labels = self._batch()
        head = self._head(screening=SampleScreening(alpha=1.0))
        plain_x, x = x.clone().requires_grad_(), x.requires_grad_()
        head(x, labels).backward()
        self._head()(plain_x, labels).backward()
        mislabelled = torch.arange(40) % 4 == 0
        assert (x.grad[mislabelled].norm(dim=1) < 0.11 * plain_x.grad[mislabelled].norm(dim=1)).all()
        torch.testing.assert_close(x.grad[~mislabelled], plain_x.grad[~mislabelled], rtol=0.05, atol=1e-6)

    def test_frozen_in_eval_mode(self):
        x, labels = self._batch()
        head = self._head(screening=SampleScreening()).eval()
        before = head.screening_state.histogram.clone()
        head(x, labels)
        assert torch.equal(before, head.screening_state.histogram)

    @pytest.mark.parametrize("world", [2, 3])
    def test_any_world_size_screens_alike(self, world):
        run_distributed(world, _check_screening)


def _check_screening(group) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    tests = TestInTheHead()
    x, labels = tests._batch()
    alone, together = tests._head(screening=SampleScreening()), tests._head(group, SampleScreening())
    own = slice(rank * 40 // world, (rank + 1) * 40 // world)
    for _ in range(3):
        expected, loss = alone(x, labels), together(x[own], labels[own])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.screening_state.histogram, alone.screening_state.histogram)


def test_config_round_trip_and_bad_fields():
    screening = SampleScreening(strength=0.5)
    assert from_dict(SampleScreening, json.loads(json.dumps(dataclasses.asdict(screening)))) == screening
    for field, value in {"strength": 1.5, "alpha": 0.0, "norm_share": -1.0, "separate": 1.0}.items():
        with pytest.raises(ValueError, match=rf"screening\.{field}={value}"):
            dataclasses.replace(screening, **{field: value})
