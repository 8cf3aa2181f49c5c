"""The class-sharded head equals the dense one: loss and gradients, uneven shards and batches included."""

from __future__ import annotations

import math
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import Margin, create_margin
from lgaf.heads.screening import SampleScreening
from lgaf.heads.sharded import ShardedMarginHead, initial_centres
from lgaf.reference import dense_margin_loss
from tests.distributed import run_distributed
from tests.lgaf.margin_cases import MARGIN_CASES

DIM = 12
SIZES = {1: [7], 2: [4, 3], 3: [5, 0, 2]}  # rows per rank; one rank of three has none


def _problem(num_classes: int):
    generator = torch.Generator().manual_seed(1)
    x = 10 * torch.randn(7, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (7,), generator=generator)
    return x, labels


def _check_against_dense(group, margin: Margin, num_classes: int) -> None:
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    x_all, labels_all = _problem(num_classes)

    dense_x = x_all.clone().requires_grad_()
    dense_weight = initial_centres(range(num_classes), DIM, seed=3).double().requires_grad_()
    # As the head keeps it: a float32 at first.
    bias = torch.tensor(math.log(num_classes * getattr(margin, "r", 1) * 10)).double().requires_grad_()
    expected = dense_margin_loss(dense_x, labels_all, dense_weight, margin, bias)
    expected.backward()

    low = sum(SIZES[world][:rank])
    own = slice(low, low + SIZES[world][rank])
    head = ShardedMarginHead(num_classes, DIM, margin, group=group, seed=3).double()
    x = x_all[own].clone().requires_grad_()
    loss = head(x, labels_all[own])
    loss.backward()

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dense_x.grad[own], rtol=1e-10, atol=1e-12)
    classes = slice(head.classes.start, head.classes.stop)
    torch.testing.assert_close(head.weight.grad, dense_weight.grad[classes], rtol=1e-10, atol=1e-12)
    for parameter in head.margin_state.parameters():
        torch.testing.assert_close(parameter.grad, bias.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("margin", MARGIN_CASES)
@pytest.mark.parametrize("num_classes", [3, 10, 11])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradients_equal_dense(margin, num_classes, world):
    run_distributed(world, _check_against_dense, margin, num_classes)


@pytest.mark.parametrize("margin", MARGIN_CASES)
def test_without_a_process_group(margin):
    _check_against_dense(None, margin, 10)


def _check_weights_and_norms(group) -> None:
    rank = dist.get_rank(group)
    margin = create_margin("magface", scale=8.0)
    x_all, labels_all = _problem(10)
    weights, norms = torch.linspace(0, 3, 7, dtype=torch.float64), torch.linspace(5, 60, 7, dtype=torch.float64)
    alone = ShardedMarginHead(10, DIM, margin).double()
    norms_alone, weights_alone = norms.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = alone(x_all, labels_all, norms_alone, weights_alone)
    expected.backward()

    low = sum(SIZES[dist.get_world_size(group)][:rank])
    own = slice(low, low + SIZES[dist.get_world_size(group)][rank])
    head = ShardedMarginHead(10, DIM, margin, group=group).double()
    own_norms, own_weights = norms[own].clone().requires_grad_(), weights[own].clone().requires_grad_()
    loss = head(x_all[own], labels_all[own], own_norms, own_weights)
    loss.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_norms.grad, norms_alone.grad[own], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(own_weights.grad, weights_alone.grad[own], rtol=1e-10, atol=1e-12)
    classes = slice(head.classes.start, head.classes.stop)
    torch.testing.assert_close(head.weight.grad, alone.weight.grad[classes], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_weights_and_norms_travel_with_their_rows(world):
    run_distributed(world, _check_weights_and_norms)


@pytest.mark.parametrize("margin", ["cosface", "magface"])
def test_weights_multiply_the_losses_penalty_and_all(margin):
    x, labels = _problem(10)
    head = ShardedMarginHead(10, DIM, create_margin(margin)).double()
    each = torch.stack([head(x[i : i + 1], labels[i : i + 1]) for i in range(7)])
    weights = torch.linspace(0, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(head(x, labels, weights_B=weights), (each * weights).mean())


def _check_rank_without_classes(group) -> None:
    # Five classes over four ranks: ceil shares leave the last rank none.
    head = ShardedMarginHead(5, DIM, create_margin("cosface"), group=group).double()
    assert len(head.classes) == [2, 2, 1, 0][dist.get_rank(group)]
    x = torch.randn(2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    loss = head(x.requires_grad_(), torch.tensor([0, 4]))
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad.abs().sum() > 0


def test_a_rank_may_own_no_class():
    run_distributed(4, _check_rank_without_classes)


def _count_collectives(group, margin: str, screening: SampleScreening | None, expected: dict[str, int]) -> None:
    counts = Counter()
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all")
    originals = {name: getattr(dist, name) for name in names}

    def counted(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    head = ShardedMarginHead(10, DIM, create_margin(margin), group=group, screening=screening)
    with mock.patch.multiple(dist, **{name: counted(name) for name in names}):
        head(torch.randn(3, DIM, requires_grad=True), torch.tensor([1, 5, 9])).backward()
    assert counts == {"all_gather_into_tensor": 3, "reduce_scatter_tensor": 1} | expected


@pytest.mark.parametrize(
    ("margin", "screening", "more"),
    [
        *((name, None, {}) for name in ("arcface", "cosface", "combined", "adaface", "magface")),
        # Target cosines for all ranks; the gradient of the learned threshold.
        *((name, None, {"all_reduce": 1}) for name in ("mv_softmax", "curricularface", "uniface")),
        ("arcface", SampleScreening(), {"all_reduce": 1}),
    ],
)
def test_four_collectives_a_step_and_one_more_where_needed(margin, screening, more):
    run_distributed(2, _count_collectives, margin, screening, more)


@given(st.integers(1, 200), st.integers(1, 20))
def test_ranges_partition_the_classes(num_classes, world):
    if num_classes < world:
        with pytest.raises(ValueError, match=f"num_classes={num_classes}"):
            class_range(num_classes, world, 0)
        return
    owned = [c for rank in range(world) for c in class_range(num_classes, world, rank)]
    assert owned == list(range(num_classes))


@given(st.integers(1, 9000), st.integers(1, 4))
def test_initial_centres_depend_on_the_class_alone(num_classes, world):
    world = min(world, num_classes)
    shards = [initial_centres(class_range(num_classes, world, rank), 2, seed=5) for rank in range(world)]
    assert torch.equal(torch.cat(shards), initial_centres(range(num_classes), 2, seed=5))
    assert shards[0][0].ne(initial_centres(range(num_classes), 2, seed=6)[0]).any()


def test_initial_centres_are_those_of_a_normal_distribution():
    centres = initial_centres(range(10_000), 16, seed=0)
    assert abs(centres.std().item() - 0.01) < 2e-4
    assert len(torch.unique(centres[:, 0])) > 9_900


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda h: h(torch.randn(2, DIM), torch.tensor([0, 10])), r"labels in \[0, 10\].*10 classes"),
        (lambda h: h(torch.randn(2, DIM), torch.tensor([-1, 1])), r"labels in \[-1, 1\]"),
        (lambda h: h(torch.randn(2, DIM), torch.tensor([1])), "2 embeddings came with 1 labels"),
        (lambda h: h(torch.randn(2, DIM), torch.tensor([1, 2]), None, torch.ones(2, 1)), r"weights of shape \[2, 1\]"),
        (lambda h: h(torch.randn(2, DIM), torch.tensor([[1], [2]])), r"labels of shape \[2, 1\]"),
        (lambda h: h(torch.randn(2, DIM), torch.tensor([1, 2]), torch.ones(3)), "2 embeddings came with 3 norms"),
        (lambda h: h(torch.randn(1, DIM), torch.tensor([1]), None, torch.ones(2)), "1 embeddings came with 2 weights"),
    ],
)
def test_bad_labels_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call(ShardedMarginHead(10, DIM, create_margin("arcface")))


def test_only_the_exact_head_exists():
    with pytest.raises(ValueError, match=r"sample_rate=0.1"):
        ShardedMarginHead(10, DIM, create_margin("arcface"), sample_rate=0.1)
