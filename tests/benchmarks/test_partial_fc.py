"""The rival of the benchmark is right: it equals the dense oracle, so beating it means something."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lgaf.heads.margins import Margin, create_margin
from lgaf.reference import dense_margin_loss
from tests.benchmarks.partial_fc import PartialFCV2
from tests.distributed import run_distributed

DIM, BATCH = 12, 8
MARGINS = [
    create_margin("arcface", gradient="straight_through", scale=16.0),
    create_margin("arcface", gradient="straight_through", margin=2.5, scale=4.0),  # beyond theta + m = pi
    create_margin("cosface", scale=16.0),
]


def _problem(num_classes: int):
    generator = torch.Generator().manual_seed(1)
    x = 10 * torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, num_classes, (BATCH,), generator=generator), weight


def _check_against_dense(group, margin: Margin, num_classes: int) -> None:
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    x_all, labels_all, weight_all = _problem(num_classes)
    dense_x, dense_weight = x_all.clone().requires_grad_(), weight_all.clone().requires_grad_()
    expected = dense_margin_loss(dense_x, labels_all, dense_weight, margin)
    expected.backward()

    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    rival = PartialFCV2(num_classes, DIM, margin, group).double()
    classes = slice(rival.class_start, rival.class_start + rival.num_local)
    rival.weight.data = weight_all[classes].clone()
    x = x_all[own].clone().requires_grad_()
    loss = rival(x, labels_all[own])
    loss.backward()

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, world * dense_x.grad[own], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rival.weight.grad, dense_weight.grad[classes], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("margin", MARGINS)
def test_alone_it_equals_dense(margin):
    _check_against_dense(None, margin, 11)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shared_out_it_equals_dense(margin, world):
    run_distributed(world, _check_against_dense, margin, 11)


@pytest.mark.parametrize("margin", MARGINS)
def test_sampled_it_equals_dense_over_the_sampled_classes(margin):
    x, labels, weight = _problem(40)
    rival = PartialFCV2(40, DIM, margin, sample_rate=0.5, weight=weight)
    loss = rival(x, labels)
    loss.backward()

    index = rival.index
    assert len(index) == 20
    assert torch.equal(index, index.unique())
    assert torch.isin(labels, index).all()
    expected = dense_margin_loss(x, torch.searchsorted(index, labels), weight[index], margin)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    assert rival.weight.grad.layout is torch.strided
    assert torch.equal(rival.weight.grad.any(dim=1).nonzero().squeeze(1), index)


def test_negatives_are_drawn_anew_each_step():
    x, labels, weight = _problem(40)
    rival = PartialFCV2(40, DIM, MARGINS[2], sample_rate=0.5, weight=weight)
    rival(x, labels)
    first = rival.index
    rival(x, labels)
    assert not torch.equal(first, rival.index)


def test_present_identities_are_all_seen_at_the_lowest_rate():
    x, labels, weight = _problem(40)
    rival = PartialFCV2(40, DIM, MARGINS[2], sample_rate=0.05, weight=weight)
    assert torch.isfinite(rival(x, labels))
    assert torch.equal(rival.index, labels.unique())


def test_low_precision_is_the_products_alone():
    x, labels, weight = _problem(11)
    rival = PartialFCV2(11, DIM, MARGINS[2], weight=weight.float())
    exact = rival(x.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = rival(x.float(), labels)
    assert loss.dtype == torch.float32
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_a_margin_that_insightface_has_not_is_refused():
    with pytest.raises(ValueError, match="margin of insightface"):
        PartialFCV2(11, DIM, create_margin("arcface"))
