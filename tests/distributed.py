"""Runs a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

TIMEOUT_S = 120


def run_distributed(world_size: int, function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(group, *arguments)`` on every rank; the first rank's failure is raised here."""
    # fork starts in milliseconds, where spawn imports torch again in every rank.
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failures = context.Queue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, port, failures, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    if not failures.empty():
        raise AssertionError(failures.get())
    assert not hung, f"{len(hung)} of {world_size} ranks did not finish"
    assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]


def _rank_main(rank, world_size, port, failures, function, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        function(dist.group.WORLD, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
