"""SampleScreening: less weight for samples that are likely mislabelled or unidentifiable (the paper's future work).

Builds on Hu et al. 2019 (Noise-tolerant paradigm for training face recognition CNNs), who found that the histogram of
target cosines over training shows wrong labels as a peak of their own, and on the posterior of a two-component mixture
as a sample's weight (Arazo et al. 2019, Unsupervised label noise modeling; Li et al. 2020, DivideMix). That the norm
tells how identifiable a face is comes from Meng et al. 2021 (MagFace) and Kim et al. 2022 (AdaFace).
"""

# Shape legend: G = global batch, K = bins of the histogram, 2 = the peaks (wrong, right), 5 = moments

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive

NUM_BINS: Final = 128
MOST_STRENGTH: Final = 0.95
EM_ITERATIONS: Final = 20
# Share of wrong samples up to which all is believed, and from which on nothing is.
_PLAUSIBLY_WRONG: Final = 0.4
_MOST_WRONG: Final = 0.5
# Least deviation of a peak, a bin's width; and of a divisor.
_LEAST_STD: Final = 2.0 / NUM_BINS
_TINY: Final = 1e-12
# Of the wrong samples' peak before the first iteration: about that of strangers in 128 dimensions.
_STRANGERS_STD: Final = 0.1


class Peaks(NamedTuple):
    """Two normal distributions, the one that is to hold the wrong samples first; each [2]."""

    share: Tensor
    mean: Tensor
    std: Tensor

    def separation(self) -> Tensor:
        """Ashman's D: how many deviations the means are apart; negative when out of order."""
        return math.sqrt(2.0) * (self.mean[1] - self.mean[0]) / self.std.square().sum().sqrt()


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleScreening:
    """Weights in [1 - strength, 1] from a sample's target cosine and norm; a pure function of a small state.

    The score of a sample is its target cosine, moved by what its norm says beyond it. How much that is, and in which
    direction, is taken from the run: a linear regression of cosines on norms. (That a high norm means a good image is
    not given; it is the other way round in some networks.)

    The running histogram of the scores is taken apart into two peaks: that of wrong samples, which lie where strangers
    do, at a cosine of about 0, and that of the others. A sample's weight is the probability that it belongs to the
    others. Where the hard samples of a clean data set make a peak of their own, it lies higher, and they keep their
    weight. While the two overlap, as in early training, all samples weigh 1; so they do while the wrong ones would be
    more than half: then the peak is that of samples which are not learned yet, such as those of rare people.

    What is not learned yet and what is wrong look alike, so no sample may lose all of its weight: it could never come
    back. (On clean data of 8 frequent and 400 rare people, a strength of 1 kept most of the rare ones from being
    learned at all; 0.9 learned them all.)

    Attributes:
        strength: How much of its weight a sample can lose, at most 0.95.
        alpha: Share of the new batch in the running histogram and moments.
        norm_share: Weight of the norm's word in the score; 0: the target cosine alone.
        stranger_cosine: How far from 0 the mean of the wrong samples' peak may be.
        overlapping: Separation of the peaks (Ashman's D) up to which nothing is screened.
        separate: Separation from which on all of ``strength`` holds.
    """

    strength: float = 0.9
    alpha: float = 0.02
    norm_share: float = 0.5
    stranger_cosine: float = 0.05
    overlapping: float = 1.0
    separate: float = 1.5

    def __post_init__(self) -> None:
        """Check the fields."""
        require_in_range("screening.strength", self.strength, 0.0, MOST_STRENGTH)
        require_positive("screening.alpha", self.alpha)
        require_in_range("screening.alpha", self.alpha, 0.0, 1.0)
        require_in_range("screening.norm_share", self.norm_share, 0.0, 1.0)
        require_in_range("screening.stranger_cosine", self.stranger_cosine, 0.0, 1.0)
        require_in_range("screening.overlapping", self.overlapping, 0.0, 100.0)
        if not self.separate > self.overlapping:
            raise ValueError(
                f"screening.separate={self.separate!r} must be greater than screening.overlapping={self.overlapping!r}"
            )

    def initial_state(self) -> dict[str, Tensor]:
        """An empty histogram, which screens nobody, and moments of nothing."""
        return {"histogram": torch.zeros(NUM_BINS), "moments": torch.zeros(5), "mass": torch.tensor(0.0)}

    @torch.no_grad()
    def next_state(self, state: Mapping[str, Tensor], cosine_G: Tensor, norm_G: Tensor) -> dict[str, Tensor]:
        """Move moments and histogram towards the global batch's."""
        kind = state["histogram"].dtype
        cosine_G, norm_G = cosine_G.to(kind), norm_G.to(kind)
        # Divided by the mass so far: an average of all batches seen, not one that starts from nothing.
        mass = state["mass"].lerp(torch.ones_like(state["mass"]), self.alpha)
        step = self.alpha / mass
        batch_5 = torch.stack([cosine_G, norm_G, cosine_G**2, norm_G**2, cosine_G * norm_G]).mean(dim=1)
        moments_5 = state["moments"].lerp(batch_5, step)
        score_G = self._scores(moments_5, cosine_G, norm_G)
        # Bounded as a whole number too: what is not a number may become any.
        bins_G = ((score_G.clamp(-1.0, 1.0) + 1.0) * (NUM_BINS / 2)).long().clamp(0, NUM_BINS - 1)
        counts_K = torch.zeros_like(state["histogram"]).index_add(0, bins_G, torch.ones_like(score_G) / len(score_G))
        return {"histogram": state["histogram"].lerp(counts_K, step), "moments": moments_5, "mass": mass}

    @torch.no_grad()
    def weights(self, state: Mapping[str, Tensor], cosine_G: Tensor, norm_G: Tensor) -> Tensor:
        """Weight [G] of each sample's loss."""
        kind = state["histogram"].dtype
        score_G = self._scores(state["moments"], cosine_G.to(kind), norm_G.to(kind))
        peaks = fit_peaks(state["histogram"], self.stranger_cosine)
        # Between the peaks the posterior rises; outside, a wider peak would win again in the other's tail.
        densities_G2 = _densities(torch.minimum(score_G.maximum(peaks.mean[0]), peaks.mean[1])[:, None], peaks)
        wrong_G = densities_G2[:, 0] / densities_G2.sum(dim=1).clamp_min(_TINY)
        minority = ((_MOST_WRONG - peaks.share[0]) / (_MOST_WRONG - _PLAUSIBLY_WRONG)).clamp(0.0, 1.0)
        certainty = minority * ((peaks.separation() - self.overlapping) / (self.separate - self.overlapping)).clamp(
            0.0, 1.0
        )
        return (1.0 - self.strength * certainty * wrong_G).to(cosine_G.dtype)

    def _scores(self, moments_5: Tensor, cosine_G: Tensor, norm_G: Tensor) -> Tensor:
        mean_c, mean_n, square_c, square_n, product = moments_5.unbind()
        covariance = product - mean_c * mean_n
        # Differences of float32 squares: norms that vary by less than a hundredth tell nothing.
        cosine_per_norm = covariance / (square_n - mean_n**2).maximum(1e-4 * square_n + _TINY)
        norm_per_cosine = covariance / (square_c - mean_c**2).clamp_min(1e-4)
        # What the norm says beyond what the cosine has said already: so the peaks stay at the cosines where they are.
        surprise_G = norm_G - (mean_n + norm_per_cosine * (cosine_G - mean_c))
        return cosine_G + self.norm_share * cosine_per_norm * surprise_G


