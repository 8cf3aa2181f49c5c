"""Dense, single-process oracles: slow and obvious. Tests hold the heads against them.

Every margin's loss is written out from its paper's formula, one sample and one class after the other; nothing but the
configs is shared with `lgaf.heads`.
"""

# Shape legend: G = global batch, D = embedding, C = all classes

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lgaf.heads.margins import MARGINS, Margin

ADAFACE_FIRST_MEAN: Final = 20.0
ADAFACE_FIRST_STD: Final = 100.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: cosines with all classes [C], its own class, its norm; and what its whole batch has [G]."""

    cosines_C: list[Tensor]
    label: int
    norm: Tensor
    batch_norms_G: Tensor
    batch_targets_G: Tensor
    bias: Tensor

    @property
    def target(self) -> Tensor:
        """Cosine with the own class."""
        return self.cosines_C[self.label]


def dense_margin_loss(
    x_GD: Tensor, labels_G: Tensor, weight_CD: Tensor, margin: Margin, bias: Tensor | None = None
) -> Tensor:
    """Mean loss of a first step (running statistics at their first values), best in float64.

    Args:
        x_GD: Un-normalised embeddings.
        labels_G: Class ids.
        weight_CD: Class centres.
        margin: Its type selects the formula, its fields fill it in.
        bias: UniFace's learned threshold; its first value where absent.
    """
    name = next(name for name, kind in MARGINS.items() if type(margin) is kind)
    if bias is None:
        bias = torch.tensor(math.log(len(weight_CD) * getattr(margin, "r", 1.0) * 10), dtype=x_GD.dtype)
    unit_x = [row / _length(row) for row in x_GD]
    unit_w = [row / _length(row) for row in weight_CD]
    cosines_GC = [[torch.dot(x, w) for w in unit_w] for x in unit_x]
    norms_G = torch.stack([_length(row) for row in x_GD])
    labels = labels_G.tolist()
    targets_G = torch.stack([cosines_GC[i][label] for i, label in enumerate(labels)])
    losses = [
        _LOSSES[name](Sample(cosines_GC[i], label, norms_G[i], norms_G.detach(), targets_G.detach(), bias), margin)
        for i, label in enumerate(labels)
    ]
    return torch.stack(losses).mean()


def _length(row: Tensor) -> Tensor:
    return row.square().sum().sqrt()


def _cos_plus(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """cos(theta + m); at +-1 the derivative of the sine is taken as 0."""
    angle = torch.as_tensor(margin, dtype=cosine.dtype)
    sine = (1 - cosine**2).sqrt() if abs(cosine.item()) < 1 else torch.zeros_like(cosine)
    return cosine * angle.cos() - sine * angle.sin()


def _acos(cosine: Tensor, epsilon: float) -> Tensor:
    return cosine.clamp(-1 + epsilon, 1 - epsilon).acos()


def _cross_entropy(sample: Sample, target: Tensor, negative: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    logits = [scale * (target if j == sample.label else negative(c)) for j, c in enumerate(sample.cosines_C)]
    highest = max(logit.item() for logit in logits)
    exponentials = torch.stack([(logit - highest).exp() for logit in logits])
    return highest + exponentials.sum().log() - logits[sample.label]


def _plain(cosine: Tensor) -> Tensor:
    return cosine


def _arcface(sample: Sample, m: Any) -> Tensor:
    if m.gradient == "straight_through":
        value = math.cos(math.acos(sample.target.item()) + m.margin)
        target = sample.target + (value - sample.target.item())
    else:
        target = (_acos(sample.target, 1e-4) + m.margin).clamp(1e-4, math.pi - 1e-4).cos()
    return _cross_entropy(sample, target, _plain, m.scale)


def _cosface(sample: Sample, m: Any) -> Tensor:
    return _cross_entropy(sample, sample.target - m.margin, _plain, m.scale)


def _combined(sample: Sample, m: Any) -> Tensor:
    if m.gradient == "straight_through":
        value = math.cos(m.m1 * math.acos(sample.target.item()) + m.m2) - m.m3
        target = sample.target + (value - sample.target.item())
    else:
        target = (m.m1 * _acos(sample.target, 1e-4) + m.m2).clamp(1e-4, math.pi - 1e-4).cos() - m.m3

    def negative(cosine: Tensor) -> Tensor:
        filtered = m.interclass_filtering_threshold > 0 and cosine.item() > m.interclass_filtering_threshold
        return cosine * 0 if filtered else cosine

    return _cross_entropy(sample, target, negative, m.scale)


def _adaface(sample: Sample, m: Any) -> Tensor:
    norms_G = sample.batch_norms_G.clamp(1e-3, 100)
    mean = m.t_alpha * norms_G.mean() + (1 - m.t_alpha) * ADAFACE_FIRST_MEAN
    std = m.t_alpha * norms_G.std(unbiased=True) + (1 - m.t_alpha) * ADAFACE_FIRST_STD
    z = (m.h * (sample.norm.detach().clamp(1e-3, 100) - mean) / (std + 1e-3)).clamp(-1, 1)
    angle = (_acos(sample.target, 1e-3) - m.margin * z).clamp(1e-3, math.pi - 1e-3)
    return _cross_entropy(sample, angle.cos() - (m.margin + m.margin * z), _plain, m.scale)


def _magface(sample: Sample, m: Any) -> Tensor:
    a = sample.norm.clamp(m.l_a, m.u_a)
    margin = (m.u_margin - m.l_margin) / (m.u_a - m.l_a) * (a - m.l_a) + m.l_margin
    if m.easy_margin:
        target = _cos_plus(sample.target, margin) if sample.target.item() > 0 else sample.target
    elif sample.target.item() > math.cos(math.pi - margin.item()):
        target = _cos_plus(sample.target, margin)
    else:
        target = sample.target - margin * (math.pi - margin).sin()
    penalty: Tensor = m.lambda_g * (a / m.u_a**2 + 1 / a)
    return _cross_entropy(sample, target, _plain, m.scale) + penalty


def _mv_softmax(sample: Sample, m: Any) -> Tensor:
    if m.variant == "am":
        with_margin, threshold = sample.target - m.margin, m.margin
    else:
        with_margin, threshold = _cos_plus(sample.target, m.margin), 0.0

    def negative(cosine: Tensor) -> Tensor:
        emphasised: Tensor = m.t * cosine + m.t - 1
        return emphasised if cosine.item() > with_margin.item() else cosine

    target = with_margin if sample.target.item() > threshold else sample.target
    return _cross_entropy(sample, target, negative, m.scale)


def _curricularface(sample: Sample, m: Any) -> Tensor:
    with_margin = _cos_plus(sample.target, m.margin)
    t = m.alpha * sample.batch_targets_G.mean()  # from 0

    def negative(cosine: Tensor) -> Tensor:
        return cosine * (t + cosine) if cosine.item() > with_margin.item() else cosine

    beyond = sample.target.item() <= math.cos(math.pi - m.margin)
    target = sample.target - m.margin * math.sin(math.pi - m.margin) if beyond else with_margin
    return _cross_entropy(sample, target, negative, m.scale)


def _uniface(sample: Sample, m: Any) -> Tensor:
    logit = (m.scale * (sample.target - m.margin) - sample.bias).clamp(-m.scale, m.scale)
    total: Tensor = (1 + (-logit).exp()).log()
    for j, cosine in enumerate(sample.cosines_C):
        if j != sample.label:
            total = total + m.l * (1 + (m.scale * cosine - sample.bias).clamp(-m.scale, m.scale).exp()).log()
    return total


_LOSSES: Final[dict[str, Callable[[Sample, Any], Tensor]]] = {
    "arcface": _arcface,
    "cosface": _cosface,
    "combined": _combined,
    "adaface": _adaface,
    "magface": _magface,
    "mv_softmax": _mv_softmax,
    "curricularface": _curricularface,
    "uniface": _uniface,
}
