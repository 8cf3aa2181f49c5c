"""What every entry point shares: parse, run, one clear error, an exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Final, cast

import tyro
from rich.console import Console

from lgaf.config import require_choice, require_in_range
from lgaf.models import NETWORKS
from pipeline import presets, storage
from pipeline.config import TrainConfig, flat_settings, recipe, recipe_of
from pipeline.console import JobDisplay, closing_table
from pipeline.data.benchmarks import find_verification_sets
from pipeline.data.sources import SYNTHETIC, detect_format
from pipeline.dry_run import dry_run
from pipeline.errors import may_pass, message, user_error
from pipeline.graph import run_graph
from pipeline.runtime import ray_session
from pipeline.stages import RunPlace, training_stages, wanted_sets
from pipeline.stopping import StoppedError, exit_on_sigterm
from pipeline.supervision import EXIT_INTERRUPTED, EXIT_MENDABLE, EXIT_RETRY, supervise
from pipeline.tracking.outbox import RunAddress
from pipeline.tracking.store import default_tracking_uri
from pipeline.tracking.tracked_run import TrackedRun
from pipeline.training.attempts import SupersededError
from pipeline.training.failure import WorkersLostError
from pipeline.training.metrics_log import NAME as METRICS
from pipeline.training.split_report import read_splits, split_table
from pipeline.training.warm_start_prepare import pin_warm_start

DEBUG_VARIABLE: Final = "LGAF_DEBUG"
CONFIG: Final = "config.json"


def run_job(job: Callable[[], None]) -> int:
    """Run a job and give its exit code.

    0; 1 for an error that the user can mend, 75 for one that another attempt may not meet (one line on stderr either
    way); 130 when interrupted, 143 after SIGTERM.
    """
    errors = Console(stderr=True)
    try:
        with exit_on_sigterm():
            job()
    except KeyboardInterrupt:
        errors.print("[red]interrupted[/]; the same command resumes the run")
        return EXIT_INTERRUPTED
    except StoppedError as error:
        errors.print(f"[yellow]{error}[/]; the same command resumes the run")
        return 128 + error.signal_number
    except Exception as error:
        known = user_error(error)
        says_it_all = known is not None or isinstance(error, WorkersLostError)
        if not says_it_all or os.environ.get(DEBUG_VARIABLE):
            errors.print_exception()
        text = message(known if known is not None else error)
        errors.print(f"[bold red]error:[/] {_escape(text)}", soft_wrap=True, highlight=False)
        if says_it_all and not os.environ.get(DEBUG_VARIABLE):
            errors.print(f"({DEBUG_VARIABLE}=1 shows where it came from)", style="dim")
        return EXIT_RETRY if known is None or may_pass(error) else EXIT_MENDABLE
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommand:
    """What a training job is told: the run, and what to do with it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    retries: int = 0
    """Further attempts when the job dies of something that another may not meet (killed, a lost cluster, a storage that
    is away); each goes on from the last checkpoint."""
    dry_run: bool = False
    """Only say what the run would be: its settings, parameters, memory of a worker and, from a few steps on this
    machine, its hours. Starts and writes nothing."""


def train_job(preset: TrainConfig, arguments: list[str] | None = None) -> int:
    """Entry point of the training jobs: a preset with what the command line changes in it."""
    commands: list[TrainCommand] = []

    def parse() -> None:
        default = _with_network(preset, sys.argv[1:] if arguments is None else arguments)
        description = f"Train: preset {preset.preset}."
        command = TrainCommand(config=default)
        commands.append(tyro.cli(TrainCommand, default=command, args=arguments, description=description))
        require_in_range("retries", commands[0].retries, 0, 1 << 20)

    def job() -> None:
        config = _with_place(commands[0].config)
        if commands[0].dry_run:
            _check_resumable(config, storage.join(config.storage, config.run_name))
            dry_run(config, Console())
        else:
            run_training(config)

    if code := run_job(parse):
        return code
    if commands[0].retries:
        return supervise([sys.executable, *sys.orig_argv[1:], "--retries", "0"], commands[0].retries)
    return run_job(job)


