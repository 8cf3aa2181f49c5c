"""The driver's part of a warm start: what is asked for is found once, checked, and noted in the run's folder."""

from __future__ import annotations

import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from lgaf.models import NETWORKS, NetworkConfig
from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest, ManifestError
from pipeline.data.mixture import Mixture
from pipeline.model_store import CONFIG, WEIGHTS, load_model, read_model_config, read_model_info
from pipeline.tracking import registry
from pipeline.tracking.model_reference import SCHEME, ModelReference
from pipeline.training.checkpoint import tensor_shapes
from pipeline.training.class_match import match_classes, named_sets
from pipeline.training.commits import MARKER, latest_checkpoint, latest_step
from pipeline.training.warm_start import (
    NOTE,
    PinnedHead,
    PinnedModel,
    WarmStart,
    WarmStartNote,
    model_copy,
    read_note,
    write_classes,
    write_note,
)

# Settings of networks that say how they are trained, not what they compute: the same weights go with any value of them.
TRAINING_ONLY: Final = frozenset(
    {
        "dropout",
        "gradient_checkpointing",
        "quality_gradient",  # LGAF
        "diversity_weight",  # LGAF, HPDA
        "diversity_margin",
        "contrast_weight",  # CQA-Face
        "augmentation_probability",  # URL
        "max_occluded_blocks",
        "confidence_regularization",
        "classification_weight",
        "adversarial_weight",
        "num_dominant_patches",  # TransFace
        "perturbation_probability",
        "perturbation_strength",
        "hard_sample_mining",
        "entropy",
        "entropy_scale",
    }
)


def pin_warm_start(config: TrainConfig, run_uri: str, tracking_uri: str) -> WarmStartNote | None:
    """Find the model and the centres that a run starts from, unless an earlier start did; None where it has none.

    The network is copied into the run's folder. The centres stay where they are: they may be larger than all else.

    Args:
        config: Of the run, with canonical places.
        run_uri: Its folder.
        tracking_uri: MLflow store with the registered models.

    Raises:
        ValueError: A model, version or alias that does not exist, a network or centres that do not fit this run's.
        StorageError: A folder without a model, a run or a checkpoint of it; centres that changed since the first start.
        ManifestError: The data of the centres' run are gone or changed, so that nobody knows whose they are.
    """
    asked = config.warm_start
    note = read_note(run_uri)
    if not asked.model or latest_step(run_uri):  # a run with a checkpoint goes on from that
        return note if asked.model else None
    if note is None or note.asked != asked:
        model = _pin_model(asked.model, run_uri, tracking_uri, config.model)
        note = WarmStartNote(asked=asked, model=model, head=_pin_head(asked, model) if asked.head else None)
        _check_fits(note, config, run_uri)
        write_note(run_uri, note)
    else:
        _check_fits(note, config, run_uri)
    if note.head is not None and _files(note.head.checkpoint) != note.head.files:
        raise storage.StorageError(
            f"{note.head.checkpoint}: changed or gone since this run noted its class centres; delete "
            f"{storage.join(run_uri, NOTE)} to start with what {note.head.run} has now"
        )
    return note


def prepare_warm_start(
    config: TrainConfig, data: Manifest | Mixture, run_uri: str, tracking_uri: str
) -> WarmStartNote | None:
    """Pin what a run starts from, and find out which of its people have centres already.

    Args:
        config: Of the run, with canonical places.
        data: Its packed data.
        run_uri: Its folder.
        tracking_uri: MLflow store with the registered models.

    Raises:
        ValueError: As `pin_warm_start`, and `pipeline.training.class_match.match_classes`.
        StorageError: As `pin_warm_start`.
        ManifestError: As `pin_warm_start`, or people without names.
    """
    note = pin_warm_start(config, run_uri, tracking_uri)
    if note is None or note.head is None or latest_step(run_uri):
        return note
    if note.classes is not None and note.classes.data_fingerprint == data.fingerprint:
        return note
    old = named_sets(_data_of(note.head), note.head.names)
    new = named_sets(data, [config.data, *config.mix])
    old_of_new, classes = match_classes(old, new, config.warm_start.sets, data.fingerprint)
    write_classes(run_uri, old_of_new)
    note = replace(note, classes=classes)
    write_note(run_uri, note)
    return note


def check_same_network(found: NetworkConfig, wanted: NetworkConfig, source: str) -> None:
    """Raise ``ValueError``, naming the settings that differ, unless one network's weights are the other's too."""
    kinds = {kind: name for name, kind in NETWORKS.items()}
    if type(found) is not type(wanted):
        raise ValueError(
            f"warm_start.model={source!r} is of network={kinds[type(found)]!r}, this run's is {kinds[type(wanted)]!r}"
        )
    compared = [entry.name for entry in fields(wanted) if entry.name not in TRAINING_ONLY]
    unlike = [
        f"model.{name} is {getattr(found, name)!r}, this run's is {getattr(wanted, name)!r}"
        for name in compared
        if getattr(found, name) != getattr(wanted, name)
    ]
    if unlike:
        raise ValueError(f"warm_start.model={source!r} is another network: {'; '.join(unlike)}")


