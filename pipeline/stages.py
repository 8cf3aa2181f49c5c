"""The stages of a training job: data, benchmarks, train, evaluate, register."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from pipeline import storage
from pipeline.config import TrainConfig, recipe
from pipeline.data import manifest as manifest_file
from pipeline.data.benchmarks import find_verification_sets, write_verification_bin
from pipeline.data.manifest import FORMAT_VERSION, Manifest
from pipeline.data.mixture import Mixture
from pipeline.data.order import epoch_samples
from pipeline.data.pack import PackSettings, pack
from pipeline.data.sources import PACKED, SYNTHETIC, SourceSpec, detect_format, open_source
from pipeline.data.synthetic import RENDERER_VERSION, SYNTHETIC_BENCHMARKS, benchmark_pairs
from pipeline.evaluation.report import EvalReport, loss_figure, roc_figure
from pipeline.evaluation.suite import evaluate_benchmarks
from pipeline.graph import Stage
from pipeline.model_card import add_evaluation, awaits_evaluation
from pipeline.model_store import CONFIG
from pipeline.registration import Candidate, Registration, promote_if_better, register
from pipeline.runtime import map_tasks
from pipeline.tracking.reachability import StoreUnreachableError, TrackingError
from pipeline.tracking.tracked_run import TrackedRun
from pipeline.training.attempts import SupersededError
from pipeline.training.commits import latest_step
from pipeline.training.loop import MODEL_FOLDER
from pipeline.training.metrics_log import NAME as METRICS
from pipeline.training.metrics_log import read_metrics
from pipeline.training.step_log import FILED_METRICS
from pipeline.training.trainer import TrainedModel, stream_plan, train
from pipeline.training.warm_start_prepare import prepare_warm_start

REPORT: Final = "report.json"

# Told (stage, done, total, what to show beside it).
OnProgress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedData:
    """Packed training data: each set with its weight, and the fingerprint and counts of them together."""

    uri: str
    sets: tuple[tuple[str, float], ...]
    fingerprint: str
    num_samples: int
    num_classes: int
    num_shards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmarks:
    """Verification sets: their folder (or the one file), the sets in it and the SHA-256 of each."""

    uri: str
    sets: tuple[str, ...]
    sha256: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlace:
    """Where a run's results go: its folder and the MLflow run."""

    uri: str
    tracked: TrackedRun

    @property
    def tracking_uri(self) -> str:
        """The MLflow store."""
        return self.tracked.address.tracking_uri


def training_stages(config: TrainConfig, place: RunPlace, on_progress: OnProgress) -> list[Stage]:
    """The graph of a training job."""
    content = asdict(config)
    logged_to = place.tracked.address.identity()
    return [
        Stage(
            name="data",
            artefact=PackedData,
            inputs={"data": config.data, "mix": config.mix, "pack": content["pack"], "format": FORMAT_VERSION},
            needs=(),
            run=functools.partial(_prepare_data, config, on_progress),
            is_valid=_is_unchanged,
        ),
        Stage(
            name="benchmarks",
            artefact=Benchmarks,
            inputs={"benchmarks": config.benchmarks, "seed": config.pack.seed, "pairs": config.pack.benchmark_pairs},
            needs=(),
            run=functools.partial(_prepare_benchmarks, config, on_progress),
            is_valid=lambda found: storage.exists(found.uri) and _describe_sets(found.uri) == found,
        ),
        Stage(
            name="train",
            artefact=TrainedModel,
            inputs=recipe(config),
            needs=("data",),
            run=functools.partial(_train, config, place, on_progress),
            is_valid=lambda model: storage.exists(storage.join(model.model_uri, CONFIG)),
        ),
        Stage(
            name="evaluate",
            artefact=EvalReport,
            inputs=logged_to,
            needs=("train", "benchmarks"),
            run=functools.partial(_evaluate, config, place, on_progress),
            is_valid=lambda report: (
                storage.exists(storage.join(place.uri, REPORT))
                and not awaits_evaluation(storage.join(place.uri, MODEL_FOLDER))
            ),
        ),
        Stage(
            name="register",
            artefact=Registration,
            inputs={"model_name": config.tracking.model_name, "policy": content["promotion"], **logged_to},
            needs=("data", "benchmarks", "train", "evaluate"),
            run=functools.partial(_register, config, place, on_progress),
        ),
    ]


