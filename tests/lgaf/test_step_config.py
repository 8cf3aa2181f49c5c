"""Ways to compute a step: in parts, clipped, averaged, in half precision, compressed, by AdamW, compiled."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lgaf.distributed import rank_in, world_size
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.state import training_state
from lgaf.step import StepConfig, TrainStep
from tests.distributed import run_distributed
from tests.lgaf.test_own_loss import _WithOwnLoss
from tests.lgaf.test_step import NUM_CLASSES, NUM_STEPS, RECIPE, _batch, _share

ADAMW = OptimizerConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.1)


def _step(group, config: StepConfig | None = None, recipe: OptimizerConfig = RECIPE, **options) -> TrainStep:
    """A linear network with a loss of its own, whose gradients do not depend on how a batch is cut."""
    torch.manual_seed(0)
    head = ShardedMarginHead(
        NUM_CLASSES, 8, create_margin("cosface", scale=8.0), group=group, sample_rate=options.pop("sample_rate", 1.0)
    )
    model = _WithOwnLoss(weighs=True, has_loss=options.pop("has_loss", True))
    return TrainStep(model, head, recipe, Schedule(), NUM_STEPS, group=group, config=config, **options)


def _scaled(step: TrainStep, scale: float) -> TrainStep:
    """With a scale that nothing overflows at."""
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": scale})
    return step


def _weights(step: TrainStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in [*step.model.parameters(), *step.head.parameters()]]


def _at_least_two_each(group, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    shares = {1: [7], 2: [5, 2], 3: [3, 2, 2]}[world_size(group)]
    rows = slice(sum(shares[: rank_in(group)]), sum(shares[: rank_in(group) + 1]))
    images, labels = _batch(number)
    return images[rows], labels[rows]


def _check_parts(group) -> None:
    for rate in (1.0, 0.5):
        whole, parted = (_step(group, config, sample_rate=rate) for config in (None, StepConfig(accumulate=2)))
        for number in range(NUM_STEPS):
            expected, found = (step(*_at_least_two_each(group, number)).loss for step in (whole, parted))
            if rate == 1.0:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        if rate == 1.0:  # else each part draws its classes around its own people
            for mine, theirs in zip(_weights(parted), _weights(whole), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert parted.num_steps_done == NUM_STEPS


def test_a_batch_in_parts_is_the_batch():
    _check_parts(None)


@pytest.mark.parametrize("world", [2, 3])
def test_a_batch_in_parts_is_the_batch_on_several_ranks_with_unequal_shares(world):
    run_distributed(world, _check_parts)


def _check_gradients_travel_once(group) -> None:
    step, calls = _step(group, StepConfig(accumulate=2)), []

    def count(state, bucket):
        calls.append(bucket.index())
        return allreduce_hook(group, bucket)

    step._network.register_comm_hook(group, count)
    step(*_at_least_two_each(group, 0))
    assert calls == [0], "one bucket, whatever the number of parts"


def test_gradients_travel_once_for_all_parts():
    run_distributed(2, _check_gradients_travel_once)


def test_more_parts_than_samples_are_refused():
    step = _step(None, StepConfig(accumulate=8))
    with pytest.raises(ValueError, match=r"step\.accumulate=8 is more than the 7 samples of a rank"):
        step(*_batch(0))


def _check_clipping(group) -> None:
    recipe = OptimizerConfig(learning_rate=0.05, max_norm=0.5)
    alone, together = (_step(which, recipe=recipe) for which in (None, group))
    for number in range(NUM_STEPS):
        alone(*_batch(number))
        together(*_share(group, number))
    norm = torch.stack([p.grad.norm() for p in [*alone.model.parameters(), *alone.head.parameters()]]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
    for mine, theirs in zip(together.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    own = alone.head.weight[together.head.classes.start : together.head.classes.stop]
    torch.testing.assert_close(together.head.weight, own, rtol=1e-4, atol=1e-6)


def test_clipping_sees_the_gradient_of_all_ranks():
    _check_clipping(None)
    run_distributed(3, _check_clipping)


def test_the_average_is_that_of_the_weights_and_is_what_is_exported():
    step, decay = _step(None, StepConfig(ema_decay=0.8)), 0.8
    expected = None
    for number in range(NUM_STEPS):
        step(*_batch(number))
        now = [p.detach().clone() for p in step.model.parameters()]
        expected = (
            now if expected is None else [decay * e + (1 - decay) * n for e, n in zip(expected, now, strict=True)]
        )
    for mine, theirs in zip(step.exported_model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs)
    assert step.exported_model is not step.model
    assert _step(None).exported_model is not None
    plain = _step(None)
    assert plain.exported_model is plain.model


def test_the_average_holds_the_statistics_of_batch_norm_too():
    torch.manual_seed(0)
    model = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, dropout=0.0).build()
    head = ShardedMarginHead(NUM_CLASSES, 8, create_margin("cosface", scale=8.0))
    step = TrainStep(model, head, RECIPE, Schedule(), NUM_STEPS, config=StepConfig(ema_decay=0.5))
    norm = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    for number in range(2):
        step(*_batch(number))
        seen.append(model.get_submodule(norm).running_mean.clone())
    averaged = step.exported_model.get_submodule(norm).running_mean
    torch.testing.assert_close(averaged, 0.5 * (seen[0] + seen[1]))
    embedding = step.exported_model.eval()(torch.zeros(1, 3, 112, 112)).embedding_BD
    assert embedding.isfinite().all()


def _check_half_precision(group) -> None:
    step = _step(group, precision="float16", has_loss=False)
    for number in range(2):
        assert step(*_share(group, number)).loss.isfinite()
    scale, before = step.scaler.get_scale(), _weights(step)
    # Not finite on the last rank alone, and in its shard of the head alone: all ranks leave the step out.
    if rank_in(group) == world_size(group) - 1:
        step.head.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    step(*_share(group, 2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(_weights(step), before, strict=True))
    assert step.scaler.get_scale() == scale / 2
    assert step.num_steps_done == 3


def test_half_precision_leaves_out_a_step_that_is_not_finite_on_all_ranks():
    _check_half_precision(None)
    run_distributed(2, _check_half_precision)


def _check_looking(group) -> None:
    """In single precision: the same digits as without looking, until a gradient is not finite."""
    plain, looking = _step(group), _step(group, leave_out_non_finite=True)
    for number in range(2):
        expected, found = (step(*_share(group, number)) for step in (plain, looking))
        assert torch.equal(found.loss, expected.loss)
        assert not found.left_out
    before = _weights(looking)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(before, _weights(plain), strict=True))
    if rank_in(group) == world_size(group) - 1:
        hook = looking.head.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    assert looking(*_share(group, 2)).left_out
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(_weights(looking), before, strict=True))
    if rank_in(group) == world_size(group) - 1:
        hook.remove()
    assert looking.scaler.get_scale() == 1.0
    # The step behind is as if the one before had not been.
    plain.pass_over()
    expected, found = (step(*_share(group, 3)) for step in (plain, looking))
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(_weights(looking), _weights(plain), strict=True))
    assert looking.is_finite()


def test_an_update_that_is_not_finite_can_be_left_out():
    _check_looking(None)
    run_distributed(2, _check_looking)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_statistics_stay_as_they_were_too(precision):
    torch.manual_seed(0)
    model = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, dropout=0.0).build()
    head = ShardedMarginHead(NUM_CLASSES, 8, create_margin("adaface", scale=8.0))
    step = TrainStep(model, head, RECIPE, Schedule(), NUM_STEPS, precision=precision, leave_out_non_finite=True)
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *head.state_dict().items()]}
    hook = head.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    assert step(*_batch(0)).left_out
    after = dict([*model.state_dict().items(), *head.state_dict().items()])
    assert all(torch.equal(after[name], value) for name, value in before.items())
    hook.remove()
    _scaled(step, 16.0)
    assert not step(*_batch(1)).left_out
    assert not torch.equal(head.margin_state.norm_mean, before["margin_state.norm_mean"])
    with torch.no_grad():
        next(iter(model.buffers())).fill_(torch.inf)
    assert not step.is_finite()


def _check_spoilt(group) -> None:
    step = _step(group)
    assert step.is_finite()
    if rank_in(group) == 0:
        with torch.no_grad():
            step.head.weight[0, 0] = torch.nan
    assert not step.is_finite(), "on the other ranks too"


def test_weights_that_are_not_finite_are_found_on_all_ranks():
    run_distributed(2, _check_spoilt)


def test_half_precision_trains_as_single_precision_does():
    exact, half = _step(None, has_loss=False), _scaled(_step(None, precision="float16", has_loss=False), 64.0)
    for number in range(NUM_STEPS):
        expected, found = (step(*_batch(number)).loss for step in (exact, half))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for mine, theirs in zip(_weights(half), _weights(exact), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


def _check_compression(group) -> None:
    exact, rounded = (_step(group, StepConfig(gradient_compression=kind)) for kind in ("none", "float16"))
    for step in (exact, rounded):
        step(*_share(group, 0))
    pairs = list(zip(exact.model.parameters(), rounded.model.parameters(), strict=True))
    assert any(not torch.equal(one.grad, other.grad) for one, other in pairs)
    for one, other in pairs:
        torch.testing.assert_close(other.grad, one.grad, rtol=2e-3, atol=1e-4)


def test_compressed_gradients_are_nearly_the_same():
    run_distributed(2, _check_compression)


def _check_adamw(group) -> None:
    alone, together = (_step(which, recipe=ADAMW) for which in (None, group))
    for number in range(NUM_STEPS):
        expected, found = alone(*_batch(number)).loss, together(*_share(group, number)).loss
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    own = alone.head.weight[together.head.classes.start : together.head.classes.stop]
    torch.testing.assert_close(together.head.weight, own, rtol=1e-3, atol=1e-5)


def test_adamw_over_ranks_is_adamw():
    run_distributed(3, _check_adamw)


ALL_OF_IT = {
    "config": StepConfig(ema_decay=0.9, accumulate=2),
    "recipe": OptimizerConfig(kind="adamw", learning_rate=1e-2, max_norm=1.0),
    "precision": "float16",
    "has_loss": False,
}


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_a_restored_run_goes_on_as_the_uninterrupted_one(sample_rate, tmp_path):
    fresh = [_step(None, sample_rate=sample_rate, **ALL_OF_IT) for _ in range(3)]
    (whole, stopped), restored = (_scaled(step, 32.0) for step in fresh[:2]), fresh[2]
    expected = [whole(*_batch(number)).loss.item() for number in range(NUM_STEPS)]
    assert [stopped(*_batch(0)).loss.item()] == expected[:1]
    dcp.save(training_state(stopped), checkpoint_id=str(tmp_path / "one"), no_dist=True)
    dcp.load(training_state(restored), checkpoint_id=str(tmp_path / "one"), no_dist=True)
    restored.num_steps_done = 1
    assert restored.scaler.get_scale() == 32.0
    assert [restored(*_batch(number)).loss.item() for number in range(1, NUM_STEPS)] == expected[1:]
    for mine, theirs in zip(restored.exported_model.parameters(), whole.exported_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_does_not_go_together_is_refused():
    for options in ({"precision": "float16"}, {"config": StepConfig(accumulate=2)}, {"leave_out_non_finite": True}):
        with pytest.raises(ValueError, match=r"take none of float16, a batch in parts and"):
            _step(None, update_head_in_backward=True, **options)
    for recipe in (ADAMW, OptimizerConfig(max_norm=1.0)):
        with pytest.raises(ValueError, match=r"take momentum SGD, and no clipping"):
            _step(None, recipe=recipe, update_head_in_backward=True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"accumulate": 0}, r"step\.accumulate=0"),
        ({"ema_decay": 1.0}, r"step\.ema_decay=1\.0"),
        ({"gradient_compression": "fp16"}, r"step\.gradient_compression='fp16'.*float16"),
    ],
)
def test_bad_values_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        StepConfig(**fields)


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_network_trains_as_the_other():
    steps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, dropout=0.0).build()
        head = ShardedMarginHead(NUM_CLASSES, 8, create_margin("cosface", scale=8.0))
        step = TrainStep(model, head, RECIPE, Schedule(), NUM_STEPS, config=StepConfig(compile=compiled))
        losses = [step(*_batch(number)).loss.item() for number in range(NUM_STEPS)]
        steps.append((losses, step.model.state_dict().keys()))
    assert steps[1][0] == pytest.approx(steps[0][0], rel=1e-3)
    assert steps[1][1] == steps[0][1], "what is saved has the same names"
