"""The chunked pass: plans, memory, and what autograd expects of it."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from lgaf.heads.chunks import PlainSoftmaxChunks
from lgaf.heads.fused import plan_chunks
from lgaf.heads.margins import create_margin
from lgaf.heads.margins.base import EMPTY_STATE
from lgaf.heads.margins.cosface import CosFace
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.optim import OptimizerConfig, UpdateInBackward
from tests.lgaf.head_problem import DIM, NUM_CLASSES, ROWS, Recorded, gradients, problem
from tests.lgaf.margin_cases import MARGIN_CASES


class TestAutograd:
    def _head(self, **options):
        return ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface", margin=0.3, scale=16.0), **options).double()

    def test_micro_batches_accumulate(self):
        x, labels = problem(torch.float64)
        head = self._head()
        _, grad_x, grad_weight = gradients(head, x, labels)
        head.weight.grad = None
        x = x.clone().requires_grad_()
        for rows in (slice(0, 4), slice(4, 12)):
            (head(x[rows], labels[rows]) * (len(labels[rows]) / ROWS)).backward()
        torch.testing.assert_close(x.grad, grad_x)
        torch.testing.assert_close(head.weight.grad, grad_weight)

    def test_both_forward_passes_before_both_backward_passes(self):
        x, labels = problem(torch.float64)
        head = self._head()
        expected = gradients(head, x, labels)[2]
        head.weight.grad = None
        first, second = head(x, labels), head(2 * x, labels)
        (first + second).backward()
        torch.testing.assert_close(head.weight.grad, 2 * expected)

    def test_statistics_of_a_later_step_do_not_reach_back(self):
        x, labels = problem(torch.float64)
        margin = create_margin("curricularface", alpha=1.0, scale=8.0)
        for mode in (True, False):  # in evaluation the statistics are the head's own, which training moves
            head = ShardedMarginHead(NUM_CLASSES, DIM, margin, memory_budget=1).double()
            other = ShardedMarginHead(NUM_CLASSES, DIM, margin, memory_budget=1).double()
            near = 50 * head.weight.detach()[labels] + 0.3 * x
            expected = gradients(other.train(mode), near, labels)[1]
            near.requires_grad_()
            first = head.train(mode)(near, labels)
            head.train()(-near.detach(), labels)
            first.backward()
            torch.testing.assert_close(near.grad, expected, rtol=1e-12, atol=0)

    def test_what_was_kept_ends_with_the_backward_pass(self):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
        loss = head(x, labels)
        loss.backward()
        (node,) = set(_nodes(loss.grad_fn, "_FusedBackward"))  # one, met on the ways of both its outputs
        assert not any(isinstance(value, list) for value in vars(node).values())
        with pytest.raises(RuntimeError, match="freed"):
            _ = node.saved_tensors

    def test_nothing_is_kept_where_nothing_is_differentiated(self):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
        add = PlainSoftmaxChunks.add
        kept = []

        def recorded(self, weight, chunk, keep):
            kept.append(keep)
            return add(self, weight, chunk, keep)

        with mock.patch.object(PlainSoftmaxChunks, "add", recorded):
            with torch.no_grad():
                head(x.clone().requires_grad_(), labels)
            head.weight.requires_grad_(False)
            head(x, labels)
            assert kept == [False, False]
            head(x.clone().requires_grad_(), labels)
        assert kept[2:] == [True]

    def test_backward_twice_over_a_kept_graph(self):
        x, labels = problem(torch.float64)
        head = self._head()
        x.requires_grad_()
        loss = head(x, labels)
        loss.backward(retain_graph=True)
        once = head.weight.grad.clone()
        loss.backward()
        torch.testing.assert_close(head.weight.grad, 2 * once)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    def test_numbers_agree_with_finite_differences(self):
        x, labels = problem(torch.float64)
        head = self._head(memory_budget=1).eval()
        assert torch.autograd.gradcheck(
            lambda x, w: torch.func.functional_call(head, {"weight": w}, (x, labels)),
            (x[:, :].clone().requires_grad_(), head.weight.detach().clone().requires_grad_()),
            fast_mode=True,
        )

    def test_gradients_are_made_only_where_asked_for(self):
        x, labels = problem(torch.float64)
        head = self._head()
        _, grad_x, grad_weight = gradients(head, x, labels)
        head.weight.grad = None
        head(x, labels).backward()
        torch.testing.assert_close(head.weight.grad, grad_weight)
        head.weight.requires_grad_(False)
        head.weight.grad = None
        x = x.clone().requires_grad_()
        head(x, labels).backward()
        torch.testing.assert_close(x.grad, grad_x)
        assert head.weight.grad is None
        with torch.no_grad():
            assert not head(x, labels).requires_grad

    def test_centres_changed_before_the_backward_pass_are_noticed(self):
        x, labels = problem(torch.float64)
        head = self._head()
        loss = head(x, labels)
        with torch.no_grad():
            head.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_gradient_scaling_and_clipping(self):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
        _, _, expected = gradients(head, x, labels)
        optimizer = torch.optim.SGD([head.weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        head.weight.grad = None
        scaler.scale(head(x, labels)).backward()
        scaler.unscale_(optimizer)
        torch.testing.assert_close(head.weight.grad, expected)
        norm = torch.nn.utils.clip_grad_norm_([head.weight], 0.5 * expected.norm().item())
        torch.testing.assert_close(norm, expected.norm())
        torch.testing.assert_close(head.weight.grad, 0.5 * expected, rtol=1e-4, atol=1e-8)

    def test_zero_and_tiny_centres_give_finite_gradients(self):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
        with torch.no_grad():
            head.weight[labels[0]] = 0
            head.weight[labels[1]] *= 1e-8
            head.weight[7] = 0
        assert all(value.isfinite().all() for value in gradients(head, x, labels))


def _nodes(node, name: str) -> list:
    if node is None:
        return []
    found = [node] if type(node).__name__ == name else []
    return found + [inner for parent, _ in node.next_functions for inner in _nodes(parent, name)]


@pytest.mark.parametrize("margin", MARGIN_CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_centre_that_is_no_number_makes_the_loss_nan(margin, value):
    x, labels = problem()
    head = ShardedMarginHead(NUM_CLASSES, DIM, margin)
    other = next(c for c in range(NUM_CLASSES) if c not in labels.tolist())
    with torch.no_grad():
        head.weight[other, 0] = value
    loss, grad_x, _ = gradients(head, x, labels)
    assert loss.isnan()
    assert grad_x.isnan().any()


@pytest.mark.parametrize("margin", MARGIN_CASES)
def test_embeddings_on_their_centres_give_finite_gradients(margin):
    _, labels = problem()
    head = ShardedMarginHead(NUM_CLASSES, DIM, margin)
    for sign in (50.0, -50.0):
        values = gradients(head, sign * head.weight.detach()[labels], labels)
        assert all(value.isfinite().all() for value in values)


def test_a_plain_margin_may_learn_a_scalar_too():
    @dataclasses.dataclass(frozen=True)
    class Learned(CosFace):
        def initial_parameters(self, num_classes):
            return {"m": torch.tensor(0.3)}

        def target_logit(self, cosine_N, norm_N=None, state=EMPTY_STATE):
            return self.scale * (cosine_N - state["m"])

    x, labels = problem(torch.float64)
    head = ShardedMarginHead(NUM_CLASSES, DIM, Learned(scale=8.0)).double()
    expected = gradients(ShardedMarginHead(NUM_CLASSES, DIM, CosFace(margin=0.3, scale=8.0)).double(), x, labels)
    found = gradients(head, x, labels)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-9)  # 0.3 is a float32 at first
    assert head.margin_state.m.grad > 0


class TestPlan:
    @given(
        st.integers(1, 10**7),
        st.integers(1, 10**5),
        st.integers(1, 10**5),
        st.integers(1, 2**36),
        st.integers(1, 10**5),
    )
    def test_fits_the_budget_or_is_the_least(self, num_centres, per_class, kept_per_class, budget, largest):
        plan = plan_chunks(num_centres, per_class, kept_per_class, budget, largest)
        assert 1 <= plan.chunk <= min(largest, num_centres)
        assert plan.chunk * per_class <= budget or plan.chunk == 1
        if plan.keep:
            assert plan.chunk * per_class + num_centres * kept_per_class <= budget

    def test_no_tensor_of_all_logits_is_made(self):
        classes, rows = 20_000, 64
        for margin in ("arcface", "curricularface"):
            head = ShardedMarginHead(classes, 16, create_margin(margin), memory_budget=1 << 20)
            # 2^18 numbers fill the budget; only the centres' gradient (and views of the centres) may be larger.
            assert {size for size in _tensor_sizes(head, rows) if size > 1 << 18} <= {classes * 16}
            head = ShardedMarginHead(classes, 16, create_margin(margin))
            assert {size for size in _tensor_sizes(head, rows) if size > 2049 * rows} <= {classes * 16}

    @pytest.mark.parametrize("rate", [1.0, 0.5])
    @pytest.mark.parametrize("in_backward", [False, True])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("margin", ["arcface", "curricularface"])
    def test_temporary_memory_stays_within_the_budget(self, margin, precision, in_backward, rate):
        classes, dim, rows, budget = 8_192, 256, 32, 4 << 20
        head = ShardedMarginHead(classes, dim, create_margin(margin), memory_budget=budget, sample_rate=rate)
        if in_backward:
            UpdateInBackward(head, OptimizerConfig())
        x, labels = torch.randn(rows, dim, requires_grad=True), torch.arange(rows)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = head(x, labels)
            loss.backward()
        held = peak = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        if head.weight.grad is not None:
            peak -= (head.weight.grad._values() if rate < 1 else head.weight.grad).nbytes
        # Besides: norms and ids of the classes, a few matrices of the batch.
        assert budget / 4 < peak < budget + 40 * classes + 16 * 4 * rows * dim

    def test_fewer_products_where_shares_are_kept(self):
        counts = []
        for budget in (1 << 30, 1 << 17):
            head = ShardedMarginHead(5_000, DIM, create_margin("arcface"), memory_budget=budget)
            x, labels = problem()
            with Recorded() as recorded:
                gradients(head, x, labels)
            counts.append(recorded.multiplications / (ROWS * 5_000 * DIM))
        assert counts == [3, 4]


def _tensor_sizes(head, rows: int) -> list[int]:
    x = torch.randn(rows, head.embedding_dim, requires_grad=True)
    with Recorded() as sizes:
        head(x, torch.arange(rows)).backward()
    return sizes.seen
