"""What a run starts from is found once, and what does not fit is named before anything starts."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import torch

from lgaf.models import NETWORKS, LGAFConfig
from lgaf.models.peers import CQAFaceConfig, HPDAConfig, LSCNNConfig, TransFaceConfig, URLConfig
from lgaf.optim import OptimizerConfig
from pipeline import cli, storage
from pipeline.config import TrainConfig
from pipeline.data.manifest import ManifestError
from pipeline.model_store import load_model
from pipeline.tracking import registry, runs
from pipeline.tracking.promotion import PromotionDecision
from pipeline.training.commits import MARKER
from pipeline.training.warm_start import WarmStart, read_note, started_from
from pipeline.training.warm_start_apply import apply_warm_start
from pipeline.training.warm_start_prepare import (
    TRAINING_ONLY,
    check_same_network,
    pin_warm_start,
    prepare_warm_start,
)
from tests.pipeline.training.old_run import BASE, DIM, MODEL, export, old_run, packed, train_step

NOWHERE = "sqlite:////nowhere/mlflow.db"
PEOPLE = ["ann", "bea", "cid"]


@pytest.fixture
def old(tmp_path) -> str:
    return old_run(tmp_path / "old", [packed(tmp_path / "faces", PEOPLE)])


def _warm(tmp_path, model: str = "old/model", head: str = "old") -> TrainConfig:
    start = WarmStart(model=str(tmp_path / model), head=str(tmp_path / head) if head else "")
    return replace(BASE, warm_start=start.normalised())


def _prepare(config: TrainConfig, tmp_path):
    return prepare_warm_start(config, packed(tmp_path / "more", [*PEOPLE, "dov"]), str(tmp_path / "new"), NOWHERE)


def test_the_note_says_what_it_was(old, tmp_path):
    note = _prepare(_warm(tmp_path), tmp_path)
    assert note == read_note(str(tmp_path / "new"))
    assert note.model.source == storage.join(old, "model")
    assert note.model.fingerprint == storage.read_json(storage.join(old, "model", "config.json"))["sha256"]
    assert note.head.run == old
    assert note.head.optimizer_tensors == ("weight.momentum_buffer",)
    assert note.head.same_network is True
    assert json.loads((tmp_path / "new" / "warm_start.json").read_text())["classes"]["num_kept"] == 3


def test_a_model_of_another_run_is_told(old, tmp_path):
    export(tmp_path / "m", seed=8)
    assert _prepare(_warm(tmp_path, "m"), tmp_path).head.same_network is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "tiny"}, r"another network: model\.backbone is 'micro', this run's is 'tiny'$"),
        ({"num_heads": 4, "fusion": "cat"}, r"model\.num_heads is 2, .* is 4; model\.fusion is 'add', .* is 'cat'$"),
        ({"quality": "entropy"}, r"model\.quality is 'norm', this run's is 'entropy'$"),
    ],
)
def test_another_network_is_told_by_its_settings(old, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        _prepare(replace(_warm(tmp_path), model=replace(MODEL, **change)), tmp_path)
    assert read_note(str(tmp_path / "new")) is None


def test_a_network_of_another_kind_is_told(old, tmp_path):
    peer = replace(_warm(tmp_path), network="transface", model=TransFaceConfig(backbone="vit_tiny", embedding_dim=DIM))
    with pytest.raises(ValueError, match=r"is of network='lgaf', this run's is 'transface'"):
        _prepare(peer, tmp_path)


SMALL = [
    LGAFConfig(backbone="micro", embedding_dim=16),
    LSCNNConfig(growth_rate=4, layers=(1, 1, 1), embedding_dim=8),
    HPDAConfig(growth_rate=4, layers=(1, 1, 1), embedding_dim=8, local_width=4, bilinear_dim=8),
    CQAFaceConfig(backbone="micro", embedding_dim=8),
    TransFaceConfig(backbone="vit_tiny", embedding_dim=8),
    URLConfig(backbone="micro", embedding_dim=32),
]
OTHER = {
    bool: lambda value: not value,
    float: lambda value: value + 0.125 if value < 0.5 else value / 2,
    int: lambda value: value - 1,
    str: lambda value: "std" if value == "softmax" else "softmax",
}


def test_every_network_is_tried():
    assert {type(config) for config in SMALL} == set(NETWORKS.values())
    named = {field.name for config in SMALL for field in dataclasses.fields(config)}
    assert named >= TRAINING_ONLY, "a setting that no network has"


@pytest.mark.parametrize("config", SMALL, ids=lambda config: type(config).__name__)
def test_settings_of_training_alone_change_neither_weights_nor_outputs(config):
    torch.manual_seed(0)
    model = config.build().eval()
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        expected = model(images).embedding_BD
        for name in TRAINING_ONLY & {field.name for field in dataclasses.fields(config)}:
            value = getattr(config, name)
            try:
                other = replace(config, **{name: OTHER[type(value)](value)})
            except ValueError as error:  # a choice of other words
                other = replace(config, **{name: re.search(r"choose one of: (\w+)", str(error))[1]})
            check_same_network(config, other, "model")
            changed = other.build().eval()
            changed.load_state_dict(model.state_dict())
            assert torch.equal(changed(images).embedding_BD, expected), name


def test_centres_of_another_length_are_told(tmp_path):
    wide = replace(BASE, model=replace(MODEL, embedding_dim=16))
    old_run(tmp_path / "old", [packed(tmp_path / "faces", PEOPLE)], config=wide)
    export(tmp_path / "m")
    with pytest.raises(ValueError, match=rf"centres of .*old have 16 dimensions, this run's embeddings {DIM}"):
        _prepare(_warm(tmp_path, "m"), tmp_path)


def test_fewer_classes_than_ranks_are_told(old, tmp_path):
    with pytest.raises(ValueError, match=r"old has 3 classes, which num_workers=4 cannot share"):
        _prepare(replace(_warm(tmp_path), num_workers=4), tmp_path)


@pytest.mark.parametrize(
    ("model", "head", "words"),
    [
        ("nothing", "", r"nothing/config\.json: does not exist"),
        ("old", "", r"old/config\.json: is not the config of an exported model.*old/model"),
        ("old/model", "nothing", r"warm_start\.head=.*nothing: does not exist; it must be the folder of a run"),
        ("old/model", "old/model", r"warm_start\.head=.*model: has no committed checkpoint"),
    ],
)
def test_places_without_what_is_wanted_are_named(old, tmp_path, model, head, words):
    with pytest.raises(storage.StorageError, match=words):
        _prepare(_warm(tmp_path, model, head), tmp_path)


def test_a_damaged_model_is_named(old, tmp_path):
    weights = tmp_path / "old" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(storage.StorageError, match=r"model\.safetensors: sha256 is"):
        _prepare(_warm(tmp_path), tmp_path)


def test_a_damaged_checkpoint_is_named(old, tmp_path):
    (metadata,) = (tmp_path / "old").glob("checkpoints/*/.metadata")
    metadata.write_bytes(b"x")
    with pytest.raises(storage.StorageError, match=r"step_00000012/\.metadata: has 1 bytes where COMMITTED\.json says"):
        _prepare(_warm(tmp_path), tmp_path)
    assert metadata.with_name(MARKER).exists(), "a run's folder is not changed by those that start from it"


def test_data_of_the_old_run_that_are_gone_or_changed_are_named(old, tmp_path):
    packed(tmp_path / "faces", [*PEOPLE, "dov"])
    with pytest.raises(ManifestError, match=r"faces changed since .*old was trained on it .*4 people.*has 3\)"):
        _prepare(_warm(tmp_path), tmp_path)
    storage.delete_tree(str(tmp_path / "faces"))
    with pytest.raises(ManifestError, match=r"warm_start\.head: the data of .*old say whose.*faces/manifest\.json"):
        _prepare(_warm(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "x"}, r"warm_start\.head='x' needs warm_start\.model"),
        ({"model": "x", "sets": {"a": "b"}}, r"warm_start\.sets=\{'a': 'b'\} needs warm_start\.head"),
        ({"model": "models:/small"}, r"warm_start\.model='models:/small' must be models:/NAME@ALIAS or"),
        ({"model": "models:/small/latest"}, r"models:/NAME/VERSION \(a number from 1\)"),
        ({"model": "models:/small/0"}, r"must be models:/NAME@ALIAS"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        WarmStart(**settings)


def test_the_command_line_has_it(tmp_path, monkeypatch, capsys):
    arguments = ["--warm-start.model", str(tmp_path / "nothing"), "--storage", str(tmp_path), "--run-name", "warm"]
    monkeypatch.setattr(cli, "ray_session", lambda: pytest.fail("went on to start Ray"))
    monkeypatch.setattr(cli, "_open_place", lambda *_: pytest.fail("opened an MLflow run"))
    assert cli.train_job(BASE, arguments=arguments) == 1
    assert "nothing/config.json: does not exist" in capsys.readouterr().err.replace("\n", "")


# --- the registry, on a real sqlite store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def versions(store, tmp_path_factory) -> list[str]:
    """Fingerprints of two versions of the model "faces"; the first is champion."""
    run = runs.open_run(store, "tests", "warm")
    fingerprints = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("m")
        fingerprints.append(export(str(folder), seed=seed))
        tags = {"model_fingerprint": fingerprints[-1]}
        registry.register_model(store, run, folder, "faces", embedding_dim=DIM, tags=tags)
    _promote(store, 1)
    return fingerprints


def _promote(store: str, version: int) -> None:
    yes = PromotionDecision(promote=True, reasons=("better",), p_value=0.01)
    registry.apply(store, "faces", version, yes)


def _registered(reference: str) -> TrainConfig:
    return replace(BASE, warm_start=WarmStart(model=reference))


@pytest.mark.parametrize(("reference", "version"), [("models:/faces@champion", 1), ("models:/faces/2", 2)])
def test_a_registered_model_is_one_exact_version(store, versions, tmp_path, reference, version):
    config, run_uri = _registered(reference), str(tmp_path)
    note = pin_warm_start(config, run_uri, store)
    assert (note.model.source, note.model.fingerprint) == (f"models:/faces/{version}", versions[version - 1])
    assert started_from(run_uri) == f"`models:/faces/{version}`, SHA-256 `{versions[version - 1]}`"
    step = train_step(config, 3)
    apply_warm_start(config.warm_start, run_uri, step)
    found = load_model(storage.join(run_uri, "warm_start", "model")).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in step.model.state_dict().items())


def test_an_alias_that_moves_moves_no_run_that_has_begun(store, versions, tmp_path):
    config = _registered("models:/faces@champion")
    note = pin_warm_start(config, str(tmp_path / "first"), store)
    _promote(store, 2)
    try:
        assert pin_warm_start(config, str(tmp_path / "first"), NOWHERE) == note, "the registry is not even asked"
        assert pin_warm_start(config, str(tmp_path / "second"), store).model.source == "models:/faces/2"
    finally:
        _promote(store, 1)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("models:/faces@best", r"model 'faces' has no alias 'best'; there are: candidate, champion"),
        ("models:/nobody@champion", r"model 'nobody' does not exist in sqlite"),
        ("models:/faces/7", r"version=7 of model 'faces' does not exist; there are: \[1, 2\]"),
    ],
)
def test_a_model_that_is_not_there_is_named(store, versions, tmp_path, reference, words):
    with pytest.raises(ValueError, match=rf"warm_start\.model='{reference}': {words}"):
        pin_warm_start(_registered(reference), str(tmp_path), store)


def test_the_optimizers_kind_is_noted(tmp_path):
    adamw = replace(BASE, optimizer=OptimizerConfig(kind="adamw"))
    old_run(tmp_path / "old", [packed(tmp_path / "faces", PEOPLE)], config=adamw)
    note = _prepare(_warm(tmp_path), tmp_path)
    assert note.head.optimizer_tensors == ("weight.exp_avg", "weight.exp_avg_sq", "weight.step")
