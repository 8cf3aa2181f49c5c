"""Bytes that a step holds: counted ones against sums by hand, and against what torch's profiler sees allocated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.memory import Activations, HeadSize, count_activations, saved_bytes, tensor_bytes
from lgaf.models import LGAFConfig
from lgaf.models.backbones.base import IMAGE_SIDE
from lgaf.optim import OptimizerConfig, UpdateInBackward
from tests.distributed import run_distributed

MICRO = LGAFConfig(backbone="micro", embedding_dim=16, num_heads=2)
CPU = torch.device("cpu")


class _Allocated:
    """Bytes that are allocated while it is entered, beyond those before: at last, and at most."""

    def __enter__(self) -> _Allocated:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._profile.__exit__(*exception)
        self.now = self.most = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                self.now += event.nbytes()
                self.most = max(self.most, self.now)


def test_a_perceptron_keeps_what_is_counted_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Sigmoid())
    x = torch.randn(5, 8)
    # The input; ReLU's result, which is the next layer's input too; the sigmoid's result. 4 bytes each.
    expected = 4 * 5 * (8 + 16 + 4)
    assert saved_bytes(lambda: model(x), model.parameters()) == expected
    assert saved_bytes(lambda: model(x), [*model.parameters(), x]) == expected - 4 * 5 * 8
    assert saved_bytes(lambda: model(x)) == expected + 4 * 16 * 4, "the second layer's weight, for the input's gradient"
    with torch.no_grad():
        assert saved_bytes(lambda: model(x)) == 0


def test_a_convolution_keeps_what_is_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.PReLU(6))
    x = torch.randn(2, 3, 10, 10)
    # The convolution's result for the norm, the norm's for PReLU; mean and inverse deviation of each channel.
    expected = 4 * (2 * 2 * 6 * 10 * 10 + 2 * 6)
    assert saved_bytes(lambda: model(x), [*model.parameters(), *model.buffers(), x]) == expected


def test_what_the_graph_has_dropped_is_not_counted():
    x = torch.randn(1000, requires_grad=True)

    def run() -> torch.Tensor:
        x.exp().sum()  # nobody keeps it
        return x.sin()

    assert saved_bytes(run, [x]) == 0
    assert saved_bytes(lambda: (x.exp(), x.sin()), [x]) == 4000


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("quality", ["norm", "none"])
def test_activations_of_any_batch_follow_from_two(autocast, quality):
    torch.manual_seed(0)
    model = dataclasses.replace(MICRO, quality=quality).build().to(memory_format=torch.channels_last)
    counted = count_activations(model, CPU, autocast)
    images = (torch.rand(7, 3, IMAGE_SIDE, IMAGE_SIDE) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            return model(images)

    assert counted.of(7) == saved_bytes(run, [*model.parameters(), *model.buffers(), images])
    assert counted.again_image_bytes == 0
    assert counted.image_bytes > 16 * 56 * 56 * 4, "at least the first block's maps"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_activations_are_what_a_forward_pass_leaves_allocated(autocast):
    torch.manual_seed(0)
    model = MICRO.build().to(memory_format=torch.channels_last)
    counted = count_activations(model, CPU, autocast)
    images = (torch.rand(8, 3, IMAGE_SIDE, IMAGE_SIDE) * 2 - 1).contiguous(memory_format=torch.channels_last)
    with _Allocated() as allocated, torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        output = model(images)
    assert output.embedding_BD.requires_grad
    # Beside them: the output, and what small things the graph holds by itself.
    assert counted.of(8) == pytest.approx(allocated.now, rel=0.02)


def test_checkpointed_blocks_count_once():
    plain, again = (dataclasses.replace(MICRO, gradient_checkpointing=given, dropout=0.0) for given in (False, True))
    found = []
    for config in (plain, again):
        torch.manual_seed(0)
        model = config.build().to(memory_format=torch.channels_last)
        counted = count_activations(model, CPU, None)
        assert "run" not in vars(model.backbone), "the network is left as it was"
        images = (torch.rand(8, 3, IMAGE_SIDE, IMAGE_SIDE) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with _Allocated() as allocated:
            model(images).embedding_BD.sum().backward()
        found.append((counted, allocated.most))
    (kept, _), (sparse, most) = found
    assert sparse.image_bytes < 0.7 * kept.image_bytes
    assert kept.again_image_bytes == 0 < sparse.again_image_bytes < kept.image_bytes
    # Gradients of activations come on top, which are not counted: those of the largest block.
    assert 0.6 * most < sparse.of(8) < 1.1 * most


def _size(**changes: object) -> HeadSize:
    base = HeadSize(
        num_classes=6_000,
        embedding_dim=64,
        batch=32,
        margin=create_margin("arcface"),
        sample_rate=1.0,
        memory_budget=1 << 30,
        reduced=False,
        in_backward=False,
        num_moments=1,
        is_cuda=False,
    )
    return dataclasses.replace(base, **changes)


def test_matrices_of_a_head_by_hand():
    matrix = 6_000 * 64 * 4
    size = _size()
    assert (size.weight_bytes, size.gradient_bytes, size.optimizer_bytes) == (matrix, matrix, matrix)
    assert _size(num_moments=2).optimizer_bytes == 2 * matrix
    moving = _size(in_backward=True)
    assert (moving.gradient_bytes, moving.update_bytes, moving.optimizer_bytes) == (0, 0, matrix)
    drawn = _size(sample_rate=0.25)
    # 1,500 of 6,000, four deviations of a binomial and the people of the batch.
    assert drawn.num_seen == 1_500 + round(4 * (1_500 * 0.75) ** 0.5) + 32
    assert drawn.gradient_bytes == drawn.num_seen * (64 * 4 + 8)
    assert _size(sample_rate=0.999).num_seen == 6_000


@pytest.mark.parametrize("budget", [1 << 30, 1 << 21])
@pytest.mark.parametrize(
    "changes", [{}, {"sample_rate": 0.3}, {"in_backward": True}, {"reduced": True}], ids=lambda value: str(value)
)
@pytest.mark.parametrize("margin", ["arcface", "curricularface"])
def test_a_head_allocates_what_is_told(margin, changes, budget):
    size = _size(margin=create_margin(margin), memory_budget=budget, **changes)
    head = ShardedMarginHead(
        size.num_classes, 64, size.margin, sample_rate=size.sample_rate, memory_budget=size.memory_budget
    )
    if size.in_backward:
        UpdateInBackward(head, OptimizerConfig())
    x, labels = torch.randn(size.batch, 64, requires_grad=True), torch.arange(size.batch)
    with _Allocated() as allocated:
        with torch.autocast("cpu", torch.bfloat16, enabled=size.reduced):
            loss = head(x, labels)
        loss.backward()
    told = size.temporary_bytes + size.gradient_bytes
    assert size.temporary_bytes <= budget
    # Ids and norms of the classes and a few matrices of the batch are not told; the bound may be half empty.
    few = 40 * size.num_classes + 16 * 4 * size.batch * 64
    assert 0.4 * told < allocated.most < told + few


def _check_buckets(group) -> None:
    """In DDP gradients lie in the buckets: they are there once."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    network = nn.parallel.DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    for number in range(2):
        network.zero_grad(set_to_none=True)
        # With a batch in parts the sums of the first parts lie beside the buckets, and travel from them.
        with network.no_sync():
            network(torch.randn(3, 64)).sum().backward()
        beside = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in model.parameters()}
        network(torch.randn(3, 64)).sum().backward()
        within = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in model.parameters()}
        assert sum(within.values()) == tensor_bytes(model.parameters()), number
        if number == 0:
            assert sum(beside.values()) == tensor_bytes(model.parameters())
        assert not within.keys() & beside.keys(), number


def test_gradients_lie_in_the_buckets_once():
    run_distributed(2, _check_buckets)


def test_a_batch_needs_its_images_and_what_is_fixed():
    assert Activations(fixed_bytes=10, image_bytes=3, again_image_bytes=2).of(4) == 30
