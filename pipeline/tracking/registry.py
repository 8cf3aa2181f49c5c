"""MLflow's model registry: versions, and the aliases ``champion`` (serves) and ``candidate`` (the newest version).

Everything may be repeated: a killed job that runs again with the same command finds its version and its promotion.

Registering and promoting read, decide and write, so they hold `pipeline.tracking.store.model_lock`: its docstring says
what it excludes if the store is a remote server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.tracking.model_package import FINGERPRINT_TAG, download_model, log_model
from pipeline.tracking.model_reference import ModelReference
from pipeline.tracking.promotion import PromotionDecision
from pipeline.tracking.store import client, model_lock

CHAMPION: Final = "champion"
CANDIDATE: Final = "candidate"

PREVIOUS_CHAMPION_TAG: Final = "previous_champion"
DECISION_TAG: Final = "promotion_decision"

_DECISION_HEADING = "**Promotion:**"


class StaleDecisionError(RuntimeError):
    """The champion is no longer the one that the decision compared the candidate with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersionInfo:
    """One version in the registry.

    Attributes:
        name: The registered model.
        version: Its number, from 1.
        run_id: The run that trained it.
        tags: All tags of the version.
        description: Text for people.
        aliases: ``champion``, ``candidate``, both or none.
    """

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]
    description: str
    aliases: tuple[str, ...]

    @property
    def decision(self) -> PromotionDecision | None:
        """The last promotion decision on this version."""
        text = self.tags.get(DECISION_TAG)
        return PromotionDecision.from_json(json.loads(text)) if text else None


def register_model(
    tracking_uri: str,
    run_id: str,
    model_dir: Path,
    name: str,
    *,
    embedding_dim: int,
    tags: Mapping[str, str],
    description: str = "",
) -> int:
    """Store an exported model with the code that runs it, register it, and make it the candidate.

    Args:
        tracking_uri: The store.
        run_id: The run that trained it.
        model_dir: ``model.safetensors`` and ``config.json``, as `pipeline.model_store.save_model` writes them.
        name: The registered model; created if it is not there.
        embedding_dim: D of the output ``[B, D]``.
        tags: Tags of the version; ``model_fingerprint``, with ``run_id``, identifies it.
        description: Text for people.

    Returns:
        The new version, or the one that an earlier call with this run and fingerprint made.

    Raises:
        ValueError: ``tags`` has no ``model_fingerprint``, or ``name`` holds a character that MLflow does not take.
    """
    if not tags.get(FINGERPRINT_TAG):
        raise ValueError(f"tags={sorted(tags)} must have {FINGERPRINT_TAG!r}: a repeated call is known by it")
    registry = client(tracking_uri)
    with model_lock(tracking_uri, name):
        _create_registered_model(registry, name)
        number = _find_version(registry, name, run_id, tags[FINGERPRINT_TAG])
        if number is None:
            model_id = log_model(registry, run_id, Path(model_dir), embedding_dim, dict(tags))
            number = _create_version(registry, name, run_id, model_id, tags, description)
        newest = _with_alias(registry, name, CANDIDATE)
        if newest is None or newest.version < number:  # an old job that runs again does not take it back
            registry.set_registered_model_alias(name, CANDIDATE, str(number))
    return number


def _find_version(registry: MlflowClient, name: str, run_id: str, fingerprint: str) -> int | None:
    found = registry.search_model_versions(f"name='{name}' and run_id='{run_id}'")
    return min((int(item.version) for item in found if item.tags.get(FINGERPRINT_TAG) == fingerprint), default=None)


def _create_version(
    registry: MlflowClient, name: str, run_id: str, model_id: str, tags: Mapping[str, str], description: str
) -> int:
    # Not models:/<id>: the sqlite registry resolves that in the process's *global* store (3.17.2).
    source = registry.get_logged_model(model_id).artifact_location
    created = registry.create_model_version(
        name, source, run_id=run_id, tags=dict(tags), description=description, model_id=model_id
    )
    return int(created.version)


def champion(tracking_uri: str, name: str) -> ModelVersionInfo | None:
    """The version with the alias ``champion``, None if there is none (or no such model yet)."""
    return _with_alias(client(tracking_uri), name, CHAMPION)


def candidate(tracking_uri: str, name: str) -> ModelVersionInfo | None:
    """The version with the alias ``candidate`` (the newest one), None if there is none."""
    return _with_alias(client(tracking_uri), name, CANDIDATE)


def get_version(tracking_uri: str, name: str, version: int) -> ModelVersionInfo:
    """One version.

    Raises:
        ValueError: It does not exist; the message names those that do.
    """
    registry = client(tracking_uri)
    try:
        return _info(registry.get_model_version(name, str(version)))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(int(item.version) for item in registry.search_model_versions(f"name='{name}'"))
        raise ValueError(f"version={version} of model {name!r} does not exist; there are: {known or 'none'}") from error


