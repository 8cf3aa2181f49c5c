"""SampleScreening: less weight for samples that are likely mislabelled or unidentifiable (the paper's future work).

Builds on Hu et al. 2019 (Noise-tolerant paradigm for training face recognition CNNs), who found that the histogram of
target cosines over training shows wrong labels as a second peak, and on the posterior of a two-component mixture as a
sample's weight (Arazo et al. 2019, Unsupervised label noise modeling; Li et al. 2020, DivideMix). That the norm tells
how identifiable a face is comes from Meng et al. 2021 (MagFace) and Kim et al. 2022 (AdaFace).
"""

# Shape legend: G = global batch, K = bins of the histogram, 2 = the peaks (wrong, right)

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
# Ashman's D of two peaks: 2 is what it takes to see them apart.
_SEPARATE_FROM: Final = 2.0
_SEPARATE_FULLY: Final = 3.0
_LEAST_STD: Final = 0.02


class Peaks(NamedTuple):
    """Two normal distributions over the target cosine, the lower one first; each [2]."""

    share: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleScreening:
    """Weights in [1 - strength, 1] from a sample's target cosine and norm; a pure function of a small state.

    * *Mislabelled*: the running histogram of target cosines is taken apart into two peaks. A sample's weight is the
      probability that it belongs to the upper one. While the peaks overlap, as they do in early training, all weigh 1;
      the lower peak must also be the smaller.
    * *Unidentifiable*: a sample of the lower half of the cosines whose norm is more than ``norm_tolerance`` deviations
      below the running mean loses weight by as many more deviations. Hard samples keep their norm and their weight.

    Attributes:
        strength: How much of its weight a sample can lose; below 1 a wrongly screened one can come back.
        alpha: Share of the new batch in the running histogram and norm statistics.
        norm_tolerance: Deviations below the mean norm that cost nothing; 0 or less: the norm is not used.
    """

    strength: float = 1.0
    alpha: float = 0.02
    norm_tolerance: float = 2.0

    def __post_init__(self) -> None:
        """Check the fields."""
        require_in_range("screening.strength", self.strength, 0.0, 1.0)
        require_positive("screening.alpha", self.alpha)
        require_in_range("screening.alpha", self.alpha, 0.0, 1.0)

    def initial_state(self) -> dict[str, Tensor]:
        """An empty histogram and norm statistics that give every sample full weight."""
        return {
            "histogram": torch.zeros(NUM_BINS),
            "norm_mean": torch.tensor(0.0),
            "norm_std": torch.tensor(0.0),
            "mass": torch.tensor(0.0),
        }

    @torch.no_grad()
    def next_state(self, state: Mapping[str, Tensor], cosine_G: Tensor, norm_G: Tensor) -> dict[str, Tensor]:
        """Move the histogram of target cosines and the norm's mean and deviation towards the global batch's."""
        bins_G = ((cosine_G.clamp(-1.0, 1.0) + 1.0) * (NUM_BINS / 2)).long().clamp_max(NUM_BINS - 1)
        count_G = torch.full_like(cosine_G, 1.0 / len(cosine_G), dtype=state["histogram"].dtype)
        histogram = torch.zeros_like(state["histogram"]).index_add(0, bins_G, count_G)
        spread = norm_G.std() if len(norm_G) > 1 else norm_G.new_zeros(())
        # Divided by the mass so far, an average of all batches seen and not one that starts from nothing.
        mass = state["mass"].lerp(torch.ones_like(state["mass"]), self.alpha)
        step = self.alpha / mass
        return {
            "histogram": state["histogram"].lerp(histogram, step),
            "norm_mean": state["norm_mean"].lerp(norm_G.mean().to(mass.dtype), step),
            "norm_std": state["norm_std"].lerp(spread.to(mass.dtype), step),
            "mass": mass,
        }

    @torch.no_grad()
    def weights(self, state: Mapping[str, Tensor], cosine_G: Tensor, norm_G: Tensor) -> Tensor:
        """Weight [G] of each sample's loss."""
        peaks = fit_peaks(state["histogram"])
        low, high = peaks.mean
        # Between the peaks the posterior rises; outside, a wider peak could win again in the other's tail.
        densities_G2 = _densities(cosine_G.clamp(low, high)[:, None], peaks)
        right_G = densities_G2[:, 1] / densities_G2.sum(dim=1)
        distance = math.sqrt(2.0) * (high - low) / peaks.std.square().sum().sqrt()
        apart = ((distance - _SEPARATE_FROM) / (_SEPARATE_FULLY - _SEPARATE_FROM)).clamp(0.0, 1.0)
        apart = apart * (peaks.share[0] < peaks.share[1])
        weight_G = 1.0 - apart * (1.0 - right_G)
        if self.norm_tolerance > 0:
            deviation_G = (norm_G - state["norm_mean"]) / state["norm_std"].clamp_min(1e-6)
            identifiable_G = (1.0 + deviation_G + self.norm_tolerance).clamp(0.0, 1.0)
            is_low_G = cosine_G < (low + high) / 2
            weight_G = torch.where(is_low_G, torch.minimum(weight_G, 1.0 - apart * (1.0 - identifiable_G)), weight_G)
        lowered_G: Tensor = 1.0 - self.strength * (1.0 - weight_G)
        return lowered_G


def fit_peaks(histogram_K: Tensor) -> Peaks:
    """Two normal peaks of a histogram over [-1, 1] by expectation-maximisation from its own quantiles.

    No path from earlier fits: the same histogram always gives the same peaks.
    """
    total = histogram_K.sum().clamp_min(1e-12)
    mass_K1 = (histogram_K / total)[:, None]
    centre_K1 = (torch.arange(len(histogram_K), device=histogram_K.device, dtype=histogram_K.dtype) + 0.5)[:, None]
    centre_K1 = centre_K1 * (2.0 / len(histogram_K)) - 1.0
    cumulative_K = mass_K1.squeeze(1).cumsum(0)
    at = [(cumulative_K < quantile).sum().clamp_max(len(histogram_K) - 1) for quantile in (0.05, 0.6)]
    spread = (mass_K1 * (centre_K1 - (mass_K1 * centre_K1).sum()).square()).sum().sqrt() / 2
    peaks = Peaks(
        histogram_K.new_tensor([0.2, 0.8]),
        torch.stack([centre_K1[index, 0] for index in at]),
        spread.clamp_min(_LEAST_STD).expand(2),
    )
    for _ in range(EM_ITERATIONS):
        densities_K2 = _densities(centre_K1, peaks)
        belongs_K2 = mass_K1 * densities_K2 / densities_K2.sum(dim=1, keepdim=True).clamp_min(1e-30)
        share = belongs_K2.sum(dim=0).clamp_min(1e-6)
        mean = (belongs_K2 * centre_K1).sum(dim=0) / share
        variance = (belongs_K2 * (centre_K1 - mean).square()).sum(dim=0) / share
        peaks = Peaks(share, mean, variance.sqrt().clamp_min(_LEAST_STD))
    return peaks


def _densities(cosine: Tensor, peaks: Peaks) -> Tensor:
    density: Tensor = peaks.share / peaks.std * (-0.5 * ((cosine - peaks.mean) / peaks.std).square()).exp()
    return density
