"""The card beside a model: true, loadable by the code in it, and with scores once there are some."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lgaf.models import LGAFConfig
from lgaf.step import StepConfig
from pipeline import storage
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.evaluation.report import BenchmarkResult, EvalReport, pack_outcomes
from pipeline.model_card import CARD, Export, add_evaluation, awaits_evaluation, write_card
from pipeline.model_store import save_model
from pipeline.presets import demo
from pipeline.training.warm_start import WarmStart
from tests.conftest import ROOT
from tests.lgaf.test_export import ALONE

DATA = Manifest(
    uri="s3://faces/people",
    shards=(ShardInfo(name="a.tar", num_samples=123456, num_bytes=1, sha256="0"),),
    num_classes=789,
    image_side=112,
    seed=0,
    source={"path": "/private-place/pictures"},
    identities=(),
)
CONFIG = replace(
    demo(),
    run_name="small-1",
    storage="file:///private-place/runs",
    data="file:///private-place/pictures",
    model=LGAFConfig(backbone="micro", embedding_dim=8),
    stream=replace(demo().stream, cache_dir="/private-place/cache"),
    warm_start=WarmStart(model="file:///private-place/model", head="file:///private-place/run"),
    seed=17,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An exported model with its card."""
    model = CONFIG.model.build()
    fingerprint = save_model(str(tmp_path), CONFIG.model, model.state_dict())
    count = sum(parameter.numel() for parameter in model.parameters())
    write_card(str(tmp_path), CONFIG, DATA, Export(fingerprint=fingerprint, num_parameters=count, num_steps=4321))
    return tmp_path


def _report(accuracy: float = 0.8125) -> EvalReport:
    results = (
        BenchmarkResult(
            name=name,
            num_pairs=6000,
            num_folds=10,
            accuracy=accuracy,
            accuracy_std=0.0125,
            val_at_far_1e3=0.5,
            tar_at_far={"1e-2": 0.75, "1e-3": 0.25},
            area_under_curve=0.9,
            fingerprint="f" * 64,
            correct=pack_outcomes([True] * 6000),
            xnorm=20.0,
        )
        for name in ("lfw", 'cfp "fp"')
    )
    return EvalReport(model_fingerprint="0" * 64, benchmarks=tuple(results))


def _front_matter(text: str) -> dict:
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front)


def _without_scores(text: str) -> str:
    without = re.sub(r"(?<=^# results\n).*?(?=^# end of results$)", "", text, flags=re.MULTILINE | re.DOTALL)
    return without[: without.index("<!-- scores -->")] + without[without.index("<!-- end of scores -->") :]


def test_it_says_what_the_model_is(folder):
    text = (folder / CARD).read_text()
    info = storage.read_json(str(folder / "config.json"))
    count = sum(parameter.numel() for parameter in CONFIG.model.build().parameters())
    for words in (
        "# small-1\n",
        "`lgaf` on `micro`",
        f"{count:,} parameters",
        "[B, 3, 112, 112]",
        "[B, 8]",
        info["sha256"],
        "`s3://faces/people`",
        DATA.fingerprint,
        "123,456, 789",
        "| steps | 4,321 |",
        "| seed | 17 |",
        "| started from | fresh weights |",
        'head.name = "cosface"',
        f"optimizer.learning_rate = {CONFIG.optimizer.learning_rate}",
        "model.embedding_dim = 8",
        "cosine",
    ):
        assert words in text, words
    assert _front_matter(text)["tags"] == ["face-recognition", "face-verification", "pytorch"]
    assert "moving average" not in text


def test_it_names_no_place_of_the_machine(folder):
    assert "/private-place" not in (folder / CARD).read_text()
    assert str(folder) not in (folder / CARD).read_text()


def test_it_tells_of_averages_and_of_what_the_weights_were_first(tmp_path):
    export = Export(fingerprint="0", num_parameters=1, num_steps=1, started_from="`models:/small/1`, SHA-256 `ab`")
    write_card(str(tmp_path), replace(CONFIG, step=StepConfig(ema_decay=0.999)), DATA, export)
    text = (tmp_path / CARD).read_text()
    assert "a moving average over the steps, of factor 0.999" in text
    assert "| started from | `models:/small/1`, SHA-256 `ab` |" in text


def test_its_code_runs_with_the_package_alone(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / CARD).read_text(), flags=re.MULTILINE | re.DOTALL)
    code = f"{ALONE}\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(embeddings.shape, -1 <= similarity <= 1)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.stdout.strip() == "torch.Size([2, 8]) True", found.stderr


def test_scores_are_put_in_and_replaced(folder):
    assert awaits_evaluation(str(folder))
    before = (folder / CARD).read_text()
    assert "model-index" not in _front_matter(before)
    add_evaluation(str(folder), _report(0.5))
    add_evaluation(str(folder), _report())
    assert not awaits_evaluation(str(folder))
    text = (folder / CARD).read_text()
    assert "| lfw | 6,000 | 81.25 ± 1.25 | 75.00 | 25.00 |" in text
    assert "50.00" not in text
    assert text.count("TAR@FAR=1e-3") == 1 + 2  # the table's head, and one of each benchmark in the metadata
    (entry,) = _front_matter(text)["model-index"]
    assert entry["name"] == "small-1"
    assert [result["dataset"]["name"] for result in entry["results"]] == ["lfw", 'cfp "fp"']
    assert entry["results"][0]["metrics"][0] == {"type": "accuracy", "name": "Accuracy", "value": 0.8125}
    assert _without_scores(text) == _without_scores(before)


def test_a_model_without_a_card_gets_none(tmp_path):
    save_model(str(tmp_path), CONFIG.model, CONFIG.model.build().state_dict())
    add_evaluation(str(tmp_path), _report())
    assert not (tmp_path / CARD).exists()
    assert not awaits_evaluation(str(tmp_path))


def test_object_stores_hold_cards(tmp_path):
    uri = f"memory://cards{tmp_path.name}/model"
    torch.manual_seed(0)
    write_card(uri, CONFIG, DATA, Export(fingerprint="0", num_parameters=1, num_steps=1))
    add_evaluation(uri, _report())
    assert b"81.25" in storage.read_bytes(storage.join(uri, CARD))
