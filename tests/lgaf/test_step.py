"""Training steps: world size does not change them, randomness is of (seed, step, rank), a restored run repeats itself.

Batch norm in training mode sees each rank's own rows, so a whole network trained by several ranks is not that of one.
With its statistics frozen everything else must be: DDP's mean, the scaling of the head's gradient, the fusion's
statistics.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from lgaf.distributed import rank_in, world_size
from lgaf.heads.margins import create_margin
from lgaf.heads.screening import SampleScreening
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAF, LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.state import training_state
from lgaf.step import TrainStep, normalise_images
from tests.conftest import ROOT
from tests.distributed import run_distributed

NUM_CLASSES = 7
ROWS = 7
NUM_STEPS = 3
SHARES = {1: [7], 2: [5, 2], 3: [4, 1, 2]}  # rows per rank
RECIPE = OptimizerConfig(learning_rate=0.05, momentum=0.9, weight_decay=0.01)


class _FrozenNorms(LGAF):
    """LGAF in double precision whose batch norms keep their statistics."""

    def train(self, mode: bool = True) -> _FrozenNorms:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images_BCHW):
        return super().forward(images_BCHW.double())


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (ROWS, 112, 112, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, NUM_CLASSES, (ROWS,), generator=generator)


def _share(group, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    shares = SHARES[world_size(group)]
    low = sum(shares[: rank_in(group)])
    images, labels = _batch(step)
    return images[low : low + shares[rank_in(group)]], labels[low : low + shares[rank_in(group)]]


def _frozen_step(group, recipe: OptimizerConfig = RECIPE) -> TrainStep:
    torch.manual_seed(0)
    model = _FrozenNorms(LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, dropout=0.0)).double()
    with torch.no_grad():
        for module in model.modules():  # features of about unit size, as trained statistics would make them
            if isinstance(module, _BatchNorm):
                module.running_var.fill_(4.0)
    head = ShardedMarginHead(NUM_CLASSES, 8, create_margin("arcface", margin=0.3, scale=8.0), group=group).double()
    return TrainStep(model, head, recipe, Schedule(milestones=(0.5,)), NUM_STEPS, group=group)


def _trained(group) -> tuple[TrainStep, list[float]]:
    step = _frozen_step(group)
    return step, [step(*_share(group, number)).loss.item() for number in range(NUM_STEPS)]


@pytest.fixture(scope="module")
def single() -> dict:
    """Three steps on the whole batch in this process, without a group."""
    step, losses = _trained(None)
    fresh = _frozen_step(None)
    return {
        "losses": losses,
        "model": step.model.state_dict(),
        "centres": step.head.weight.detach(),
        "momentum": [step.optimizer.state[p]["momentum_buffer"] for p in step.model.parameters()],
        "unmoved": [
            name
            for (name, now), then in zip(step.model.named_parameters(), fresh.model.parameters(), strict=True)
            if (now - then).abs().max() < 1e-7
        ],
    }


def test_the_single_process_run_trains_everything(single):
    # Without this the comparisons below could hold for a network that stands still.
    # A unit of an attention may be dead from the start; its bias has no decay either.
    assert all(".attention." in name or ".excite." in name for name in single["unmoved"]), single["unmoved"]
    assert len(set(single["losses"])) == NUM_STEPS
    assert single["model"]["fusion.local_quality.mean"].item() != 20.0


def _check_ranks(group, single) -> None:
    _check_training_equals(group, single)
    _check_first_gradients(group)
    _check_ranks_differ_in_dropout(group)


def _check_training_equals(group, single) -> None:
    step, losses = _trained(group)
    # Embeddings cross to the head as float32, hence not 1e-12.
    torch.testing.assert_close(losses, single["losses"], rtol=1e-6, atol=0)
    classes = slice(step.head.classes.start, step.head.classes.stop)
    torch.testing.assert_close(step.head.weight.detach(), single["centres"][classes], rtol=1e-5, atol=1e-8)
    for name, value in step.model.state_dict().items():
        torch.testing.assert_close(
            value, single["model"][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    for parameter, expected in zip(step.model.parameters(), single["momentum"], strict=True):
        buffer = step.optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-6)


def _check_first_gradients(group) -> None:
    """The gradients of the first step are those of the mean over the global batch: no factor of the world size."""
    alone, together = _frozen_step(None), _frozen_step(group)
    loss_alone = alone(*_batch(0)).loss
    loss_together = together(*_share(group, 0)).loss
    # Equal weights, so equal embeddings: the loss is equal to rounding.
    torch.testing.assert_close(loss_together, loss_alone, rtol=1e-7, atol=0)
    for mine, theirs in zip(together.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    classes = slice(together.head.classes.start, together.head.classes.stop)
    torch.testing.assert_close(together.head.weight.grad, alone.head.weight.grad[classes], rtol=1e-5, atol=1e-8)


def _plain_step(
    group,
    seed: int = 3,
    precision: str = "float32",
    dropout: float = 0.4,
    backbone: str = "tiny",
    sample_rate: float = 1.0,
    **options,
) -> TrainStep:
    torch.manual_seed(0)
    model = LGAFConfig(backbone=backbone, embedding_dim=8, num_heads=2, dropout=dropout).build()
    margin = create_margin("cosface", margin=0.2, scale=8.0)
    head = ShardedMarginHead(NUM_CLASSES, 8, margin, group=group, sample_rate=sample_rate)
    schedule = Schedule(milestones=(0.5,), warmup=0.2)
    return TrainStep(model, head, RECIPE, schedule, 6, group=group, precision=precision, seed=seed, **options)


def _rank_rows(group, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows a rank: batch norm in training mode needs more than one."""
    generator = torch.Generator().manual_seed(1000 * rank_in(group) + number)
    images = torch.randint(0, 256, (4, 112, 112, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, NUM_CLASSES, (4,), generator=generator)


def _losses(step: TrainStep, last: int) -> list[float]:
    return [step(*_rank_rows(step.group, number)).loss.item() for number in range(step.num_steps_done, last)]


def _flat(state: dict, path: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in state.items():
        inner = f"{path}/{key}"
        found |= _flat(value, inner) if isinstance(value, dict) else {inner: value}
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in found.items()}


def _check_runs_repeat(group) -> None:
    whole = _plain_step(group)
    expected = _losses(whole, 5)
    assert _losses(_plain_step(group), 5) == expected, "two identical runs"
    assert _losses(_plain_step(group, seed=4), 5) != expected, "the seed of dropout has no effect"

    stopped = _plain_step(group)
    assert _losses(stopped, 2) == expected[:2]
    saved = copy.deepcopy(_flat(training_state(stopped)))
    restored = _plain_step(group)
    with torch.no_grad():
        for parameter in [*restored.model.parameters(), *restored.head.parameters()]:
            parameter.fill_(0.123)  # nothing of the fresh weights may survive
        torch.rand(11)  # nor may the place of the global generator matter
        for name, value in _flat(training_state(restored)).items():
            value.copy_(saved[name])
    restored.num_steps_done = 2
    assert _losses(restored, 5) == expected[2:], "a restored run differs from the uninterrupted one"
    after, uninterrupted = _flat(training_state(restored)), _flat(training_state(whole))
    assert after.keys() == uninterrupted.keys()
    for name, value in after.items():
        assert torch.equal(value, uninterrupted[name]), name


def _check_ways_of_updating(group) -> None:
    """A run goes on where another stopped, whichever of them moves its centres in the backward pass; sampled too."""
    for rate in (1.0, 0.4):
        expected = _losses(_plain_step(group, sample_rate=rate), 5)
        for before, after in ((True, True), (True, False), (False, True)):
            stopped = _plain_step(group, sample_rate=rate, update_head_in_backward=before)
            losses = _losses(stopped, 2)
            assert (stopped.head.weight.grad is None) == before
            restored = _plain_step(group, sample_rate=rate, update_head_in_backward=after)
            saved = _flat(training_state(stopped))
            with torch.no_grad():
                for name, value in _flat(training_state(restored)).items():
                    value.copy_(saved[name])
            restored.num_steps_done = 2
            # The gradient is the same; where it counts at once, that of a chunk is added to its centres sooner.
            torch.testing.assert_close(losses + _losses(restored, 5), expected, rtol=1e-5, atol=0)


def _check_ranks_differ_in_dropout(group) -> None:
    step = _plain_step(group)
    masks = _record_masks(step)
    step(*_batch(0))  # the same rows on all ranks
    mine = masks[0].to(torch.uint8)
    gathered = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    assert len({tuple(mask.flatten().tolist()) for mask in gathered}) == world_size(group)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one_process(world, single):
    run_distributed(world, _check_ranks, single)


# Three ranks, not two: a sum of two is the same in any order, so only here does the order of DDP's reduction show.
@pytest.mark.parametrize("world", [2, 3])
def test_runs_of_several_ranks_repeat_and_restore_bit_for_bit(world):
    run_distributed(world, _check_runs_repeat)


def test_a_run_of_one_process_repeats_and_restores():
    _check_runs_repeat(None)


def test_centres_may_move_within_the_backward_pass():
    _check_ways_of_updating(None)
    run_distributed(2, _check_ways_of_updating)


def test_bfloat16_head_with_a_float32_network():
    exact, rounded = (_losses(_plain_step(None, head_precision=kind), 3) for kind in ("float32", "bfloat16"))
    assert rounded != exact
    assert rounded[0] == pytest.approx(exact[0], rel=2**-8)
    assert rounded[2] == pytest.approx(exact[2], rel=0.1)  # the batch norms of eight rows make much of a difference


def _record_masks(step: TrainStep) -> list[torch.Tensor]:
    masks = []
    for module in step.model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _module, inputs, output: masks.append((output == 0) & (inputs[0] != 0)))
    return masks


