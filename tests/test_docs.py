"""The documents name what exists."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest
import torch
import tyro

from lgaf.models import LGAFConfig
from pipeline.config import TrainConfig
from pipeline.presets import webface4m_r100_arcface
from tests.conftest import ROOT

FIDELITY = (ROOT / "docs" / "fidelity.md").read_text()
# Settings of a run that decide nothing about the paper.
WITHOUT_A_ROW = {"gradient_checkpointing"}
ROWS = {
    "table 1": ("I", "II", "III", "LGAF"),
    "table 2": ("b=2", "b=4", "b=8", "b=16"),
    "table 3": ("Baseline", "Entropy", "Energy"),
    "table 4": ("CAT", "iAFF", "ADD"),
    "table 5": ("LGAF (CosFace)", "LGAF (ArcFace)"),
}
DEFAULT = ("LGAF", "b=4", "Energy", "ADD", "LGAF (ArcFace)")


EXAMPLES = [
    pytest.param(code, id=f"{name}-{number}")
    for name in ("README.md", "docs/data.md", "docs/head.md")
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    )
]


def _settings() -> dict[tuple[str, str], list[str]]:
    (block,) = re.findall(r"^```text\n(.*?)^```$", FIDELITY, flags=re.MULTILINE | re.DOTALL)
    cells = [re.split(r" {2,}", line) for line in block.splitlines()]
    return {(table, row): flags[0].split() if flags else [] for table, row, *flags in cells}


def _config(flags: list[str]) -> TrainConfig:
    return tyro.cli(TrainConfig, default=webface4m_r100_arcface(), args=flags)


SETTINGS = _settings()


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code):
    exec(compile(code, "example", "exec"), {})


def test_every_row_of_the_tables_has_its_setting():
    assert list(SETTINGS) == [(table, row) for table, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("key", SETTINGS, ids=" ".join)
def test_the_setting_of_a_row_builds_and_runs(key):
    config = _config(SETTINGS[key])
    assert (
        dataclasses.replace(config, model=webface4m_r100_arcface().model, head=webface4m_r100_arcface().head)
        == webface4m_r100_arcface()
    )
    model = dataclasses.replace(config.model, backbone="micro").build().eval()
    with torch.no_grad():
        embedding = model(torch.zeros(1, 3, 112, 112)).embedding_BD
    assert embedding.shape == (1, config.model.output_dim)
    assert config.head.create().margin == 0.4


def test_rows_that_are_one_network_are_the_only_ones():
    networks: dict[str, set[tuple[str, str]]] = {}
    for key, flags in SETTINGS.items():
        config = _config(flags)
        networks.setdefault(repr((config.model, config.head)), set()).add(key)
    assert [keys for keys in networks.values() if len(keys) > 1] == [
        {("table 1", "III"), ("table 3", "Baseline")},
        {(table, row) for table in ROWS for row in ROWS[table] if row in DEFAULT},
    ]


def test_every_named_field_exists():
    groups = typing.get_type_hints(TrainConfig)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    named = re.findall(r"`([a-z_]+)(?:\.([a-z_]+))?`", FIDELITY)
    assert ("model", "lanet_gap") in named
    for group, field in named:
        if group == "model":
            assert field in {field.name for field in dataclasses.fields(LGAFConfig)}
        elif field:
            assert field in {field.name for field in dataclasses.fields(groups[group])}, f"{group}.{field}"
        else:
            assert group in fields, group


def test_every_switch_of_the_network_is_named():
    named = set(re.findall(r"`model\.([a-z_]+)`", FIDELITY))
    assert named == {field.name for field in dataclasses.fields(LGAFConfig)} - WITHOUT_A_ROW


def test_every_named_file_exists():
    paths = re.findall(r"`((?:\w+/)+\w+\.\w+)`", FIDELITY)
    assert "lgaf/models/fusion.py" in paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_the_rows_are_numbered():
    numbers = re.findall(r"^\| (\d+) \|", FIDELITY, flags=re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert len(numbers) >= 25
    assert all(line.count("|") == 5 for line in FIDELITY.splitlines() if line.startswith("|"))
