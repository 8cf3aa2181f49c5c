"""Entry points that look at packed data: one checks all of it, one shows what is in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lgaf.config import require_positive
from pipeline import storage
from pipeline.cli import run_job
from pipeline.console import JobDisplay
from pipeline.data.card import NAME as CARD_NAME
from pipeline.data.card import card_files, save_card
from pipeline.data.manifest import Manifest
from pipeline.data.pack_report import load_report
from pipeline.data.summary import Findings, Section, sections, size_text
from pipeline.data.survey import DEFAULT_NUM_SHARDS, survey
from pipeline.data.verify import VerifyReport, verify
from pipeline.runtime import ray_session

PROBLEMS_SHOWN: Final = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyArguments:
    """Check a packed data set: read every shard, compare it with the manifest, decode every image.

    Tells all that is wrong. The exit code is 0 if nothing is, 1 otherwise.
    """

    data: str
    """Folder or URI of the shards and their manifest."""
    report: str = ""
    """File or URI to write all that was found to, as JSON; the terminal shows the first 50 problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectArguments:
    """Show what is in a packed data set: tables here, a data card with pictures in a folder.

    The data set itself is only read.
    """

    data: str
    """Folder or URI of the shards and their manifest."""
    output: str = ""
    """Folder or URI for data_card.md and its pictures; by default <name of the set>-card in the current directory."""
    num_shards: int | Literal["report", "all"] = "report"
    """Shards to decode, evenly spread, or all; report: none, what packing noted of all images is shown (8 shards where
    packing left no report)."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if isinstance(self.num_shards, int):
            require_positive("num_shards", self.num_shards)


def verify_job(arguments: list[str] | None = None) -> int:
    """Entry point of the verifying job; its exit code is 1 if anything is wrong with the data."""
    found: list[VerifyReport] = []

    def job() -> None:
        wanted = tyro.cli(VerifyArguments, args=arguments)
        console = Console()
        manifest = Manifest.load(wanted.data)
        with ray_session(), JobDisplay(console) as display:
            display.stage("verify", False)
            report = verify(manifest, lambda done, total: display.update("verify", done, total, "shards"))
        found.append(report)
        console.print(_verified_table(report))
        if not report.ok:
            console.print(_problem_table(report))
        if wanted.report:
            storage.write_json(wanted.report, asdict(report))
            console.print(Text(f"all that was found: {storage.normalise(wanted.report)}"))

    code = run_job(job)
    return code or int(not all(report.ok for report in found))


def _verified_table(report: VerifyReport) -> Table:
    table = Table(title="Verified data set", show_header=False, title_justify="left", min_width=80)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("folder", Text(report.uri))
    table.add_row("fingerprint", report.fingerprint)
    table.add_row("shards", f"{report.num_shards:,}")
    table.add_row("read", size_text(report.num_bytes))
    table.add_row("samples", f"{report.num_samples:,}")
    table.add_row("good images", f"{report.num_images:,}")
    verdict = "[green]nothing is wrong[/]" if report.ok else f"[red]{len(report.problems):,} problems[/]"
    table.add_row("verdict", verdict)
    return table


def _problem_table(report: VerifyReport) -> Table:
    hidden = len(report.problems) - PROBLEMS_SHOWN
    caption = f"{hidden:,} more; --report FILE has all" if hidden > 0 else None
    table = Table(title="Problems", caption=caption, title_justify="left", min_width=80)
    table.add_column("file", overflow="fold")
    table.add_column("key", overflow="fold")
    table.add_column("byte", justify="right")
    table.add_column("what is wrong", overflow="fold", ratio=1)
    for problem in report.problems[:PROBLEMS_SHOWN]:
        byte = "" if problem.byte is None else str(problem.byte)
        table.add_row(*(Text(cell) for cell in (problem.file, problem.key, byte, problem.what)))
    return table


def inspect_job(arguments: list[str] | None = None) -> int:
    """Entry point of the inspecting job."""

    def job() -> None:
        wanted = tyro.cli(InspectArguments, args=arguments)
        console = Console()
        manifest = Manifest.load(wanted.data)
        output = _output(wanted.output, manifest)
        found = _findings(manifest, wanted.num_shards, console)
        files = card_files(manifest, found)
        for section in sections(manifest, found):
            console.print(_section_table(section))
            for note in section.notes:
                console.print(Text(note, style="dim"))
            console.print()
        save_card(files, output)
        console.print(Text(f"data card: {storage.join(output, CARD_NAME)}"))

    return run_job(job)


def _output(wanted: str, manifest: Manifest) -> str:
    name = manifest.uri.rstrip("/").rpartition("/")[2] or "data"
    output = storage.normalise(wanted or f"{name}-card")
    if output == manifest.uri or output.startswith(f"{manifest.uri}/"):
        raise ValueError(f"output={output!r} lies in the data set, which is only read; name another folder")
    return output


def _findings(manifest: Manifest, num_shards: int | Literal["report", "all"], console: Console) -> Findings:
    """What packing noted, if that is wanted, is there and is about this data; else what some shards show."""
    if num_shards == "report":
        report = load_report(manifest.uri)
        if report is not None and report.num_packed == manifest.num_samples:
            return report
        num_shards = DEFAULT_NUM_SHARDS
    wanted = None if num_shards == "all" else num_shards
    with ray_session(), JobDisplay(console) as display:
        display.stage("inspect", False)
        return survey(manifest, wanted, lambda done, total: display.update("inspect", done, total, "shards"))


def _section_table(section: Section) -> Table:
    has_heads = any(section.columns)
    table = Table(title=section.title, show_header=has_heads, title_justify="left", min_width=80)
    for place, head in enumerate(section.columns):
        if place == 0:
            table.add_column(head, style="bold", overflow="fold")
        else:
            table.add_column(head, justify="right" if has_heads else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
