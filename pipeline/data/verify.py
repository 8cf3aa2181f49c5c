"""Checking a packed data set from its first byte to its last: all that is wrong is told, not only the first thing.

Each shard is checked by itself (`pipeline.data.verify_shard`), then what only shows in the set as a whole.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline import storage
from pipeline.data.manifest import NAME as MANIFEST_NAME
from pipeline.data.manifest import Manifest
from pipeline.data.pack_report import NAME as REPORT_NAME
from pipeline.data.pack_report import load_report
from pipeline.data.verify_shard import Problem, ShardCheck, ShardTask, check_shard
from pipeline.runtime import map_tasks

__all__ = ["Problem", "VerifyReport", "verify"]

EXAMPLES: Final = 10
# Shards, and what a packing that was killed in the middle of a write leaves of one.
_LIKE_A_SHARD: Final = re.compile(r"\.?shard-\d.*|.*\.tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a check found.

    Attributes:
        uri: The data set.
        fingerprint: Its manifest's.
        num_shards: Shards of the manifest.
        num_samples: Samples that were found.
        num_images: Images of them that decode in the right size.
        num_bytes: Bytes that were read.
        problems: All that is wrong: first what concerns the whole set, then shard by shard.
    """

    uri: str
    fingerprint: str
    num_shards: int
    num_samples: int
    num_images: int
    num_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(manifest: Manifest, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read every shard of a data set as Ray tasks and check all that its manifest promises.

    Args:
        manifest: The set.
        on_progress: Told (shards checked, shards).

    Raises:
        StorageError: The folder cannot be listed. What is wrong with a single file is a `Problem`.
    """
    tasks = [
        ShardTask(
            uri=manifest.shard_uri(number),
            info=info,
            first_sample=int(manifest.offsets[number]),
            num_classes=manifest.num_classes,
            image_side=manifest.image_side,
        )
        for number, info in enumerate(manifest.shards)
    ]
    on_done = None if on_progress is None else lambda done: on_progress(done, len(tasks))
    checked = map_tasks(check_shard, tasks, on_done)
    whole = [*_check_manifest(manifest), *_check_folder(manifest), *_check_labels(manifest, checked)]
    return VerifyReport(
        uri=manifest.uri,
        fingerprint=manifest.fingerprint,
        num_shards=len(tasks),
        num_samples=sum(one.num_samples for one in checked),
        num_images=sum(one.num_images for one in checked),
        num_bytes=sum(one.num_bytes for one in checked),
        problems=(*whole, *_check_equal(manifest, checked), *(found for one in checked for found in one.problems)),
    )


def _check_manifest(manifest: Manifest) -> list[Problem]:
    names = [info.name for info in manifest.shards]
    sizes = [info.num_samples for info in manifest.shards]
    found = [f"it lists {name} {count} times" for name, count in sorted(Counter(names).items()) if count > 1]
    if not names:
        found.append("it lists no shards")
    uneven = next((place for place, size in enumerate(sizes[:-1]) if size != sizes[0]), None)
    if uneven is None and sizes and sizes[-1] > sizes[0]:
        uneven = len(sizes) - 1
    if uneven is not None:
        found.append(
            f"all shards but the last, which may be smaller, have equal numbers of samples: {names[0]} has {sizes[0]}, "
            f"{names[uneven]} has {sizes[uneven]}"
        )
    if len(manifest.identities) != manifest.num_classes:
        found.append(f"it names {len(manifest.identities)} people, num_classes is {manifest.num_classes}")
    if len(set(manifest.identities)) < len(manifest.identities):
        twice = {name for name, after in itertools.pairwise(sorted(manifest.identities)) if name == after}
        found.append(f"two labels have one name: {_some([repr(name) for name in sorted(twice)])}")
    return [Problem(file=MANIFEST_NAME, what=what) for what in found]


def _check_folder(manifest: Manifest) -> list[Problem]:
    try:
        files = storage.list_folder(manifest.uri)[0] or ()
    except storage.MissingError:
        files = ()
    known = {info.name for info in manifest.shards}
    return [
        Problem(file=name, what="looks like a shard, and the manifest does not know it")
        for name in files
        if name not in known and _LIKE_A_SHARD.fullmatch(name)
    ]


def _check_labels(manifest: Manifest, checked: Sequence[ShardCheck]) -> list[Problem]:
    counts = np.zeros(manifest.num_classes, np.int64)
    for one in checked:
        counts[one.labels] += one.label_counts
    shards_are_whole = not any(one.problems for one in checked)
    found = []
    if unused := np.flatnonzero(counts == 0).tolist():
        what = f"{len(unused)} of {manifest.num_classes} labels have no sample: {_some(unused)}"
        hint = "" if shards_are_whole else "; what is lost in damaged shards may have them"
        found.append(Problem(file=MANIFEST_NAME, what=what + hint))
    # Where samples are lost, the numbers must differ: that is told already.
    return found + _check_report(manifest, counts) if shards_are_whole else found


def _check_report(manifest: Manifest, counts: np.ndarray) -> list[Problem]:
    try:
        report = load_report(manifest.uri)
    except (ValueError, KeyError, TypeError, storage.StorageError) as error:
        return [Problem(file=REPORT_NAME, what=f"cannot be read: {type(error).__name__}: {error}")]
    if report is None or report.samples_per_identity == counts.tolist():
        return []
    said = report.samples_per_identity
    if len(said) != len(counts):
        return [Problem(file=REPORT_NAME, what=f"it is about {len(said)} people, the manifest has {len(counts)}")]
    other = np.flatnonzero(np.array(said) != counts).tolist()
    what = (
        f"it says label {other[0]} has {said[other[0]]} samples, {counts[other[0]]} are found "
        f"(labels that differ: {_some(other)})"
    )
    return [Problem(file=REPORT_NAME, what=what)]


def _check_equal(manifest: Manifest, checked: Sequence[ShardCheck]) -> list[Problem]:
    first: dict[str, str] = {}
    found = []
    for info, one in zip(manifest.shards, checked, strict=True):
        if one.sha256 and first.setdefault(one.sha256, info.name) != info.name:
            found.append(Problem(file=info.name, what=f"has the same bytes as {first[one.sha256]}"))
    return found


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:EXAMPLES])
    return shown if len(values) <= EXAMPLES else f"{shown}, ..."
