"""The head with the Triton kernel gives what the torch path gives: interpreted here, compiled where there is a GPU.

Triton reads ``TRITON_INTERPRET`` when it is first imported, and other tests may have imported it: so all cases run in
one process of their own, which is this file as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from lgaf.heads import chunks
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from tests.conftest import ROOT

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
MARGINS = ("arcface", "adaface", "magface")
BUDGETS = {"kept": 1 << 30, "recomputed": 50_000}
RATES = (1.0, 0.3)
PRECISIONS = ("float32", "bfloat16")
CASES = [" ".join(map(str, case)) for case in product(MARGINS, BUDGETS, RATES, PRECISIONS)]


def _step(margin: str, budget: str, rate: str, precision: str) -> tuple[torch.Tensor, ...]:
    device = "cuda" if CUDA else "cpu"
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 300, (10,), generator=generator).to(device)
    # At a low scale, and near the own centres: there own classes that are not left out weigh most.
    options = create_margin(margin, scale=8.0)
    head = ShardedMarginHead(300, 64, options, sample_rate=float(rate), memory_budget=BUDGETS[budget]).to(device)
    noise = 0.1 * torch.randn(10, 64, generator=generator).to(device)
    x = (500 * head.weight.detach()[labels] + noise).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = head(x, labels)
    loss.backward()
    gradient = head.weight.grad
    return loss.detach(), x.grad, gradient.to_dense() if gradient.is_sparse else gradient


def _difference(case: str) -> list[float]:
    """Relative differences of loss and gradients between kernel and torch path."""
    # Only where there is a GPU would the head ask for the kernel by itself.
    from lgaf.heads.triton_softmax import exponentials

    calls = []

    def kernel(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return exponentials(*arguments)

    with mock.patch.object(chunks, "kernel_for", return_value=kernel):
        found = _step(*case.split())
    assert calls, "the kernel was not called"
    with mock.patch.object(chunks, "kernel_for", return_value=None):
        expected = _step(*case.split())
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.fixture(scope="module")
def differences() -> dict[str, list[float]]:
    environment = os.environ if CUDA else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.lgaf.test_head_with_kernel"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernel_and_torch_path_agree(differences, case):
    loss, *gradients = differences[case]
    assert loss < 1e-6
    # In bfloat16 both store rounded exponentials; the interpreter cuts bits off where a GPU and torch round.
    assert max(gradients) < (1e-5 if "float32" in case else 2**-8 if CUDA else 2**-7)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_gpu_takes_the_kernel_by_itself():
    called = mock.patch("lgaf.heads.triton_softmax.exponentials", side_effect=RuntimeError("called"))
    with called, pytest.raises(RuntimeError, match="called"):
        _step("arcface", "kept", "1.0", "bfloat16")


def test_a_cpu_does_not():
    assert chunks.kernel_for(torch.zeros(2, 4)) is None


if __name__ == "__main__":
    print(json.dumps({case: _difference(case) for case in CASES}))
