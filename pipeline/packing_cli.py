"""Entry points that make packed data of a source, and a pack for other tools of packed data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.cli import run_job
from pipeline.console import JobDisplay
from pipeline.data.card import NAME as CARD
from pipeline.data.checks import PackChecks
from pipeline.data.export import export_recordio
from pipeline.data.manifest import Manifest
from pipeline.data.pack import PackSettings, pack
from pipeline.data.pack_report import QUARANTINE, PackReport, load_report
from pipeline.data.recordio_writer import InsightFacePack
from pipeline.data.sources import PACKED, SYNTHETIC, SourceSpec, SyntheticConfig, detect_format
from pipeline.runtime import ray_session


@dataclass(frozen=True, kw_only=True, slots=True)
class PackArguments:
    """Pack a face data set into verified WebDataset shards with a manifest."""

    source: str
    """Place of the source (a folder or a file), or the word synthetic."""
    output: str
    """Folder or URI for the shards and their manifest."""
    format: Literal["auto", "recordio", "webdataset", "archives", "tables", "list", "folder", "synthetic"] = "auto"
    """Kind of the source; auto: what lies there tells."""
    settings: Annotated[PackSettings, tyro.conf.arg(name="")] = field(default_factory=PackSettings)
    checks: PackChecks = field(default_factory=PackChecks)
    image_column: str = ""
    """Of tables (Parquet, Arrow): the column of encoded images; empty: found by its usual names."""
    label_column: str = ""
    """Of tables: the column that says who it is; empty: found by its usual names."""
    root: str = ""
    """Of list files: what their paths are relative to; empty: the folder of the list."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


def pack_job(arguments: list[str] | None = None) -> int:
    """Entry point of the packing job."""

    def job() -> None:
        wanted = tyro.cli(PackArguments, args=arguments)
        kind = detect_format(wanted.source) if wanted.format == "auto" else wanted.format
        if kind == PACKED:
            raise ValueError(
                f"source={wanted.source!r} is packed already: take it as --data; --format webdataset packs it again"
            )
        spec = SourceSpec(
            format=kind,
            uri="" if kind == SYNTHETIC else storage.normalise(wanted.source),
            image_column=wanted.image_column,
            label_column=wanted.label_column,
            root=wanted.root,
            seed=wanted.settings.seed,
            synthetic=wanted.synthetic,
        )
        console = Console()
        with ray_session(), JobDisplay(console) as display:
            display.stage("pack", False)
            manifest = pack(
                spec,
                wanted.output,
                wanted.settings,
                wanted.checks,
                on_progress=lambda what, done, total: display.update("pack", done, total, what),
            )
        console.print(_packed_table(manifest, load_report(manifest.uri)))

    return run_job(job)


def _packed_table(manifest: Manifest, report: PackReport | None) -> Table:
    """What was packed, what was left out, and where it all is."""
    table = Table(title="Packed data set", show_header=False, title_justify="left", min_width=80)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "folder": manifest.uri,
        "samples": f"{manifest.num_samples:,}",
        "people": f"{manifest.num_classes:,}",
        "shards": f"{len(manifest.shards)} ({sum(shard.num_bytes for shard in manifest.shards):,} bytes)",
        "fingerprint": manifest.fingerprint,
    }
    if report is not None:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.dropped.items())
        rows["left out"] = f"{kinds}; see {QUARANTINE}" if kinds else "nothing"
        rows["few images"] = f"{report.num_few:,} people have fewer than {report.fewer_than:,}"
        rows["data card"] = storage.join(manifest.uri, CARD)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


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
