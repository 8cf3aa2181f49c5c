"""How close the head comes in each precision: float32 to the oracle, bfloat16 to the rounded operands; and how far."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lgaf.heads import fused
from lgaf.heads.centres import LEAST_NORM
from lgaf.heads.chunks import fixed_shift
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.reference import dense_margin_loss
from tests.lgaf.head_problem import DIM, NUM_CLASSES, Recorded, gradients, problem, relative
from tests.lgaf.margin_cases import MARGIN_CASES


@pytest.mark.parametrize("margin", MARGIN_CASES)
@pytest.mark.parametrize(("chunk", "budget"), [(2048, 1 << 30), (37, 1)])
def test_float32_is_within_1e_5_of_the_dense_float64_oracle(margin, chunk, budget):
    x, labels = problem()
    head = ShardedMarginHead(NUM_CLASSES, DIM, margin, seed=1, memory_budget=budget * 30_000)
    with mock.patch.object(fused, "CPU_CHUNK", chunk):
        loss, grad_x, grad_weight = gradients(head, x, labels)
    oracle_x, weight = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    expected = dense_margin_loss(oracle_x, labels, weight, margin)
    expected.backward()
    assert relative(loss, expected.detach()) < 1e-5
    assert relative(grad_x, oracle_x.grad) < 1e-5
    assert relative(grad_weight, weight.grad) < 1e-5


class TestBfloat16:
    """Products of operands rounded to 8 bits; statistics and the target's cosine are float32."""

    def test_loss_is_that_of_the_rounded_operands(self):
        # Rounding aside nothing is lost: so the tolerance against the rounded operands is float32's.
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("cosface", margin=0.2, scale=16.0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(x, labels)
        unit, weight = F.normalize(x), head.weight.detach()
        rounded = unit.bfloat16().double() @ weight.bfloat16().double().T / weight.double().norm(dim=1)
        target = F.cosine_similarity(x.double(), weight[labels].double()) - 0.2
        logits = 16 * rounded.scatter(1, labels[:, None], target[:, None])
        assert relative(loss.detach(), F.cross_entropy(logits, labels)) < 1e-6

    @pytest.mark.parametrize("margin", ["arcface", "curricularface", "uniface"])
    @pytest.mark.parametrize("budget", [1 << 30, 1])
    def test_gradients_are_within_the_rounding_of_one_operand(self, margin, budget):
        # A product of two operands rounded by at most 2^-9 each is off by 2^-8 at most; the errors of many add up at
        # random. The shares change with the logits too, here by scale * 2^-9 / sqrt(D) about.
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin(margin, scale=8.0), memory_budget=budget)
        exact = gradients(head, x, labels)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = gradients(head, x, labels)
        for found, expected in zip(rounded, exact, strict=True):
            assert found.dtype == torch.float32
            assert 0 < relative(found, expected.double()) < 2**-8

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_embeddings_may_come_in_half_precision(self, dtype):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("adaface"))
        half = x.to(dtype).requires_grad_()
        loss = head(half, labels)
        loss.backward()
        assert loss.dtype == torch.float32
        assert half.grad.dtype == dtype
        expected = gradients(head.eval().train(), half.detach().float(), labels)[1]
        torch.testing.assert_close(half.grad, expected.to(dtype), rtol=2**-7, atol=1e-4)

    def test_float16_autocast_leaves_the_products_as_they_are(self):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"))
        expected = gradients(head, x, labels)
        with torch.autocast("cpu", torch.float16):
            found = gradients(head, x, labels)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_a_double_head_stays_double(self):
        x, labels = problem(torch.float64)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface")).double()
        expected = head(x, labels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(x, labels), expected)
        assert expected.dtype == torch.float64

    def test_every_operand_of_a_product_is_rounded(self):
        x, labels = problem()
        for budget in (1 << 30, 1):
            head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface"), memory_budget=budget)
            with Recorded() as recorded, torch.autocast("cpu", torch.bfloat16):
                gradients(head, x, labels)
            assert len(recorded.operands) >= 3
            assert all(torch.equal(value, value.bfloat16().to(value)) for pair in recorded.operands for value in pair)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_coarse_centres_are_refused(self, dtype):
        x, labels = problem()
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("arcface")).to(dtype)
        with pytest.raises(ValueError, match=rf"centres are {dtype}.*under torch.autocast"):
            head(x, labels)


@given(st.floats(0.1, 500), st.integers(1, 10**8), st.sampled_from([torch.float32, torch.float64]))
def test_the_fixed_shift_keeps_everything_within_the_floats(scale, num_classes, dtype):
    shift = fixed_shift(scale, num_classes, dtype)
    if shift is None:
        assert dtype == torch.float32
        assert scale > 64 or num_classes > 10**7
        return
    limits = torch.finfo(dtype)
    longest = -math.log(LEAST_NORM)
    assert scale - shift + longest + math.log(num_classes) < math.log(limits.max)
    assert -scale - shift > math.log(limits.smallest_normal)


def test_a_scale_beyond_the_floats_takes_the_other_way():
    x, labels = problem(scale=1.0)
    margin = create_margin("cosface", scale=300.0)
    assert fixed_shift(300.0, NUM_CLASSES, torch.float32) is None
    head = ShardedMarginHead(NUM_CLASSES, DIM, margin)
    loss, _, grad_weight = gradients(head, x, labels)
    weight = head.weight.detach().double().requires_grad_()
    expected = dense_margin_loss(x.double(), labels, weight, margin)
    expected.backward()
    assert relative(loss, expected.detach()) < 1e-5
    assert relative(grad_weight, weight.grad) < 1e-4
