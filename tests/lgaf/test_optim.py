"""SGD: decay on matrices and kernels alone, and the trajectory of torch's own SGD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 5), nn.BatchNorm1d(5)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5)  # no zeros: a decayed zero could not be told from one left alone
    return network


def test_decay_shrinks_matrices_and_kernels_alone():
    network = _network()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = OptimizerConfig(learning_rate=0.5, weight_decay=0.1).build([network])
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        shrink = 0.95 if name in ("0.weight", "4.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrink, rtol=1e-6, atol=0)


def test_each_parameter_of_all_modules_is_trained_once():
    modules = [LGAFConfig(backbone="micro", embedding_dim=16).build(), nn.Linear(3, 2)]
    optimizer = OptimizerConfig().build(modules)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for module in modules for p in module.parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for module in modules:
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                matrix = isinstance(layer, (nn.Linear, nn.Conv2d)) and name == "weight"
                assert decay[id(parameter)] == (5e-4 if matrix else 0.0), (layer, name)


@settings(max_examples=15)
@given(st.floats(0.01, 0.5), st.sampled_from([0.0, 0.5, 0.9]), st.floats(0.0, 0.01), st.integers(0, 1000))
def test_zero_momentum_buffers_give_the_trajectory_of_plain_sgd(learning_rate, momentum, weight_decay, seed):
    ours, plain = _network(seed), _network(seed)
    config = OptimizerConfig(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    optimizer = config.build([ours])
    buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in ours.parameters()]
    assert all(buffer.eq(0).all() for buffer in buffers)
    groups = [
        {"params": [plain[0].weight, plain[4].weight], "weight_decay": weight_decay},
        {
            "params": [p for p in plain.parameters() if p is not plain[0].weight and p is not plain[4].weight],
            "weight_decay": 0.0,
        },
    ]
    reference = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    for _ in range(4):
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert all(not torch.equal(now, then) for now, then in zip(ours.parameters(), start, strict=True))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"learning_rate": 0.0}, r"optimizer\.learning_rate=0\.0"),
        ({"learning_rate": float("nan")}, r"optimizer\.learning_rate=nan"),
        ({"momentum": 1.0}, r"optimizer\.momentum=1\.0"),
        ({"weight_decay": -1e-4}, r"optimizer\.weight_decay=-0\.0001"),
    ],
)
def test_bad_values_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        OptimizerConfig(**fields)
