"""What one rank's head meets is told on all ranks: settings that differ, labels, numbers that are not finite."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lgaf.heads import sharded
from lgaf.heads.global_batch import NonFiniteEmbeddingError
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from tests.distributed import run_distributed

DIM = 12


def _check_unlike_heads(group) -> None:
    rank = dist.get_rank(group)
    for name, options, text in (
        ("arcface", {"num_classes": 10 + rank}, "num_classes: 1[01] here; ranks [[]1[]]"),
        ("arcface", {"sample_rate": 1 - rank / 2}, "sample_rate"),
        ("arcface", {"seed": rank}, "seed"),
        (("arcface", "curricularface")[rank], {}, r"margin: \w+\(.*ranks \[1\] differ from rank 0"),
    ):
        options = {"num_classes": 10, **options}
        head = ShardedMarginHead(embedding_dim=DIM, margin=create_margin(name), group=group, **options)
        for _ in range(2):  # nor does it go on when asked again
            with pytest.raises(ValueError, match=f"the ranks' heads differ in {text}"):
                head(torch.randn(2, DIM), torch.tensor([1, 3]))


def test_heads_that_differ_are_told_on_all_ranks():
    run_distributed(2, _check_unlike_heads)


def _check_errors_reach_all_ranks(group) -> None:
    head = ShardedMarginHead(10, DIM, create_margin("arcface"), group=group)
    rank = dist.get_rank(group)
    labels = torch.tensor([1, 12 if rank == 1 else 3])
    with pytest.raises(ValueError, match=r"labels in \[1, 12\].*10 classes: valid are 0 to 9"):
        head(torch.randn(2, DIM), labels)
    x = torch.randn(2, DIM)
    if rank == 0:
        x[1, 4] = math.inf
    with pytest.raises(NonFiniteEmbeddingError, match=r"1 of 4 embeddings.*row 1 \(label 7\)"):
        head(x, torch.tensor([1, 7]))
    with pytest.raises(ValueError, match=rf"rank {rank} of 2 has 2 rows.*sizes=\[3, 3\]"):
        head(torch.randn(2, DIM), torch.tensor([1, 7]), sizes=[3, 3])
    with pytest.raises(ValueError, match="the global batch is empty"):
        head(torch.empty(0, DIM), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels in \[1, 2147483647\]"):
        head(torch.randn(2, DIM), torch.tensor([1, 2**32 + 3 if rank == 0 else 3]))
    # A rank without rows need not ask for their gradient.
    rows = torch.empty(0, DIM) if rank == 0 else torch.randn(3, DIM, requires_grad=True)
    head(rows, torch.arange(len(rows))).backward()
    assert head.weight.grad.any()
    head.weight.requires_grad_(rank == 1)
    head(torch.randn(2, DIM, requires_grad=True), torch.tensor([1, 7])).backward()  # still in step with each other


def _check_nan_centre(group) -> None:
    for name in ("cosface", "curricularface"):
        head = ShardedMarginHead(10, DIM, create_margin(name), group=group)
        if dist.get_rank(group) == 1:
            with torch.no_grad():
                head.weight[3, 2] = math.nan
        loss = head(torch.randn(2, DIM), torch.tensor([0, 1]))
        assert loss.isnan(), name


def test_a_damaged_shard_is_seen_by_all_ranks():
    run_distributed(2, _check_nan_centre)


def test_labels_that_nobody_has_make_the_loss_nan_where_they_are_not_looked_at():
    head = ShardedMarginHead(10, DIM, create_margin("cosface"))
    with mock.patch.object(sharded, "check_values"):  # as on an accelerator
        for label in (-1, 10, 2**40):
            assert head(torch.randn(2, DIM), torch.tensor([3, label])).isnan()


def test_errors_of_one_rank_are_raised_on_all():
    run_distributed(2, _check_errors_reach_all_ranks)
