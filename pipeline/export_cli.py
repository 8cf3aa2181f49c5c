"""Entry point of the export job: a packed data set back to an InsightFace pack."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from pipeline.cli import run_job
from pipeline.console import JobDisplay
from pipeline.data.export import export_recordio
from pipeline.data.recordio_writer import InsightFacePack


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments:
    """Write a packed data set as an InsightFace pack (train.rec, train.idx, property)."""

    data: str
    """Folder or URI of the shards and their manifest."""
    output: str
    """Folder or URI for the pack."""
    header: bool = True
    """Whether the pack has InsightFace's header and identity records; without them it is as im2rec's."""


def export_job(arguments: list[str] | None = None) -> int:
    """Entry point of the export job; gives its exit code."""

    def job() -> None:
        wanted = tyro.cli(ExportArguments, args=arguments)
        console = Console()
        with JobDisplay(console) as display:
            units = {"read": "shards", "write": "images"}

            def show(phase: str, done: int, total: int) -> None:
                if done == 0:
                    display.stage(phase, False)
                display.update(phase, done, total, units[phase])

            pack = export_recordio(wanted.data, wanted.output, header=wanted.header, on_progress=show)
        console.print(_exported_table(pack))

    return run_job(job)


def _exported_table(pack: InsightFacePack) -> Table:
    table = Table(title="InsightFace pack", show_header=False, title_justify="left", min_width=80)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("folder", pack.uri)
    table.add_row("images", f"{pack.num_images:,}")
    table.add_row("people", f"{pack.num_identities:,}")
    table.add_row("train.rec", f"{pack.num_bytes:,} bytes")
    return table