def _is_unchanged(data: PackedData) -> bool:
    found = all(storage.exists(storage.join(uri, manifest_file.NAME)) for uri, _ in data.sets)
    return found and Mixture.load(dict(data.sets)).fingerprint == data.fingerprint


def _prepare_data(config: TrainConfig, on_progress: OnProgress, needed: Mapping[str, Any]) -> PackedData:
    weights = {_prepare_set(uri, config, on_progress): weight for uri, weight in wanted_sets(config).items()}
    data = Mixture.load(weights)
    return PackedData(
        uri=data.uri,
        sets=tuple(weights.items()),
        fingerprint=data.fingerprint,
        num_samples=data.num_samples,
        num_classes=data.num_classes,
        num_shards=len(data.shards),
    )


def wanted_sets(config: TrainConfig) -> dict[str, float]:
    """The data sets that a run trains on, by place, each with its weight."""
    return {config.data: 1.0} | config.mix


def _prepare_set(uri: str, config: TrainConfig, on_progress: OnProgress) -> str:
    """Where the packed form of a data set lies; a source that is not packed yet is packed now."""
    kind = detect_format(uri)
    if kind == PACKED:
        return storage.normalise(uri)
    return pack_shared(source_spec(uri, kind, config), config, on_progress).uri


def source_spec(uri: str, kind: str, config: TrainConfig) -> SourceSpec:
    """A run's source of this kind that is not packed yet."""
    return SourceSpec(
        format=kind,
        uri="" if kind == SYNTHETIC else storage.normalise(uri),
        seed=config.pack.seed,
        synthetic=config.pack.synthetic,
    )


def shared_place(spec: SourceSpec, config: TrainConfig) -> str:
    """Where `pack_shared` puts a source, whether it is there or not."""
    source = open_source(spec)
    settings = _pack_settings(config)
    key = {"source": source.version() | source.describe(), "settings": asdict(settings), "format": FORMAT_VERSION}
    return storage.join(config.storage, "data", f"{spec.format}-{storage.fingerprint(key)[:12]}")


def pack_shared(spec: SourceSpec, config: TrainConfig, on_progress: OnProgress) -> Manifest:
    """Pack a source into the storage's ``data`` folder, once: runs on equal data share the shards."""
    output = shared_place(spec, config)
    if storage.exists(storage.join(output, manifest_file.NAME)):
        return Manifest.load(output)
    settings = _pack_settings(config)
    return pack(spec, output, settings, on_progress=lambda what, done, total: on_progress("data", done, total, what))


