import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from lgaf import LGAFConfig
from pipeline.model_store import load_model, save_model
from pipeline.tracking import registry, runs
from pipeline.tracking.promotion import BenchmarkOutcome, PromotionDecision, PromotionPolicy, decide
from pipeline.tracking.store import client, sqlite_path

DIM = 64
YES = PromotionDecision(promote=True, reasons=("It is better.",), p_value=0.01)
NO = PromotionDecision(promote=False, reasons=("It is not better.", "It falls on lfw."), p_value=0.4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Three exported models: folder and fingerprint."""
    config = LGAFConfig(backbone="tiny", embedding_dim=DIM)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"export{seed}")
        models.append((folder, save_model(str(folder), config, config.build().state_dict())))
    return models


@pytest.fixture
def register(store, run, exported, request):
    name = request.node.name.replace("[", "-").replace("]", "")

    def register(i, run_id=run, description="A tiny model."):
        folder, fingerprint = exported[i]
        tags = {"model_fingerprint": fingerprint, "data_fingerprint": "d" * 64, "run_name": f"r{i}"}
        return registry.register_model(
            store, run_id, folder, name, embedding_dim=DIM, tags=tags, description=description
        )

    register.name = name
    return register


@pytest.fixture
def global_store(store):
    """`mlflow.pyfunc.load_model` knows the global store only; our own code must not need it."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    yield
    mlflow.set_tracking_uri(before)


def test_no_model_and_no_alias(store, register):
    assert registry.champion(store, "never-registered") is None
    register(0)
    assert registry.champion(store, register.name) is None
    assert registry.candidate(store, register.name).version == 1


def test_dead_server_is_not_an_absent_champion(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(mlflow.MlflowException, match="registered-models/alias"):
        registry.champion(uri, "lgaf")


def test_registering_twice_gives_the_same_version(store, register, run):
    assert register(0) == 1
    assert register(0) == 1
    assert register(1) == 2
    assert register(0) == 1
    assert registry.candidate(store, register.name).version == 2, "an old job that runs again does not take it back"
    info = registry.get_version(store, register.name, 1)
    assert info.run_id == run
    assert (info.tags["run_name"], info.tags["data_fingerprint"]) == ("r0", "d" * 64)
    assert info.description == "A tiny model."
    assert register(0, run_id=runs.open_run(store, "tests", "another")) == 3, "another run is another version"


def test_killed_between_upload_and_registration(store, register, run):
    register(0)
    client(store).delete_model_version(register.name, "1")
    version = register(0)
    experiment = client(store).get_run(run).info.experiment_id
    stored = client(store).search_logged_models([experiment], filter_string=f"source_run_id = '{run}'")
    assert len(stored) == 1, "the uploaded model is used again"
    assert registry.get_version(store, register.name, version).run_id == run


def test_first_champion_and_its_successor(store, register):
    first, second = register(0), register(1)
    assert registry.apply(store, register.name, first, YES, champion_seen=None).version == first
    assert registry.champion(store, register.name).aliases == ("champion",)
    assert registry.apply(store, register.name, second, NO, champion_seen=first).version == first
    refused = registry.get_version(store, register.name, second)
    assert refused.decision == NO
    assert refused.tags["promoted"] == "false"
    assert refused.tags["promotion_reasons"] == "It is not better.\nIt falls on lfw."
    assert "previous_champion" not in refused.tags
    assert refused.description == ("A tiny model.\n\n**Promotion:** not promoted. It is not better. It falls on lfw.")
    assert registry.apply(store, register.name, second, YES, champion_seen=first).version == second
    promoted = registry.champion(store, register.name)
    assert promoted.tags["previous_champion"] == str(first)
    assert promoted.tags["promotion_p_value"] == "0.01"
    assert promoted.description == "A tiny model.\n\n**Promotion:** promoted. It is better."
    assert set(promoted.aliases) == {"champion", "candidate"}


def test_apply_may_be_repeated(store, register):
    first, second = register(0), register(1)
    registry.apply(store, register.name, first, YES)
    for _ in range(2):  # the second time `first` is no longer the champion, as the decision still says
        assert registry.apply(store, register.name, second, YES, champion_seen=first).version == second
    assert registry.champion(store, register.name).tags["previous_champion"] == str(first)


def test_decision_about_a_former_champion_is_refused(store, register):
    first, second, third = register(0), register(1), register(2)
    registry.apply(store, register.name, first, YES, champion_seen=None)
    registry.apply(store, register.name, second, YES, champion_seen=first)
    with pytest.raises(registry.StaleDecisionError, match="compared with champion 1, now it is 2"):
        registry.apply(store, register.name, third, YES, champion_seen=first)
    assert registry.champion(store, register.name).version == second
    assert registry.get_version(store, register.name, third).decision is None


def test_two_promotions_at_once_exclude_each_other(store, register):
    first, second, third = register(0), register(1), register(2)
    registry.apply(store, register.name, first, YES)
    results = {}

    def promote(version):
        try:
            results[version] = registry.apply(store, register.name, version, YES, champion_seen=first).version
        except registry.StaleDecisionError:
            results[version] = None

    threads = [threading.Thread(target=promote, args=(version,)) for version in (second, third)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [version for version, result in results.items() if result is not None]
    champion = registry.champion(store, register.name)
    assert champion.version == winner
    assert champion.tags["previous_champion"] == str(first)
    assert list(sqlite_path(store).parent.glob("mlflow.db.locks/*.lock"))


def test_real_decision_is_read_back(store, register):
    version = register(0)
    ours = [BenchmarkOutcome(name="lfw", fingerprint="f" * 64, correct=np.ones(600, dtype=bool))]
    theirs = [BenchmarkOutcome(name="lfw", fingerprint="f" * 64, correct=np.arange(600) > 20)]
    decision = decide(ours, theirs, PromotionPolicy())
    registry.apply(store, register.name, version, decision)
    assert registry.champion(store, register.name).decision == decision


def test_fetched_model_is_the_exported_one(store, register, exported, tmp_path):
    version = register(1)
    folder = registry.fetch_model(store, register.name, version, tmp_path / "fetched")
    ours, theirs = load_model(str(folder)).state_dict(), load_model(str(exported[1][0])).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_champion_by_alias_predicts_what_torch_does(store, register, exported, global_store):
    registry.apply(store, register.name, register(2), YES)
    loaded = mlflow.pyfunc.load_model(f"models:/{register.name}@champion")
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, 112, 112)).astype(np.float32)
    embeddings = loaded.predict(images)
    with torch.no_grad():
        expected = load_model(str(exported[2][0]))(torch.from_numpy(images)).embedding_BD
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    assert loaded.metadata.signature.outputs.inputs[0].shape == (-1, DIM)
    with pytest.raises(mlflow.MlflowException, match="schema"):
        loaded.predict(images.astype(np.float64))


def test_loads_without_the_project(store, register, tmp_path):
    registry.apply(store, register.name, register(0), YES)
    code = (
        "import sys, mlflow, numpy as np; mlflow.set_tracking_uri(sys.argv[1]);"
        "model = mlflow.pyfunc.load_model(sys.argv[2]);"
        "print(model.predict(np.zeros((1, 3, 112, 112), np.float32)).shape);"
        "import lgaf, pipeline.model_store; print(lgaf.__file__); print(pipeline.model_store.__file__)"
    )
    command = [sys.executable, "-c", code, store, f"models:/{register.name}@champion"]
    found = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=True)
    shape, *files = found.stdout.strip().splitlines()
    assert shape == f"(1, {DIM})"
    assert all(not file.startswith(str(Path(__file__).parents[3])) for file in files), files


def test_no_pickle_is_stored(store, register):
    register(0)
    folder = sqlite_path(store).parent / "mlflow-artifacts"
    stored = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in stored)
    assert not [path for path in stored if path.suffix in {".pkl", ".pickle", ".pt", ".pth"}]


def test_user_errors(store, register, run, exported):
    register(0)
    with pytest.raises(ValueError, match=r"version=9 .* there are: \[1\]"):
        registry.apply(store, register.name, 9, YES)
    with pytest.raises(ValueError, match="model_fingerprint"):
        registry.register_model(store, run, exported[0][0], "x", embedding_dim=DIM, tags={})
    with pytest.raises(ValueError, match="is not a model name"):
        registry.register_model(store, run, exported[0][0], "a/b", embedding_dim=DIM, tags={"model_fingerprint": "f"})
