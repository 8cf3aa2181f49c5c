"""The memory of a worker: by hand, and beside what a real step allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lgaf.memory import Activations, count_activations, tensor_bytes
from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.step import AUTOCAST, StepConfig
from pipeline import presets
from pipeline.config import HeadConfig, TrainConfig
from pipeline.dry_run_memory import MemoryEstimate, MemoryItem, estimate_memory, largest_shard
from pipeline.training.assembly import assemble

MICRO = LGAFConfig(backbone="micro", embedding_dim=128, num_heads=2)
ACTIVATIONS = Activations(fixed_bytes=1000, image_bytes=100, again_image_bytes=10)
MATRIX = 25 * 128 * 4


def _config(**changes: object) -> TrainConfig:
    base = presets.demo()
    stream = replace(base.stream, num_streams=4)
    return replace(base, **{"model": MICRO, "num_workers": 4, "batch_size": 64, "stream": stream, **changes})


def _estimate(config: TrainConfig, num_classes: int | None = 97, is_cuda: bool = False) -> MemoryEstimate:
    return estimate_memory(config, config.model.build(), ACTIVATIONS, num_classes, is_cuda)


def _bytes(estimate: MemoryEstimate) -> dict[str, int]:
    return {item.name: item.num_bytes for item in estimate.items}


def test_items_by_hand():
    model = MICRO.build()
    parameters, buffers = tensor_bytes(model.parameters()), tensor_bytes(model.buffers())
    found = _estimate(_config())
    items = _bytes(found)
    assert items["weights"] == parameters + buffers
    assert items["gradients"] == items["optimizer"] == parameters
    assert items["DDP buckets"] == 0
    assert "moving average" not in items
    # The first of four workers has 25 of the 97 people, the last 22; each has 16 images.
    assert items["head: centres"] == items["head: gradient"] == items["head: optimizer"] == MATRIX
    assert items["images"] == 16 * 3 * 112 * 112 * (4 + 1)
    assert items["activations"] == 1000 + 16 * 110
    assert 25 * 64 * 4 * 2 < items["head: logits"] < 2**18
    assert items["optimizer's copies"] == max(tensor_bytes([p]) for p in model.parameters())
    passes = items["images"] + items["activations"] + items["head: logits"]
    assert found.total_bytes == 3 * parameters + buffers + 3 * MATRIX + max(passes, items["optimizer's copies"])
    assert found.host_bytes == 2 * parameters + buffers + 2 * MATRIX
    assert found.checkpoint_bytes == 2 * parameters + buffers + 2 * 97 * 128 * 4
    assert found.person_bytes == 0


def test_ways_to_compute_a_step_change_their_items():
    model = MICRO.build()
    parameters, buffers = tensor_bytes(model.parameters()), tensor_bytes(model.buffers())
    parted = _bytes(_estimate(_config(step=StepConfig(accumulate=3, ema_decay=0.9))))
    assert parted["activations"] == 1000 + 6 * 110, "16 images in three parts"
    assert parted["DDP buckets"] == parameters
    assert parted["head: a part's gradient"] == MATRIX
    assert parted["moving average"] == parameters + buffers
    rounded = _bytes(_estimate(_config(step=StepConfig(gradient_compression="float16"))))
    assert rounded["DDP buckets"] == parameters // 2
    moving = _bytes(_estimate(_config(head=HeadConfig(update="backward"))))
    assert (moving["head: gradient"], moving["head: optimizer"]) == (0, MATRIX)
    adamw = _bytes(_estimate(_config(optimizer=OptimizerConfig(kind="adamw"))))
    assert (adamw["optimizer"], adamw["head: optimizer"]) == (2 * parameters, 2 * MATRIX)
    on_gpu = _bytes(_estimate(_config(), is_cuda=True))
    assert on_gpu["optimizer's copies"] == parameters + MATRIX, "of all tensors together"
    assert "DDP buckets" not in _bytes(_estimate(_config(num_workers=1)))


def test_without_a_number_of_people_the_head_is_told_by_the_person():
    found = _estimate(_config(), None)
    assert not any(name.startswith("head") for name in _bytes(found))
    assert found.person_bytes == 3 * 128 * 4
    assert _estimate(_config(head=HeadConfig(update="backward")), None).person_bytes == 2 * 128 * 4


def test_the_first_worker_has_most_people():
    assert largest_shard(97, 4) == 25
    assert largest_shard(2_000_000, 8) == 250_000


def test_items_are_of_a_known_time():
    with pytest.raises(ValueError, match=r"when='pass' is not valid \(did you mean 'passes'\?\)"):
        MemoryItem(name="x", num_bytes=1, when="pass")


WAYS = {
    "plain": {},
    "float32": {"precision": "float32"},
    "in parts": {"step": StepConfig(accumulate=4)},
    "averaged": {"step": StepConfig(ema_decay=0.9)},
    "in backward": {"head": HeadConfig(update="backward")},
    "drawn": {"head": HeadConfig(sample_rate=0.2)},
    "adamw": {"optimizer": OptimizerConfig(kind="adamw")},
}


@pytest.mark.parametrize(("way", "num_classes"), [("plain", 100), *((way, 30_000) for way in WAYS)])
def test_a_real_step_allocates_as_much(way, num_classes):
    """Within 10 %: gradients of activations on their way back are not told, and not all is there at once."""
    config = _config(num_workers=1, batch_size=16, **WAYS[way])
    torch.manual_seed(0)
    model = config.model.build().to(memory_format=torch.channels_last)
    counted = count_activations(model, torch.device("cpu"), AUTOCAST.get(config.precision))
    told = estimate_memory(config, model, counted, num_classes, is_cuda=False)

    step = assemble(config, num_classes, 9, torch.device("cpu"))
    images = torch.randint(0, 256, (16, 112, 112, 3), dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (16,))
    step(images, labels)  # all buffers are there from then on
    step.optimizer.zero_grad(set_to_none=True)
    before = [images, *step.model.parameters(), *step.model.buffers(), *step.head.parameters()]
    before += [value for state in step.optimizer.state.values() for value in state.values()]
    before += [*step.average.parameters(), *step.average.buffers()] if step.average else []
    before += [step.head_update.momentum_buffer] if step.head_update else []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(images, labels)
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert told.total_bytes == pytest.approx(tensor_bytes(before) + most, rel=0.1)