def _pack_settings(config: TrainConfig) -> PackSettings:
    return PackSettings(samples_per_shard=config.pack.samples_per_shard, seed=config.pack.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _SyntheticSet:
    name: str
    num_pairs: int
    seed: int
    uri: str


def _prepare_benchmarks(config: TrainConfig, on_progress: OnProgress, needed: Mapping[str, Any]) -> Benchmarks:
    uri = config.benchmarks
    if uri == SYNTHETIC:
        pairs = config.pack.benchmark_pairs
        uri = storage.join(config.storage, "benchmarks", f"synthetic-v{RENDERER_VERSION}-{config.pack.seed}-{pairs}")
        tasks = [
            _SyntheticSet(name=name, num_pairs=pairs, seed=config.pack.seed, uri=storage.join(uri, f"{name}.bin"))
            for name in SYNTHETIC_BENCHMARKS
        ]
        missing = [task for task in tasks if not storage.exists(task.uri)]
        map_tasks(_write_synthetic_set, missing, lambda done: on_progress("benchmarks", done, len(missing), "sets"))
    return _describe_sets(uri)


def _describe_sets(uri: str) -> Benchmarks:
    sets = tuple(find_verification_sets(uri))
    sha256 = tuple(hashlib.sha256(storage.read_bytes(found)).hexdigest() for found in sets)
    return Benchmarks(uri=storage.normalise(uri), sets=sets, sha256=sha256)


def _write_synthetic_set(task: _SyntheticSet) -> None:
    images, is_same = benchmark_pairs(task.name, task.num_pairs, task.seed)
    write_verification_bin(task.uri, images, is_same)


def _train(config: TrainConfig, place: RunPlace, on_progress: OnProgress, needed: Mapping[str, Any]) -> TrainedModel:
    data: PackedData = needed["data"]
    place.tracked.log_dataset(
        name=" + ".join(uri.rsplit("/", 1)[1] for uri, _ in data.sets),
        uri=data.uri,
        fingerprint=data.fingerprint,
        num_samples=data.num_samples,
        num_classes=data.num_classes,
    )
    loaded = Mixture.load(dict(data.sets))
    done = latest_step(place.uri)
    plan = stream_plan(config, loaded)
    left_out = epoch_samples(loaded) % config.batch_size
    warm = prepare_warm_start(config, loaded, place.uri, place.tracking_uri)
    beginning = "from the start" if warm is None else warm.summary()
    if not done and (lost := len(read_metrics(place.uri))):
        beginning += f", for the {lost} steps that were trained left no checkpoint"
    note = f"{'resumed' if done else beginning}; {left_out} samples of each epoch are left out (less than a batch)"
    on_progress("train", done, plan.total_steps, note)
    try:
        with place.tracked.steps_are_the_workers():
            trained = train(
                config,
                loaded,
                place.uri,
                tracking=place.tracked.address,
                on_progress=lambda done, total, loss, rate: on_progress(
                    "train", done, total, f"loss {loss:6.3f}  {rate:5.0f} images/s"
                ),
            )
    except SupersededError:
        raise  # the lines are the other job's by now, and so is what MLflow gets of them
    except Exception:
        # With KeyboardInterrupt and SystemExit workers may still be sending: the next start does this.
        with contextlib.suppress(TrackingError, OSError):  # the error itself is what people are to see
            place.tracked.log_steps_of(storage.join(place.uri, METRICS), FILED_METRICS)
        raise
    # A worker that was killed has not sent its last steps.
    place.tracked.log_steps_of(storage.join(place.uri, METRICS), FILED_METRICS)
    lines = read_metrics(place.uri)
    figure = loss_figure(*([line[name] for line in lines] for name in ("step", "loss", "lr")))
    place.tracked.log_figure("loss", figure)
    return trained


def _evaluate(config: TrainConfig, place: RunPlace, on_progress: OnProgress, needed: Mapping[str, Any]) -> EvalReport:
    model: TrainedModel = needed["train"]
    report, curves = evaluate_benchmarks(
        model.model_uri,
        needed["benchmarks"].uri,
        num_gpus_per_task=1.0 if config.workers.use_gpu else 0.0,
        on_progress=lambda done, total: on_progress("evaluate", done, total, "images embedded"),
    )
    storage.write_bytes(storage.join(place.uri, REPORT), report.to_json().encode())
    add_evaluation(model.model_uri, report)
    place.tracked.log_metrics(report.metrics(), model.num_steps - 1)
    place.tracked.log_json("report", asdict(report))
    place.tracked.log_figure("roc", roc_figure(curves))
    return report


def _register(config: TrainConfig, place: RunPlace, on_progress: OnProgress, needed: Mapping[str, Any]) -> Registration:
    try:
        return _register_now(config, place, on_progress, needed)
    except StoreUnreachableError as error:
        raise StoreUnreachableError(
            f"{error}. The model is trained and evaluated, and {place.tracked.num_waiting} writes for MLflow wait in "
            f"{place.uri}; the same command sends them and registers the model"
        ) from error.__cause__


def _register_now(
    config: TrainConfig, place: RunPlace, on_progress: OnProgress, needed: Mapping[str, Any]
) -> Registration:
    name, store = config.tracking.model_name, place.tracking_uri
    candidate = Candidate(
        model_uri=needed["train"].model_uri,
        embedding_dim=config.model.output_dim,
        run_id=place.tracked.drain(),
        run_name=config.run_name,
        report=needed["evaluate"],
        report_uri=storage.join(place.uri, REPORT),
        data_fingerprint=needed["data"].fingerprint,
        benchmarks_uri=needed["benchmarks"].uri,
        num_gpus_per_task=1.0 if config.workers.use_gpu else 0.0,
    )
    version = register(store, name, candidate)
    on_progress("register", 1, 2, f"{name} version {version}")
    registered = promote_if_better(store, name, version, candidate, config.promotion)
    on_progress("register", 2, 2, "promoted" if registered.decision.promote else "not promoted")
    return registered
