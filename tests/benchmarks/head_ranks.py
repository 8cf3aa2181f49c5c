"""The head over several gloo ranks: time of a step, and bytes that each rank has to send for it."""

from __future__ import annotations

import inspect
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist
from torch import Tensor

from tests import distributed
from tests.benchmarks.head_measure import Arm, Problem, forward_backward, recycle_memory, timed
from tests.benchmarks.head_report import Report, milliseconds, ratio

TIMEOUT_S = 1800
FORMULAS = (
    "Bytes sent by a rank (as many arrive) of W by ring algorithms, n the bytes of a rank's own part: all-gather and"
    " reduce-scatter (W-1)n, all-reduce 2n(W-1)/W, reduce n unless the rank is the root. Least possible:"
    " 4(G-B)(D+1) for the others' embeddings and labels, 4(G-B)D for the gradients of their rows, and an all-reduce of"
    " two numbers a row (sum of exponentials, target logit)."
)


def _all_gather(call: dict[str, Any], world: int) -> float:
    part: Tensor = call["input_tensor"] if "input_tensor" in call else call["tensor"]
    return part.nbytes * (world - 1)


def _reduce_scatter(call: dict[str, Any], world: int) -> float:
    return call["output"].nbytes * (world - 1)


# Bytes that a rank sends in a collective, from the arguments of its call. (Some go by two names from torch 2.13 on.)
SENT: dict[str, Callable[[dict[str, Any], int], float]] = {
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather,
    "all_gather_single": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter,
    "all_reduce": lambda call, world: 2 * call["tensor"].nbytes * (world - 1) / world,
    "reduce": lambda call, world: call["tensor"].nbytes * (call["dst"] != dist.get_rank()),
    "broadcast": lambda call, world: call["tensor"].nbytes * (world - 1) / world,
    "all_to_all_single": lambda call, world: call["input"].nbytes * (world - 1) / world,
}


@contextmanager
def counted() -> Iterator[tuple[Counter, Counter]]:
    """Calls and bytes by collective while the context lasts."""
    calls, sent = Counter(), Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            sent[name] += SENT[name](signature.bind(*args, **kwargs).arguments, dist.get_world_size())
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in SENT.keys() & vars(dist).keys():
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield calls, sent


def least_possible(problem: Problem, world: int) -> float:
    """Bytes a rank must send: see `FORMULAS`."""
    others = problem.batch * (world - 1)
    statistics = 2 * (2 * 4 * problem.batch * world) * (world - 1) / world
    return others * (problem.dim + 1) * 4 + others * problem.dim * 4 + statistics


@dataclass(frozen=True)
class RankResult:
    """What one rank saw of one arm."""

    seconds: float
    calls: dict[str, int]
    sent: float
    loss: float


def _rank_main(group: Any, problem: Problem, arms: Sequence[Arm], repeats: int, results: Any) -> None:
    recycle_memory()
    weight, (x, labels) = problem.centres(group), problem.inputs(group)
    heads = {arm.name: problem.build(arm, weight, group) for arm in arms}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    traffic = {}
    for number in range(repeats + 1):
        for arm in arms:
            dist.barrier()
            with counted() as (calls, sent):
                passed, loss = timed(problem.device, forward_backward, heads[arm.name], x, labels, arm)
            heads[arm.name].zero_grad(set_to_none=True)
            # Of the last round: the first may have to tell the sizes too.
            traffic[arm.name] = (dict(calls), sum(sent.values()), loss.item())
            if number:
                seconds[arm.name].append(passed)
    for name, (calls, sent, loss) in traffic.items():
        results.put((name, RankResult(float(np.median(seconds[name])), calls, sent, loss)))


def measure(problem: Problem, arms: Sequence[Arm], world: int, repeats: int) -> dict[str, list[RankResult]]:
    """Results of all ranks by arm."""
    results = multiprocessing.get_context("fork").SimpleQueue()
    with mock.patch.object(distributed, "TIMEOUT_S", TIMEOUT_S):
        distributed.run_distributed(world, _rank_main, problem, arms, repeats, results)
    found: dict[str, list[RankResult]] = {arm.name: [] for arm in arms}
    while not results.empty():
        name, result = results.get()
        found[name].append(result)
    return found


def report_ranks(
    report: Report, problem: Problem, arms: Sequence[Arm], worlds: Sequence[int], repeats: int, advance: Callable
) -> None:
    """The table of the ranks; the last arm is the rival."""
    rows = []
    for world in worlds:
        if problem.num_classes % world:
            raise ValueError(f"{problem.num_classes} classes over {world} ranks: the rival cuts them unlike us")
        results = measure(problem, arms, world, repeats)
        rival = max(result.seconds for result in results[arms[-1].name])
        least = least_possible(problem, world)
        for arm in arms:
            own = results[arm.name]
            slowest, sent = max(result.seconds for result in own), float(np.mean([result.sent for result in own]))
            calls = ", ".join(f"{count} {name.replace('_', '-')}" for name, count in own[0].calls.items())
            rows.append(
                [
                    arm.name,
                    str(world),
                    milliseconds(slowest),
                    ratio(slowest, rival),
                    f"{sent:,.0f}",
                    f"{sent / least:.3f}" if least else "",
                    calls,
                ]
            )
            reference = results[arms[-1].name][0].loss
            if not abs(own[0].loss - reference) <= 1e-5 * abs(reference):  # NaN too
                raise SystemExit(f"{arm.name} on {world} ranks: loss {own[0].loss}, the rival's {reference}")
        rows.append(["least possible", str(world), "", "", f"{least:,.0f}", "1.000" if least else "", ""])
        advance()
    title = (
        f"Ranks (gloo, one thread each, freed memory recycled): {problem.num_classes:,} classes in all,"
        f" {problem.batch} rows a rank, D={problem.dim}, CosFace; time of the slowest rank, median of {repeats}"
    )
    columns = ("head", "ranks", "forward+backward", "rival / this", "bytes sent a rank", "of the least", "collectives")
    report.table(title, columns, rows, FORMULAS)
