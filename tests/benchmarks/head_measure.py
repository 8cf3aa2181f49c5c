"""What the head's benchmark measures with: arms, time in alternation, peak memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lgaf.distributed import rank_in, world_size
from lgaf.heads import sharded
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import Margin, create_margin
from lgaf.heads.sharded import ShardedMarginHead
from tests.benchmarks.head_report import MIB, mib
from tests.benchmarks.partial_fc import PartialFCV2

T = TypeVar("T")
# Classes of the pass before a measurement of memory: enough for every library to take its own buffers.
WARM_CLASSES = 4096
# Of malloc.h: M_MMAP_MAX 0, M_TRIM_THRESHOLD without bound.
M_MMAP_NEVER, M_TRIM_NEVER = (-4, 0), (-1, -1)
# From this size of the exponentials on, the memory that our head took shows whether it kept them.
SURE_OF = 64 * MIB
ARCFACE, COSFACE = create_margin("arcface", gradient="straight_through"), create_margin("cosface")


@dataclass(frozen=True)
class Arm:
    """One thing that is measured."""

    name: str
    kind: Literal["kept", "recompute", "rival"]
    """Our head with room for the exponentials, our head without, or PartialFC_V2."""
    margin: Margin = COSFACE
    bf16: bool = False
    sample_rate: float = 1.0

    @property
    def products(self) -> int:
        """Matrix products of 2*B*C*D operations in one forward and backward."""
        return 4 if self.kind == "recompute" else 3


@dataclass(frozen=True)
class Problem:
    """The size of a measurement, and where it runs."""

    num_classes: int
    dim: int = 512
    batch: int = 256
    """Rows of this rank."""
    device: str = "cpu"
    threads: int = 2
    small_budget: int = 64 * MIB
    """Memory budget of the recomputing arm; less where the exponentials would fit."""

    def centres(self, group: ProcessGroup | None = None) -> Tensor:
        """This rank's centres, N(0, 0.01), on the device."""
        classes = class_range(self.num_classes, world_size(group), rank_in(group))
        generator = torch.Generator(self.device).manual_seed(1 + rank_in(group))
        weight = torch.empty(len(classes), self.dim, device=self.device)
        return weight.normal_(0, 0.01, generator=generator)

    def inputs(self, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
        """This rank's embeddings and labels."""
        generator = torch.Generator().manual_seed(1000 + rank_in(group))
        x = 10 * torch.randn(self.batch, self.dim, generator=generator)
        labels = torch.randint(0, self.num_classes, (self.batch,), generator=generator)
        return x.to(self.device).requires_grad_(), labels.to(self.device)

    def kept_bytes(self, arm: Arm, num_local: int, group: ProcessGroup | None = None) -> int:
        """What the exponentials of this rank's classes take."""
        seen = int(arm.sample_rate * num_local)
        return self.batch * world_size(group) * seen * (2 if arm.bf16 else 4)

    def build(self, arm: Arm, weight: Tensor, group: ProcessGroup | None = None) -> nn.Module:
        """The arm's head over these very centres (no copy)."""
        if arm.kind == "rival":
            return PartialFCV2(self.num_classes, self.dim, arm.margin, group, arm.sample_rate, weight)
        kept = self.kept_bytes(arm, len(weight), group)
        # Ample, or what does not suffice in any case.
        budget = 2 * kept + self.small_budget if arm.kind == "kept" else min(self.small_budget, kept // 2)
        with mock.patch.object(sharded, "initial_centres", return_value=weight):
            head = ShardedMarginHead(
                self.num_classes,
                self.dim,
                arm.margin,
                group,
                sample_rate=arm.sample_rate,
                memory_budget=max(1, budget),
            )
        return head.to(self.device)


def forward_backward(head: nn.Module, x: Tensor, labels: Tensor, arm: Arm) -> Tensor:
    """One pass, the gradients anew; gives the loss."""
    x.grad = None
    head.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=arm.bf16):
        loss = head(x, labels)
    loss.backward()
    return loss.detach()


def timed(device: str, function: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Seconds of a call, the device's work included, and what it gave."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*arguments)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


@dataclass
class Timing:
    """What the repeats of one arm gave."""

    seconds: list[float]
    loss: float
    grad: np.ndarray
    """Of the embeddings."""

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


def recycle_memory() -> None:
    """Let this process keep what it frees for its next tensors, as an accelerator's allocator does.

    Else glibc asks the kernel for every large tensor anew, and the faults of its fresh pages take about as long as the
    work of a head that has many large tensors.
    """
    libc = ctypes.CDLL("libc.so.6")
    for option, value in M_MMAP_NEVER, M_TRIM_NEVER:
        if not libc.mallopt(option, value):
            raise OSError(f"mallopt({option}, {value}) failed")


def alternate(problem: Problem, arms: Sequence[Arm], repeats: int, recycle: bool = False) -> dict[str, Timing | None]:
    """Time the arms, the first round not counted; None: its memory did not suffice.

    On a CPU, whose speed drifts, the arms take turns; on a GPU, whose allocator keeps memory for the next of the same
    sizes, one follows the other.
    """
    torch.set_num_threads(problem.threads)
    if recycle:
        recycle_memory()
    weight, (x, labels) = problem.centres(), problem.inputs()
    heads = {arm.name: problem.build(arm, weight) for arm in arms}
    rounds = range(repeats + 1)
    turns = [(arm, number) for number in rounds for arm in arms]
    if problem.device != "cpu":
        turns = [(arm, number) for arm in arms for number in rounds]
    timings: dict[str, Timing | None] = {}
    for arm, number in turns:
        if number and timings[arm.name] is None:
            continue
        if number == 0:
            release(problem.device)
        head = heads[arm.name]
        try:
            seconds, loss = timed(problem.device, forward_backward, head, x, labels, arm)
            if number == 0:
                timings[arm.name] = Timing([], loss.item(), x.grad.float().cpu().numpy())
            else:
                timings[arm.name].seconds.append(seconds)
        except torch.OutOfMemoryError:
            timings[arm.name] = None
        head.zero_grad(set_to_none=True)  # one gradient of the centres at a time
    return timings


def peak_extra(problem: Problem, arm: Arm) -> int | None:
    """Bytes that one forward and backward needs at its peak beyond the centres and their gradient; None: too many.

    On a CPU the peak is the whole process's, so this wants a process of its own (`isolated`).
    """
    torch.set_num_threads(problem.threads)
    warm = replace(problem, num_classes=min(problem.num_classes, WARM_CLASSES))
    forward_backward(warm.build(arm, warm.centres()), *warm.inputs(), arm)
    head = problem.build(arm, problem.centres())
    x, labels = problem.inputs()
    try:
        before = reset_peak(problem.device)
        forward_backward(head, x, labels, arm)
        return peak(problem.device) - before - size_of(head.weight.grad)
    except torch.OutOfMemoryError:
        return None
    finally:
        head.zero_grad(set_to_none=True)


def wrong_path(problem: Problem, arm: Arm, extra: int | None) -> str:
    """What is wrong where our head kept the exponentials although it should not have, or did not; else nothing."""
    kept = problem.kept_bytes(arm, problem.num_classes)
    if extra is None or arm.kind == "rival" or kept < SURE_OF or (extra > 0.9 * kept) == (arm.kind == "kept"):
        return ""
    return f"{problem.num_classes:,} classes, {arm.name}: took {mib(extra)} where the exponentials take {mib(kept)}"


def size_of(value: Tensor) -> int:
    """Bytes of a tensor, sparse or not."""
    if value.is_sparse:
        return value._values().nbytes + value._indices().nbytes
    return value.nbytes


def reset_peak(device: str) -> int:
    """Forget the peak; gives the bytes that are resident now."""
    release(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux: 5 sets the high-water mark to what is resident.
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    """The most bytes that were resident since `reset_peak`."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def release(device: str) -> None:
    """Give back what is only kept for later, so that it is not counted as resident."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    else:
        torch.cuda.empty_cache()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def isolated(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process (on a GPU: in this one, which counts its own memory); None: it was killed."""
    if device != "cpu":
        return function(*arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def gap(ours: Timing, theirs: Timing) -> tuple[float, float]:
    """Relative differences of the losses and of the embeddings' gradients."""
    grads = np.linalg.norm(ours.grad - theirs.grad) / np.linalg.norm(theirs.grad)
    return abs(ours.loss - theirs.loss) / abs(theirs.loss), float(grads)
