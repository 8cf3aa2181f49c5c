"""Margins against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lgaf.heads.margins import MARGINS, create_margin

COSINES = torch.tensor([-1.0, -0.99, -0.9, -0.3, 0.0, 0.3, 0.9, 0.99, 1.0], dtype=torch.float64)


def _arcface(cosine: float, margin: float) -> float:
    epsilon = 1e-4
    theta = math.acos(min(max(cosine, -1 + epsilon), 1 - epsilon))
    return math.cos(min(max(theta + margin, epsilon), math.pi - epsilon))


ORACLES = {"arcface": _arcface, "cosface": lambda cosine, margin: cosine - margin}


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.4, 0.5])
def test_values_equal_the_formula(name, margin):
    logits = create_margin(name, margin=margin, scale=64.0).target_logit(COSINES, None)
    expected = [64.0 * ORACLES[name](cosine, margin) for cosine in COSINES.tolist()]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-10)


def test_arcface_beyond_pi_is_clipped_as_in_the_adaface_repository():
    # The three published variants give -59.9, -64.0 and -78.7 here; this is the second.
    logit = create_margin("arcface", margin=0.5).target_logit(torch.tensor([-0.99]), None)
    assert logit.item() == pytest.approx(-64.0, abs=1e-3)


def test_arcface_gradient_is_that_of_the_angle():
    # The straight-through variant would give 64.0.
    cosine = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    create_margin("arcface", margin=0.5).target_logit(cosine, None).sum().backward()
    assert cosine.grad.item() == pytest.approx(65.8, abs=0.05)


@pytest.mark.parametrize("name", MARGINS)
def test_finite_and_rising_with_the_cosine(name):
    cosine = COSINES.clone().requires_grad_()
    logits = create_margin(name).target_logit(cosine, None)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(cosine.grad).all()
    assert (logits.diff() >= 0).all()


@pytest.mark.parametrize("name", MARGINS)
def test_no_margin_is_plain_scaled_softmax(name):
    logits = create_margin(name, margin=0.0, scale=30.0).target_logit(COSINES[1:-1], None)
    torch.testing.assert_close(logits, 30.0 * COSINES[1:-1])


def test_unknown_names_and_values_are_named():
    with pytest.raises(ValueError, match=r"margin='arcfase'.*did you mean 'arcface'"):
        create_margin("arcfase")
    with pytest.raises(ValueError, match=r"head.scale=0"):
        create_margin("cosface", scale=0.0)
    with pytest.raises(ValueError, match=r"head.margin=4"):
        create_margin("arcface", margin=4.0)
