"""What a run does at a step whose loss or gradient is not finite.

Such a step is noted in the run's folder, with its samples, in a file of its own. "stop" ends the run; "skip" leaves the
update out where it happens, at the price of asking the device each step; "rollback" costs nothing until it happens:
the workers start again from the last checkpoint and pass over the noted steps, and over the one before each, whose
update may be what spoilt the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from lgaf.config import require_choice, require_in_range
from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.mixture import Mixture

FOLDER: Final = "non_finite"
_NAME = re.compile(r"/step_(\d+)\.json$")

Policy = Literal["stop", "skip", "rollback"]


class DivergedError(ValueError):
    """A run whose loss is not finite, and that its policy ends."""


class RollbackError(RuntimeError):
    """Ends the workers so that they start again from the last checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceConfig:
    """What happens at a loss that is not finite (a gradient, with "skip")."""

    policy: Policy = "stop"
    """stop: the run ends. skip: the update is left out; each step then waits for the device. rollback: the workers go
    back to the last checkpoint and pass over the step and the one before it."""
    budget: int = 10
    """Steps that may be left out or passed over before the run ends all the same."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_choice("divergence.policy", self.policy, ("stop", "skip", "rollback"))
        require_in_range("divergence.budget", self.budget, 0, 1 << 30)


def note_step(
    run_uri: str, data: Manifest | Mixture, step: int, indices: np.ndarray, statistics: dict[str, Any]
) -> None:
    """Note a step that was not finite.

    Args:
        run_uri: Folder of the run.
        data: What it trains on.
        step: Of the run.
        indices: Global sample indices of its batch.
        statistics: What else is known of it.
    """
    shards = np.searchsorted(data.offsets, indices, side="right") - 1
    samples = [
        {"index": int(index), "shard": data.shard_uri(int(shard)), "row": int(index - data.offsets[shard])}
        for index, shard in zip(indices, shards, strict=True)
    ]
    storage.write_json(_note_uri(run_uri, step), {"step": step} | statistics | {"samples": samples})


def decide(config: DivergenceConfig, run_uri: str, step: int, what: str) -> None:
    """Raise what ends or restarts the workers, or return where the run goes on; ``step`` is noted already.

    Raises:
        DivergedError: The run ends here.
        RollbackError: It goes on from the last checkpoint.
    """
    place = f"its samples are in {_note_uri(run_uri, step)}"
    if config.policy == "stop":
        raise DivergedError(
            f"{what}: the run diverged; lower optimizer.learning_rate or add schedule.warmup, under a new run_name, or "
            f"go on with another divergence.policy ({place})"
        )
    noted = noted_steps(run_uri)
    if len(noted) > config.budget:
        raise DivergedError(f"{what}: more than divergence.budget={config.budget} steps were not finite ({place})")
    if config.policy == "rollback":
        raise RollbackError(f"{what}: back to the last checkpoint")


def noted_steps(run_uri: str) -> list[int]:
    """The noted steps, rising."""
    files = storage.list_files(storage.join(run_uri, FOLDER))
    return sorted(int(match.group(1)) for info in files if (match := _NAME.search(info.uri)))


def passed_over(run_uri: str) -> set[int]:
    """Steps that a run which was rolled back does not train on."""
    return {passed for step in noted_steps(run_uri) for passed in (step - 1, step) if passed >= 0}


def _note_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, FOLDER, f"step_{step:08d}.json")
