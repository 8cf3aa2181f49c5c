"""Tables of the head's benchmark, on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

MIB = 2**20
NO_MEMORY = "out of memory"


@dataclass
class Report:
    """Prints tables, and adds them to a Markdown file where there is one."""

    markdown: str = ""
    console: Console = field(default_factory=lambda: _console())

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        """One table; short rows are filled up with empty cells."""
        rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
        table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        if self.markdown:
            lines = [
                f"### {title}",
                "",
                *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)),
            ]
            with Path(self.markdown).open("a") as file:
                file.write("\n".join([*lines, "", *([note, ""] if note else []), ""]))

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text)


def _console() -> Console:
    """As wide as the tables where nobody looks at a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def mib(count: int | None) -> str:
    """A table's cell."""
    return NO_MEMORY if count is None else f"{count / MIB:,.0f} MiB"


def milliseconds(seconds: float) -> str:
    """A table's cell."""
    return f"{1000 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def ratio(ours: float | None, theirs: float | None) -> str:
    """A table's cell: how many times ours theirs is."""
    return f"{theirs / ours:.2f}x" if ours and theirs else ""
