"""The job graph: stages that take and return one JSON-serialisable artefact each.

A stage's fingerprint covers its inputs and the artefacts of the stages that it needs. A stage whose fingerprint has a
result is not run again, so a graph that was killed goes on where it stopped, and what led to a model can be read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lgaf.config import from_dict
from pipeline import storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of a job.

    Attributes:
        name: Unique in its graph; names the result's file.
        artefact: Frozen dataclass of the result.
        inputs: JSON-serialisable settings that the result depends on.
        needs: Names of earlier stages whose artefacts ``run`` takes.
        run: From the needed artefacts (by name) to this one.
        is_valid: Whether a stored artefact still stands (its files are there).
    """

    name: str
    artefact: type[Any]
    inputs: Mapping[str, Any]
    needs: tuple[str, ...]
    run: Callable[[Mapping[str, Any]], Any]
    is_valid: Callable[[Any], bool] = lambda artefact: True


OnStage = Callable[[str, bool], None]


def run_graph(stages: Sequence[Stage], results_uri: str, on_stage: OnStage | None = None) -> dict[str, Any]:
    """Run stages in the given order and give all artefacts by name.

    Args:
        stages: Each after those that it needs.
        results_uri: Folder for the results, one JSON file a stage.
        on_stage: Told (name, whether its result was there already) before each stage.

    Raises:
        ValueError: A stage needs one that does not come before it, or a name occurs twice.
    """
    _check_order(stages)
    artefacts: dict[str, Any] = {}
    for stage in stages:
        needed = {name: artefacts[name] for name in stage.needs}
        fingerprint = _fingerprint(stage, needed)
        uri = storage.join(results_uri, f"{stage.name}.json")
        found = _stored(stage, uri, fingerprint)
        if on_stage is not None:
            on_stage(stage.name, found is not None)
        if found is None:
            found = stage.run(needed)
            storage.write_json(uri, {"fingerprint": fingerprint, "artefact": dataclasses.asdict(found)})
        artefacts[stage.name] = found
    return artefacts


def _check_order(stages: Sequence[Stage]) -> None:
    before: list[str] = []
    for stage in stages:
        if stage.name in before or not set(stage.needs) <= set(before):
            raise ValueError(f"stage {stage.name!r} needs {stage.needs}; before it there are {before}")
        before.append(stage.name)


def _fingerprint(stage: Stage, needed: Mapping[str, Any]) -> str:
    return storage.fingerprint(
        {
            "name": stage.name,
            "inputs": dict(stage.inputs),
            "needs": {name: dataclasses.asdict(artefact) for name, artefact in needed.items()},
        }
    )


def _stored(stage: Stage, uri: str, fingerprint: str) -> Any | None:
    if not storage.exists(uri):
        return None
    content = storage.read_json(uri)
    if content["fingerprint"] != fingerprint:
        return None
    try:
        artefact = from_dict(stage.artefact, content["artefact"], stage.name)
    except ValueError:  # written by another version of the code
        return None
    return artefact if stage.is_valid(artefact) else None
