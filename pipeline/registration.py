"""A trained model to the registry, and the decision whether it becomes the champion."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.evaluation.report import EvalReport, outcomes
from pipeline.evaluation.suite import evaluate_benchmarks
from pipeline.model_card import CARD
from pipeline.model_store import CONFIG, WEIGHTS
from pipeline.tracking import registry
from pipeline.tracking.model_package import FINGERPRINT_TAG
from pipeline.tracking.promotion import BenchmarkOutcome, PromotionDecision, PromotionPolicy, decide
from pipeline.tracking.reachability import contacting


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What is to be registered.

    Attributes:
        model_uri: Folder of the exported model.
        embedding_dim: Length of its embeddings.
        run_id: MLflow run that made it.
        run_name: Its name, for people.
        report: Its scores.
        report_uri: Where they are.
        data_fingerprint: Of the data that it was trained on.
        benchmarks_uri: What it was scored on.
        num_gpus_per_task: GPUs for scoring the champion on it, too.
    """

    model_uri: str
    embedding_dim: int
    run_id: str
    run_name: str
    report: EvalReport
    report_uri: str
    data_fingerprint: str
    benchmarks_uri: str
    num_gpus_per_task: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """What became of a model in the registry."""

    model_name: str
    version: int
    champion_version: int
    decision: PromotionDecision


def register(store: str, name: str, candidate: Candidate) -> int:
    """Store a model as a version of the registered model ``name``, once; gives the version.

    Raises:
        TrackingError: Here and in `promote_if_better`: MLflow cannot be reached, or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        for file in (WEIGHTS, CONFIG, CARD):
            uri = storage.join(candidate.model_uri, file)
            if file != CARD or storage.exists(uri):
                (Path(folder) / file).write_bytes(storage.read_bytes(uri))
        with contacting(store):
            return registry.register_model(
                store,
                candidate.run_id,
                Path(folder),
                name,
                embedding_dim=candidate.embedding_dim,
                tags={
                    FINGERPRINT_TAG: candidate.report.model_fingerprint,
                    "data_fingerprint": candidate.data_fingerprint,
                    "report_uri": candidate.report_uri,
                    "run_name": candidate.run_name,
                },
                description=f"Network of run {candidate.run_name}, mean accuracy {candidate.report.mean_accuracy:.4f}.",
            )


def promote_if_better(
    store: str, name: str, version: int, candidate: Candidate, policy: PromotionPolicy
) -> Registration:
    """Compare a version with the champion pair by pair and move the alias if the policy says so."""
    with contacting(store):
        champion = registry.champion(store, name)
        if champion is not None and champion.version == version:
            champion = _previous(store, name, champion)  # a repeated call decides as the first one did
    theirs = None if champion is None else _champion_outcomes(store, champion, candidate)
    decision = decide(_outcomes(candidate.report), theirs, policy)
    seen = champion.version if champion is not None else None
    with contacting(store):
        after = registry.apply(store, name, version, decision, champion_seen=seen)
    return Registration(
        model_name=name, version=version, champion_version=after.version if after else 0, decision=decision
    )


def _champion_outcomes(store: str, champion: registry.ModelVersionInfo, candidate: Candidate) -> list[BenchmarkOutcome]:
    """The champion's outcomes on the candidate's benchmarks: from its report, else by evaluating it on them now."""
    wanted = _benchmarks(candidate.report)
    report_uri = champion.tags.get("report_uri", "")
    if report_uri and storage.exists(report_uri):
        report = EvalReport.from_json(storage.read_bytes(report_uri).decode())
        # The place may since hold another model's report: a run that was deleted and made again has the same name.
        if report.model_fingerprint == champion.tags.get(FINGERPRINT_TAG) and _benchmarks(report) == wanted:
            return _outcomes(report)
    # Tasks on other nodes must reach it too, so it lies beside the candidate, not in a folder of this machine.
    target = storage.join(candidate.report_uri.rsplit("/", 1)[0], f"champion-version-{champion.version}")
    with tempfile.TemporaryDirectory() as folder:
        with contacting(store):
            found = registry.fetch_model(store, champion.name, champion.version, Path(folder))
        for file in (WEIGHTS, CONFIG):
            storage.write_bytes(storage.join(target, file), (found / file).read_bytes())
    report, _ = evaluate_benchmarks(target, candidate.benchmarks_uri, num_gpus_per_task=candidate.num_gpus_per_task)
    return _outcomes(report)


def _benchmarks(report: EvalReport) -> set[tuple[str, str]]:
    return {(result.name, result.fingerprint) for result in report.benchmarks}


def _previous(store: str, name: str, champion: registry.ModelVersionInfo) -> registry.ModelVersionInfo | None:
    before = champion.tags.get(registry.PREVIOUS_CHAMPION_TAG)
    return registry.get_version(store, name, int(before)) if before else None


def _outcomes(report: EvalReport) -> list[BenchmarkOutcome]:
    return [
        BenchmarkOutcome(name=result.name, fingerprint=result.fingerprint, correct=outcomes(result))
        for result in report.benchmarks
    ]
