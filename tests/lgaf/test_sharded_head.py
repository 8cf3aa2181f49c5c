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
from torch.nn import functional as F

from lgaf.distributed import ALL_GATHER, REDUCE_SCATTER
from lgaf.heads import fused
from lgaf.heads.centres import Centres, initial_centres
from lgaf.heads.class_shard import class_range
from lgaf.heads.global_batch import NonFiniteEmbeddingError
from lgaf.heads.margins import MARGINS, Margin, create_margin
from lgaf.heads.screening import SampleScreening
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.optim import OptimizerConfig
from lgaf.reference import dense_margin_loss
from tests.distributed import run_distributed
from tests.lgaf.margin_cases import MARGIN_CASES

DIM = 12
LABELS = torch.tensor([1, 2])
SIZES = {1: [7], 2: [4, 3], 3: [5, 0, 2], 4: [0, 1, 5, 1]}  # rows per rank; some have none


def _problem(num_classes: int):
    generator = torch.Generator().manual_seed(1)
    x = 10 * torch.randn(7, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (7,), generator=generator)
    return x, labels


def _dense(margin: Margin, num_classes: int):
    """Loss and gradients of the oracle: of embeddings, centres and learned scalars."""
    x, labels = _problem(num_classes)
    x.requires_grad_()
    weight = initial_centres(range(num_classes), DIM, seed=3).double().requires_grad_()
    # As the head keeps it: a float32 at first.
    bias = torch.tensor(math.log(num_classes * getattr(margin, "r", 1) * 10)).double().requires_grad_()
    loss = dense_margin_loss(x, labels, weight, margin, bias)
    loss.backward()
    return loss.detach(), x.grad, weight.grad, bias.grad


def _check_against_dense(group, margin: Margin, num_classes: int, expected, chunk: int, budget: int) -> None:
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    x_all, labels_all = _problem(num_classes)
    low = sum(SIZES[world][:rank])
    own = slice(low, low + SIZES[world][rank])
    head = ShardedMarginHead(num_classes, DIM, margin, group=group, seed=3, memory_budget=budget).double()
    x = x_all[own].clone().requires_grad_()
    with mock.patch.object(fused, "CPU_CHUNK", chunk):
        loss = head(x, labels_all[own])
        loss.backward()

    expected_loss, expected_x, expected_weight, expected_bias = expected
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, expected_x[own], rtol=1e-10, atol=1e-12)
    classes = slice(head.classes.start, head.classes.stop)
    torch.testing.assert_close(head.weight.grad, expected_weight[classes], rtol=1e-10, atol=1e-12)
    for parameter in head.margin_state.parameters():
        torch.testing.assert_close(parameter.grad, expected_bias, rtol=1e-10, atol=1e-12)


def _check_sizes_and_plans(group, margin: Margin, expected) -> None:
    for num_classes, dense in expected:
        # One chunk, kept; chunks that do not divide, kept; the same, computed again; chunks of one class.
        for chunk, budget in ((2048, 1 << 30), (3, 1 << 30), (3, 10_000), (2048, 1)):
            _check_against_dense(group, margin, num_classes, dense, chunk, budget)


def _check_margins(group, cases) -> None:
    for margin, expected in cases:
        try:
            _check_sizes_and_plans(group, margin, expected)
        except AssertionError as error:
            error.add_note(f"with {margin}")
            raise


@pytest.fixture(scope="module")
def dense_cases():
    """Margins with what the oracle says at several numbers of classes."""
    margins = [case.values[0] for case in MARGIN_CASES]
    return [(margin, [(n, _dense(margin, n)) for n in (4, 5, 10, 11)]) for margin in margins]


