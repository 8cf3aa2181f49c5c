"""Networks that weigh their samples or have a loss of their own: the step trains on both, over any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import FaceNetwork
from lgaf.models.network import global_embedding
from lgaf.schedule import Schedule
from lgaf.step import TrainStep
from tests.distributed import run_distributed
from tests.lgaf.test_step import NUM_CLASSES, NUM_STEPS, RECIPE, _batch, _share


class _WithOwnLoss(FaceNetwork):
    """A linear network that weighs its samples and has a loss of its own."""

    def __init__(self, weighs: bool, has_loss: bool) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 4 * 4, 8)
        self.judge = nn.Linear(3 * 4 * 4, 1)
        self.weighs, self.has_loss = weighs, has_loss

    def forward(self, images_BCHW):
        pooled = nn.functional.adaptive_avg_pool2d(images_BCHW, 4).flatten(1)
        embedding = self.project(pooled)
        weights = 2.0 + self.judge(pooled).sigmoid().squeeze(1) if self.weighs else None
        return global_embedding(embedding, weights, self.project.weight.square().sum() if self.has_loss else None)


def _own_loss_step(group, **switches) -> TrainStep:
    torch.manual_seed(0)
    head = ShardedMarginHead(NUM_CLASSES, 8, create_margin("cosface", scale=8.0), group=group)
    return TrainStep(_WithOwnLoss(**switches), head, RECIPE, Schedule(), NUM_STEPS, group=group)


def test_a_networks_own_loss_and_sample_weights_are_trained_on():
    images, labels = _batch(0)
    plain, weighing, losing = (
        _own_loss_step(None, weighs=weighs, has_loss=has_loss)
        for weighs, has_loss in ((False, False), (True, False), (False, True))
    )
    before = plain.model.project.weight.detach().clone()
    results = [step(images, labels).loss for step in (plain, weighing, losing)]
    assert results[1] > results[0], "weights above 1 raise the loss"
    assert results[2] == results[0], "the head's loss is what is reported"
    # d |W|^2 / dW = 2 W, beside the head's gradient.
    torch.testing.assert_close(losing.model.project.weight.grad, plain.model.project.weight.grad + 2 * before)


def _check_own_loss(group) -> None:
    alone, together = (_own_loss_step(g, weighs=True, has_loss=True) for g in (None, group))
    loss_alone, loss_together = alone(*_batch(0)).loss, together(*_share(group, 0)).loss
    torch.testing.assert_close(loss_together, loss_alone, rtol=1e-6, atol=0)
    for mine, theirs in zip(together.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert together.model.judge.weight.grad.any(), "weights may be learned"


@pytest.mark.parametrize("world", [2, 3])
def test_own_loss_and_weights_over_ranks_equal_one_process(world):
    run_distributed(world, _check_own_loss)


def test_a_step_trains_a_head_that_was_evaluated():
    step = _own_loss_step(None, weighs=False, has_loss=False)
    step.head = ShardedMarginHead(NUM_CLASSES, 8, create_margin("adaface")).eval()
    step(*_batch(0))
    assert step.head.margin_state.norm_mean.item() != 20.0
