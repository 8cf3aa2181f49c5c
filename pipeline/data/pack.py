"""Packing a source into WebDataset shards with a manifest, in two passes of Ray tasks.

First each part of the source is read from front to back, checked, and written as buckets sorted by key
(`pipeline.data.spill`); then each run of buckets becomes shards (`pipeline.data.gather`). No task holds more than a few
times ``memory_mib`` of images, however large the source is; the driver holds a few numbers for each bucket of each
part, and the names of all people. The same images and seed give the same bytes, whatever the memory and the number of
CPUs.

A killed packing goes on where it stopped: finished parts and shards are noted in ``<output>/.packing``
(`pipeline.data.staging`), which holds a copy of the images until the end. The manifest is written last: a folder
without one is not a data set.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray

from lgaf.config import require_positive
from pipeline import storage
from pipeline.data.card import write_card
from pipeline.data.checks import ImageStatistics, PackChecks
from pipeline.data.gather import Duplicates, DuplicateTask, GatherTask, Spills, find_duplicates, write_shards
from pipeline.data.manifest import DEFAULT_SAMPLES_PER_SHARD, FORMAT_VERSION, Manifest, ShardInfo
from pipeline.data.pack_report import QUARANTINE, PackReport
from pipeline.data.sources import Source, SourceSpec, open_source
from pipeline.data.sources.base import Part, cut
from pipeline.data.spill import PackError, Spill, SpillTask, check_budget, spill_part
from pipeline.data.staging import Staging
from pipeline.runtime import map_tasks

DEFAULT_MEMORY_MIB: Final = 256
IMAGE_SIDE: Final = 112
MAX_BUCKETS: Final = 4096
BUCKETS_OF_TASK: Final = 16  # a task reads that many, and one more to fill its last shard
TASKS_PER_CPU: Final = 2
MIN_TASK_BYTES: Final = 1 << 20
EXAMPLES: Final = 20

# Told (what, done, total).
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSettings:
    """What decides the bytes of a packed data set, and how much memory is taken to make it."""

    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD
    """Samples of every shard but the last."""
    seed: int = 0
    """Of the shuffle."""
    memory_mib: int = DEFAULT_MEMORY_MIB
    """Images that a packing task holds (and one shard, if that is more); its process takes about four times as much.
    More means fewer requests for a large source on an object store."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require_positive("samples_per_shard", self.samples_per_shard)
        require_positive("memory_mib", self.memory_mib)