def _pin_model(asked: str, run_uri: str, tracking_uri: str, wanted: NetworkConfig) -> PinnedModel:
    target = model_copy(run_uri)
    with tempfile.TemporaryDirectory() as folder:
        source, uri = asked, asked
        if asked.startswith(SCHEME):
            reference = ModelReference.parse(asked, "warm_start.model")
            try:
                version = registry.find_version(tracking_uri, reference)
            except ValueError as error:
                raise ValueError(f"warm_start.model={asked!r}: {error}") from error
            source = f"{SCHEME}{version.name}/{version.version}"
            uri = storage.normalise(registry.fetch_model(tracking_uri, version.name, version.version, Path(folder)))
        try:
            info = read_model_info(uri)
            check_same_network(read_model_config(uri), wanted, source)
            load_model(uri)  # whole, and of this network: told now, not by every worker
        except storage.StorageError as error:
            raise storage.StorageError(f"warm_start.model={asked!r}: {error}") from error
        for file in (WEIGHTS, CONFIG):
            storage.write_bytes(storage.join(target, file), storage.read_bytes(storage.join(uri, file)))
    return PinnedModel(source=source, fingerprint=str(info["sha256"]))


def _pin_head(asked: WarmStart, model: PinnedModel) -> PinnedHead:
    run = asked.head
    newest = latest_checkpoint(run)
    if newest is None:
        why = "has no committed checkpoint" if storage.exists(run) else "does not exist"
        raise storage.StorageError(
            f"warm_start.head={run}: {why}; it must be the folder of a run, <storage>/<run_name>"
        )
    checkpoint = newest.uri
    shapes = tensor_shapes(checkpoint)
    if "head.weight" not in shapes:
        raise storage.StorageError(f"warm_start.head: {checkpoint} holds no class centres (head.weight)")
    prefix = "head_optimizer."
    kept = sorted(name.removeprefix(prefix) for name in shapes if name.startswith(f"{prefix}weight."))
    data, settings = (storage.read_json(storage.join(run, name)) for name in ("stages/data.json", "config.json"))
    exported = storage.join(run, "model")
    found = read_model_info(exported)["sha256"] if storage.exists(storage.join(exported, CONFIG)) else None
    head = PinnedHead(
        run=run,
        checkpoint=checkpoint,
        step=newest.step,
        files=_files(checkpoint),
        num_classes=shapes["head.weight"][0],
        optimizer_tensors=tuple(kept),
        sets={uri: float(weight) for uri, weight in data["artefact"]["sets"]},
        names=(settings["data"], *settings["mix"]),
        data_fingerprint=storage.read_json(storage.join(checkpoint, MARKER))["data_fingerprint"],
        same_network=None if found is None else found == model.fingerprint,
    )
    named_sets(_data_of(head), head.names)
    return head


def _data_of(head: PinnedHead) -> Manifest | Mixture:
    """The data that centres were trained on: who each of them is."""
    try:
        data = Mixture.load(head.sets)
    except (ManifestError, storage.StorageError) as error:
        raise ManifestError(f"warm_start.head: the data of {head.run} say whose its centres are: {error}") from error
    if data.fingerprint != head.data_fingerprint or data.num_classes != head.num_classes:
        raise ManifestError(
            f"warm_start.head: {data.uri} changed since {head.run} was trained on it (fingerprint "
            f"{data.fingerprint[:12]}, was {head.data_fingerprint[:12]}; {data.num_classes} people, its checkpoint has "
            f"{head.num_classes}): nobody knows whose its centres are"
        )
    return data


def _check_fits(note: WarmStartNote, config: TrainConfig, run_uri: str) -> None:
    check_same_network(read_model_config(model_copy(run_uri)), config.model, note.model.source)
    if note.head is None:
        return
    dim = tensor_shapes(note.head.checkpoint)["head.weight"][1]
    if dim != config.model.output_dim:
        raise ValueError(
            f"warm_start.head: the class centres of {note.head.run} have {dim} dimensions, this run's embeddings "
            f"{config.model.output_dim} (model.embedding_dim)"
        )
    if note.head.num_classes < config.most_workers:
        raise ValueError(
            f"warm_start.head: {note.head.run} has {note.head.num_classes} classes, which num_workers="
            f"{config.most_workers} cannot share: start with fewer, a resumed run may have more"
        )


def _files(uri: str) -> str:
    """Digest of a checkpoint's files: a run that was deleted and made again writes others under the same names."""
    return storage.fingerprint(storage.read_json(storage.join(uri, MARKER)).get("files", {}))
