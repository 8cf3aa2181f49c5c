"""What a measured process of the data benchmark does: time batches and check that each sample came once."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

# Part of an epoch that is not timed.
WARM_UP = 0.2


@dataclass(kw_only=True)
class Measurement:
    """What one process found; times are of the wall clock (`time.time`), so that processes can be compared.

    Attributes:
        ready: When libraries and Ray were up and the loader could be asked.
        first: When the first batch was there.
        warm: When counting began.
        end: When counting ended.
        done: When the last batch was there.
        counted: Images between the two.
        samples: Images in all.
        batch: What a batch is.
        extra: What only some processes find.
    """

    ready: float = 0.0
    first: float = 0.0
    warm: float = 0.0
    end: float = 0.0
    done: float = 0.0
    counted: int = 0
    samples: int = 0
    batch: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Images a second after the warm-up."""
        return self.counted / (self.end - self.warm) if self.end > self.warm else float("nan")

    @property
    def first_batch(self) -> float:
        """Seconds."""
        return self.first - self.ready

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(images: Any) -> str:
    """Type and shape of a batch."""
    return f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"


def consume(batches: Iterable[tuple[Any, Any]], num_samples: int, ready: float) -> tuple[Measurement, np.ndarray]:
    """Time the batches of an epoch; gives the labels too, in the order of arrival."""
    result, warm = Measurement(ready=ready), WARM_UP * num_samples
    labels_seen: list[np.ndarray] = []
    for images, labels in batches:
        now = time.time()
        if not labels_seen:
            result.first, result.batch = now, describe(images)
        if result.warm:
            result.counted += len(labels)
        result.samples += len(labels)
        if not result.warm and result.samples >= warm:
            result.warm = now
        labels_seen.append(np.asarray(labels).copy())  # its own memory: a worker's would stay open
        result.end = result.done = now
    return result, np.concatenate(labels_seen)


def check_labels(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """The program ends unless each label came as often as the set has it: every image once, none twice."""
    counts = np.bincount(found, minlength=expected.max() + 1)
    wrong = np.flatnonzero(counts != np.bincount(expected, minlength=len(counts)))
    if len(found) != len(expected) or found.sum() != expected.sum() or len(wrong):
        raise SystemExit(
            f"{name}: {len(found):,} samples with a sum of labels of {found.sum():,}, {len(wrong)} labels the wrong "
            f"number of times; the set has {len(expected):,} with {expected.sum():,}"
        )
