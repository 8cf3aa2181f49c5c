"""The packing job's command line: mistakes are named before Ray starts, and its table says what was left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from pipeline import packing_cli
from pipeline.data.checks import ImageStatistics
from pipeline.data.pack_report import PackReport
from tests.pipeline.data.writers import packed_set


@pytest.fixture
def no_start(monkeypatch):
    """The boundary to Ray fails the test."""
    monkeypatch.setattr(packing_cli, "ray_session", lambda: pytest.fail("went on to start Ray"))


def test_packing_what_is_not_there_names_it(tmp_path, capsys, no_start):
    missing = tmp_path / "faces"
    assert packing_cli.pack_job(["--source", str(missing), "--output", str(tmp_path / "out")]) == 1
    assert f"{missing}: does not exist" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_a_packed_set_as_source_is_told_what_it_is_good_for(tmp_path, capsys, no_start):
    packed_set(tmp_path / "set", (4,))
    assert packing_cli.pack_job(["--source", str(tmp_path / "set"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.replace("\n", "")
    assert "is packed already: take it as --data; --format webdataset packs it again" in error


def test_the_table_says_what_was_left_out(tmp_path):
    manifest = packed_set(tmp_path / "set", (6,), num_classes=2)
    report = PackReport(
        num_read=10,
        dropped={"undecodable": 3, "duplicate": 1},
        duplicates_across=0,
        duplicate_examples=[],
        samples_per_identity=[5, 1],
        fewer_than=2,
        num_few=1,
        few_examples=["p1"],
        statistics=ImageStatistics(),
    )

    def shown(found: PackReport | None) -> str:
        console = Console(width=160, record=True, quiet=False, file=(tmp_path / "screen").open("w"))
        console.print(packing_cli._packed_table(manifest, found))
        return console.export_text()

    assert "3 undecodable, 1 duplicate; see quarantine.jsonl" in shown(report)
    assert "1 people have fewer than 2" in shown(report)
    assert "data_card.md" in shown(report)
    assert "nothing" in shown(replace(report, dropped={}))
    assert "left out" not in shown(None)
