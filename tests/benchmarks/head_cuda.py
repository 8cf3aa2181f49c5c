"""The margin head on one GPU: against PartialFC_V2 in float32 and bfloat16, and at ten million classes.

``python -m tests.benchmarks.head --device cuda``; on a machine without tyro ``python -m tests.benchmarks.head_cuda``,
with a Markdown file to add the tables to as its argument.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from lgaf.optim import OptimizerConfig
from tests.benchmarks.head_measure import (
    Arm,
    Problem,
    Timing,
    alternate,
    forward_backward,
    gap,
    peak,
    peak_extra,
    release,
    reset_peak,
    timed,
    wrong_path,
)
from tests.benchmarks.head_report import MIB, NO_MEMORY, Report, mib, milliseconds, ratio

DEVICE = "cuda"
BATCH = 1024
CLASSES = (200_000, 1_000_000, 4_000_000)
ALL_CLASSES = 10_000_000
BUDGET = 1024 * MIB
# The time after which no further case begins: the whole must end within a lease.
BEGIN_WITHIN_S = 400
ARMS = (
    Arm("ours, kept, bfloat16", "kept", bf16=True),
    Arm("ours, recomputed, bfloat16", "recompute", bf16=True),
    Arm("ours, kept, float32", "kept"),
    Arm("ours, recomputed, float32", "recompute"),
    Arm("PartialFC_V2, bfloat16", "rival", bf16=True),
    Arm("PartialFC_V2, float32", "rival"),
)
RIVALS = {arm.bf16: arm for arm in ARMS if arm.kind == "rival"}
LOSS_TOLERANCE = {True: 1e-2, False: 1e-5}
"""Of the relative difference to the rival of the same precision; by whether that is bfloat16."""


def product_peak(size: int = 8192, repeats: int = 20) -> float:
    """Operations a second of a large matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    seconds, _ = timed(DEVICE, lambda: [torch.mm(a, b) for _ in range(repeats)])
    return 2 * size**3 * repeats / seconds


def against_rival(report: Report, sizes: Sequence[int], batch: int, dim: int, repeats: int, began: float) -> list[str]:
    """Time, memory and rate of both heads, a table each size; gives what is wrong with them."""
    best, faults = product_peak(), []
    report.say(f"bfloat16 product of 8192x8192 matrices: {best / 1e12:,.0f} TFLOP/s")
    for num_classes in sizes:
        if time.perf_counter() - began > BEGIN_WITHIN_S:
            report.say(f"{num_classes:,} classes: left out, the time is up")
            continue
        problem = Problem(num_classes, dim, batch, DEVICE, small_budget=BUDGET)
        timings = alternate(problem, ARMS, repeats)
        memory = {}
        for arm in ARMS:
            release(DEVICE)
            memory[arm.name] = peak_extra(problem, arm)
            faults.append(wrong_path(problem, arm, memory[arm.name]))
        report.table(
            f"One GPU ({torch.cuda.get_device_name()}): {num_classes:,} classes, CosFace, B={batch}, D={dim},"
            f" median of {repeats}",
            (
                *(
                    "head",
                    "forward+backward",
                    "rival in float32 / this",
                    "in bfloat16 / this",
                    "TFLOP/s",
                    "of the peak",
                ),
                *("peak extra memory", "rival in float32 / this", "in bfloat16 / this", "differs: loss / gradient"),
            ),
            [_row(problem, arm, timings, memory, best, faults) for arm in ARMS],
            f"Peak: {best / 1e12:,.0f} TFLOP/s, bfloat16 product of 8192x8192 matrices. Operations counted: 2BCD a"
            " product, 3 products, 4 where recomputed. Extra: beyond the centres and their gradient. Differences: from"
            f" the rival of the same precision. Budget of the recomputing head: at most {BUDGET // MIB} MiB.",
        )
        report.say(f"{time.perf_counter() - began:.0f} s so far")
    return [fault for fault in faults if fault]


def _row(
    problem: Problem,
    arm: Arm,
    timings: dict[str, Timing | None],
    memory: dict[str, int | None],
    best: float,
    faults: list[str],
) -> list[str]:
    rivals = [RIVALS[False].name, RIVALS[True].name]
    own, theirs = timings[arm.name], timings[RIVALS[arm.bf16].name]
    cells = [arm.name, NO_MEMORY, "", "", "", ""]
    if own is not None:
        rate = 2 * problem.batch * problem.num_classes * problem.dim * arm.products / own.median
        ratios = [ratio(own.median, timings[name] and timings[name].median) for name in rivals]
        cells = [arm.name, milliseconds(own.median), *ratios, f"{rate / 1e12:,.0f}", f"{rate / best:.0%}"]
    cells += [mib(memory[arm.name]), *(ratio(memory[arm.name], memory[name]) for name in rivals)]
    if own and theirs:
        loss_gap, gradient_gap = gap(own, theirs)
        if not loss_gap <= LOSS_TOLERANCE[arm.bf16]:  # NaN too
            faults.append(f"{problem.num_classes:,} classes, {arm.name}: loss {own.loss}, the rival's {theirs.loss}")
        cells.append(f"{loss_gap:.0e} / {gradient_gap:.0e}")
    return cells


def all_classes(report: Report, num_classes: int, batch: int, dim: int) -> None:
    """Memory of whole steps, exact and with the optimizer, at a size where logits alone would not fit."""
    problem = Problem(num_classes, dim, batch, DEVICE, small_budget=BUDGET)
    arm = ARMS[1]
    try:
        release(DEVICE)
        start = reset_peak(DEVICE)
        head = problem.build(arm, problem.centres())
        optimizer = OptimizerConfig().build([head])
        x, labels = problem.inputs()
        resident = reset_peak(DEVICE) - start
        loss = forward_backward(head, x, labels, arm)
        passes = peak(DEVICE) - start
        optimizer.step()
        seconds, _ = timed(DEVICE, forward_backward, head, x, labels, arm)
        reset_peak(DEVICE)
        step_seconds, _ = timed(DEVICE, optimizer.step)
        step = peak(DEVICE) - start
    except torch.OutOfMemoryError:
        cells = [NO_MEMORY, *[""] * 5]
    else:
        logits = 4 * batch * num_classes
        cells = [mib(resident), mib(passes), mib(step), mib(logits), milliseconds(seconds), milliseconds(step_seconds)]
        report.say(f"first loss at {num_classes:,} classes: {loss.item():.4f}")
    report.table(
        f"{num_classes:,} classes, exact, on one GPU: {arm.name}, B={batch}, D={dim}",
        (
            "centres and momentum",
            "peak, forward+backward",
            "peak, optimizer",
            "(float32 logits)",
            "forward+backward",
            "optimizer",
        ),
        [cells],
        "Peaks of all memory of the process: centres, momentum and gradient included.",
    )


def run(
    report: Report,
    sizes: Sequence[int] = CLASSES,
    largest: int = ALL_CLASSES,
    batch: int = BATCH,
    dim: int = 512,
    repeats: int = 5,
) -> None:
    """All tables; what is wrong is told after them, so that a lease is not lost."""
    began = time.perf_counter()
    # The rival's float32 is float32: no short-cut through the tensor cores' 19 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    faults = against_rival(report, sizes, batch, dim, repeats, began)
    all_classes(report, largest, batch, dim)
    report.say(f"{time.perf_counter() - began:.0f} s in all")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    run(Report(*sys.argv[1:2]))
