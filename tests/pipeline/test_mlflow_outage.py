"""A training job whose MLflow server is away: what goes on, what ends, and what the same command then does."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest
from mlflow import MlflowClient

from lgaf.models import LGAFConfig
from pipeline import cli, storage
from pipeline.config import PackConfig, TrackingConfig, WorkersConfig
from pipeline.data.sources import SyntheticConfig
from pipeline.data.stream_plan import StreamConfig
from pipeline.errors import user_error
from pipeline.evaluation.report import EvalReport
from pipeline.model_store import save_model
from pipeline.presets import demo
from pipeline.stages import Benchmarks, PackedData, training_stages
from pipeline.tracking.reachability import StoreUnreachableError
from pipeline.tracking.registry import champion
from pipeline.training.metrics_log import read_metrics
from pipeline.training.trainer import TrainedModel
from tests.mlflow_server import MlflowServer

SMALL = dataclasses.replace(
    demo(),
    epochs=2,
    batch_size=32,
    num_workers=1,
    model=LGAFConfig(backbone="micro", embedding_dim=16),
    pack=PackConfig(
        samples_per_shard=20, synthetic=SyntheticConfig(num_identities=8, images_per_identity=9), benchmark_pairs=20
    ),
    stream=StreamConfig(num_streams=4, block_rows=16),
    workers=WorkersConfig(checkpoint_every_steps=2, log_every_steps=1),
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a run in an empty folder, with a store at which nothing listens."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    tracking = TrackingConfig(uri=uri, experiment="outage", model_name="outage")
    return dataclasses.replace(SMALL, storage=str(tmp_path), run_name="r", tracking=tracking)


def _stages(config, place):
    return {stage.name: stage for stage in training_stages(config, place, lambda *told: None)}


def test_stages_are_the_same_before_and_after_the_run_has_its_id(config, store_of):
    run_uri = storage.join(config.storage, "r")
    place = cli._open_place(config, run_uri)
    assert place.tracked.num_waiting == 2
    before = {name: stage.inputs for name, stage in _stages(config, place).items()}
    here = store_of(config)
    moved = cli._open_place(here, run_uri)
    assert moved.tracked.num_waiting == 0, "what waited for the other store is in this one"
    after = {name: stage.inputs for name, stage in _stages(here, moved).items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"evaluate", "register"}, "another store must have the evaluation too"
    again = {name: stage.inputs for name, stage in _stages(here, cli._open_place(here, run_uri)).items()}
    assert again == after
    place.tracked.address.note("0" * 32)
    assert {name: stage.inputs for name, stage in _stages(config, place).items()} == before


@pytest.fixture
def store_of(tmp_path):
    def with_sqlite(config):
        tracking = dataclasses.replace(config.tracking, uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        return dataclasses.replace(config, tracking=tracking)

    return with_sqlite


def test_registering_needs_the_server_and_says_so(config, capfd):
    run_uri = storage.join(config.storage, "r")
    place = cli._open_place(config, run_uri)
    model_uri = storage.join(run_uri, "model")
    fingerprint = save_model(model_uri, config.model, config.model.build().state_dict())
    needed = {
        "data": PackedData(uri="d", sets=(), fingerprint="d", num_samples=1, num_classes=1, num_shards=1),
        "benchmarks": Benchmarks(uri="b", sets=(), sha256=()),
        "train": TrainedModel(
            model_uri=model_uri, fingerprint=fingerprint, num_steps=1, final_loss=1.0, images_per_second=1.0
        ),
        "evaluate": EvalReport(model_fingerprint=fingerprint, benchmarks=()),
    }
    with pytest.raises(StoreUnreachableError) as caught:
        _stages(config, place)["register"].run(needed)
    assert user_error(caught.value) is caught.value
    assert cli.run_job(lambda: _stages(config, place)["register"].run(needed)) == 75  # worth a retry
    errors = capfd.readouterr().err.replace("\n", " ")
    assert f"MLflow at {config.tracking.uri} cannot be reached" in errors
    assert "The model is trained and evaluated, and 2 writes for MLflow wait" in errors
    assert "the same command sends them and registers the model" in errors
    assert "Traceback" not in errors


@pytest.mark.ray
@pytest.mark.slow
def test_a_whole_run_without_mlflow_is_sent_and_registered_by_the_same_command(
    config, tmp_path, ray_cluster, capfd, caplog
):
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=server.uri))

    def job():
        cli.run_training(cli._with_place(config))

    assert cli.run_job(job) == 75, "another attempt may meet a server"
    errors = capfd.readouterr().err.replace("\n", " ")
    assert caplog.text.count("the run goes on, what is logged waits in") == 1
    assert "the same command sends them and registers the model" in errors
    lines = read_metrics(str(tmp_path / "r"))
    num_steps = 2 * (8 * 9 // 32)
    assert [line["step"] for line in lines] == list(range(num_steps))
    report = (tmp_path / "r" / "report.json").read_bytes()
    server.start()
    try:
        assert cli.run_job(job) == 0, capfd.readouterr().err
        assert "train: done before" in capfd.readouterr().out
        client = MlflowClient(server.uri)
        run = client.get_run(json.loads((tmp_path / "r" / "mlflow.json").read_text())["run_id"])
        assert run.info.status == "FINISHED"
        for key in ("loss", "lr", "data_wait_s"):
            assert [item.step for item in client.get_metric_history(run.info.run_id, key)] == list(range(num_steps))
        losses = [item.value for item in client.get_metric_history(run.info.run_id, "loss")]
        assert losses == [line["loss"] for line in lines]
        artifacts = {info.path for info in client.list_artifacts(run.info.run_id)}
        assert {"config.json", "report.json", "loss.png", "roc.png"} <= artifacts
        stored = client.download_artifacts(run.info.run_id, "report.json", str(tmp_path))
        with open(stored, "rb") as file:
            assert json.loads(file.read()) == json.loads(report)
        best = champion(server.uri, "outage")
        assert (best.version, best.run_id) == (1, run.info.run_id)
        assert list((tmp_path / "r" / "mlflow_outbox").iterdir()) == []
    finally:
        server.stop()
