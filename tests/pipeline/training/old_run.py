"""A run's folder as training leaves it, with known class centres: what a warm start reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lgaf.distributed import rank_in, world_size
from lgaf.heads.class_shard import class_range
from lgaf.heads.margins import create_margin
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAFConfig
from lgaf.schedule import Schedule
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest, ShardInfo
from pipeline.data.mixture import Mixture
from pipeline.model_store import save_model
from pipeline.presets import demo
from pipeline.training.checkpointer import Checkpointer
from tests.distributed import run_distributed

DIM = 8
STEPS = 12
MODEL = LGAFConfig(backbone="micro", embedding_dim=DIM, num_heads=2)
BASE = replace(demo(), model=MODEL, num_workers=1, run_name="new")


def packed(place: Path, names: Sequence[str], content: str = "") -> Manifest:
    """The manifest of a data set of these people; ``content`` tells sets with equal people apart."""
    shard = ShardInfo(name=f"{content}a.tar", num_samples=len(names), num_bytes=1, sha256="0" * 64)
    manifest = Manifest(
        uri=storage.normalise(place),
        shards=(shard,),
        num_classes=len(names),
        image_side=112,
        seed=0,
        source={},
        identities=tuple(names),
    )
    manifest.save()
    return manifest


def train_step(config: TrainConfig, num_classes: int, group=None, seed: int = 0) -> TrainStep:
    """As the loop makes it."""
    torch.manual_seed(seed)
    model = config.model.build()
    head = ShardedMarginHead(num_classes, config.model.output_dim, create_margin("uniface"), group=group, seed=seed)
    backward = config.head.update == "backward"
    return TrainStep(
        model,
        head,
        config.optimizer,
        Schedule(),
        100,
        group=group,
        update_head_in_backward=backward,
        config=config.step,
    )


def centres(num_classes: int, dim: int = DIM, what: float = 0.0) -> torch.Tensor:
    """Known rows: row r of ``what`` is r + ``what`` / 10 and so on; every number occurs once."""
    return torch.arange(num_classes * dim, dtype=torch.float32).reshape(num_classes, dim) / 7 + what


def optimizer_rows(step: TrainStep) -> dict[str, torch.Tensor]:
    """This rank's live rows of what the optimizer keeps of the centres."""
    if step.head_update is not None:
        return {"momentum_buffer": step.head_update.momentum_buffer}
    return step.optimizer.state[step.head.weight]


def _save(group, run_uri: str, config: TrainConfig, num_classes: int, fingerprint: str) -> None:
    step = train_step(config, num_classes, group, seed=5)
    own = class_range(num_classes, world_size(group), rank_in(group))
    with torch.no_grad():
        step.head.weight.copy_(centres(num_classes, config.model.output_dim)[own.start : own.stop])
        for number, value in enumerate(optimizer_rows(step).values(), 1):
            rows = centres(num_classes, config.model.output_dim, 100.0 * number)
            value.copy_(rows[own.start : own.stop] if value.ndim else torch.tensor(77.0))
    step.num_steps_done = STEPS
    Checkpointer(run_uri, step, keep=1, details={"data_fingerprint": fingerprint}).save_now(60)


def old_run(
    place: Path, sets: Sequence[Manifest], world: int = 1, config: TrainConfig = BASE, exports: bool = True
) -> str:
    """Write the folder of a run on these sets by ``world`` ranks; its URI. With its model, unless it was stopped."""
    run_uri = storage.normalise(place)
    weights = {manifest.uri: 1.0 for manifest in sets}
    data = Mixture.load(weights)
    config = replace(config, data=sets[0].uri, mix={manifest.uri: 1.0 for manifest in sets[1:]})
    storage.write_json(storage.join(run_uri, "config.json"), storage.plain_json(asdict(config)))
    storage.write_json(storage.join(run_uri, "stages", "data.json"), {"artefact": {"sets": list(weights.items())}})
    arguments = (run_uri, config, data.num_classes, data.fingerprint)
    if world == 1:
        _save(None, *arguments)
    else:
        run_distributed(world, _save, *arguments)
    if exports:
        export(storage.join(run_uri, "model"), config)
    return run_uri


def export(uri: str, config: TrainConfig = BASE, seed: int = 5) -> str:
    """Export a network whose numbers, statistics too, are nobody's initial ones; its fingerprint."""
    torch.manual_seed(seed)
    state = config.model.build().state_dict()
    return save_model(uri, config.model, {name: (value + 0.25).to(value.dtype) for name, value in state.items()})
