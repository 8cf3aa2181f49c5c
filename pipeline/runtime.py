"""The typed seam to Ray's runtime: starting it, and running functions as tasks."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

A = TypeVar("A")
R = TypeVar("R")


@contextmanager
def ray_session() -> Iterator[None]:
    """Be connected to Ray: to the cluster of ``RAY_ADDRESS`` (a submitted job has one), else to an own local one.

    A session that was open before stays open after.
    """
    if ray.is_initialized():
        yield
        return
    # Read by Ray when it starts; the progress shown is our own.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if is_on_cluster():
        ray.init(log_to_driver=False, logging_level="ERROR")
    else:
        _start_local()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there
    try:
        yield
    finally:
        ray.shutdown()


def is_on_cluster() -> bool:
    """Whether ``RAY_ADDRESS`` names a cluster, as it does in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _start_local() -> None:
    start = functools.partial(
        ray.init,
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        # By default Ray ends idle workers after a second, above one per CPU: on two cores every read task would pay for
        # a new Python process, a third of a core in all.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000, "num_workers_soft_limit": 8},
    )
    try:
        start()
    except Exception:
        # Ray gives its own processes 30 s to come up, which a busy machine may miss once.
        ray.shutdown()
        start()


def release_placement_groups() -> None:
    """Give back what placement groups hold in a Ray of this process's own.

    Those of a dead controller of Ray Train stay: Ray's cleaner asks the dashboard who is alive, a local Ray has none.
    Two hundredths of a CPU are enough to leave the next attempt's data without one. On a cluster the cleaner works, and
    other jobs' groups are there too.
    """
    if is_on_cluster():
        return
    for found in placement_group_table().values():
        if found["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(found["placement_group_id"])))


def map_tasks(
    function: Callable[[A], R], arguments: Sequence[A], on_done: Callable[[int], None] | None = None
) -> list[R]:
    """Run a function as one Ray task of one CPU per argument and give the results in order.

    Args:
        function: A module-level function (it travels by import).
        arguments: One per task.
        on_done: Told the number of finished tasks whenever one more is.

    Raises:
        Exception: What the first failing task raised; the others are cancelled.
    """
    task: Any = ray.remote(num_cpus=1)(function)
    pending = [task.remote(argument) for argument in arguments]
    references, done = list(pending), 0
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=1)
            ray.get(ready)
            done += len(ready)
            if on_done is not None:
                on_done(done)
    except BaseException:
        for reference in pending:
            ray.cancel(reference)
        raise
    results: list[R] = ray.get(references)
    return results