def fit_peaks(histogram_K: Tensor, stranger_cosine: float) -> Peaks:
    """Two normal peaks of a histogram over [-1, 1] by expectation-maximisation; the first one's mean is near 0.

    The start is a function of the histogram too, so the same histogram always gives the same peaks.
    """
    mass_K1 = (histogram_K / histogram_K.sum().clamp_min(_TINY))[:, None]
    centre_K1 = (torch.arange(len(histogram_K), device=histogram_K.device, dtype=histogram_K.dtype) + 0.5)[:, None]
    centre_K1 = centre_K1 * (2.0 / len(histogram_K)) - 1.0
    mean = (mass_K1 * centre_K1).sum()
    std = (mass_K1 * (centre_K1 - mean).square()).sum().sqrt().clamp_min(_LEAST_STD)
    peaks = Peaks(
        histogram_K.new_tensor([0.2, 0.8]),
        torch.stack([torch.zeros_like(mean), mean.clamp_min(stranger_cosine)]),
        torch.stack([std.clamp_max(_STRANGERS_STD), std]),
    )
    for _ in range(EM_ITERATIONS):
        densities_K2 = _densities(centre_K1, peaks)
        belongs_K2 = mass_K1 * densities_K2 / densities_K2.sum(dim=1, keepdim=True).clamp_min(_TINY)
        share = belongs_K2.sum(dim=0).clamp_min(1e-6)
        low, high = ((belongs_K2 * centre_K1).sum(dim=0) / share).unbind()
        means = torch.stack([low.clamp(-stranger_cosine, stranger_cosine), high])
        variance = (belongs_K2 * (centre_K1 - means).square()).sum(dim=0) / share
        peaks = Peaks(share, means, variance.sqrt().clamp_min(_LEAST_STD))
    return peaks


def _densities(score: Tensor, peaks: Peaks) -> Tensor:
    density: Tensor = peaks.share / peaks.std * (-0.5 * ((score - peaks.mean) / peaks.std).square()).exp()
    return density
