"""The command line: mistakes are named in a few words before anything starts, and a run name means one recipe."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import asdict, replace

import pytest
import tyro

from lgaf.models import NETWORKS, LGAFConfig
from lgaf.optim import OptimizerConfig
from pipeline import cli, presets, storage
from pipeline.config import TrackingConfig, TrainConfig, WorkersConfig
from pipeline.stopping import StoppedError
from pipeline.tracking.reachability import StoreRefusedError, StoreUnreachableError
from pipeline.training.attempts import SupersededError
from pipeline.training.failure import WorkersLostError
from pipeline.training.metrics_log import MetricsLog


@pytest.fixture
def no_start(monkeypatch):
    """Mistakes must be found before Ray or MLflow start: the boundary to both fails the test."""

    def started(*arguments, **keywords):
        pytest.fail("went on to start Ray or open an MLflow run")

    monkeypatch.setattr(cli, "ray_session", started)
    monkeypatch.setattr(cli, "_open_place", started)


def _plain(text: str) -> str:
    """Text without the box that frames it and the line breaks that fit it in."""
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())


def _run(preset: TrainConfig, arguments: list[str], capsys) -> tuple[int, str]:
    try:
        code = cli.train_job(preset, arguments=arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    return code, _plain(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.bakbone", "tiny"], ["--model.bakbone", "Perhaps you meant: --model.backbone"]),
        (["--batchsize", "64"], ["--batchsize", "Perhaps you meant: --batch-size"]),
        (["--model.backbone", "tinny"], ["model.backbone='tinny'", "did you mean 'tiny'", "iresnet100", "micro"]),
        (["--batch-size", "127"], ["batch_size=127 must be a multiple of stream.num_streams=4"]),
        (["--batch-size", "2", "--num-workers", "4", "--stream.num-streams", "1"], ["batch_size=2", "4 workers"]),
        (["--epochs", "0"], ["epochs=0 must be greater than 0"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--precision", "fp8"], ["--precision", "'fp8'", "'float32', 'bfloat16'"]),
        (["--head.name", "arcfase"], ["--head.name", "'arcfase'", "'arcface', 'cosface'"]),
        (["--head.name", "magface"], ["head.margin=0.2: magface has no such field", "--head.margin None", "l_margin"]),
        (["--head.options", "h", "0.3"], ["head: the key='h' is not valid", "margin, scale"]),
        (["--model.fusion", "iaff"], ["model.fusion='iaff'", "model.quality='none'"]),
        (["--network", "hpd"], ["--network", "'hpd'", "'hpda'"]),
        (["--network", "hpda", "--model.num-heads", "4"], ["--model.num-heads"]),
        (["--network=transface", "--model.backbone", "vitb"], ["model.backbone='vitb'", "did you mean 'vit_b'"]),
        (["--screening.strength", "2"], ["screening.strength=2.0 must lie in [0.0, 0.95]"]),
        (["--model.dropout", "2"], ["model.dropout=2.0 must lie in [0.0, 0.99]"]),
        (["--schedule.milestones", "0.9", "0.5"], ["schedule.milestones=(0.9, 0.5)", "rising"]),
        (["--stream.augmentation", "adafase"], ["stream.augmentation='adafase'", "did you mean 'adaface'"]),
        (["--run-name", "a/b"], ["run_name='a/b'", "no slash"]),
        (["--storage", "hdfs://bucket"], ["hdfs://bucket: unknown scheme 'hdfs'", "s3"]),
        (["--num-workers", "3", "2"], ["num_workers=(3, 2) must be a number, or the fewest and then the most workers"]),
        (["--retries", "-1"], ["retries=-1 must lie in"]),
        (["--workers.hang-timeout-s", "-5"], ["workers.hang_timeout_s=-5.0 must lie in"]),
        (["--tracking.url", "x"], ["--tracking.url", "--tracking.uri"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_mistakes_are_named_without_a_traceback(arguments, words, capsys, no_start):
    code, text = _run(presets.demo(), arguments, capsys)
    assert code not in (0, None)
    for word in words:
        assert word in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data", "required"]),
        (["--data", "{tmp}"], ["--benchmarks", "required"]),
        (["--benchmarks", "{tmp}"], ["--data", "required"]),
    ],
    ids=["neither", "no benchmarks", "no data"],
)
def test_the_real_job_says_what_it_requires(arguments, words, capsys, no_start, tmp_path):
    given = [argument.format(tmp=tmp_path) for argument in [*arguments, "--storage", "{tmp}/out"]]
    code, text = _run(presets.webface4m_r100_arcface(), given, capsys)
    assert code not in (0, None)
    for word in words:
        assert word in text
    assert not (tmp_path / "out").exists(), "nothing must be left behind"


def test_a_dry_run_tells_and_leaves_nothing(capsys, no_start, tmp_path):
    small = ["--model.backbone", "micro", "--model.embedding-dim", "16", "--batch-size", "16"]
    assert cli.train_job(presets.demo(), ["--dry-run", *small, "--storage", str(tmp_path / "x")]) == 0
    told = capsys.readouterr().out
    for word in ("model.backbone", "micro", "Parameters", "Memory", "Time"):
        assert word in told
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_brings_its_own_settings(network):
    arguments = ["--network", network, "--model.embedding-dim", "64"]
    default = cli._with_network(presets.demo(), arguments)
    config = tyro.cli(TrainConfig, default=default, args=arguments)
    assert config.network == network
    assert type(config.model) is NETWORKS[network]
    assert config.model.embedding_dim == 64
    assert config.head == presets.demo().head
    assert cli._with_place(config).run_name != cli._with_place(presets.demo()).run_name


@pytest.mark.parametrize(
    ("arguments", "network"),
    [
        ([], "lgaf"),
        (["--network"], "lgaf"),
        (["--network", "hpda", "--network", "url"], "url"),
        (["--network=url", "--network", "lgaf"], "lgaf"),
        (["--epochs", "3", "--network=hpda"], "hpda"),
    ],
)
def test_the_last_network_named_counts(arguments, network):
    found = cli._with_network(presets.demo(), arguments)
    assert found.network == network
    assert type(found.model) is NETWORKS[network]


def test_a_job_without_any_flag_starts(monkeypatch):
    started = []
    monkeypatch.setattr(cli, "run_training", started.append)
    assert cli.train_job(presets.demo(), arguments=[]) == 0
    assert started[0].model == presets.demo().model


def test_network_and_model_go_together():
    with pytest.raises(ValueError, match=r"network='hpda' goes with a HPDAConfig"):
        replace(presets.demo(), network="hpda")


def test_a_named_run_is_trained(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(cli, "run_training", started.append)
    flags = ["--data", "/d", "--benchmarks", "/b", "--epochs", "2"]
    assert cli.named_train_job(["table2_8_heads", *flags]) == 0
    (config,) = started
    assert (config.preset, config.model.num_heads, config.epochs) == ("table2_8_heads", 8, 2)
    assert cli.named_train_job(["table2_9_heads"]) == 1
    assert "table2_8_heads" in capsys.readouterr().err
    assert cli.named_train_job(["--help"]) == 0
    assert cli.named_train_job([]) == 2
    usage = _plain(capsys.readouterr().out)
    assert usage.count("network_transface") == 2
    assert "NAME [flags]" in usage
    assert len(started) == 1


def _named(config: TrainConfig, **changes: object) -> str:
    return cli._with_place(replace(config, **changes)).run_name


def test_the_default_run_name_is_stable_and_says_the_preset():
    name = _named(presets.demo())
    assert re.fullmatch(r"demo-[0-9a-f]{8}", name)
    assert name == _named(presets.demo())
    assert name == _named(presets.demo(), storage="/elsewhere"), "the place is not part of what is trained"
    assert _named(presets.demo(), run_name="mine") == "mine"


def test_the_default_run_name_changes_with_the_configuration():
    config = presets.demo()
    changes = [
        {"epochs": 13},
        {"seed": 1},
        {"data": "/other"},
        {"precision": "float32"},
        {"model": replace(config.model, dropout=0.1)},
        {"optimizer": replace(config.optimizer, learning_rate=0.2)},
        {"stream": replace(config.stream, num_streams=8)},
        {"head": replace(config.head, margin=0.3)},
    ]
    assert len({_named(config), *(_named(config, **change) for change in changes)}) == len(changes) + 1


def test_storage_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli._with_place(presets.demo()).storage == f"file://{tmp_path}/outputs"
    assert cli._with_place(replace(presets.demo(), storage="s3://bucket/x/")).storage == "s3://bucket/x"


def test_a_submitted_job_does_not_write_into_the_folder_that_ray_deletes(monkeypatch, tmp_path):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "pkg"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert cli._with_place(presets.demo()).storage == "file://" + os.path.expanduser("~/lgaf-outputs")
    assert cli._with_place(replace(presets.demo(), storage=str(tmp_path))).storage == f"file://{tmp_path}"
    assert cli._with_place(replace(presets.demo(), storage="s3://b/x")).storage == "s3://b/x"


def _began(config: TrainConfig, run_uri: str) -> None:
    """Leave what a run that has trained leaves."""
    cli._note_config(config, run_uri)
    MetricsLog(run_uri, 0)


def test_the_same_name_with_another_recipe_is_refused(tmp_path):
    config = replace(presets.demo(), run_name="run", storage=str(tmp_path))
    uri = str(tmp_path / "run")
    _began(config, uri)
    cli._check_resumable(config, uri)
    other = replace(config, epochs=99, optimizer=OptimizerConfig(learning_rate=0.3), num_workers=1)
    with pytest.raises(ValueError, match=r"run_name='run' was started with another configuration") as caught:
        cli._check_resumable(other, uri)
    text = str(caught.value)
    assert "epochs was 18, is 99" in text
    assert "optimizer" in text
    assert "0.3" in text
    assert "num_workers" not in text, "what may differ is not the reason"
    assert "model was" not in text
    cli._check_resumable(config, uri)  # a refused attempt must not have replaced what was noted


def test_a_run_that_never_trained_may_be_corrected(tmp_path):
    config = replace(presets.demo(), run_name="run")
    cli._note_config(config, str(tmp_path))
    corrected = replace(config, data="/the/right/place")
    cli._check_resumable(corrected, str(tmp_path))
    _began(corrected, str(tmp_path))
    with pytest.raises(ValueError, match=r"data was '/the/right/place', is 'synthetic'"):
        cli._check_resumable(config, str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": 1},
        {"workers": WorkersConfig(checkpoint_every_steps=3)},
        {"tracking": TrackingConfig(uri="http://mlflow:5000")},
        {"benchmarks": "/faces"},
        {"storage": "/mounted/elsewhere"},
        {"stream": replace(presets.demo().stream, max_bad_images=5000, block_rows=64, cache_dir="/scratch")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_change_the_training_may_differ(tmp_path, changes):
    config = replace(presets.demo(), run_name="run")
    _began(config, str(tmp_path))
    cli._check_resumable(replace(config, **changes), str(tmp_path))
    cli._note_config(replace(config, **changes), str(tmp_path))
    noted = storage.read_json(str(tmp_path / "config.json"))
    assert noted == storage.plain_json(asdict(replace(config, **changes)))


def test_another_way_to_read_the_same_samples_leaves_the_run_its_name():
    stream = presets.demo().stream
    name = cli._with_place(presets.demo()).run_name
    assert cli._with_place(replace(presets.demo(), stream=replace(stream, block_rows=64))).run_name == name
    assert cli._with_place(replace(presets.demo(), stream=replace(stream, num_streams=8))).run_name != name


def test_the_whole_job_refuses_it_in_one_line(tmp_path, capsys, no_start):
    config = cli._with_place(replace(presets.demo(), run_name="run", storage=str(tmp_path)))
    _began(config, storage.join(config.storage, "run"))
    code, text = _run(presets.demo(), ["--run-name", "run", "--storage", str(tmp_path), "--epochs", "3"], capsys)
    assert code == 1
    assert text.startswith("error: run_name='run' was started with another configuration: epochs was 18, is 3")
    assert "Traceback" not in text


def test_exit_codes(capsys):
    def fail(error: BaseException):
        def job() -> None:
            raise error

        return job

    assert cli.run_job(lambda: None) == 0
    assert cli.run_job(fail(KeyboardInterrupt())) == 130
    assert "resumes" in capsys.readouterr().err
    assert cli.run_job(fail(storage.MissingError("s3://x/[1]: does not exist"))) == 1
    text = capsys.readouterr().err
    assert "error: s3://x/[1]: does not exist" in text
    assert "Traceback" not in text
    away = storage.StorageError("s3://x: cannot read")
    away.__cause__ = ConnectionResetError()
    for passing in (away, StoreUnreachableError("MLflow at x: refused")):
        assert cli.run_job(fail(passing)) == 75, "another attempt may not meet it"
        assert "Traceback" not in capsys.readouterr().err
    for lasting in (storage.StorageError("s4://x: unknown scheme"), StoreRefusedError("MLflow at x: forbidden")):
        assert cli.run_job(fail(lasting)) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert cli.run_job(fail(SupersededError("other workers took this run over"))) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert cli.run_job(fail(StoppedError(signal.SIGTERM, "stopped after 3 of 9 steps"))) == 143
    assert "stopped after 3 of 9 steps, by SIGTERM; the same command resumes the run" in capsys.readouterr().err
    assert cli.run_job(fail(WorkersLostError("the workers died more often than ... allows"))) == 75
    text = capsys.readouterr().err
    assert "error: the workers died more often" in text
    assert "Traceback" not in text
    assert cli.run_job(fail(ZeroDivisionError("a bug"))) == 75
    text = capsys.readouterr().err
    assert "Traceback" in text, "a bug keeps its traceback"
    assert "error: a bug" in text


def test_a_debug_variable_shows_the_traceback_of_user_errors(monkeypatch, capsys):
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")

    def job() -> None:
        raise storage.MissingError("s3://x: does not exist")

    assert cli.run_job(job) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_preset_decides_the_defaults(no_start, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_training", seen.append)
    assert cli.train_job(presets.demo(), arguments=["--epochs", "2", "--model.dropout", "0.1"]) == 0
    (config,) = seen
    assert config.model == replace(presets.demo().model, dropout=0.1)
    assert config.model != LGAFConfig(dropout=0.1)
    assert replace(config, epochs=presets.demo().epochs, model=presets.demo().model) == cli._with_place(
        replace(presets.demo(), run_name=config.run_name)
    )
