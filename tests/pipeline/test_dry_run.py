"""Dry runs: counts, tables, and that nothing is started or written."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray
import torch
from rich.console import Console

from lgaf.models import LGAFConfig
from lgaf.models.peers import LSCNNConfig
from lgaf.optim import OptimizerConfig
from pipeline import presets, probe, storage
from pipeline.config import HeadConfig, TrainConfig, WorkersConfig
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.sources import SyntheticConfig
from pipeline.dry_run import DryRun, changes, count_data, dry_run
from pipeline.stages import shared_place, source_spec

MICRO = LGAFConfig(backbone="micro", embedding_dim=16, num_heads=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(probe, "STEP_S", 0.05)
    monkeypatch.setattr(probe, "TIMED_S", 0.1)


def _config(folder: Path, **changed: object) -> TrainConfig:
    return replace(presets.demo(), **{"model": MICRO, "storage": str(folder / "outputs"), **changed})


def _packed(folder: Path, num_classes: int, counts: tuple[int, ...]) -> str:
    """A manifest alone: a dry run reads no shard."""
    uri = storage.normalise(str(folder))
    shards = tuple(
        ShardInfo(name=f"{n}.tar", num_samples=count, num_bytes=1, sha256="") for n, count in enumerate(counts)
    )
    Manifest(uri=uri, shards=shards, num_classes=num_classes, image_side=112, seed=0, source={}, identities=()).save()
    return uri


def _run(config: TrainConfig) -> tuple[DryRun, str]:
    console = Console(file=io.StringIO(), width=160)
    found = dry_run(config, console)
    return found, console.file.getvalue()


def _row(text: str, name: str) -> str:
    """The cells of the first row that begins with this name."""
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith(f"{name} "))
    return line.strip("│ ")[len(name) :].strip("│ ")


def test_a_synthetic_run_is_told_and_nothing_is_left_behind(tmp_path, monkeypatch):
    def refused(*arguments: object, **named: object) -> None:
        raise AssertionError("a dry run starts no Ray")

    monkeypatch.setattr(ray, "init", refused)
    monkeypatch.chdir(tmp_path)
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    config = _config(tmp_path, pack=replace(presets.demo().pack, synthetic=SyntheticConfig(num_identities=11)))
    found, text = _run(config)
    size = config.pack.synthetic
    total = size.num_identities * size.images_per_identity
    assert (found.data.num_samples, found.data.num_classes) == (total, 11)
    assert found.data.steps_per_epoch == total // 128
    assert found.data.total_steps == 18 * (total // 128)
    assert found.data.left_out == total % 128
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    model = MICRO.build()
    assert found.parameters["network"] == sum(p.numel() for p in model.parameters())
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert {f"network: {name}": number for name, number in parts.items() if number}.items() <= found.parameters.items()
    assert (found.parameters["head"], found.parameters["head, largest worker"]) == (11 * 16, 6 * 16)
    assert found.images_per_second == 128 / found.step.seconds
    assert found.hours == found.data.total_steps * found.step.seconds / 3600
    for title in ("Settings", "Data", "Parameters", "Memory of a worker, at most", "Time"):
        assert f"\n{title} " in f"\n{text}", title
    assert _row(text, "images").startswith(f"{total:,}")
    assert "rendered and packed when the run starts" in text
    assert f"{found.images_per_second:,.0f}" in _row(text, "images/s")
    assert f"{found.memory.total_bytes / 2**20:,.1f}" in _row(text, "in all")


def test_what_differs_from_the_preset_is_marked(tmp_path):
    config = _config(tmp_path, epochs=3, data=_packed(tmp_path / "data", 40, (200, 100)))
    differing = changes(config)
    assert differing is not None
    assert differing["epochs"] == 18
    assert differing["model.backbone"] == "tiny"
    assert differing.keys() == {
        "epochs", "storage", "data", "model.backbone", "model.embedding_dim", "model.num_heads", "model.dropout"
    }  # fmt: skip
    _, text = _run(config)
    assert [cell.strip() for cell in _row(text, "epochs").split("│")] == ["3", "18"]
    assert [cell.strip() for cell in _row(text, "seed").split("│")] == ["0"]
    assert changes(presets.demo()) == {}
    assert changes(replace(config, preset="mine")) is None
    other = changes(replace(presets.demo(), network="ls_cnn", model=LSCNNConfig(embedding_dim=16)))
    assert other is not None
    assert other["network"] == "lgaf"
    assert (other["model.embedding_dim"], other["model.growth_rate"]) == (128, None)
    assert "model.backbone" not in other, "that network has none"


def test_packed_sets_are_counted_with_their_weights(tmp_path):
    one, two = _packed(tmp_path / "one", 40, (200, 100)), _packed(tmp_path / "two", 17, (150,))
    data = count_data(_config(tmp_path, data=one, mix={two: 0.5}))
    assert (data.num_samples, data.num_classes, data.notes) == (450, 57, ())
    assert (data.steps_per_epoch, data.left_out) == (375 // 128, 375 % 128)
    with pytest.raises(ValueError, match=r"num_workers=64 is more than the 40 people"):
        count_data(_config(tmp_path, data=one, num_workers=64))
    with pytest.raises(storage.MissingError, match="does not exist"):
        count_data(_config(tmp_path, data=str(tmp_path / "nowhere")))


def test_two_million_people_take_a_share_of_them(tmp_path):
    """Eight GPUs that are not here: the figures say so."""
    config = _config(
        tmp_path,
        data=_packed(tmp_path / "data", 2_000_001, (100_000,) * 10),
        num_workers=8,
        stream=replace(presets.demo().stream, num_streams=8),
        head=HeadConfig(sample_rate=0.1, precision="bfloat16"),
        workers=WorkersConfig(use_gpu=True),
    )
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    found, text = _run(config)
    assert found.parameters["head, largest worker"] == 250_001 * 16
    items = {item.name: item.num_bytes for item in found.memory.items}
    assert items["head: centres"] == 250_001 * 16 * 4
    assert items["head: gradient"] < 0.12 * 250_001 * (16 * 4 + 8)
    assert found.step.head is not None
    assert found.step.head.wanted == 250_001
    assert found.step.head.is_scaled
    assert "Memory of a GPU, at most" in text
    assert "The run is for GPUs and there is none here" in text
    assert "Scaled to the run's size from smaller ones" in text
    assert "are free here" not in text


def _folder_of_faces(folder: Path) -> str:
    for person in ("ann", "bea"):
        (folder / person).mkdir(parents=True)
        cv2.imwrite(str(folder / person / "1.png"), np.full((112, 112, 3), 99, np.uint8))
    return str(folder)


def test_a_source_that_is_not_packed_says_which_command_packs(tmp_path):
    source = storage.normalise(_folder_of_faces(tmp_path / "faces"))
    found, text = _run(_config(tmp_path, data=source))
    assert (found.data.num_samples, found.data.num_classes, found.data.total_steps) == (None, None, None)
    assert found.hours is None
    assert f"jobs/pack_dataset.py --source {source} --output" in "".join(found.data.notes)
    assert "jobs/pack_dataset.py" in text
    assert _row(text, "people").strip() == "not known"
    assert _row(text, "the run").strip() == "not known"
    assert "not in the sum: 192 bytes for each person" in text
    assert found.step.head is None
    assert found.memory.total_bytes > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]


def test_what_a_run_has_packed_before_is_counted(tmp_path):
    source = storage.normalise(_folder_of_faces(tmp_path / "faces"))
    config = _config(tmp_path, data=source, num_workers=1)
    place = shared_place(source_spec(source, "folder", config), config)
    _packed(Path(storage.local_path(place)), 9, (300,))
    data = count_data(config)
    assert (data.num_samples, data.num_classes) == (300, 9)
    assert data.notes == (f"{source}: packed already, in {place}",)


def test_a_preset_without_data_is_told_too(tmp_path):
    config = replace(
        presets.arcface_torch_ms1mv2(),
        model=replace(MICRO, branches=("global",)),
        optimizer=OptimizerConfig(kind="adamw"),
        num_workers=64,
        storage=str(tmp_path),
    )
    found, text = _run(config)
    assert "no --data was given" in text
    assert found.changed is not None
    assert found.changed["optimizer.kind"] == "sgd"
    assert "counted in bfloat16 on the cpu" in text or torch.cuda.is_available()
