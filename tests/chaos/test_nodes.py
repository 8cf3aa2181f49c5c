"""Nodes that go and come, on a Ray cluster of several: real raylets, one training worker to a node."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.training.commits import committed, read_marker
from tests.chaos.job import SAVE_EVERY, Job, data_of, judge

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

# A node takes one training worker, and what is left is a rank's share of the data.
NODE = {"num_cpus": 4, "object_store_memory": 100 << 20}
FLAGS = ("--workers.cpus-per-worker", "2.5", "--workers.resize-interval-s", "5", "--workers.max-failures", "5")
# A dead node is noticed within seconds; with Ray's own settings it took 77.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}


@pytest.fixture
def cluster():
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100 << 20,
            "include_dashboard": False,
            "_system_config": HEALTH,
        },
    )
    yield made
    made.shutdown()


def _world_sizes(job: Job) -> list[int]:
    """Of the checkpoints that are there, the newest last."""
    return [read_marker(checkpoint.uri)["world_size"] for checkpoint in committed(job.run_uri)]


def _wait_for_world_size(job: Job, size: int) -> None:
    job.wait_until(lambda: _world_sizes(job)[-1:] == [size], timeout_s=400)


def test_a_node_is_lost_two_come_and_one_is_taken_away_with_notice(cluster, table, tmp_path):
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    cluster.wait_for_nodes()
    job = Job(tmp_path, "--num-workers", "1", "3", *FLAGS, epochs=100, environment={"RAY_ADDRESS": cluster.address})
    job.start()
    try:
        _wait_for_world_size(job, 2)
        lost = [time.monotonic()]
        cluster.remove_node(nodes[0], allow_graceful=False)
        _wait_for_world_size(job, 1)

        grown = [time.monotonic()]
        nodes += [cluster.add_node(**NODE) for _ in range(2)]
        _wait_for_world_size(job, 3)

        taken = [time.monotonic()]
        _drain(cluster.address, nodes[-1].node_id)
        _wait_for_world_size(job, 2)
        assert job.finish(600) == 0, job.log()
    finally:
        job.end()
    data, moments = data_of(job), [*lost, *grown, *taken]
    whole = judge("all three", job, moments, data)
    names = ("node lost (2 -> 1 workers)", "two nodes added (1 -> 3 workers)", "preemption notice (3 -> 2 workers)")
    for place, name in enumerate(names):
        table(whole.of(place, name))
    assert whole.survived == 3
    assert whole.wrong_samples == 0
    assert whole.repeated[2] == 0  # a notice leaves time for a checkpoint
    assert max(whole.repeated) <= 6 * SAVE_EVERY


def _drain(address: str, node_id: str) -> None:
    """What a cloud's notice becomes on a cluster: the autoscaler's call."""
    ray = Path(sys.executable).with_name("ray")
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test")
    subprocess.run(
        [
            str(ray),
            "drain-node",
            "--address",
            address,
            "--node-id",
            node_id,
            *reason,
            "--deadline-remaining-seconds",
            "90",
        ],
        check=True,
        capture_output=True,
    )
