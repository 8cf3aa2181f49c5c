"""The jobs that look at packed data: exit codes, what they print and write, and that they leave the data alone."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import data_cli, storage
from pipeline.data.checks import ImageStatistics
from pipeline.data.pack_report import PackReport
from tests.conftest import ROOT
from tests.pipeline.data.writers import jpeg, label_of, packed_set

SIZES = [4, 4, 4, 2]
WHOLE = [int(count) for count in np.bincount([label_of(i) for i in range(14)], minlength=5)]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables without folded lines."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def no_start(monkeypatch):
    """What needs no Ray must not start it."""

    def started():
        pytest.fail("went on to start Ray")

    monkeypatch.setattr(data_cli, "ray_session", started)


def save_report(uri: str, samples_per_identity: list[int]) -> None:
    statistics = ImageStatistics()
    statistics.add(1234, np.full((70, 60, 3), 9, np.uint8), "grey")
    PackReport(
        num_read=sum(samples_per_identity) + 3,
        dropped={"near-empty": 3},
        duplicates_across=0,
        duplicate_examples=[],
        samples_per_identity=samples_per_identity,
        fewer_than=2,
        num_few=0,
        few_examples=[],
        statistics=statistics,
    ).save(uri)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- verify ---


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_good_data_are_verified_with_exit_code_0(tmp_path, capsys):
    manifest = packed_set(tmp_path / "set", SIZES)
    before = contents(tmp_path)
    assert data_cli.verify_job(["--data", str(tmp_path / "set")]) == 0
    text = capsys.readouterr().out
    assert "nothing is wrong" in text
    assert manifest.fingerprint in text
    assert re.search(r"samples +│ 14 ", text)
    assert re.search(r"good images +│ 14 ", text)
    assert "Problems" not in text
    assert contents(tmp_path) == before


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_damaged_data_are_verified_with_exit_code_1_and_a_line_for_each_problem(tmp_path, capsys):
    packed_set(tmp_path / "set", SIZES)
    shard = tmp_path / "set" / "shard-000001.tar"
    place = shard.read_bytes().index(jpeg(5))
    shard.write_bytes(shard.read_bytes().replace(jpeg(5), b"[red]".ljust(len(jpeg(5)))))
    (tmp_path / "set" / "shard-000002.tar").unlink()
    output = tmp_path / "found.json"
    code = data_cli.verify_job(["--data", str(tmp_path / "set"), "--report", str(output)])
    assert code == 1
    text = capsys.readouterr().out
    assert re.search(r"verdict +│ 3 problems", text)
    assert re.search(r"shard-000002.tar +│ +│ +│ does not exist", text)
    assert re.search(rf"shard-000001.tar +│ 000000005 +│ {place - 512} +│ not a readable image", text)
    assert re.search(
        r"shard-000001.tar +│ +│ +0 │ corrupt, bytes 0 to \d+: sha256 is [0-9a-f]{64}, the manifest says", text
    )
    found = json.loads(output.read_text())
    assert [problem["file"] for problem in found["problems"]] == ["shard-000001.tar"] * 2 + ["shard-000002.tar"]
    assert found["num_images"] == 9


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_many_problems_are_cut_on_the_terminal_alone(tmp_path, capsys, monkeypatch):
    packed_set(tmp_path / "set", SIZES)
    for path in (tmp_path / "set").glob("*.tar"):
        path.unlink()
    monkeypatch.setattr(data_cli, "PROBLEMS_SHOWN", 2)
    arguments = ["--data", str(tmp_path / "set"), "--report", str(tmp_path / "found.json")]
    assert data_cli.verify_job(arguments) == 1
    text = capsys.readouterr().out
    assert text.count("does not exist") == 1, "the first of two is about the labels"
    assert "3 more; --report FILE has all" in text
    assert len(json.loads((tmp_path / "found.json").read_text())["problems"]) == 5


def test_data_without_a_manifest_or_with_an_altered_one_end_verifying_with_exit_code_1(tmp_path, capsys, no_start):
    assert data_cli.verify_job(["--data", str(tmp_path)]) == 1
    assert "manifest.json: there is no manifest here" in capsys.readouterr().err
    packed_set(tmp_path, SIZES)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"num_classes": 5', '"num_classes": 6'))
    assert data_cli.verify_job(["--data", str(tmp_path)]) == 1
    assert "altered: its fingerprint is" in capsys.readouterr().err


# --- inspect ---


def test_inspecting_shows_what_packing_noted_and_leaves_the_data_alone(tmp_path, capsys, no_start):
    manifest = packed_set(tmp_path / "set", SIZES)
    save_report(manifest.uri, WHOLE)
    before = contents(tmp_path / "set")
    assert data_cli.inspect_job(["--data", str(tmp_path / "set"), "--output", str(tmp_path / "card")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"left out: near-empty +│ +3 │", text)
    assert re.search(r"60x70 +│ +1 │", text)
    assert f"data card: file://{tmp_path}/card/data_card.md" in text
    assert contents(tmp_path / "set") == before
    written = contents(tmp_path / "card")
    assert "data_card.md" in written
    assert "data_card/faces.jpg" in written
    assert "left out: near-empty" in written["data_card.md"].decode()


def test_the_card_goes_beside_the_set_and_never_into_it(tmp_path, capsys, no_start, monkeypatch):
    manifest = packed_set(tmp_path / "set", SIZES)
    save_report(manifest.uri, WHOLE)
    before = contents(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert data_cli.inspect_job(["--data", "set"]) == 0
    assert (tmp_path / "set-card" / "data_card.md").is_file()
    for output in ("set", "set/", "set/card", "./set/../set"):
        capsys.readouterr()
        assert data_cli.inspect_job(["--data", "set", "--output", output]) == 1
        assert "lies in the data set, which is only read" in capsys.readouterr().err
    assert data_cli.inspect_job(["--data", "set", "--output", "settings"]) == 0
    assert contents(tmp_path / "set") == before


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("arguments", "report", "shards"),
    [
        ([], None, "4 of 4"),
        ([], [1, 1, 1, 1, 1], "4 of 4"),
        (["--num-shards", "2"], WHOLE, "2 of 4"),
        (["--num-shards", "all"], WHOLE, "4 of 4"),
    ],
    ids=["no report", "report of other data", "some", "all"],
)
def test_inspecting_looks_at_shards_where_there_is_no_report_or_it_is_asked_to(
    tmp_path, capsys, arguments, report, shards
):
    manifest = packed_set(tmp_path / "set", SIZES)
    if report is not None:
        save_report(manifest.uri, report)
    given = ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "card"), *arguments]
    assert data_cli.inspect_job(given) == 0
    text = capsys.readouterr().out
    assert re.search(rf"shards +│ +{shards} ", text)
    assert re.search(r"112x112 +│ +(14|6) │", text)
    assert "60x70" not in text
    assert (tmp_path / "card" / "data_card.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-shards", "0"], "num_shards=0 must be greater than 0"),
        (["--num-shards", "some"], "--num-shards"),
        (["--num-shard", "2"], "--num-shards"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, no_start, arguments, words):
    packed_set(tmp_path / "set", SIZES)
    try:
        code = data_cli.inspect_job(["--data", str(tmp_path / "set"), "--output", str(tmp_path / "card"), *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code not in (0, None)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "card").exists()


def test_a_damaged_shard_is_named_when_its_faces_are_drawn(tmp_path, capsys, no_start):
    manifest = packed_set(tmp_path / "set", SIZES)
    save_report(manifest.uri, WHOLE)
    storage.write_bytes(manifest.shard_uri(1), b"short")
    assert data_cli.inspect_job(["--data", manifest.uri, "--output", str(tmp_path / "card")]) == 1
    assert re.search(r"shard-000001.tar: .*5 bytes", capsys.readouterr().err)
    assert not (tmp_path / "card").exists()


def test_names_are_printed_as_they_are(tmp_path, capsys, no_start):
    manifest = packed_set(tmp_path / "set", SIZES)
    replace(manifest, source={"folder": "[bold]people[/]"}).save()
    save_report(manifest.uri, WHOLE)
    assert data_cli.inspect_job(["--data", manifest.uri, "--output", str(tmp_path / "card")]) == 0
    assert "[bold]people[/]" in capsys.readouterr().out


@pytest.mark.parametrize("job", ["verify_dataset", "inspect_dataset"])
def test_each_job_is_executable_and_explains_itself(job, capsys, monkeypatch):
    path = ROOT / "jobs" / f"{job}.py"
    assert path.stat().st_mode & 0o111
    assert len(path.read_text().splitlines()) < 12
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--data" in text
    assert "Folder or URI of the shards and their manifest" in text