def named_train_job(arguments: list[str] | None = None) -> int:
    """Entry point of the job that takes the name of a preset first."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        usage = "usage: train.py NAME [flags]; train.py NAME --help shows the flags."
        Console().print(f"{usage}\n\nNames: {', '.join(presets.names())}", markup=False)
        return 0 if given else 2

    def known() -> None:
        require_choice("NAME", given[0], presets.names())

    return run_job(known) or train_job(presets.preset(given[0]), given[1:])


def _with_network(preset: TrainConfig, arguments: list[str]) -> TrainConfig:
    """The preset with the network that the command line names: its settings are what ``--model.*`` then means."""
    name: str = preset.network
    for position, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--network":  # the last one counts, as for every flag
            name = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
    if name == preset.network or name not in NETWORKS:  # a wrong name is told with all other mistakes
        return preset
    return replace(preset, network=cast("Any", name), model=cast("Any", NETWORKS[name]()))


def run_training(config: TrainConfig) -> dict[str, Any]:
    """Run the whole graph of a training job and print the closing table; gives the artefacts."""
    for name in ("data", "benchmarks"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is required: preset {config.preset!r} has no default for it")
    started = time.monotonic()
    console = Console()
    run_uri = storage.join(config.storage, config.run_name)
    with storage.lock(run_uri, f"run_name={config.run_name!r} is running already: stop it, or take another name"):
        return _run_locked(config, run_uri, console, started)


def _run_locked(config: TrainConfig, run_uri: str, console: Console, started: float) -> dict[str, Any]:
    _check_resumable(config, run_uri)
    _note_config(config, run_uri)
    for uri in wanted_sets(config):
        detect_format(uri)  # a mistyped place is told before anything is started
    if config.benchmarks != SYNTHETIC:
        find_verification_sets(config.benchmarks)
    pin_warm_start(config, run_uri, config.tracking.uri or default_tracking_uri(config.storage))
    place = _open_place(config, run_uri)
    status: Any = "FAILED"
    try:
        with ray_session(), JobDisplay(console) as display:
            stages = training_stages(config, place, display.update)
            artefacts = run_graph(stages, storage.join(run_uri, "stages"), display.stage)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, StoppedError):
        status = "KILLED"
        raise
    except SupersededError:
        status = None
        raise
    finally:
        if status is not None:  # else the run in MLflow is the other job's too
            place.tracked.finish(status)
    console.print(closing_table(config, place, artefacts, time.monotonic() - started))
    if config.profile.steps and (splits := read_splits(run_uri)):
        console.print(split_table(splits))
    return artefacts


def _with_place(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on where the job runs: absolute places, and a run name that this command always gives."""
    folder = config.storage
    if "://" not in folder and "runtime_resources" in os.getcwd() and not os.path.isabs(folder):
        # A packaged working directory (`ray job submit --working-dir`) is deleted after the job.
        folder = os.path.join("~", "lgaf-outputs")
    data, sets = (uri if uri in ("", SYNTHETIC) else storage.normalise(uri) for uri in (config.data, config.benchmarks))
    mix = {uri if uri == SYNTHETIC else storage.normalise(uri): weight for uri, weight in config.mix.items()}
    if data in mix or len(mix) < len(config.mix):
        raise ValueError(f"mix={list(config.mix)} and data={data!r}: each set is named once")
    warm_start = config.warm_start.normalised()
    config = replace(
        config, storage=storage.normalise(folder), data=data, mix=mix, benchmarks=sets, warm_start=warm_start
    )
    return replace(config, run_name=config.run_name or f"{config.preset}-{storage.fingerprint(recipe(config))[:8]}")


def _check_resumable(config: TrainConfig, run_uri: str) -> None:
    """Refuse to go on with a training that was started with another recipe."""
    uri = storage.join(run_uri, CONFIG)
    content = storage.plain_json(asdict(config))
    if storage.exists(uri) and storage.exists(storage.join(run_uri, METRICS)):
        before, now = (flat_settings(recipe_of(settings)) for settings in (storage.read_json(uri), content))
        fixed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
        if fixed:
            details = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in fixed)
            raise ValueError(f"run_name={config.run_name!r} was started with another configuration: {details}")


def _note_config(config: TrainConfig, run_uri: str) -> None:
    storage.write_json(storage.join(run_uri, CONFIG), storage.plain_json(asdict(config)))


def _open_place(config: TrainConfig, run_uri: str) -> RunPlace:
    """Begin the MLflow run of this run, a new one or that of the attempt that is resumed; MLflow may be away."""
    address = RunAddress(
        run_uri=run_uri,
        tracking_uri=config.tracking.uri or default_tracking_uri(config.storage),
        experiment=config.tracking.experiment,
        run_name=config.run_name,
        tags={"preset": config.preset},
    )
    tracked = TrackedRun(address)
    tracked.begin(asdict(config))
    return RunPlace(uri=run_uri, tracked=tracked)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
