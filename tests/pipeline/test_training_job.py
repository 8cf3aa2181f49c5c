"""The whole job on a real Ray, a real MLflow store and real kills, at the smallest size that has every part."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from lgaf.models import LGAFConfig
from pipeline import cli, storage
from pipeline.config import PackConfig, TrackingConfig, TrainConfig, WorkersConfig
from pipeline.data.manifest import Manifest
from pipeline.data.order import epoch_order, plan
from pipeline.data.sources import SyntheticConfig
from pipeline.data.stream_plan import StreamConfig
from pipeline.model_store import load_model
from pipeline.presets import demo
from pipeline.tracking.registry import champion
from pipeline.training.commits import committed_steps
from pipeline.training.divergence import DivergenceConfig
from pipeline.training.metrics_log import read_metrics
from pipeline.training.profiling import ProfileConfig
from pipeline.training.split_report import read_splits

pytestmark = pytest.mark.ray

SMALL = dataclasses.replace(
    demo(),
    epochs=3,
    batch_size=32,
    model=LGAFConfig(backbone="micro", embedding_dim=16, dropout=0.1),
    pack=PackConfig(
        samples_per_shard=20,
        synthetic=SyntheticConfig(num_identities=8, images_per_identity=17),
        benchmark_pairs=40,
    ),
    stream=StreamConfig(num_streams=4, block_rows=16),
    workers=WorkersConfig(checkpoint_every_steps=5, log_every_steps=2),
    tracking=TrackingConfig(experiment="tests", model_name="small"),
)
NUM_STEPS = 3 * (8 * 17 // 32)


def _run(config: TrainConfig) -> dict:
    return cli.run_training(cli._with_place(config))


def _planned_digests(data_uri: str, config: TrainConfig) -> list[str]:
    """The digests that a run must have, from the pure order alone, dealt by hand."""
    manifest = Manifest.load(data_uri)
    digests = []
    for epoch in range(config.epochs):
        order = epoch_order(manifest, config.seed, epoch, config.stream.num_streams)
        samples = plan(order, 1, 0, config.batch_size)
        batches = (manifest.offsets[samples.shard] + samples.row).reshape(-1, config.batch_size)
        digests += [hashlib.sha256(batch.astype("<i8").tobytes()).hexdigest() for batch in batches]
    return digests


@pytest.fixture(scope="module")
def place(tmp_path_factory, ray_cluster) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def first(place) -> dict:
    """One finished run with two workers."""
    return _run(dataclasses.replace(SMALL, storage=str(place), run_name="two-workers"))


def test_every_step_has_its_line_and_the_planned_samples(first, place):
    lines = read_metrics(str(place / "two-workers"))
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert [line["epoch"] for line in lines] == [step // (NUM_STEPS // 3) for step in range(NUM_STEPS)]
    assert set(lines[0]) == {"step", "epoch", "loss", "lr", "images_per_second", "samples_digest"}
    assert [line["samples_digest"] for line in lines] == _planned_digests(first["data"].uri, SMALL)
    # The paper's milestones, 12/20/24 of 26, on 12 steps.
    assert [round(line["lr"], 6) for line in lines] == [0.1] * 6 + [0.01] * 4 + [0.001] * 2
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.fixture(scope="module")
def twin(place) -> TrainConfig:
    """Of a short run with one worker, and with a head that does otherwise."""
    head = dataclasses.replace(
        SMALL.head, sample_rate=0.5, precision="bfloat16", memory_budget_mib=1, update="backward"
    )
    tracking = dataclasses.replace(SMALL.tracking, model_name="twins")
    return dataclasses.replace(
        SMALL,
        storage=str(place),
        run_name="twin-one",
        tracking=tracking,
        epochs=1,
        num_workers=1,
        head=head,
        profile=ProfileConfig(steps=2, after=2),
    )


@pytest.fixture(scope="module")
def alone(first, twin) -> dict:
    """That run, on the data of the first."""
    return _run(twin)


def test_one_worker_trains_on_the_same_global_batches(first, alone, place):
    ours, theirs = read_metrics(str(place / "twin-one")), read_metrics(str(place / "two-workers"))
    assert len(ours) == NUM_STEPS // 3
    assert [line["samples_digest"] for line in ours] == [line["samples_digest"] for line in theirs[: len(ours)]]


def test_a_profile_of_a_run_takes_its_steps_apart(alone, place):
    (split,) = read_splits(str(place / "twin-one"))
    assert (split.first_step, len(split.steps), split.global_batch) == (2, 2, SMALL.batch_size)
    assert all(split.mean_s[part] > 0 for part in ("data_wait", "forward", "head", "backward", "optimizer"))
    # Of the four steps, the last one saves.
    assert split.steps[0]["checkpoint"] == 0 < split.steps[1]["checkpoint"]


@pytest.mark.slow
def test_a_kill_between_the_last_checkpoint_and_the_export_loses_nothing(alone, twin, place):
    lines = read_metrics(str(place / "twin-one"))
    shutil.rmtree(place / "twin-one" / "model")
    (place / "twin-one" / "stages" / "train.json").unlink()
    again = _run(twin)
    assert again["train"].fingerprint == alone["train"].fingerprint
    assert again["register"].version == alone["register"].version
    assert read_metrics(str(place / "twin-one")) == lines


def test_the_same_command_again_does_nothing_twice(first, place):
    started = time.monotonic()
    again = _run(dataclasses.replace(SMALL, storage=str(place), run_name="two-workers"))
    assert again == first
    assert time.monotonic() - started < 15
    versions = MlflowClient(_store(place)).search_model_versions("name='small'")
    assert sum(version.tags["run_name"] == "two-workers" for version in versions) == 1


def _store(place: Path) -> str:
    return f"sqlite:///{place / 'mlflow.db'}"


def test_mlflow_has_all_of_it(first, place):
    known = json.loads((place / "two-workers" / "mlflow.json").read_text())
    client = MlflowClient(_store(place))
    run = client.get_run(known["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.backbone"] == "micro"
    assert run.data.tags["training_data_fingerprint"] == first["data"].fingerprint
    losses = {metric.step: metric.value for metric in client.get_metric_history(known["run_id"], "loss")}
    assert losses == {line["step"]: line["loss"] for line in read_metrics(str(place / "two-workers"))}
    for name in ("synth-pose", "synth-deform", "synth-lowres"):
        assert 0.0 <= run.data.metrics[f"eval/{name}/accuracy"] <= 1.0
    artifacts = {info.path for info in client.list_artifacts(known["run_id"])}
    assert {"config.json", "report.json", "loss.png", "roc.png"} <= artifacts


def test_the_first_version_is_champion_and_serves_the_trained_model(first, place):
    best = champion(_store(place), "small")
    assert best is not None
    assert best.version == first["register"].version == first["register"].champion_version == 1
    assert best.tags["data_fingerprint"] == first["data"].fingerprint
    model = load_model(first["train"].model_uri)
    assert model.config == SMALL.model
    report = json.loads((place / "two-workers" / "report.json").read_text())
    assert report["model_fingerprint"] == best.tags["model_fingerprint"] == first["train"].fingerprint


@pytest.fixture(scope="module")
def other_twin(first, alone, twin, place) -> tuple[TrainConfig, dict]:
    """The same run again, on a copy of the data and other benchmarks; with its configuration."""
    copy = place / "repacked"
    shutil.copytree(storage.local_path(first["data"].uri), copy)
    pack = dataclasses.replace(SMALL.pack, benchmark_pairs=30)
    config = dataclasses.replace(twin, run_name="twin-two", data=str(copy), pack=pack)
    return config, _run(config)


def test_a_model_that_is_not_better_is_not_promoted(alone, other_twin, place):
    assert alone["register"].decision.promote
    # On other benchmarks than the champion was scored on: it is scored on them now.
    _, two = other_twin
    assert two["train"].fingerprint == alone["train"].fingerprint
    decision = two["register"].decision
    assert not decision.promote
    assert decision.p_value == 1.0
    assert [difference.num_pairs for difference in decision.differences] == [30, 30, 30]
    assert all(d.champion_accuracy == d.candidate_accuracy for d in decision.differences)
    assert champion(_store(place), "twins").version == alone["register"].version


def test_another_recipe_under_the_same_name_is_refused(first, place):
    with pytest.raises(ValueError, match=r"run_name='two-workers' was started with another.*epochs was 3, is 4"):
        _run(dataclasses.replace(SMALL, storage=str(place), run_name="two-workers", epochs=4))


def test_data_packed_again_at_the_same_place_is_not_mixed_in(other_twin, capfd):
    config, _ = other_twin
    dataclasses.replace(Manifest.load(config.data), seed=99).save()
    assert cli.run_job(lambda: _run(config)) == 1
    assert "take another run_name" in capfd.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_diverged_run_stops_at_once_and_says_so(first, place, capfd):
    wild = dataclasses.replace(SMALL.optimizer, learning_rate=1e30)
    config = dataclasses.replace(SMALL, storage=str(place), run_name="wild", optimizer=wild)
    assert cli.run_job(lambda: _run(config)) == 1
    errors = capfd.readouterr().err.replace("\n", " ")
    assert "the run diverged; lower optimizer.learning_rate" in errors
    assert all(np.isfinite(line["loss"]) for line in read_metrics(str(place / "wild")))
    (note,) = (place / "wild" / "non_finite").iterdir()
    assert len(json.loads(note.read_text())["samples"]) == SMALL.batch_size
    assert committed_steps(str(place / "wild")) == []


@pytest.mark.slow
def test_a_run_that_is_rolled_back_passes_over_what_spoilt_it(first, place, capfd):
    """Every second step spoils the weights: the third time is one more than the budget."""
    wild = dataclasses.replace(SMALL.optimizer, learning_rate=1e30)
    divergence = DivergenceConfig(policy="rollback", budget=2)
    config = dataclasses.replace(SMALL, storage=str(place), run_name="back", optimizer=wild, divergence=divergence)
    assert cli.run_job(lambda: _run(dataclasses.replace(config, num_workers=1))) == 1
    assert "more than divergence.budget=2 steps were not finite" in capfd.readouterr().err.replace("\n", " ")
    assert len(list((place / "back" / "non_finite").iterdir())) == 3


def test_gpus_that_are_not_there_are_not_waited_for(first, place, capfd):
    workers = dataclasses.replace(SMALL.workers, use_gpu=True)
    config = dataclasses.replace(SMALL, storage=str(place), run_name="gpus", workers=workers, num_workers=9)
    assert cli.run_job(lambda: _run(config)) == 1
    assert "num_workers=9 is more than the 8 people" in capfd.readouterr().err
    assert cli.run_job(lambda: _run(dataclasses.replace(config, num_workers=8))) == 1
    assert "need as many GPUs" in capfd.readouterr().err


def test_a_run_is_not_started_twice_at_once(first, place):
    code = "import sys, time; from pipeline import storage\n"
    code += "with storage.lock(sys.argv[1], 'x'): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(place / "two-workers")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(storage.StorageError, match=r"run_name='two-workers' is running already"):
            _run(dataclasses.replace(SMALL, storage=str(place), run_name="two-workers"))
    finally:
        holder.kill()
        holder.wait()


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.slow  # the stream's own test names the shard in every run of the suite
@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("flipped", _flip, "corrupt, bytes 0 to"),
        ("truncated", lambda data: data[: len(data) // 2], "truncated"),
    ],
)
def test_a_damaged_shard_ends_in_one_error_that_names_it(first, place, capfd, name, damage, text):
    data = place / name
    shutil.copytree(storage.local_path(first["data"].uri), data)
    shard = data / Manifest.load(str(data)).shards[1].name
    shard.write_bytes(damage(shard.read_bytes()))
    config = dataclasses.replace(SMALL, storage=str(place), run_name=f"on-{name}", data=str(data))
    code = cli.run_job(lambda: _run(config))
    errors = capfd.readouterr().err
    assert code == 1
    assert f"{name}/shard-000001.tar: {text}" in errors.replace("\n", "")
    assert "Traceback" not in errors
    assert committed_steps(str(place / f"on-{name}")) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": "nowhere/at-all"}, "nowhere/at-all: does not exist"),
        ({"data": "{place}/shards-only"}, "shard-000000.tar"),
        ({"benchmarks": "{place}/nothing"}, "nothing"),
    ],
)
def test_a_place_that_holds_no_data_is_named(first, place, capfd, change, text):
    (place / "shards-only").mkdir(exist_ok=True)
    (place / "shards-only" / "shard-000000.tar").write_bytes(b"")
    config = dataclasses.replace(
        SMALL,
        storage=str(place),
        run_name="nowhere",
        **{key: value.format(place=place) for key, value in change.items()},
    )
    assert cli.run_job(lambda: _run(config)) == 1
    errors = capfd.readouterr().err
    assert text in errors.replace("\n", "")
    assert "Traceback" not in errors