def pack(
    spec: SourceSpec,
    output: str,
    settings: PackSettings | None = None,
    checks: PackChecks | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Write a source as shards, a manifest, a report and a data card.

    Args:
        spec: The source.
        output: Folder URI; a manifest that is there is deleted first, so that no failure leaves it beside other shards.
        settings: Shard size, shuffle, memory.
        checks: What is looked at in the images.
        on_progress: Told (what, done, total).

    Raises:
        StorageError: Source or output cannot be reached, or another process packs there.
        SourceError: The source is damaged.
        PackError: A bad image that may not be left out; the message names it. Or an output that is not a place for it.
    """
    settings, checks = settings or PackSettings(), checks or PackChecks()
    report_progress = on_progress or (lambda what, done, total: None)
    source = open_source(spec)
    if spec.uri and _overlap(storage.normalise(spec.uri), storage.normalise(output)):
        raise PackError(
            f"{storage.normalise(output)}: the output must not lie in the source ({spec.uri}), nor around it"
        )
    with storage.lock(output, "another process is packing here"):
        return _Packing(source, output, settings, checks, report_progress).run()


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


class _Packing:
    def __init__(
        self, source: Source, output: str, settings: PackSettings, checks: PackChecks, on_progress: OnProgress
    ) -> None:
        self._source, self._output, self._settings, self._checks = source, output, settings, checks
        self._on_progress = on_progress
        self._staging = Staging(output)
        self._memory = settings.memory_mib << 20

    def run(self) -> Manifest:
        plan = self._staging.prepare(self._packing(), self._new_plan, self._is_current)
        self._task_bytes = int(plan["task_bytes"])
        spills = self._spill()
        uris = ray.put(Spills.of(spills))
        sizes = np.diff(np.array([spill.offsets for spill in spills], np.int64)).sum(axis=0).tolist()
        duplicates = self._find_duplicates(uris, sizes)
        counts = Counter[str]()
        for spill in spills:
            counts.update(spill.identities)
        for found in duplicates:
            counts.subtract(found.removed)
        identities = sort_identities(name for name, count in counts.items() if count > 0)
        if not identities:
            raise PackError("no image is left to pack")
        everything: list[int] = np.sum([spill.rows for spill in spills], axis=0).tolist()
        kept = [count for found in duplicates for count in found.kept] if duplicates else everything
        shards = self._gather(uris, kept, sizes, identities)
        report = self._report(spills, duplicates, identities, [counts[name] for name in identities])
        return self._finish(shards, identities, report)

    def _packing(self) -> Any:
        return storage.plain_json(
            {
                "format_version": FORMAT_VERSION,
                "source": self._source.version() | self._source.describe(),
                "settings": asdict(self._settings),
                "checks": asdict(self._checks),
            }
        )

    def _new_plan(self) -> dict[str, Any]:
        # A small source is cut finer than memory asks, so that all CPUs have work; noted, for they may be others later.
        total = sum(part.num_bytes for part in self._source.parts(self._memory))
        share = total // (TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1))))
        task_bytes = min(self._memory, max(MIN_TASK_BYTES, share))
        return {"task_bytes": task_bytes, "parts": _layout(self._source.parts(task_bytes))}

    def _is_current(self, plan: dict[str, Any]) -> bool:
        # A list file is cut by the sizes of a few of its images, which its version does not know of.
        return bool(plan["parts"] == _layout(self._source.parts(int(plan["task_bytes"]))))

    def _spill(self) -> list[Spill]:
        parts = self._source.parts(self._task_bytes)
        total = sum(part.num_bytes for part in parts)
        wanted = max(1, BUCKETS_OF_TASK * total // self._task_bytes)
        num_buckets = min(MAX_BUCKETS, 1 << math.ceil(math.log2(wanted)))
        tasks = [
            SpillTask(
                part=part,
                uri=storage.join(self._staging.parts, f"part-{number:06d}"),
                memory_bytes=self._memory,
                num_buckets=num_buckets,
                seed=self._settings.seed,
                image_side=IMAGE_SIDE,
                checks=self._checks,
            )
            for number, part in enumerate(parts)
        ]
        written = map_tasks(spill_part, tasks, functools.partial(self._progress, "parts read", len(tasks)))
        spills = [spill for of_part in written for spill in of_part]
        dropped = [bad for spill in spills for bad in spill.dropped]
        check_budget(dropped, len(dropped), self._checks)
        return spills

    def _find_duplicates(self, uris: Any, sizes: list[int]) -> list[Duplicates]:
        if self._checks.duplicates == "keep":
            return []
        tasks = [DuplicateTask(spills=uris, buckets=run) for run in cut(sizes, self._task_bytes)]
        what = "runs of buckets compared"
        return map_tasks(find_duplicates, tasks, functools.partial(self._progress, what, len(tasks)))

    def _gather(self, uris: Any, kept: list[int], sizes: list[int], identities: list[str]) -> list[ShardInfo]:
        names = ray.put(pa.array(identities, pa.string()))
        tasks = [
            GatherTask(
                spills=uris,
                identities=names,
                buckets=run.buckets,
                skip=run.skip,
                shards=run.shards,
                first_sample=run.shards[0][0] * self._settings.samples_per_shard,
                output=self._output,
                staging=self._staging.shards,
                drop_duplicates=self._checks.duplicates == "drop",
            )
            for run in shard_runs(kept, sizes, self._settings.samples_per_shard, self._task_bytes)
        ]
        found = map_tasks(write_shards, tasks, functools.partial(self._progress, "runs of shards written", len(tasks)))
        return [shard for shards in found for shard in shards]

    def _report(
        self, spills: list[Spill], duplicates: list[Duplicates], names: list[str], samples: list[int]
    ) -> PackReport:
        statistics = ImageStatistics()
        dropped = Counter[str]()
        for spill in spills:
            statistics.merge(spill.statistics)
            dropped.update(bad.kind for bad in spill.dropped)
        dropped["duplicate"] = sum(count for found in duplicates for count in found.removed.values())
        lines = [json.dumps({"name": bad.name, "reason": bad.reason}) for spill in spills for bad in spill.dropped]
        storage.write_bytes(storage.join(self._output, QUARANTINE), "".join(line + "\n" for line in lines).encode())
        few = [label for label, count in enumerate(samples) if count < self._checks.fewer_than]
        return PackReport(
            num_read=sum(samples) + sum(dropped.values()),
            dropped={kind: count for kind, count in sorted(dropped.items()) if count},
            duplicates_across=sum(found.across for found in duplicates) if duplicates else None,
            duplicate_examples=[pair for found in duplicates for pair in found.examples][:EXAMPLES],
            samples_per_identity=samples,
            fewer_than=self._checks.fewer_than,
            num_few=len(few),
            few_examples=[names[label] for label in few[:EXAMPLES]],
            statistics=statistics,
            checks=asdict(self._checks),
        )

    def _finish(self, shards: list[ShardInfo], identities: list[str], report: PackReport) -> Manifest:
        manifest = Manifest(
            uri=storage.normalise(self._output),
            shards=tuple(shards),
            num_classes=len(identities),
            image_side=IMAGE_SIDE,
            seed=self._settings.seed,
            source=self._source.describe(),
            identities=tuple(identities),
        )
        report.save(self._output)
        write_card(manifest, report)
        manifest.save()
        self._staging.remove()
        return manifest

    def _progress(self, what: str, total: int, done: int) -> None:
        self._on_progress(what, done, total)


def sort_identities(names: Iterable[str]) -> list[str]:
    """Names of people in the order of their labels: by number where all are numbers, else as text."""
    listed = sorted(names)
    if all(name.isascii() and name.isdigit() for name in listed):
        listed.sort(key=int)  # stable: 07 comes before 7
    return listed


def _layout(parts: list[Part]) -> str:
    return storage.fingerprint([part.num_bytes for part in parts])


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRun:
    """Consecutive shards that one task writes; fields as in `GatherTask`."""

    buckets: tuple[int, int]
    skip: int
    shards: list[tuple[int, int]]


def shard_runs(kept: Sequence[int], sizes: Sequence[int], samples_per_shard: int, memory: int) -> list[ShardRun]:
    """Cut the packed order into tasks: a shard goes to the run of buckets that holds its first sample.

    Args:
        kept: Samples of each bucket.
        sizes: Bytes of each bucket.
        samples_per_shard: Of every shard but the last.
        memory: About the bytes that a task reads.
    """
    ends = np.cumsum(kept)
    total = int(ends[-1])
    runs: list[ShardRun] = []
    for run in cut(list(sizes), memory):
        first, stop = run.start, run.stop
        begin, end = int(ends[first]) - kept[first], int(ends[stop - 1])
        numbers = range(-(-begin // samples_per_shard), -(-end // samples_per_shard))
        if numbers:
            last_sample = min(numbers.stop * samples_per_shard, total)
            behind = int(np.searchsorted(ends, last_sample)) + 1
            counts = [min(samples_per_shard, total - number * samples_per_shard) for number in numbers]
            runs.append(
                ShardRun(
                    buckets=(first, behind),
                    skip=numbers.start * samples_per_shard - begin,
                    shards=list(zip(numbers, counts, strict=True)),
                )
            )
    return runs
