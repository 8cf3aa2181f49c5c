"""Partial FC: what is drawn, what a step touches, and the updates of its optimizer, also within the backward pass."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lgaf.heads import centres, sampling
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import create_margin
from lgaf.heads.sampling import sampled_rows
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.optim import OptimizerConfig, UpdateInBackward
from lgaf.reference import dense_margin_loss
from tests.distributed import run_distributed
from tests.lgaf.margin_cases import MARGIN_CASES

NUM_CLASSES, DIM, ROWS, RATE = 200, 8, 6, 0.3
RECIPE = OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01)


def _problem(seed: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, NUM_CLASSES, (ROWS,), generator=generator)
    labels[3] = labels[5]
    return x.to(dtype), labels


class TestDraw:
    def test_holds_the_batch_and_about_its_share_of_the_others(self):
        labels = torch.tensor([7, 99_999, 50_000, 7])
        rows = sampled_rows(range(100_000), labels, 0.1, seed=1, step=5)
        assert set(labels.tolist()) <= set(rows.tolist())
        assert torch.equal(rows, rows.unique())  # each once, ascending
        assert abs(len(rows) - 10_000) < 5 * (100_000 * 0.1 * 0.9) ** 0.5

    def test_is_a_function_of_seed_step_and_class(self):
        labels = torch.tensor([3])
        first = sampled_rows(range(5_000), labels, 0.2, seed=1, step=5)
        assert torch.equal(first, sampled_rows(range(5_000), labels, 0.2, seed=1, step=5))
        for other in (
            sampled_rows(range(5_000), labels, 0.2, seed=2, step=5),
            sampled_rows(range(5_000), labels, 0.2, seed=1, step=6),
            sampled_rows(range(5_000), labels, 0.2, seed=6, step=1),
            sampled_rows(range(5_000), labels, 0.2, seed=5, step=1),
            sampled_rows(range(5_000), labels, 0.2, seed=0, step=6),  # the same sum
        ):
            # Two draws share no more than chance has it.
            shared = len(set(first.tolist()) & set(other.tolist()))
            assert abs(shared - 200) < 5 * 200**0.5

    def test_every_class_has_its_turn_and_neighbours_are_independent(self):
        steps = torch.stack(
            [
                torch.zeros(300).index_fill(0, sampled_rows(range(300), torch.tensor([400]), 0.1, 0, step), 1.0)
                for step in range(2_000)
            ]
        )
        counts = steps.sum(dim=0)
        assert (counts - 200).abs().max() < 5 * 180**0.5
        together = (steps[:, :-1] * steps[:, 1:]).sum() / steps[:, 1:].numel()
        assert together == pytest.approx(0.01, rel=0.05)

    def test_does_not_depend_on_the_block(self):
        labels = torch.tensor([3, 999])
        whole = sampled_rows(range(500, 1_500), labels, 0.2, seed=1, step=5)
        with mock.patch.object(sampling, "BLOCK", 7):
            assert torch.equal(sampled_rows(range(500, 1_500), labels, 0.2, seed=1, step=5), whole)
        assert 499 in whole.tolist()
        # A label of another rank is no row of this one.
        assert torch.equal(sampled_rows(range(500, 1_500), labels[1:], 0.2, seed=1, step=5), whole)

    @given(st.integers(1, 3_000), st.integers(1, 6), st.floats(1e-6, 1.0), st.integers(0, 2**31))
    def test_does_not_depend_on_the_world_size(self, num_classes, world, rate, step):
        world = min(world, num_classes)
        labels = torch.tensor([num_classes // 2, 0, num_classes - 1])
        parts = []
        for rank in range(world):
            classes = class_range(num_classes, world, rank)
            parts.append(sampled_rows(classes, labels, rate, 4, step) + classes.start)
        assert torch.equal(torch.cat(parts), sampled_rows(range(num_classes), labels, rate, 4, step))
        if rate == 1.0:
            assert len(torch.cat(parts)) == num_classes


@pytest.mark.parametrize("margin", MARGIN_CASES)
def test_equals_the_dense_head_over_the_drawn_classes(margin):
    x, labels = _problem()
    head = ShardedMarginHead(NUM_CLASSES, DIM, margin, sample_rate=RATE, seed=3).double()
    head.step = 17
    own_x = x.clone().requires_grad_()
    with mock.patch.object(centres, "INIT_BLOCK", 16):  # lengths are taken in blocks
        loss = head(own_x, labels)
    loss.backward()

    rows = sampled_rows(range(NUM_CLASSES), labels, RATE, 3, 17)
    dense_x, weight = x.clone().requires_grad_(), head.weight.detach()[rows].requires_grad_()
    bias = next(head.margin_state.parameters(), None)
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    expected = dense_margin_loss(dense_x, torch.searchsorted(rows, labels), weight, margin, bias)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_x.grad, dense_x.grad, rtol=1e-10, atol=1e-12)
    gradient = head.weight.grad
    assert gradient.is_sparse
    assert torch.equal(gradient.coalesce().indices()[0], rows)
    torch.testing.assert_close(gradient.coalesce().values(), weight.grad, rtol=1e-10, atol=1e-12)
    if bias is not None:
        torch.testing.assert_close(next(head.margin_state.parameters()).grad, bias.grad, rtol=1e-10, atol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_a_rate_of_one_is_exact(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, num_classes, (4,), generator=generator)
    head = ShardedMarginHead(num_classes, DIM, create_margin("arcface"), sample_rate=1.0).double()
    loss = head(x, labels)
    (expected,) = torch.autograd.grad(loss, head.weight, retain_graph=True)
    drawn = ShardedMarginHead(num_classes, DIM, create_margin("arcface"), sample_rate=1.0).double()
    drawn._samples = lambda: True  # the way of a sample, with all classes in it
    sampled_loss = drawn(x, labels)
    (gradient,) = torch.autograd.grad(sampled_loss, drawn.weight)
    assert gradient.is_sparse
    torch.testing.assert_close(sampled_loss, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient.to_dense(), expected, rtol=1e-12, atol=1e-14)


def test_evaluation_sees_all_classes_and_draws_nothing():
    x, labels = _problem()
    head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("cosface"), sample_rate=RATE).double()
    head.eval()
    expected = dense_margin_loss(x, labels, head.weight.detach(), head.margin)
    torch.testing.assert_close(head(x, labels).detach(), expected)
    assert head.step == 0
    head.train()
    assert head(x, labels) < expected  # fewer classes to compare with
    assert head.step == 1


def _trained(group, steps: int, in_backward: bool, rate: float, dtype=torch.float64):
    """Head, momentum and losses after some steps of fixed batches."""
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    head = ShardedMarginHead(
        NUM_CLASSES,
        DIM,
        create_margin("arcface", scale=8.0),
        group=group,
        sample_rate=rate,
        seed=3,
        memory_budget=5_000,
    ).to(dtype)
    optimizer = None
    if in_backward:
        UpdateInBackward(head, RECIPE)
    else:
        optimizer = RECIPE.build([head])
    losses = []
    for step in range(steps):
        x, labels = _problem(step, dtype)
        rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        loss = head(x[rows], labels[rows])
        head.weight.grad = None
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    buffer = head.update.momentum_buffer if in_backward else optimizer.state[head.weight]["momentum_buffer"]
    return head, buffer, losses


@pytest.mark.parametrize("rate", [1.0, RATE])
def test_an_update_within_the_backward_pass_is_that_of_the_optimizer(rate):
    head, buffer, losses = _trained(None, 6, False, rate)
    other, other_buffer, other_losses = _trained(None, 6, True, rate)
    assert other.weight.grad is None
    torch.testing.assert_close(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-12, atol=0)
    torch.testing.assert_close(other.weight, head.weight, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(other_buffer, buffer, rtol=1e-11, atol=1e-14)
    assert losses[-1] != losses[0]


def test_a_second_backward_pass_with_updates_is_told_what_is_wrong():
    head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
    UpdateInBackward(head, RECIPE)
    x, labels = _problem(dtype=torch.float32)
    first, second = head(x, labels), head(x, labels)
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        second.backward()
    assert caught.value.__notes__ == [
        "the centres moved in another backward pass: with an update in it, each one is a step"
    ]


def test_an_update_made_before_its_head_moved_is_refused():
    head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
    UpdateInBackward(head, RECIPE)
    head.double()
    x, labels = _problem()
    with pytest.raises(ValueError, match=r"float64 on cpu, their momentum torch.float32 on cpu: move the head first"):
        head(x, labels).backward()


def _check_sampled_shards(group, in_backward: bool, weight, buffer, losses) -> None:
    head, own_buffer, own_losses = _trained(group, 6, in_backward, RATE)
    classes = slice(head.classes.start, head.classes.stop)
    torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-12, atol=0)
    torch.testing.assert_close(head.weight.detach(), weight[classes], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(own_buffer, buffer[classes], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("world", "in_backward"), [(2, False), (3, False), (3, True)])
def test_sampled_training_over_several_ranks_equals_that_of_one(world, in_backward):
    head, buffer, losses = _trained(None, 6, False, RATE)
    run_distributed(world, _check_sampled_shards, in_backward, head.weight.detach(), buffer, losses)


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_was_not_drawn_stays_to_the_bit(in_backward):
    head, buffer, _ = _trained(None, 3, in_backward, RATE, torch.float32)
    weight, momentum = head.weight.detach().clone(), buffer.clone()
    x, labels = _problem(50, torch.float32)
    rows = sampled_rows(range(NUM_CLASSES), labels, RATE, 3, head.step)
    untouched = torch.ones(NUM_CLASSES, dtype=torch.bool).index_fill(0, rows, False)
    optimizer = RECIPE.build([head])
    optimizer.state[head.weight]["momentum_buffer"] = buffer
    head.weight.grad = None
    head(x, labels).backward()
    if not in_backward:
        optimizer.step()
    assert torch.equal(head.weight[untouched], weight[untouched])
    assert torch.equal(buffer[untouched], momentum[untouched])
    assert momentum[untouched].any(), "some of them had momentum that could have run on"
    assert not (head.weight[rows] == weight[rows]).any(dim=1).all()
    assert (buffer[rows] != momentum[rows]).any(dim=1).all()
