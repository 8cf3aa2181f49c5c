"""One measured process of the data benchmark: ``python -m tests.benchmarks.data_arms ARM FOLDER [OPTION]``.

It prints one line of JSON behind `MARK`; `tests.benchmarks.data_watch` starts it, and looks at its memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import data_rivals as rivals
from tests.benchmarks.data_measure import Measurement, check_labels, consume
from tests.benchmarks.data_set import DataSet, load_set

MARK = "MEASUREMENT "
CORES = 2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is measured.

    Attributes:
        title: In the tables.
        loader: Of a rival.
        ray_cpus: CPUs of the local Ray that it needs; 0: none.
        rivals_python: Whether it runs in MosaicML's environment.
        resumed: Whether it starts in the middle of an epoch.
        imports: Modules whose import is not part of the time to the first batch.
    """

    title: str
    loader: Callable[[DataSet], Any] | None = None
    ray_cpus: int = 0
    rivals_python: bool = False
    resumed: bool = False
    imports: tuple[str, ...] = ("torch.utils.data", "tests.benchmarks.data_adaface", "pipeline.data.augment")


ARMS: dict[str, Arm] = {
    "adaface": Arm(title="AdaFace's loader (PIL, 2 workers)", loader=rivals.adaface),
    "adaface-torchvision": Arm(
        title="AdaFace's loader, torchvision's own functions",
        loader=rivals.adaface_torchvision,
        rivals_python=True,
        imports=("tests.benchmarks.data_torchvision",),
    ),
    "webdataset": Arm(title="webdataset + DataLoader", loader=rivals.webdataset_pil),
    "webdataset-fast": Arm(title="webdataset + DataLoader, our decode + augment", loader=rivals.webdataset_fast),
    "ray": Arm(title="ray.data.read_webdataset", loader=rivals.ray_pil, ray_cpus=2),
    "ray-fast": Arm(title="ray.data.read_webdataset, our decode + augment", loader=rivals.ray_fast, ray_cpus=2),
    "streaming": Arm(title="MosaicML Streaming", loader=rivals.streaming_pil, rivals_python=True),
    "streaming-fast": Arm(
        title="MosaicML Streaming, our decode + augment", loader=rivals.streaming_fast, rivals_python=True
    ),
    "streaming-resumed": Arm(
        title="MosaicML Streaming", loader=rivals.streaming_pil_resumed, rivals_python=True, resumed=True
    ),
    "streaming-fast-resumed": Arm(
        title="MosaicML Streaming, our decode + augment",
        loader=rivals.streaming_fast_resumed,
        rivals_python=True,
        resumed=True,
    ),
    "ceiling-1": Arm(title="own ceiling, a plain loop on one core", imports=()),
    "ceiling-2": Arm(title="own ceiling on both cores", imports=()),
    "ours": Arm(title="ours, one rank", ray_cpus=2, imports=()),
    "ours-2": Arm(title="ours, two ranks", ray_cpus=2, imports=()),
    "ours-resumed": Arm(title="ours, one rank", ray_cpus=2, resumed=True, imports=()),
    "ours-s3": Arm(title="ours, one rank, over S3", ray_cpus=2, imports=()),
    "pack-1": Arm(title="packing, 1 process", ray_cpus=1, imports=()),
    "pack-2": Arm(title="packing, 2 processes", ray_cpus=2, imports=()),
}


def measure(name: str, folder: Path, option: str) -> Measurement:
    """Run an arm in this process, which should be fresh.

    Args:
        name: Of `ARMS`.
        folder: Of the set.
        option: ``ours-s3``: URI of the packed set; packing: the RecordIO file, or empty for the set's own.
    """
    arm, data = ARMS[name], load_set(folder)
    _keep_to_cores(arm.ray_cpus or CORES)
    for module in arm.imports:
        __import__(module)
    if arm.rivals_python:
        from tests.benchmarks import data_torchvision

        data_torchvision.declare_operators()
        if arm.loader is rivals.adaface_torchvision:
            data_torchvision.check_equal(data)
        else:
            __import__("streaming")
    if arm.ray_cpus:
        from tests.benchmarks.data_ours import start_ray

        start_ray(arm.ray_cpus)
    if arm.loader is None:
        return _ours(name, data, time.time(), option)
    ready = time.time()
    expected = data.labels
    result, labels = consume(arm.loader(data), len(expected), ready)
    if arm.resumed:
        result.extra["left"] = len(expected) - len(expected) // rivals.BATCH // 2 * rivals.BATCH
        if result.samples != result.extra["left"]:
            raise SystemExit(f"{name}: {result.samples:,} samples were left, {result.extra['left']:,} should be")
    else:
        check_labels(labels, expected, name)
    return result


def _ours(name: str, data: DataSet, ready: float, option: str) -> Measurement:
    from tests.benchmarks import data_ours

    if name.startswith("ceiling"):
        return data_ours.ceiling(data, ready, int(name[-1]))
    if name.startswith("pack"):
        record = Path(option) if option else data.record
        return data_ours.packing(record, data.folder / f"{name}-out", ready)
    return data_ours.ours(
        data,
        ready,
        uri=option if name == "ours-s3" else "",
        world_size=2 if name == "ours-2" else 1,
        resume=ARMS[name].resumed,
    )


def _keep_to_cores(count: int) -> None:
    """Larger machines lend no more than the benchmark's own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def main() -> None:
    """Measure and print."""
    name, folder, option = sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
    result = measure(name, folder, option)
    print(MARK + json.dumps(result.to_dict() | {"rate": result.rate}), flush=True)


if __name__ == "__main__":
    main()
