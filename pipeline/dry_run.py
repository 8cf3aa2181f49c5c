"""What a training job would do, told without doing it: settings, sizes, memory of a worker, hours.

Nothing is started and nothing is written. A few real steps run in this process, on the device that the run would use
here; see `pipeline.probe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lgaf.memory import Activations, count_activations
from lgaf.models import FaceNetwork
from lgaf.step import AUTOCAST, Precision
from pipeline import presets, storage
from pipeline.config import TrainConfig, flat_settings
from pipeline.data import manifest as manifest_file
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.mixture import Mixture
from pipeline.data.order import epoch_samples
from pipeline.data.sources import PACKED, SYNTHETIC, detect_format
from pipeline.dry_run_memory import MemoryEstimate, estimate_memory, largest_shard
from pipeline.dry_run_tables import data_table, memory_table, parameter_table, settings_table, time_table
from pipeline.probe import StepTime, free_bytes, probe, probe_device, worker_threads
from pipeline.stages import shared_place, source_spec, wanted_sets
from pipeline.training.trainer import stream_plan


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFigures:
    """Counts of the training data, None where they are not known before it is packed.

    Attributes:
        num_samples: Distinct images.
        num_classes: People.
        steps_per_epoch: Global batches.
        total_steps: Of the run.
        left_out: Samples of each epoch that make no whole batch.
        notes: Where the counts come from, or what they lack.
    """

    num_samples: int | None = None
    num_classes: int | None = None
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    left_out: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """The figures of a dry run.

    Attributes:
        settings: Every setting by its name on the command line.
        changed: Those that are not the preset's, with the preset's value; None where there is no such preset.
        parameters: Trained numbers of the network by part, and of the head: in all, and on the largest worker.
        data: Counts.
        memory: Of the worker that needs most.
        device: Where steps were timed and activations counted.
        free_bytes: Memory that was free there.
        step: Time of a step.
    """

    settings: Mapping[str, Any]
    changed: Mapping[str, Any] | None
    parameters: Mapping[str, int]
    data: DataFigures
    memory: MemoryEstimate
    device: str
    free_bytes: int
    step: StepTime
    batch_size: int

    @property
    def images_per_second(self) -> float:
        """Of the global batch."""
        return self.batch_size / self.step.seconds

    @property
    def hours(self) -> float | None:
        """Of the whole run; None where its steps are not known."""
        return None if self.data.total_steps is None else self.data.total_steps * self.step.seconds / 3600


def dry_run(config: TrainConfig, console: Console) -> DryRun:
    """Print what a run would be, and give the figures.

    Args:
        config: Of the run.
        console: Prints tables, and progress on a terminal.

    Raises:
        StorageError: The data are not where they should be.
        ValueError: There are fewer people than workers, or fewer images than a batch has.
    """
    console.print(settings_table(settings := flat_settings(asdict(config)), changed := changes(config)))
    data = count_data(config)
    console.print(data_table(data))
    device = probe_device(config)
    with torch.random.fork_rng(), worker_threads(config, device) as threads, _progress(console) as progress:
        task = progress.add_task("network")

        def tell(what: str) -> None:
            progress.update(task, description=what)

        torch.manual_seed(config.seed)
        model: FaceNetwork = config.model.build().to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        parameters = _parameters(config, model, data.num_classes)
        tell("activations")
        precision = _counted_precision(config, device)
        activations = count_activations(model, device, AUTOCAST.get(precision))
        counted = _counted(precision, activations, device)
        memory = estimate_memory(config, model, activations, data.num_classes, config.workers.use_gpu, counted)
        free = free_bytes(device)
        del model
        shard = None if data.num_classes is None else largest_shard(data.num_classes, config.fewest_workers)
        step = probe(config, shard, activations.of(1), device, threads, lambda what: tell(f"timing the {what}"))
    found = DryRun(
        settings=settings,
        changed=changed,
        parameters=parameters,
        data=data,
        memory=memory,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        free_bytes=free,
        step=step,
        batch_size=config.batch_size,
    )
    console.print(parameter_table(found))
    console.print(memory_table(found, config))
    console.print(time_table(found, config))
    return found


def changes(config: TrainConfig) -> dict[str, Any] | None:
    """Settings that are not those of the run's preset, with the preset's value; None where there is no such preset."""
    if config.preset not in presets.names():
        return None
    before, now = flat_settings(asdict(presets.preset(config.preset))), flat_settings(asdict(config))
    # Another network has other settings: those that the preset's lacks count as changed from nothing.
    return {name: before.get(name) for name, value in now.items() if name not in before or before[name] != value}


def count_data(config: TrainConfig) -> DataFigures:
    """Count images, people and steps as far as they are known without packing; see `dry_run` for what it raises."""
    if not config.data:
        return DataFigures(notes=("no --data was given: images, people and steps are not known",))
    sets, notes, unknown = [], [], False
    for uri, weight in wanted_sets(config).items():
        found, note = _counted_set(uri, config)
        unknown |= found is None
        notes += [note] if note else []
        sets += [(found, weight)] if found else []
    if unknown:
        return DataFigures(notes=tuple(notes))
    data: Manifest | Mixture
    data = Mixture(manifests=tuple(m for m, _ in sets), weights=tuple(weight for _, weight in sets))
    plan = stream_plan(config, data)
    return DataFigures(
        num_samples=data.num_samples,
        num_classes=data.num_classes,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        left_out=epoch_samples(data) % config.batch_size,
        notes=tuple(notes),
    )


def _counted_set(uri: str, config: TrainConfig) -> tuple[Manifest | None, str]:
    """The manifest of a set, or the one that packing will give; None, and why, where only packing tells."""
    kind = detect_format(uri)
    if kind == PACKED:
        return Manifest.load(uri), ""
    place = shared_place(source_spec(uri, kind, config), config)
    if storage.exists(storage.join(place, manifest_file.NAME)):
        return Manifest.load(place), f"{uri}: packed already, in {place}"
    if kind == SYNTHETIC:
        return _rendered(config, place), "synthetic faces: rendered and packed when the run starts"
    return None, (
        f"{uri}: a source of kind {kind} that is not packed yet; its images and people are counted when it is packed: "
        f"python jobs/pack_dataset.py --source {uri} --output FOLDER, then --data FOLDER (the run itself packs it too)"
    )


def _rendered(config: TrainConfig, place: str) -> Manifest:
    """What packing the synthetic faces will give, as far as sizes go."""
    size, per_shard = config.pack.synthetic, config.pack.samples_per_shard
    total = size.num_identities * size.images_per_identity
    counts = [min(per_shard, total - first) for first in range(0, total, per_shard)]
    return Manifest(
        uri=place,
        shards=tuple(
            ShardInfo(name=str(number), num_samples=count, num_bytes=0, sha256="")
            for number, count in enumerate(counts)
        ),
        num_classes=size.num_identities,
        image_side=112,
        seed=config.pack.seed,
        source={},
        identities=(),
    )


def _parameters(config: TrainConfig, model: FaceNetwork, num_classes: int | None) -> dict[str, int]:
    found = {f"network: {name}": _num_parameters(part) for name, part in model.named_children()}
    found = {name: number for name, number in found.items() if number}
    found["network"] = _num_parameters(model)
    if num_classes is not None:
        dim = config.model.output_dim
        found["head"] = num_classes * dim
        found["head, largest worker"] = largest_shard(num_classes, config.fewest_workers) * dim
    return found


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _counted_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The run's; on a CPU bfloat16 for float16, which has as many bytes and takes CPUs a hundred times as long."""
    return "bfloat16" if config.precision == "float16" and device.type == "cpu" else config.precision


def _counted(precision: Precision, activations: Activations, device: torch.device) -> str:
    again = ", the largest block that is computed again among them" if activations.again_image_bytes else ""
    each = (activations.image_bytes + activations.again_image_bytes) / 2**20
    return f"counted in {precision} on the {device.type}: {each:.1f} MiB an image{again}"


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
