"""Batch norm over all ranks: what it changes of a network and what it leaves; its training needs a GPU."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lgaf.distributed import world_size
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAFConfig
from lgaf.models.peers import TransFaceConfig, URLConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.step import StepConfig, TrainStep, _average
from lgaf.synchronised_norm import synchronise_norms
from tests.distributed import run_distributed

MICRO = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, dropout=0.0)
CUDA = torch.cuda.is_available()
ON_TWO = StepConfig(sync_batch_norm=True)

NETWORKS = {
    "lgaf": MICRO,
    "learned shift": LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, feature_shift=True, fusion="cat"),
    "iaff": LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2, quality="none", fusion="iaff"),
    "mobilefacenet": LGAFConfig(backbone="mobilefacenet", embedding_dim=8, num_heads=2),
    "transface": TransFaceConfig(backbone="vit_tiny", embedding_dim=8),
    "url": URLConfig(backbone="micro", embedding_dim=16, num_sub_embeddings=4),
}


def _trained_a_little(config) -> nn.Module:
    """A network whose running statistics are not those it starts with."""
    torch.manual_seed(0)
    model = config.build()
    model(torch.rand(4, 3, 112, 112) * 2 - 1)
    return model


def _check_conversion(group, name: str) -> None:
    model = _trained_a_little(NETWORKS[name])
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    kinds = {key: type(module) for key, module in model.named_modules()}
    parameters = {key: (value, value.requires_grad) for key, value in model.named_parameters()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model.eval()(images).embedding_BD
    synchronise_norms(model, group)
    norms = {key for key, kind in kinds.items() if issubclass(kind, _BatchNorm)}
    assert norms
    for key, module in model.named_modules():
        assert type(module) is (nn.SyncBatchNorm if key in norms else kinds[key]), key
        assert not hasattr(module, "process_group") or module.process_group is group
    # The very same parameters: an optimizer that has them goes on; and the names and order of all that is saved.
    assert list(parameters) == [key for key, _ in model.named_parameters()]
    for key, value in model.named_parameters():
        assert value is parameters[key][0], key
        assert value.requires_grad == parameters[key][1], key
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.eval()(images).embedding_BD, before), "in eval mode nothing changes"
    fresh = NETWORKS[name].build()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images).embedding_BD, before), "and its state is a plain network's"
    model.load_state_dict(fresh.state_dict())


def _check_conversions(group) -> None:
    for name in NETWORKS:
        _check_conversion(group, name)


def test_every_batch_norm_is_converted_and_nothing_else_changes():
    run_distributed(2, _check_conversions)


def _check_average(group) -> None:
    """The average is a copy made before: of plain batch norms, fed from the converted network."""
    model = _trained_a_little(MICRO)
    average = _average(model, 0.5)
    synchronise_norms(model, group)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in average.modules())
    average.update_parameters(model)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    average.update_parameters(model)
    for (name, mine), (_, theirs) in zip(average.module.state_dict().items(), model.state_dict().items(), strict=True):
        if mine.dtype.is_floating_point:
            torch.testing.assert_close(mine, theirs - 0.5, msg=name)
    assert average.module.eval()(torch.zeros(1, 3, 112, 112)).embedding_BD.isfinite().all()


def test_the_moving_average_stays_of_plain_batch_norms():
    run_distributed(2, _check_average)


def _step(group, device: str = "cpu", config: StepConfig = ON_TWO) -> TrainStep:
    torch.manual_seed(0)
    head = ShardedMarginHead(7, 8, create_margin("cosface", scale=8.0), group=group).to(device)
    return TrainStep(MICRO.build().to(device), head, OptimizerConfig(), Schedule(), 2, group=group, config=config)


def _check_refused(group) -> None:
    with pytest.raises(ValueError, match=r"step\.sync_batch_norm=True with 2 ranks on CPUs.*accelerators alone"):
        _step(group)


def test_several_ranks_on_cpus_are_refused():
    run_distributed(2, _check_refused)


def _check_one_rank(group) -> None:
    step = _step(group)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in step.model.modules())
    assert step(torch.zeros(2, 112, 112, 3, dtype=torch.uint8), torch.tensor([0, 1])).loss.isfinite()


def test_one_rank_keeps_its_batch_norms():
    _check_one_rank(None)
    run_distributed(1, _check_one_rank)


def _on_one_gpu(rank: int, port: int) -> None:
    """One of two ranks that share a GPU: its rows of the batch give what they give in the whole batch."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group, rows = dist.group.WORLD, slice(0, 5) if rank == 0 else slice(5, 8)
    assert world_size(group) == 2
    torch.manual_seed(0)
    whole = MICRO.build().cuda().double()
    shared = MICRO.build().cuda().double()
    shared.load_state_dict(whole.state_dict())
    shared.set_process_group(group)
    synchronise_norms(shared, group)
    images = torch.rand(8, 3, 112, 112, device="cuda", dtype=torch.float64) * 2 - 1
    slopes = torch.randn(8, 8, device="cuda", dtype=torch.float64)
    expected, found = whole(images).embedding_BD, shared(images[rows]).embedding_BD
    torch.testing.assert_close(found, expected[rows])
    (expected * slopes).sum().backward()
    (found * slopes[rows]).sum().backward()
    for (name, mine), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            dist.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for (name, mine), theirs in zip(shared.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    dist.destroy_process_group()


@pytest.mark.skipif(not CUDA, reason="torch's SyncBatchNorm trains on GPUs alone")
def test_two_ranks_train_as_one_big_batch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_on_one_gpu, (port,), nprocs=2)