def test_dropout_changes_with_step_and_seed_and_not_with_the_global_generator():
    def masks_of(seed: int, first_step: int) -> tuple:
        step = _plain_step(None, seed=seed)
        step.num_steps_done = first_step
        masks = _record_masks(step)
        torch.rand(torch.randint(1, 50, ()).item())
        step(*_batch(0))
        assert len(masks) == 2  # one a branch
        assert all(0.3 < mask.float().mean() < 0.5 for mask in masks)
        return tuple(tuple(mask.flatten().tolist()) for mask in masks)

    first = masks_of(3, 0)
    assert first == masks_of(3, 0)
    assert len({first, masks_of(3, 1), masks_of(4, 0)}) == 3


def test_bfloat16_network_float32_head_and_loss():
    step = _plain_step(None, precision="bfloat16")
    seen = {}
    step.model.register_forward_hook(lambda _m, _i, output: seen.update(network=output.embedding_BD.dtype))
    step.head.register_forward_pre_hook(lambda _m, inputs: seen.update(head=inputs[0].dtype))
    step.model.backbone.layer1[0].register_forward_hook(lambda _m, _i, output: seen.update(layer=output.dtype))
    for number in range(3):
        result = step(*_rank_rows(None, number))
        assert result.loss.dtype == torch.float32
        assert torch.isfinite(result.loss)
    assert seen["layer"] == torch.bfloat16, "the network does not run in bfloat16"
    assert seen["head"] == torch.float32
    assert {p.dtype for p in [*step.model.parameters(), *step.head.parameters()]} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in step.model.parameters())
    fusion = step.model.fusion
    assert {fusion.local_quality.mean.dtype, fusion.global_quality.std.dtype} == {torch.float32}
    # The same step in float32 gives about the same loss, and not exactly it.
    exact, rounded = (_plain_step(None, precision=p)(*_batch(0)).loss for p in ("float32", "bfloat16"))
    assert exact != rounded
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)