def find_version(tracking_uri: str, reference: ModelReference) -> ModelVersionInfo:
    """The version that a reference names now.

    Raises:
        ValueError: There is none; the message names the aliases, or versions, that there are.
    """
    name = reference.name
    if reference.version:
        return get_version(tracking_uri, name, reference.version)
    registry = client(tracking_uri)
    found = _with_alias(registry, name, reference.alias)
    if found is not None:
        return found
    models = registry.search_registered_models(f"name='{name}'")
    if not models:
        raise ValueError(f"model {name!r} does not exist in {tracking_uri}")
    known = sorted(models[0].aliases)
    raise ValueError(f"model {name!r} has no alias {reference.alias!r}; there are: {', '.join(known) or 'none'}")


def fetch_model(tracking_uri: str, name: str, version: int, target: Path) -> Path:
    """Download a version and give the folder with its ``model.safetensors`` and ``config.json``."""
    source = client(tracking_uri).get_model_version_download_uri(name, str(version))
    return download_model(tracking_uri, source, target)


def apply(
    tracking_uri: str,
    name: str,
    version: int,
    decision: PromotionDecision,
    *,
    champion_seen: int | EllipsisType | None = ...,
) -> ModelVersionInfo | None:
    """Write a decision to its version and, if it says so, make that version the champion.

    Args:
        tracking_uri: The store.
        name: The registered model.
        version: The candidate.
        decision: What `pipeline.tracking.promotion.decide` said.
        champion_seen: The champion that the decision compared with (None: there was none). Left out: not checked.

    Returns:
        The champion afterwards.

    Raises:
        ValueError: The version does not exist.
        StaleDecisionError: The champion is no longer ``champion_seen``: the comparison has to be made again.
    """
    registry = client(tracking_uri)
    with model_lock(tracking_uri, name):
        info = get_version(tracking_uri, name, version)
        current = _with_alias(registry, name, CHAMPION)
        current_version = None if current is None else current.version
        promote = decision.promote and current_version != version
        if promote and champion_seen is not ... and champion_seen != current_version:
            seen, now = champion_seen, current_version
            raise StaleDecisionError(f"{name}: version {version} was compared with champion {seen}, now it is {now}")
        _write_decision(registry, info, decision)
        if promote:  # the replaced champion's number first: no moment loses it
            if current_version is not None:
                registry.set_model_version_tag(name, str(version), PREVIOUS_CHAMPION_TAG, str(current_version))
            registry.set_registered_model_alias(name, CHAMPION, str(version))
        return _with_alias(registry, name, CHAMPION)


def _write_decision(registry: MlflowClient, info: ModelVersionInfo, decision: PromotionDecision) -> None:
    values = {
        DECISION_TAG: json.dumps(decision.to_json()),
        "promoted": str(decision.promote).lower(),
        "promotion_reasons": "\n".join(decision.reasons)[:5000],
        "promotion_p_value": "" if decision.p_value is None else f"{decision.p_value:.6g}",
    }
    for key, value in values.items():
        registry.set_model_version_tag(info.name, str(info.version), key, value)
    # A later decision replaces the former one's paragraph.
    own_text = info.description.split(_DECISION_HEADING)[0].rstrip()
    verdict = f"{_DECISION_HEADING} {'promoted' if decision.promote else 'not promoted'}. {' '.join(decision.reasons)}"
    registry.update_model_version(info.name, str(info.version), description=f"{own_text}\n\n{verdict}".strip())


def _create_registered_model(registry: MlflowClient, name: str) -> None:
    if not name or set(name) & set("/:'\"\\"):
        raise ValueError(f"name={name!r} is not a model name: it must not be empty nor hold any of / : ' \" \\")
    try:
        registry.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _with_alias(registry: MlflowClient, name: str, alias: str) -> ModelVersionInfo | None:
    try:
        return _info(registry.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        # 3.17.2: no such model is RESOURCE_DOES_NOT_EXIST, a model without the alias INVALID_PARAMETER_VALUE. Nothing
        # else may read as "no champion": a server that is down would then let every candidate through.
        no_alias = error.error_code == "INVALID_PARAMETER_VALUE" and f"alias {alias} not found" in str(error)
        if no_alias or error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _info(found: Any) -> ModelVersionInfo:
    return ModelVersionInfo(
        name=found.name,
        version=int(found.version),
        run_id=found.run_id or "",
        tags=dict(found.tags),
        description=found.description or "",
        aliases=tuple(found.aliases),
    )
