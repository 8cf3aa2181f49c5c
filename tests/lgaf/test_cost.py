"""The cost table counts what a hand counts, and its parts are the whole."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import pytest
import torch

from lgaf.models import LGAFConfig, cost
from lgaf.models.__main__ import main
from lgaf.models.cost import PARTS, PLAIN, WHOLE, Cost, Duration, cost_table, network_costs, network_durations

MICRO = LGAFConfig(backbone="micro", embedding_dim=16)
LGAF_100 = LGAFConfig()

_costs = functools.lru_cache(network_costs)  # LGAF-100 takes seconds


def _macs(in_channels: int, channels: int, kernel: int, side: int) -> int:
    return in_channels * channels * kernel**2 * side**2


def test_operations_of_a_small_network_are_those_counted_by_hand():
    costs = _costs(MICRO)
    stem = _macs(3, 16, 3, 56)
    # (side of the first convolution, side after the second one's stride), and a 1x1 shortcut where they differ
    stages = [(56, 56), (56, 28), (28, 14), (14, 7)]
    body = sum(
        _macs(16, 16, 3, before) + _macs(16, 16, 3, after) + (before != after) * _macs(16, 16, 1, after)
        for before, after in stages
    )
    # One head of width 4: the equivalent kernels 1, 3 and 5 are one 1x1 and none, one and two 3x3; each has its LANet
    # (4 to 1, 1 to 1 channels); SE goes from 12 channels to 1 and back.
    scales = sum(_macs(16, 4, 1, 7) + num_3x3 * _macs(4, 4, 3, 7) for num_3x3 in (0, 1, 2))
    head = scales + 3 * (_macs(4, 1, 1, 7) + _macs(1, 1, 1, 7)) + 2 * 12 + 12 * 7**2 * 16 // 4
    expected = {"backbone": stem + body, "GFE": 16 * 7**2 * 16, "MHMS": 4 * head, "LGF": 0}
    assert {name: costs[name].forward_flops for name in PARTS} == {name: 2 * macs for name, macs in expected.items()}
    # Backward: the gradients of weight and input, as many each; the image wants none.
    training = {name: 3 * 2 * macs for name, macs in expected.items()}
    training["backbone"] -= 2 * stem
    assert {name: costs[name].training_flops for name in PARTS} == training


@pytest.mark.parametrize(
    "config",
    [
        MICRO,
        LGAF_100,
        dataclasses.replace(MICRO, quality="none", fusion="iaff"),
        dataclasses.replace(MICRO, num_heads=2, global_projection="gdc", fusion="cat"),
    ],
    ids=["micro", "LGAF-100", "iaff", "gdc"],
)
def test_the_parts_are_the_whole(config):
    costs = _costs(config)
    for field in dataclasses.fields(Cost):
        values = {name: getattr(cost, field.name) for name, cost in costs.items()}
        assert sum(values[name] for name in PARTS) == values[WHOLE], field.name
        assert values["backbone"] + values["GFE"] == values[PLAIN], field.name
    assert all((costs[name].forward_flops > 0) == (name != "LGF" or config.fusion == "iaff") for name in PARTS)


def test_depthwise_convolutions_cost_thrice_their_forward_pass():
    cost = _costs(dataclasses.replace(MICRO, global_projection="gdc"))["GFE"]
    assert cost.forward_flops == 2 * (16 * 7**2 + 16 * 16)
    assert cost.training_flops == 3 * cost.forward_flops


def test_numbers_of_parameters_of_lgaf_100():
    costs = _costs(LGAF_100)
    # Of insightface's iresnet100 (65,156,160) all but the 1,024 of its last batch norm, which has none here.
    assert costs[PLAIN].num_parameters == 65_156_160 - 1_024
    assert costs["backbone"].num_parameters == 65_156_160 - 12_845_568 - 2 * 1_024
    assert costs["LGF"].num_parameters == 0
    assert costs["MHMS"].num_parameters == pytest.approx(12.3e6, rel=5e-3)
    assert costs[WHOLE].num_parameters == pytest.approx(77.5e6, rel=1e-3)
    with torch.device("meta"):
        parameters = LGAF_100.build().parameters()
    assert costs[WHOLE].num_parameters == sum(parameter.numel() for parameter in parameters)


def test_lgaf_100_adds_little_to_its_plain_backbone():
    costs = _costs(LGAF_100)
    assert costs[PLAIN].forward_flops == pytest.approx(24.2e9, rel=2e-3)
    for field in ("forward_flops", "training_flops"):
        assert 1.0 < getattr(costs[WHOLE], field) / getattr(costs[PLAIN], field) < 1.015


@pytest.mark.parametrize("branches", [("global",), ("local",)])
def test_one_branch_is_no_comparison(branches):
    with pytest.raises(ValueError, match=r"model\.branches=.*with both branches"):
        network_costs(dataclasses.replace(MICRO, branches=branches))


@pytest.fixture
def one_round(monkeypatch):
    monkeypatch.setattr(cost, "NUM_ROUNDS", 1)
    monkeypatch.setattr(cost, "SHORTEST_S", 0.0)


@pytest.mark.usefixtures("one_round")
def test_durations_are_told_of_every_subject():
    durations = network_durations(MICRO, batch=2)
    assert durations.keys() == _costs(MICRO).keys()
    assert all(value.forward_s > 0 and value.training_s > 0 for value in durations.values())
    with pytest.raises(ValueError, match="time_batch=1 must be at least 2"):
        network_durations(MICRO, batch=1)


def test_the_table_tells_shares_and_increases():
    costs = {
        name: Cost(num_parameters=1000 * number, forward_flops=10**9 * number, training_flops=3 * 10**9 * number)
        for name, number in zip((*PARTS, WHOLE, PLAIN), (6, 2, 2, 0, 10, 8), strict=True)
    }
    durations = {
        name: Duration(forward_s=value.num_parameters * 1e-6, training_s=2e-3, batch=3) for name, value in costs.items()
    }
    table = cost_table(MICRO, costs, durations)
    assert "batches of 3" in table
    lines = table.splitlines()
    rows = {line[:22].rstrip(): line[22:].split() for line in lines[3:9]}
    assert " ".join(rows["MHMS"]) == "2,000 20.00 % 2.000 20.00 % 6.000 20.00 % 2.000 20.00 % 2.000 100.00 %"
    assert rows["LGF"][:3] == ["0", "0.00", "%"]
    assert " ".join(lines[9].split()) == f"{WHOLE} over {PLAIN} +25.00 % +25.00 % +25.00 % +25.00 % +0.00 %"
    assert len({len(line) for line in lines[2:9]}) == 1  # aligned


@pytest.mark.usefixtures("one_round")
def test_the_command_prints_the_table(capsys):
    assert main(["--backbone", "micro", "--embedding-dim", "16", "--time-batch", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("One image of 112x112: backbone micro, embedding 16\n")
    assert "training ms" in out
    assert main(["--backbone", "micro", "--no-time"]) == 0
    assert " ms" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backbone", "micra"], "model.backbone='micra' is not valid (did you mean 'micro'?)"),
        (["--embedding-dim", "10", "--no-time"], "model.num_heads=4 must divide model.embedding_dim=10"),
        (["--backbone", "micro", "--time-batch", "1"], "time_batch=1 must be at least 2"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert text in capsys.readouterr().err


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "lgaf.models", "--backbone", "micro", "--no-time"]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "LGAF over backbone + GFE" in out.stdout
    assert out.stderr == ""
