"""The table of what was tried."""

from __future__ import annotations

import pytest

from tests.chaos.job import HEADER, Verdict
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def table():
    """Takes the verdicts; the table is written when all are there, and grows while they come."""
    rows: list[str] = []
    path = ROOT / "outputs" / "chaos.md"

    def add(verdict: Verdict) -> None:
        rows.append(verdict.row())
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([HEADER, *rows]) + "\n")
        print(f"\n{verdict.row()}")

    return add
