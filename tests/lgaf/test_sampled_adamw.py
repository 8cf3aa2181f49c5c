"""AdamW on dense and on sparse gradients, beside torch's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lgaf import sampled_optim
from lgaf.optim import OptimizerConfig
from lgaf.sampled_optim import SampledAdamW

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))


def _sparse(rows: list[int], values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (20, 3), check_invariants=True)


def test_dense_gradients_are_torchs_to_the_bit():
    ours, theirs = _parameter(), _parameter()
    both = SampledAdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(20, 3)
        for optimizer in both:
            optimizer.step()
        assert torch.equal(ours, theirs)


@given(st.lists(st.sets(st.integers(0, 19), min_size=1), min_size=1, max_size=4), st.integers(1, 5))
def test_drawn_rows_move_by_torchs_rule_and_the_others_not_at_all(draws, rows_at_once):
    """The oracle: a dense AdamW whose weights and moments are put back where a row was not drawn."""
    ours, theirs = _parameter(), _parameter()
    sampled, dense = SampledAdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for drawn in draws:
        rows = sorted(drawn)
        others = [row for row in range(20) if row not in drawn]
        gradient = torch.zeros(20, 3)
        gradient[rows] = torch.randn(len(rows), 3, generator=generator)
        ours.grad, theirs.grad = _sparse(rows, gradient[rows]), gradient
        before = [value.clone() for value in (theirs.detach(), *dense.state[theirs].values())]
        with mock.patch.object(sampled_optim, "ROWS_AT_ONCE", rows_at_once):
            sampled.step()
        dense.step()
        with torch.no_grad():
            state = dense.state[theirs]
            kept = before if len(before) == 4 else [before[0], None, torch.zeros(20, 3), torch.zeros(20, 3)]
            theirs[others] = kept[0][others]
            for name, old in zip(("exp_avg", "exp_avg_sq"), kept[2:], strict=True):
                state[name][others] = old[others]
        torch.testing.assert_close(ours, theirs)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(sampled.state[ours][name], dense.state[theirs][name])


def test_rows_that_stand_twice_are_summed():
    values = torch.randn(3, 3)
    twice, once = _parameter(), _parameter()
    twice.grad, once.grad = _sparse([4, 9, 4], values), _sparse([4, 9], torch.stack([values[0] + values[2], values[1]]))
    for parameter in (twice, once):
        SampledAdamW([parameter], **SETTINGS).step()
    torch.testing.assert_close(twice, once)


def test_the_recipe_decays_matrices_alone_and_its_state_is_there_from_the_start():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = OptimizerConfig(kind="adamw", learning_rate=0.5, weight_decay=0.1, beta2=0.99).build([network])
    assert isinstance(optimizer, SampledAdamW)
    decays = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {1: 0.1, 3: 0.0}
    assert all(group["betas"] == (0.9, 0.99) and group["lr"] == 0.5 for group in optimizer.param_groups)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in network.parameters())


@pytest.mark.parametrize(
    ("reference", "batch", "rate"), [(0, 2048, 0.1), (512, 512, 0.1), (512, 2048, 0.4), (512, 128, 0.025)]
)
def test_the_rate_follows_the_batch_where_it_is_asked_to(reference, batch, rate):
    assert OptimizerConfig(reference_batch=reference).learning_rate_for(batch) == pytest.approx(rate)