def test_learning_rate_follows_the_schedule_into_the_optimizer():
    step = _plain_step(None)
    for number in range(6):
        result = step(*_rank_rows(None, number))
        assert result.learning_rate == step.schedule.learning_rate(RECIPE.learning_rate, number, 6)
        assert {group["lr"] for group in step.optimizer.param_groups} == {result.learning_rate}
    assert step.num_steps_done == 6
    assert not result.loss.requires_grad


def test_training_lowers_the_loss():
    step = _plain_step(None, dropout=0.0)
    images, labels = _batch(0)
    losses = [step(images, labels).loss.item() for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_smallest_backbone_trains_without_corrupting_memory(precision):
    # In a process of its own: where a kernel writes past its buffers, the process dies in the middle of a step.
    code = f"""
import torch
from tests.lgaf.test_step import _batch, _plain_step
torch.set_num_threads(1)
step = _plain_step(None, precision={precision!r}, backbone="micro")
losses = [step(*_batch(number)).loss.item() for number in range(6)]
assert all(0 < loss < 100 for loss in losses), losses
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_images_are_scaled_to_plus_minus_one_and_stay_channels_last():
    images = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    images[0, 1, 2] = torch.tensor([0, 255, 51], dtype=torch.uint8)
    out = normalise_images(images)
    assert out.shape == (2, 3, 4, 5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[0, :, 1, 2], torch.tensor([-1.0, 1.0, -0.6]))
    assert images[0, 1, 2, 1] == 255, "the batch itself must stay as it was"


def test_state_tensors_are_views_of_the_live_ones():
    step = _plain_step(None)
    for value in _flat(training_state(step)).values():
        value.detach().fill_(2)
    assert all((p == 2).all() for p in [*step.model.parameters(), *step.model.buffers(), step.head.weight])
    assert all((s["momentum_buffer"] == 2).all() for s in step.optimizer.state.values())


@pytest.mark.parametrize("margin", ["adaface", "uniface"])
def test_the_state_holds_what_the_margin_keeps(margin):
    torch.manual_seed(0)
    head = ShardedMarginHead(NUM_CLASSES, 8, create_margin(margin), screening=SampleScreening())
    model = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2).build()
    state = training_state(TrainStep(model, head, RECIPE, Schedule(), NUM_STEPS))
    kept = {"adaface": {"norm_mean", "norm_std"}, "uniface": {"bias"}}[margin]
    assert {f"margin_state.{name}" for name in kept} <= state["head"].keys()
    assert "screening_state.histogram" in state["head"]
    learned = {"margin_state.bias.momentum_buffer"} if margin == "uniface" else set()
    assert state["head_optimizer"].keys() == {"weight.momentum_buffer", *learned}
