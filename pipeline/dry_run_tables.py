"""The tables of a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline.config import TrainConfig
from pipeline.probe import Timing

if TYPE_CHECKING:
    from pipeline.dry_run import DataFigures, DryRun

UNKNOWN = "[yellow]not known[/]"


def settings_table(settings: Mapping[str, Any], changed: Mapping[str, Any] | None) -> Table:
    """Every setting by section; beside those that differ what the preset has."""
    table = Table(title="Settings", title_justify="left", min_width=80)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("preset" if changed is not None else "preset: there is none of this name", overflow="fold")
    section = ""
    for name in sorted(settings, key=lambda name: (_section(name) != "", _order(settings, name))):
        if _section(name) != section:
            table.add_section()
            section = _section(name)
        differs = changed is not None and name in changed
        style = "bold yellow" if differs else ""
        table.add_row(name, _text(settings[name]), _text(changed[name]) if differs and changed else "", style=style)
    return table


def data_table(data: DataFigures) -> Table:
    """Counts of the training data."""
    table = _plain("Data")
    counts = {
        "images": data.num_samples,
        "people": data.num_classes,
        "steps an epoch": data.steps_per_epoch,
        "steps": data.total_steps,
        "left out of each epoch": data.left_out,
    }
    for name, number in counts.items():
        table.add_row(name, UNKNOWN if number is None else f"{number:,}")
    for note in data.notes:
        table.add_row("", escape(note))
    return table


def parameter_table(found: DryRun) -> Table:
    """Trained numbers by part."""
    table = _plain("Parameters")
    for name, number in found.parameters.items():
        table.add_row(name, f"{number:,}")
    if found.data.num_classes is None:
        table.add_row("head", UNKNOWN)
    return table


def memory_table(found: DryRun, config: TrainConfig) -> Table:
    """Bytes of the worker that needs most."""
    memory = found.memory
    table = Table(title=f"Memory of a {'GPU' if config.workers.use_gpu else 'worker'}, at most", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("MiB", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    titles = {"always": "always", "passes": "forward and backward", "update": "update of the weights"}
    for when, title in titles.items():
        table.add_section()
        table.add_row(f"[dim]{title}[/]", "", "")
        for item in memory.items:
            if item.when == when:
                table.add_row(f"  {item.name}", _mib(item.num_bytes), escape(item.note))
        if when == "always" and memory.person_bytes:
            note = f"not in the sum: {memory.person_bytes:,} bytes for each person of a worker, and logits"
            table.add_row("  head", UNKNOWN, note)
    table.add_section()
    note = "always, and the larger of the other two"
    if config.workers.use_gpu == (found.device != "CPU"):  # else the machine is not of the run's kind
        note += f"; {_mib(found.free_bytes)} MiB are free here ({found.device})"
    table.add_row("[bold]in all[/]", f"[bold]{_mib(memory.total_bytes)}[/]", note)
    whole = f"checkpoint of {_mib(memory.checkpoint_bytes)} MiB in the storage"
    table.add_row("host, worker 0", _mib(memory.host_bytes), f"while it writes its part of a {whole}")
    table.caption = (
        "Not in it: what the allocator loses to fragments, workspaces of cuDNN, buffers of NCCL, the CUDA context, "
        "gradients of activations on their way back."
    )
    return table


def time_table(found: DryRun, config: TrainConfig) -> Table:
    """Seconds of a step, hours of the run, and what they leave out."""
    step = found.step
    table = _plain("Time")
    table.add_row("measured on", f"{found.device}, threads of torch: {step.threads}, one worker alone")
    table.add_row("network", _timed(step.network, "images of a worker's share"))
    if step.head is None:
        table.add_row("head", UNKNOWN)
    else:
        rows = f"people of a worker, global batch of {config.batch_size:,}"
        table.add_row("head and its optimizer", _timed(step.head, rows))
    table.add_row("a step", f"{step.seconds:.4f} s")
    table.add_row("images/s", f"{found.images_per_second:,.0f} ({config.batch_size:,} a step, all workers)")
    table.add_row("[bold]the run[/]", UNKNOWN if found.hours is None else f"[bold]{_duration(found.hours)}[/]")
    for warning in _warnings(found, config):
        table.add_row("", f"[yellow]{escape(warning)}[/]")
    table.add_row(
        "left out",
        "communication between workers, waiting for data, checkpoints, evaluation; and what overlaps",
    )
    return table


def _warnings(found: DryRun, config: TrainConfig) -> list[str]:
    warnings = []
    if config.workers.use_gpu and found.device == "CPU":
        warnings.append("The run is for GPUs and there is none here: these are the times of this CPU.")
    scaled = [name for name, timing in (("network", found.step.network), ("head", found.step.head)) if _scaled(timing)]
    if scaled:
        warnings.append(f"Scaled to the run's size from smaller ones: {', '.join(scaled)}.")
    if config.step.compile:
        warnings.append("The network was timed without torch.compile.")
    if config.fewest_workers > 1 and not config.workers.use_gpu:
        warnings.append("Workers on one machine share its memory bandwidth: together they are slower than this one.")
    if found.step.head is None:
        warnings.append("Without the head's time: it grows with the number of people.")
    return warnings


def _scaled(timing: Timing | None) -> bool:
    return timing is not None and timing.is_scaled


def _timed(timing: Timing, of: str) -> str:
    points = ", ".join(f"{took:.4f} s at {size:,}" for size, took in zip(timing.sizes, timing.seconds, strict=True))
    return f"{timing.at_wanted:.4f} s for {timing.wanted:,} {of} (timed: {points})"


def _plain(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", min_width=80)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _section(name: str) -> str:
    return name.partition(".")[0] if "." in name else ""


def _order(settings: Mapping[str, Any], name: str) -> int:
    return list(settings).index(name)


def _text(value: Any) -> str:
    return escape(str(value)) if value not in ("", None) else f"[dim]{'None' if value is None else 'empty'}[/]"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
