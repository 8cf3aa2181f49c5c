"""How long a step of a run takes here: a few real steps, timed, and scaled where a whole one would take too long."""

# Shape legend: G = global batch, D = embedding

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from lgaf.models import FaceNetwork
from lgaf.models.backbones import IMAGE_SIDE
from lgaf.models.network import FaceEmbedding, global_embedding
from lgaf.step import TrainStep
from pipeline.config import TrainConfig
from pipeline.training.assembly import assemble

STEP_S: Final = 2.0
"""A probed step is about this long at most, where the smallest one is not longer."""
TIMED_S: Final = 6.0
"""Steps of one size are timed for about this long, after the first."""
SLOW_S: Final = 15.0
"""A first step that takes longer is not done again: what it does once is then the lesser part of it."""
MOST_STEPS: Final = 7
FIRST_IMAGES: Final = 2
FIRST_CLASSES: Final = 2_000
FEW_CLASSES: Final = 128
"""Of the head behind the network that is timed: next to no time."""
MEMORY_SHARE: Final = 0.4
"""Of the memory that is free here, for what is probed."""

# Told what is being timed.
OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median seconds of a step at one or two sizes, and what they say of the size that the run has.

    Attributes:
        sizes: Ascending.
        seconds: Of each.
        wanted: Size of the run.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    wanted: int

    @property
    def is_scaled(self) -> bool:
        """Whether the run's size was not timed itself."""
        return self.sizes[-1] != self.wanted

    @property
    def at_wanted(self) -> float:
        """Seconds at the run's size: on the straight line through what was timed.

        Noise must not bend it: it neither falls nor rises faster than in proportion to the size.
        """
        size, took = self.sizes[-1], self.seconds[-1]
        if size == self.wanted:
            return took
        slope = took / size
        if len(self.sizes) > 1:
            slope = min(slope, max(0.0, (took - self.seconds[0]) / (size - self.sizes[0])))
        return max(0.0, took + (self.wanted - size) * slope)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Of one step on one worker: its network on its share of the batch, its classes on the whole batch.

    Attributes:
        network: By images.
        head: By classes of the worker; None where the number of people is not known.
        threads: Of torch.
    """

    network: Timing
    head: Timing | None
    threads: int

    @property
    def seconds(self) -> float:
        """Of both, one after the other."""
        return self.network.at_wanted + (self.head.at_wanted if self.head else 0.0)


def probe_device(config: TrainConfig) -> torch.device:
    """A GPU where the run wants one and there is one, else the CPU."""
    return torch.device("cuda" if config.workers.use_gpu and torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def largest_share(config: TrainConfig) -> int:
    """Images of the global batch that a worker has at most."""
    return -(-config.batch_size // config.fewest_workers)


def largest_part(config: TrainConfig) -> int:
    """Images that a worker computes at once."""
    return -(-largest_share(config) // config.step.accumulate)


@contextmanager
def worker_threads(config: TrainConfig, device: torch.device) -> Iterator[int]:
    """As many threads of torch as a worker of the run would have on this machine."""
    cores = len(os.sched_getaffinity(0))
    wants_other = config.workers.use_gpu and device.type == "cpu"  # no GPU here: the machine is not the run's
    if wants_other:
        neighbours = 1
    else:
        neighbours = (
            min(config.fewest_workers, torch.cuda.device_count()) if device.type == "cuda" else config.fewest_workers
        )
    before, threads = torch.get_num_threads(), config.workers.threads or max(1, cores // neighbours)
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def probe(
    config: TrainConfig,
    num_classes: int | None,
    image_bytes: int,
    device: torch.device,
    threads: int,
    on_stage: OnStage = lambda what: None,
) -> StepTime:
    """Time real steps of a run on this process alone.

    A step is timed in two: the run's network with next to no classes, on a worker's share of the batch; and the run's
    head behind next to no network, on the whole batch, which is what every worker's classes see.

    Args:
        config: Of the run.
        num_classes: Of a worker; None: not known.
        image_bytes: Memory of an image in a step.
        device: Where.
        threads: Of torch, for the record.
        on_stage: Told what is being timed.
    """
    room = int(free_bytes(device) * MEMORY_SHARE)
    on_stage("network")
    network = _time_network(config, num_classes, max(FIRST_IMAGES, room // max(1, image_bytes)), device)
    head = None
    if num_classes is not None:
        on_stage("head")
        dim, moments = config.model.output_dim, 2 if config.optimizer.kind == "adamw" else 1
        # Centres, gradient, moments and a copy; rows of the temporary memory are within its budget.
        row = dim * 4 * (3 + moments)
        head = _time_head(config, num_classes, max(1, room // row), device)
    return StepTime(network=network, head=head, threads=threads)


def time_sizes(
    make: Callable[[int], Callable[[], None]], first: int, wanted: int, largest: int, multiple: int = 1
) -> Timing:
    """Time a step at a small size, and at the wanted one or the largest that takes about `STEP_S`.

    Args:
        make: Gives a step of a size; it must have finished when it returns.
        first: The small size.
        wanted: Size of the run; less than ``first`` is not timed but scaled to.
        largest: Most that there is memory for.
        multiple: Sizes after the first are multiples of this.
    """
    sizes = [first]
    seconds = [_median_seconds(make(sizes[0]))]
    if wanted > sizes[0]:
        fits = min(wanted, largest, int(sizes[0] * STEP_S / seconds[0])) // multiple * multiple
        if fits > sizes[0]:
            sizes.append(fits)
            seconds.append(_median_seconds(make(fits)))
    return Timing(sizes=tuple(sizes), seconds=tuple(seconds), wanted=wanted)


def _median_seconds(step: Callable[[], None]) -> float:
    """Of the steps after the first, which makes buffers and picks algorithms; of that one where it takes too long."""
    first = _seconds(step)
    if first > SLOW_S:
        return first
    took: list[float] = []
    while len(took) < MOST_STEPS and sum(took) < TIMED_S:
        took.append(_seconds(step))
    return statistics.median(took)


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _time_network(config: TrainConfig, num_classes: int | None, largest: int, device: torch.device) -> Timing:
    # Parts of a batch cost what they cost together; all but the first lack the optimizer, as the line knows.
    config = replace(config, step=replace(config.step, accumulate=1, compile=False))
    step = assemble(config, min(FEW_CLASSES, num_classes or FEW_CLASSES), MOST_STEPS, device)
    largest = min(largest, largest_part(config))

    def make(size: int) -> Callable[[], None]:
        images_BHWC = torch.randint(0, 256, (size, IMAGE_SIDE, IMAGE_SIDE, 3), dtype=torch.uint8)
        return _finished(step, images_BHWC, torch.arange(size) % step.head.num_classes)

    # torch 2.13 ends with a segmentation fault in the backward pass of an odd batch on two threads of a CPU (measured:
    # 3, 5, 7, 9, 15, 33; never on one thread, never with an even batch).
    multiple = torch.get_num_threads() if device.type == "cpu" else 1
    first = -(-FIRST_IMAGES // multiple) * multiple
    return time_sizes(make, first, largest_share(config), largest, multiple)


def _time_head(config: TrainConfig, num_classes: int, largest: int, device: torch.device) -> Timing:
    config = replace(config, step=replace(config.step, compile=False))

    def make(size: int) -> Callable[[], None]:
        step = assemble(config, size, MOST_STEPS, device, model=_Pixels(config.model.output_dim))
        images_GHWC = torch.randint(0, 256, (config.batch_size, 1, 1, 3), dtype=torch.uint8)
        return _finished(step, images_GHWC, torch.randint(0, size, (config.batch_size,)))

    return time_sizes(make, FIRST_CLASSES if num_classes > FIRST_CLASSES else num_classes, num_classes, largest)


def _finished(step: TrainStep, images_BHWC: Tensor, labels_B: Tensor) -> Callable[[], None]:
    def run() -> None:
        step(images_BHWC, labels_B)
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)

    return run


class _Pixels(FaceNetwork):
    """Embeddings [B, D] of images of one pixel: a network that costs next to nothing before a head."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(3, embedding_dim)

    def forward(self, images_BCHW: Tensor) -> FaceEmbedding:
        return global_embedding(self.projection(images_BCHW.flatten(1)))
