"""Partial FC: what is drawn, what a step touches, and the updates of its optimizer, also within the backward pass."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lgaf import optim
from lgaf.heads import centres, sampling
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import create_margin
from lgaf.heads.sampling import sampled_rows
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.optim import SampledSGD, SGDConfig, UpdateInBackward, clip_gradients
from lgaf.reference import dense_margin_loss
from tests.distributed import run_distributed
from tests.lgaf.margin_cases import MARGIN_CASES

NUM_CLASSES, DIM, ROWS, RATE = 200, 8, 6, 0.3
RECIPE = SGDConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01)


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


class TestSampledSGD:
    def _parameter(self, gradient: torch.Tensor) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
        parameter.grad = gradient
        return parameter

    def _optimizer(self, parameter: torch.nn.Parameter, kind=SampledSGD):
        optimizer = kind([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.5)
        return optimizer

    def test_dense_gradients_are_torchs(self):
        gradient = torch.randn(20, 3)
        ours, theirs = self._parameter(gradient.clone()), self._parameter(gradient.clone())
        self._optimizer(ours).step()
        self._optimizer(theirs, torch.optim.SGD).step()
        assert torch.equal(ours, theirs)

    def test_rows_of_a_sparse_gradient_move_as_torch_would_move_them(self):
        rows, values = torch.tensor([4, 9, 10]), torch.randn(3, 3)
        sparse = torch.sparse_coo_tensor(rows[None], values, (20, 3), check_invariants=True)
        ours, theirs = self._parameter(sparse), self._parameter(sparse.to_dense())
        before = ours.detach().clone()
        optimizer = self._optimizer(ours)
        optimizer.step()
        self._optimizer(theirs, torch.optim.SGD).step()
        assert torch.equal(ours[rows], theirs[rows])
        others = [row for row in range(20) if row not in rows.tolist()]
        assert torch.equal(ours[others], before[others])
        assert (optimizer.state[ours]["momentum_buffer"][others] == 0.5).all()
        assert ours.grad is not None
        assert ours.grad.is_sparse

    def test_gradients_of_two_backward_passes_are_summed_before_they_count(self):
        rows = torch.tensor([4, 9, 4])
        values = torch.randn(3, 3)
        twice = self._parameter(torch.sparse_coo_tensor(rows[None], values, (20, 3), check_invariants=True))
        once = self._parameter(
            torch.sparse_coo_tensor(
                torch.tensor([[4, 9]]),
                torch.stack([values[0] + values[2], values[1]]),
                (20, 3),
                check_invariants=True,
            )
        )
        self._optimizer(twice).step()
        self._optimizer(once).step()
        torch.testing.assert_close(twice, once)

    def test_rows_that_stand_twice_side_by_side_are_summed(self):
        values = torch.randn(3, 3)
        rows = torch.tensor([[4, 4, 9]])
        twice = self._parameter(torch.sparse_coo_tensor(rows, values, (20, 3), check_invariants=True))
        dense = self._parameter(twice.grad.to_dense())
        self._optimizer(twice).step()
        self._optimizer(dense, torch.optim.SGD).step()
        torch.testing.assert_close(twice[[4, 9]], dense[[4, 9]])

    def test_rows_move_in_blocks_by_the_rule_of_their_group_beside_dense_ones(self):
        rows, values = torch.tensor([1, 4, 9, 10, 15]), torch.randn(5, 3)
        sparse = torch.sparse_coo_tensor(rows[None], values, (20, 3), check_invariants=True)
        ours = [self._parameter(torch.randn(20, 3)), self._parameter(sparse)]
        theirs = [self._parameter(ours[0].grad.clone()), self._parameter(sparse.to_dense())]
        both = []
        for kind, (first, second) in ((SampledSGD, ours), (torch.optim.SGD, theirs)):
            groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second], "lr": 0.7, "weight_decay": 0.3}]
            both.append(kind(groups, lr=0.1, momentum=0.9))
        with mock.patch.object(optim, "ROWS_AT_ONCE", 2):
            for optimizer in both:
                optimizer.step()
                optimizer.step()
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1][rows], theirs[1][rows])

    def test_its_buffers_are_saved_and_restored(self):
        rows = torch.tensor([[4, 9]])
        sparse = torch.sparse_coo_tensor(rows, torch.randn(2, 3), (20, 3), check_invariants=True)
        parameters = [self._parameter(sparse), self._parameter(sparse)]
        first, second = (SampledSGD([parameter], lr=0.1, momentum=0.9) for parameter in parameters)
        first.step()  # made by itself, without buffers at first
        with torch.no_grad():
            parameters[1].copy_(parameters[0])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        first.step()
        second.step()
        assert torch.equal(parameters[0], parameters[1])

    def test_hooks_of_a_step_run_once(self):
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)  # torch wraps the class's own step then
        parameter = self._parameter(torch.ones(20, 3))
        optimizer, calls = self._optimizer(parameter), []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        optimizer.step()
        assert calls == [1]

    def test_works_with_a_gradient_scaler_and_a_closure(self):
        x, labels = _problem(dtype=torch.float32)
        heads = []
        for scale in (1.0, 1024.0):
            head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("cosface"), sample_rate=RATE, seed=3)
            optimizer, scaler = RECIPE.build([head]), torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(head(x, labels)).backward()
            scaler.step(optimizer)
            heads.append(head)
        torch.testing.assert_close(heads[1].weight, heads[0].weight)

        def closure() -> float:
            optimizer.zero_grad()
            loss = heads[1](x, labels)
            loss.backward()
            return loss.item()

        before = heads[1].weight.detach().clone()
        assert optimizer.step(closure) > 0
        assert not torch.equal(heads[1].weight, before)


class TestClipping:
    def _parameters(self) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((20, 3), (4, 5), (6,))]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return parameters

    @pytest.mark.parametrize("max_norm", [0.5, 100.0])
    def test_is_torchs_for_dense_and_sparse_gradients(self, max_norm):
        ours, theirs = self._parameters(), self._parameters()
        sparse = ours[0].grad.to_sparse(1)
        # One row in two parts, as after two backward passes.
        ours[0].grad = torch.sparse_coo_tensor(
            torch.cat([sparse.indices(), sparse.indices()[:, :1]], 1),
            torch.cat([sparse.values()[:1] * 0.25, sparse.values()[1:], sparse.values()[:1] * 0.75]),
            (20, 3),
            check_invariants=True,
        )
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close(clip_gradients(ours[1:], ours[:1], max_norm, None), expected)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad.to_dense(), other.grad)

    def test_shards_count_as_the_one_tensor_they_are(self):
        run_distributed(2, _check_clipped_shards)

    def test_no_gradient_is_norm_0(self):
        assert clip_gradients([torch.nn.Parameter(torch.ones(2))], [], 1.0, None) == 0

    def test_the_norm_must_be_positive(self):
        with pytest.raises(ValueError, match="max_norm=0 must be greater than 0"):
            clip_gradients([], [], 0, None)


def _check_clipped_shards(group) -> None:
    whole, other = TestClipping()._parameters()[:2]
    shard = torch.nn.Parameter(torch.zeros(10, 3))
    rows = slice(10 * dist.get_rank(group), 10 * dist.get_rank(group) + 10)
    shard.grad = whole.grad[rows].clone()
    replicated = torch.nn.Parameter(torch.zeros(4, 5))
    replicated.grad = other.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_([whole, other], 0.5)
    torch.testing.assert_close(clip_gradients([replicated], [shard], 0.5, group), expected)
    torch.testing.assert_close(shard.grad, whole.grad[rows])
    torch.testing.assert_close(replicated.grad, other.grad)
