"""SampleScreening: less weight for samples that are likely mislabelled or unidentifiable (the paper's future work).

Builds on Hu et al. 2019 (Noise-tolerant paradigm for training face recognition CNNs), who found that the histogram of
target cosines over training shows wrong labels as a peak of their own, and on the posterior of a two-component mixture
as a sample's weight (Arazo et al. 2019, Unsupervised label noise modeling; Li et al. 2020, DivideMix). That the norm
tells how identifiable a face is comes from Meng et al. 2021 (MagFace) and Kim et al. 2022 (AdaFace).
"""

# Shape legend: G = global batch, K = bins of the histogram, 2 = the peaks (wrong, right), 4 = moments

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lgaf.config import require_in_range, require_positive

NUM_BINS: Final = 128
EM_ITERATIONS: Final = 12
# Least deviation of a peak, a bin's width; and of a divisor.
_LEAST_STD: Final = 2.0 / NUM_BINS
_TINY: Final = 1e-12


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

    The score of a sample is its target cosine, moved by what its norm says of it. How much that is, and in which
    direction, is taken from the run: the cosine that a linear regression on the norm expects. (That a high norm means
    a good image is not given; it is the other way round in some networks.)

    The running histogram of the scores is taken apart into two peaks; a sample's weight is the probability that it
    belongs to the upper one. While the peaks overlap, as in early training or without noise, all samples weigh 1.

    Attributes:
        strength: How much of its weight a sample can lose; below 1 a wrongly screened one can come back.
        alpha: Share of the new batch in the running histogram and moments.
        norm_share: Weight of the norm's expectation in the score; 0: the target cosine alone.
        overlapping: Separation of the peaks (Ashman's D) up to which nothing is screened.
        separate: Separation from which on all of ``strength`` holds.
    """

    strength: float = 1.0
    alpha: float = 0.02
    norm_share: float = 0.5
    overlapping: float = 1.8
    separate: float = 2.3

    def __post_init__(self) -> None:
        """Check the fields."""
        require_in_range("screening.strength", self.strength, 0.0, 1.0)
        require_positive("screening.alpha", self.alpha)
        require_in_range("screening.alpha", self.alpha, 0.0, 1.0)
        require_in_range("screening.norm_share", self.norm_share, 0.0, 1.0)
        require_in_range("screening.overlapping", self.overlapping, 0.0, 100.0)
        if not self.separate > self.overlapping:
            raise ValueError(
                f"screening.separate={self.separate!r} must be greater than screening.overlapping={self.overlapping!r}"
            )

    def initial_state(self) -> dict[str, Tensor]:
        """An empty histogram, which screens nobody, and moments of nothing."""
        return {"histogram": torch.zeros(NUM_BINS), "moments": torch.zeros(4), "mass": torch.tensor(0.0)}

    @torch.no_grad()
    def next_state(self, state: Mapping[str, Tensor], cosine_G: Tensor, norm_G: Tensor) -> dict[str, Tensor]:
        """Move moments and histogram towards the global batch's."""
        kind = state["histogram"].dtype
        cosine_G, norm_G = cosine_G.to(kind), norm_G.to(kind)
        # Divided by the mass so far: an average of all batches seen, not one that starts from nothing.
        mass = state["mass"].lerp(torch.ones_like(state["mass"]), self.alpha)
        step = self.alpha / mass
        batch_4 = torch.stack([cosine_G, norm_G, norm_G**2, cosine_G * norm_G]).mean(dim=1)
        moments_4 = state["moments"].lerp(batch_4, step)
        score_G = self._scores(moments_4, cosine_G, norm_G)
        bins_G = ((score_G.clamp(-1.0, 1.0) + 1.0) * (NUM_BINS / 2)).long().clamp_max(NUM_BINS - 1)
        counts_K = torch.zeros_like(state["histogram"]).index_add(0, bins_G, torch.ones_like(score_G) / len(score_G))
        return {"histogram": state["histogram"].lerp(counts_K, step), "moments": moments_4, "mass": mass}

    @torch.no_grad()
    def weights(self, state: Mapping[str, Tensor], cosine_G: Tensor, norm_G: Tensor) -> Tensor:
        """Weight [G] of each sample's loss."""
        kind = state["histogram"].dtype
        score_G = self._scores(state["moments"], cosine_G.to(kind), norm_G.to(kind))
        peaks = fit_peaks(state["histogram"])
        # Between the peaks the posterior rises; outside, a wider peak would win again in the other's tail.
        densities_G2 = _densities(torch.minimum(score_G.maximum(peaks.mean[0]), peaks.mean[1])[:, None], peaks)
        wrong_G = densities_G2[:, 0] / densities_G2.sum(dim=1).clamp_min(_TINY)
        certainty = ((peaks.separation() - self.overlapping) / (self.separate - self.overlapping)).clamp(0.0, 1.0)
        return (1.0 - self.strength * certainty * wrong_G).to(cosine_G.dtype)

    def _scores(self, moments_4: Tensor, cosine_G: Tensor, norm_G: Tensor) -> Tensor:
        mean_c, mean_n, square_n, product = moments_4.unbind()
        slope = (product - mean_c * mean_n) / (square_n - mean_n**2).clamp_min(_TINY)
        return cosine_G + self.norm_share * slope * (norm_G - mean_n)


def fit_peaks(histogram_K: Tensor) -> Peaks:
    """Two normal peaks of a histogram over [-1, 1] by expectation-maximisation from its own quantiles.

    No path from earlier fits: the same histogram always gives the same peaks.
    """
    mass_K1 = (histogram_K / histogram_K.sum().clamp_min(_TINY))[:, None]
    centre_K1 = (torch.arange(len(histogram_K), device=histogram_K.device, dtype=histogram_K.dtype) + 0.5)[:, None]
    centre_K1 = centre_K1 * (2.0 / len(histogram_K)) - 1.0
    cumulative_K = mass_K1.squeeze(1).cumsum(0)
    starts = [(cumulative_K < quantile).sum().clamp_max(len(histogram_K) - 1) for quantile in (0.05, 0.6)]
    spread = (mass_K1 * (centre_K1 - (mass_K1 * centre_K1).sum()).square()).sum().sqrt() / 2
    peaks = Peaks(
        histogram_K.new_tensor([0.2, 0.8]),
        centre_K1[torch.stack(starts), 0],
        spread.clamp_min(_LEAST_STD).expand(2),
    )
    for _ in range(EM_ITERATIONS):
        densities_K2 = _densities(centre_K1, peaks)
        belongs_K2 = mass_K1 * densities_K2 / densities_K2.sum(dim=1, keepdim=True).clamp_min(_TINY)
        share = belongs_K2.sum(dim=0).clamp_min(1e-6)
        mean = (belongs_K2 * centre_K1).sum(dim=0) / share
        variance = (belongs_K2 * (centre_K1 - mean).square()).sum(dim=0) / share
        peaks = Peaks(share, mean, variance.sqrt().clamp_min(_LEAST_STD))
    return peaks


def _densities(score: Tensor, peaks: Peaks) -> Tensor:
    density: Tensor = peaks.share / peaks.std * (-0.5 * ((score - peaks.mean) / peaks.std).square()).exp()
    return density
