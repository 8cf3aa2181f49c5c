"""Sampled centres against all of them: time and memory of forward, backward and optimizer, and which rows move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lgaf.optim import OptimizerConfig
from tests.benchmarks.head_measure import (
    Arm,
    Problem,
    forward_backward,
    isolated,
    peak,
    reset_peak,
    timed,
)
from tests.benchmarks.head_report import Report, mib, milliseconds, ratio


@dataclass(frozen=True)
class SamplingResult:
    """What a head with its optimizer costs."""

    forward_backward: float
    step: float
    forward_backward_peak: int
    """Bytes beyond centres and momentum; the gradient counts."""
    step_peak: int
    """Bytes beyond centres, momentum and gradient."""
    sampled: int
    """Rows of the centres that the head saw in the last step."""
    moved: tuple[int, int]
    """Rows of centres and momentum that it changed."""
    strays: int
    """Rows changed that were not sampled."""


def _optimizer(head: nn.Module, arm: Arm) -> torch.optim.Optimizer:
    if arm.kind != "rival":
        return OptimizerConfig().build([head])
    config = OptimizerConfig()
    return torch.optim.SGD(
        head.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _momentum(optimizer: torch.optim.Optimizer, head: nn.Module) -> Tensor:
    return optimizer.state[head.weight]["momentum_buffer"]


def _sampled(head: nn.Module, arm: Arm) -> Tensor:
    if head.weight.grad.is_sparse:
        return head.weight.grad._indices()[0]
    if arm.kind == "rival" and arm.sample_rate < 1:
        return head.index
    return torch.arange(len(head.weight), device=head.weight.device)


def measure(problem: Problem, arm: Arm, repeats: int) -> SamplingResult:
    """Steps of one head; for a process of its own."""
    torch.set_num_threads(problem.threads)
    head = problem.build(arm, problem.centres())
    optimizer = _optimizer(head, arm)
    x, labels = problem.inputs()
    # The first step is not counted: after it the momentum is there, and no row of it that it moved may move unsampled.
    forward_backward(head, x, labels, arm)
    optimizer.step()
    passes, steps = [], []
    for _ in range(repeats):
        passes.append(timed(problem.device, forward_backward, head, x, labels, arm)[0])
        steps.append(timed(problem.device, optimizer.step)[0])

    head.zero_grad(set_to_none=True)
    before = reset_peak(problem.device)
    forward_backward(head, x, labels, arm)
    passes_peak = peak(problem.device) - before
    before = reset_peak(problem.device)
    optimizer.step()
    step_peak = peak(problem.device) - before

    forward_backward(head, x, labels, arm)
    sampled = _sampled(head, arm)
    old = [head.weight.detach().clone(), _momentum(optimizer, head).clone()]
    optimizer.step()
    new = [head.weight.detach(), _momentum(optimizer, head)]
    moved = [(a != b).any(dim=1) for a, b in zip(old, new, strict=True)]
    is_stray = moved[0] | moved[1]
    is_stray[sampled] = False
    return SamplingResult(
        float(np.median(passes)),
        float(np.median(steps)),
        passes_peak,
        step_peak,
        len(sampled),
        (int(moved[0].sum()), int(moved[1].sum())),
        int(is_stray.sum()),
    )


def report_sampling(report: Report, problem: Problem, sample_rate: float, repeats: int) -> None:
    """The table of sampling; a row of ours that moved unsampled ends the program."""
    arms = [
        Arm("ours, kept, all centres", "kept"),
        Arm("ours, recomputed, all centres", "recompute"),
        Arm(f"ours, kept, rate {sample_rate}", "kept", sample_rate=sample_rate),
        Arm("PartialFC_V2, all centres", "rival"),
        Arm(f"PartialFC_V2, rate {sample_rate}", "rival", sample_rate=sample_rate),
    ]
    rows, first = [], None
    for arm in arms:
        result = isolated(problem.device, measure, problem, arm, repeats)
        if result is None:
            rows.append([arm.name, "killed"])
            continue
        if arm.kind != "rival" and result.strays:
            raise SystemExit(f"{arm.name}: {result.strays} rows moved that were not sampled")
        step = result.forward_backward + result.step
        first = first or step
        rows.append(
            [
                arm.name,
                milliseconds(result.forward_backward),
                milliseconds(result.step),
                milliseconds(step),
                ratio(step, first),
                mib(result.forward_backward_peak),
                mib(result.step_peak),
                f"{result.sampled:,}",
                f"{result.moved[0]:,} / {result.moved[1]:,}",
                f"{result.strays:,}",
            ]
        )
    report.table(
        f"Sampling: {problem.num_classes:,} classes, CosFace, float32, B={problem.batch}, D={problem.dim},"
        f" {problem.threads} threads, median of {repeats}",
        (
            "head",
            "forward+backward",
            "optimizer",
            "both",
            "first row / this",
            "peak, forward+backward",
            "peak, optimizer",
            "rows sampled",
            "rows moved (centres / momentum)",
            "moved unsampled",
        ),
        rows,
        "Peaks: of forward+backward beyond centres and momentum, the gradient included; of the optimizer beyond those.",
    )
