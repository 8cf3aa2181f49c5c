"""SGD on dense and on sparse gradients, and their clipping, beside torch's."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lgaf import sampled_optim
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.optim import OptimizerConfig, clip_gradients
from lgaf.sampled_optim import SampledSGD
from tests.distributed import run_distributed


class TestSampledSGD:
    def _parameter(self, gradient: torch.Tensor) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
        parameter.grad = gradient
        return parameter

    def _optimizer(self, parameter: torch.nn.Parameter, kind=SampledSGD):
        optimizer = kind([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.5)
        return optimizer

    def test_dense_gradients_are_torchs(self):
        gradient = torch.randn(20, 3)
        ours, theirs = self._parameter(gradient.clone()), self._parameter(gradient.clone())
        self._optimizer(ours).step()
        self._optimizer(theirs, torch.optim.SGD).step()
        assert torch.equal(ours, theirs)

    def test_rows_of_a_sparse_gradient_move_as_torch_would_move_them(self):
        rows, values = torch.tensor([4, 9, 10]), torch.randn(3, 3)
        sparse = torch.sparse_coo_tensor(rows[None], values, (20, 3), check_invariants=True)
        ours, theirs = self._parameter(sparse), self._parameter(sparse.to_dense())
        before = ours.detach().clone()
        optimizer = self._optimizer(ours)
        optimizer.step()
        self._optimizer(theirs, torch.optim.SGD).step()
        assert torch.equal(ours[rows], theirs[rows])
        others = [row for row in range(20) if row not in rows.tolist()]
        assert torch.equal(ours[others], before[others])
        assert (optimizer.state[ours]["momentum_buffer"][others] == 0.5).all()
        assert ours.grad is not None
        assert ours.grad.is_sparse

    def test_gradients_of_two_backward_passes_are_summed_before_they_count(self):
        rows = torch.tensor([4, 9, 4])
        values = torch.randn(3, 3)
        twice = self._parameter(torch.sparse_coo_tensor(rows[None], values, (20, 3), check_invariants=True))
        once = self._parameter(
            torch.sparse_coo_tensor(
                torch.tensor([[4, 9]]),
                torch.stack([values[0] + values[2], values[1]]),
                (20, 3),
                check_invariants=True,
            )
        )
        self._optimizer(twice).step()
        self._optimizer(once).step()
        torch.testing.assert_close(twice, once)

    def test_rows_that_stand_twice_side_by_side_are_summed(self):
        values = torch.randn(3, 3)
        rows = torch.tensor([[4, 4, 9]])
        twice = self._parameter(torch.sparse_coo_tensor(rows, values, (20, 3), check_invariants=True))
        dense = self._parameter(twice.grad.to_dense())
        self._optimizer(twice).step()
        self._optimizer(dense, torch.optim.SGD).step()
        torch.testing.assert_close(twice[[4, 9]], dense[[4, 9]])

    def test_rows_move_in_blocks_by_the_rule_of_their_group_beside_dense_ones(self):
        rows, values = torch.tensor([1, 4, 9, 10, 15]), torch.randn(5, 3)
        sparse = torch.sparse_coo_tensor(rows[None], values, (20, 3), check_invariants=True)
        ours = [self._parameter(torch.randn(20, 3)), self._parameter(sparse)]
        theirs = [self._parameter(ours[0].grad.clone()), self._parameter(sparse.to_dense())]
        both = []
        for kind, (first, second) in ((SampledSGD, ours), (torch.optim.SGD, theirs)):
            groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second], "lr": 0.7, "weight_decay": 0.3}]
            both.append(kind(groups, lr=0.1, momentum=0.9))
        with mock.patch.object(sampled_optim, "ROWS_AT_ONCE", 2):
            for optimizer in both:
                optimizer.step()
                optimizer.step()
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1][rows], theirs[1][rows])

    def test_its_buffers_are_saved_and_restored(self):
        rows = torch.tensor([[4, 9]])
        sparse = torch.sparse_coo_tensor(rows, torch.randn(2, 3), (20, 3), check_invariants=True)
        parameters = [self._parameter(sparse), self._parameter(sparse)]
        first, second = (SampledSGD([parameter], lr=0.1, momentum=0.9) for parameter in parameters)
        first.step()  # made by itself, without buffers at first
        with torch.no_grad():
            parameters[1].copy_(parameters[0])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        first.step()
        second.step()
        assert torch.equal(parameters[0], parameters[1])

    def test_hooks_of_a_step_run_once(self):
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)  # torch wraps the class's own step then
        parameter = self._parameter(torch.ones(20, 3))
        optimizer, calls = self._optimizer(parameter), []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        optimizer.step()
        assert calls == [1]

    def test_works_with_a_gradient_scaler_and_a_closure(self):
        x, labels = 10 * torch.randn(6, 8), torch.randint(0, 200, (6,))
        heads = []
        for scale in (1.0, 1024.0):
            head = ShardedMarginHead(200, 8, create_margin("cosface"), sample_rate=0.3, seed=3)
            optimizer, scaler = OptimizerConfig().build([head]), torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(head(x, labels)).backward()
            scaler.step(optimizer)
            heads.append(head)
        torch.testing.assert_close(heads[1].weight, heads[0].weight)

        def closure() -> float:
            optimizer.zero_grad()
            loss = heads[1](x, labels)
            loss.backward()
            return loss.item()

        before = heads[1].weight.detach().clone()
        assert optimizer.step(closure) > 0
        assert not torch.equal(heads[1].weight, before)


class TestClipping:
    def _parameters(self) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((20, 3), (4, 5), (6,))]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return parameters

    @pytest.mark.parametrize("max_norm", [0.5, 100.0])
    def test_is_torchs_for_dense_and_sparse_gradients(self, max_norm):
        ours, theirs = self._parameters(), self._parameters()
        sparse = ours[0].grad.to_sparse(1)
        # One row in two parts, as after two backward passes.
        ours[0].grad = torch.sparse_coo_tensor(
            torch.cat([sparse.indices(), sparse.indices()[:, :1]], 1),
            torch.cat([sparse.values()[:1] * 0.25, sparse.values()[1:], sparse.values()[:1] * 0.75]),
            (20, 3),
            check_invariants=True,
        )
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close(clip_gradients(ours[1:], ours[:1], max_norm, None), expected)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad.to_dense(), other.grad)

    def test_shards_count_as_the_one_tensor_they_are(self):
        run_distributed(2, _check_clipped_shards)

    def test_no_gradient_is_norm_0(self):
        assert clip_gradients([torch.nn.Parameter(torch.ones(2))], [], 1.0, None) == 0

    def test_the_norm_must_be_positive(self):
        with pytest.raises(ValueError, match="max_norm=0 must be greater than 0"):
            clip_gradients([], [], 0, None)


def _check_clipped_shards(group) -> None:
    whole, other = TestClipping()._parameters()[:2]
    shard = torch.nn.Parameter(torch.zeros(10, 3))
    rows = slice(10 * dist.get_rank(group), 10 * dist.get_rank(group) + 10)
    shard.grad = whole.grad[rows].clone()
    replicated = torch.nn.Parameter(torch.zeros(4, 5))
    replicated.grad = other.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_([whole, other], 0.5)
    torch.testing.assert_close(clip_gradients([replicated], [shard], 0.5, group), expected)
    torch.testing.assert_close(shard.grad, whole.grad[rows])
    torch.testing.assert_close(replicated.grad, other.grad)