@pytest.mark.parametrize("world", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_and_gradients_equal_dense(world, dense_cases):
    run_distributed(world, _check_margins, dense_cases)


@pytest.mark.parametrize("margin", MARGIN_CASES)
def test_without_a_process_group(margin):
    _check_sizes_and_plans(None, margin, [(n, _dense(margin, n)) for n in (1, 2, 10)])


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


def _check_rank_without_classes(group, margin: Margin) -> None:
    # Five classes over four ranks: ceil shares leave the last rank none.
    head = ShardedMarginHead(5, DIM, margin, group=group).double()
    assert len(head.classes) == [2, 2, 1, 0][dist.get_rank(group)]
    x = torch.randn(2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    loss = head(x.requires_grad_(), torch.tensor([0, 4]))
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("margin", ["cosface", "curricularface", "uniface"])
def test_a_rank_may_own_no_class(margin):
    run_distributed(4, _check_rank_without_classes, create_margin(margin))


NAMES = ("all_reduce", "all_gather", ALL_GATHER, REDUCE_SCATTER, "broadcast", "all_to_all_single")


def _count_collectives(group, margin: str, screening: SampleScreening | None, expected: dict[str, int]) -> None:
    counts = Counter()
    originals = {name: getattr(dist, name) for name in NAMES}

    def counted(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    head = ShardedMarginHead(10, DIM, create_margin(margin), group=group, screening=screening)
    rank = dist.get_rank(group)

    def step(rows: int, sizes: list[int] | None) -> Counter:
        counts.clear()
        x = torch.randn(rows, DIM, requires_grad=True)
        head(x, torch.arange(rows), weights_B=torch.ones(rows), sizes=sizes).backward()
        return +counts

    with mock.patch.multiple(dist, **{name: counted(name) for name in NAMES}):
        one_more = Counter({ALL_GATHER: 1})
        # Once: the settings are compared. And nobody knows yet how long batches are.
        assert step(3 + rank, None) == Counter(expected) + one_more + one_more
        for rows in (4 - rank, rank, 3 + rank):  # one of them empty
            assert step(rows, None) == expected
        assert sum(expected.values()) <= 4
        assert step(5 + rank, [5, 6]) == expected
        assert step(5, None) == Counter(expected) + one_more


@pytest.mark.parametrize("screening", [None, SampleScreening()])
@pytest.mark.parametrize("margin", MARGINS)
def test_at_most_four_collectives_a_step(margin, screening):
    expected = {ALL_GATHER: 2, REDUCE_SCATTER: 1}
    if margin in ("mv_softmax", "curricularface"):
        expected["all_reduce"] = 1  # the other classes' logits need the target cosines of all ranks
    run_distributed(2, _count_collectives, margin, screening, expected)


def _check_overlap(group) -> None:
    head = ShardedMarginHead(10, DIM, create_margin("cosface"), group=group)
    head(torch.randn(2, DIM), torch.tensor([1, 3]))  # settings are compared, sizes learned
    order, gather, lengths = [], getattr(dist, ALL_GATHER), Centres.all

    def gathered(*arguments, async_op=False, **options):
        order.append("sent without waiting" if async_op else "gathered")
        work = gather(*arguments, async_op=async_op, **options)
        return mock.Mock(wait=lambda: (order.append("waited for"), work.wait())) if async_op else work

    def measured(weight):
        order.append("lengths of the centres")
        return lengths(weight)

    with mock.patch.object(dist, ALL_GATHER, gathered), mock.patch.object(Centres, "all", measured):
        head(torch.randn(2, DIM), torch.tensor([1, 3]))
    assert order == ["sent without waiting", "lengths of the centres", "waited for", "gathered"]


def test_samples_travel_while_the_centres_are_measured():
    run_distributed(2, _check_overlap)


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


def test_print_shows_what_it_is():
    shown = repr(ShardedMarginHead(10, DIM, create_margin("cosface")))
    assert "num_classes=10, embedding_dim=12, margin=CosFace(margin=0.4, scale=64.0), sample_rate=1.0" in shown
    assert "classes=range(0, 10)" in shown


def test_settings_are_checked():
    margin = create_margin("arcface")
    for options, text in (
        ({"sample_rate": 0.0}, r"sample_rate=0.0 must lie in"),
        ({"sample_rate": 1.5}, r"sample_rate=1.5 must lie in"),
        ({"memory_budget": 0}, r"memory_budget=0 must lie in"),
        ({"embedding_dim": 0}, r"embedding_dim=0 must be greater than 0"),
    ):
        with pytest.raises(ValueError, match=text):
            ShardedMarginHead(10, **{"embedding_dim": DIM, "margin": margin, **options})
    for labels in (torch.tensor([1.0, 2.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=rf"labels are {labels.dtype}; they must be whole numbers"):
            ShardedMarginHead(10, DIM, margin)(torch.randn(2, DIM), labels)
    with pytest.raises(ValueError, match=r"embeddings of shape \[2, 5\] must be of shape \[B, 12\]"):
        ShardedMarginHead(10, DIM, margin)(torch.randn(2, 5), torch.tensor([1, 2]))
    with pytest.raises(NonFiniteEmbeddingError, match=r"1 of 2 embeddings.*row 1 \(label 2\)"):
        ShardedMarginHead(10, DIM, margin)(torch.full((2, DIM), math.nan).index_fill(0, torch.tensor(0), 1.0), LABELS)


def _train_sharded(group, steps: int, losses) -> None:
    rank = dist.get_rank(group)
    head = ShardedMarginHead(103, DIM, create_margin("cosface", scale=16.0), group=group, seed=3)
    encoder = torch.nn.Linear(20, DIM)
    with torch.no_grad():
        encoder.weight.copy_(_encoder())
        encoder.bias.zero_()
    optimizer = OptimizerConfig(learning_rate=0.1).build([encoder, head])
    for step in range(steps):
        inputs, labels = _inputs(step)
        rows = slice(*[(0, 5), (5, 13), (13, 16)][rank])
        loss = head(encoder(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        for parameter in encoder.parameters():  # as DDP would, but for its mean
            dist.all_reduce(parameter.grad)
        optimizer.step()
        if rank == 0:
            losses[step] = loss.item()


def _encoder() -> torch.Tensor:
    return torch.randn(DIM, 20, generator=torch.Generator().manual_seed(5)) / 4


def _inputs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 103, (16,), generator=generator)
    people = torch.randn(103, 20, generator=torch.Generator().manual_seed(9))
    return people[labels] + 0.3 * torch.randn(16, 20, generator=generator), labels


def test_200_steps_over_3_ranks_equal_200_dense_steps():
    steps = 200
    losses = torch.zeros(steps).share_memory_()
    run_distributed(3, _train_sharded, steps, losses)

    # Dense, written out, in float64, with torch's own optimizer.
    encoder = _encoder().double().requires_grad_()
    bias = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    weight = initial_centres(range(103), DIM, seed=3).double().requires_grad_()
    groups = [{"params": [encoder, weight], "weight_decay": 5e-4}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    expected = []
    for step in range(steps):
        inputs, labels = _inputs(step)
        cosine = F.normalize(inputs.double() @ encoder.T + bias) @ F.normalize(weight).T
        loss = F.cross_entropy(16 * (cosine - 0.4 * F.one_hot(labels, 103)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
