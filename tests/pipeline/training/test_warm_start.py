"""A run that starts from a model and class centres has them to the bit, whatever the numbers of ranks and of people."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lgaf.distributed import rank_in, world_size
from lgaf.heads.centres import initial_centres
from lgaf.heads.class_shard import class_range
from lgaf.optim import OptimizerConfig
from lgaf.step import StepConfig
from pipeline import storage
from pipeline.config import HeadConfig, TrainConfig
from pipeline.model_store import load_model
from pipeline.training.warm_start import WarmStart, read_note, started_from
from pipeline.training.warm_start_apply import apply_warm_start
from pipeline.training.warm_start_prepare import prepare_warm_start
from tests.distributed import run_distributed
from tests.pipeline.training.old_run import (
    BASE,
    DIM,
    STEPS,
    centres,
    export,
    old_run,
    optimizer_rows,
    packed,
    train_step,
)

NOWHERE = "sqlite:////nowhere/mlflow.db"  # a run that starts from a folder asks no registry
OLD = ["ann", "bea", "cid", "dov", "eva", "fay", "gus"]
GROWN = ["zoe", "ann", "gus", "bea", "yan", "cid", "fay", "dov", "eva", "xia"]  # all of them, and three more
SHRUNK = ["gus", "cid", "ann", "new"]  # three of them, and one more
ADAMW = replace(BASE, optimizer=OptimizerConfig(kind="adamw", learning_rate=1e-3))


def _check(group, config: TrainConfig, run_uri: str, names: list[str], carries: bool = True) -> None:
    step, fresh = (train_step(config, len(names), group, seed=3) for _ in range(2))
    apply_warm_start(config.warm_start, run_uri, step)
    own = class_range(len(names), world_size(group), rank_in(group))
    rows = list(own)
    old_of = [OLD.index(names[row]) if names[row] in OLD else -1 for row in rows]
    kept = [i for i, old in enumerate(old_of) if old >= 0]
    new = [i for i, old in enumerate(old_of) if old < 0]
    wanted = [old_of[i] for i in kept]
    assert torch.equal(step.head.weight[kept], centres(len(OLD))[wanted])
    assert torch.equal(step.head.weight[new], initial_centres(own, DIM, 3)[new])
    for number, (name, value) in enumerate(optimizer_rows(step).items(), 1):
        if not value.ndim:
            assert value == (77.0 if carries else 0.0), name
            continue
        assert torch.equal(value[kept], centres(len(OLD), what=100.0 * number)[wanted] * carries), name
        assert not value[new].any(), name
    found = load_model(storage.join(storage.normalise(config.warm_start.model))).state_dict()
    networks = [step.model] if step.average is None else [step.model, step.average.module]
    for network in networks:
        assert all(torch.equal(value, found[name]) for name, value in network.state_dict().items())
    for name, value in fresh.head.margin_state.state_dict().items():
        assert torch.equal(step.head.margin_state.state_dict()[name], value), name
    assert step.num_steps_done == 0
    network_momentum = step.optimizer.state[next(iter(step.model.parameters()))]
    assert not any(value.any() for value in network_momentum.values())


def _prepared(
    tmp_path, old_world: int, names: list[str], config: TrainConfig = BASE, before: TrainConfig = BASE
) -> tuple[TrainConfig, str]:
    """Configuration and folder of a new run, with its note; ``before`` is that of the old one."""
    run = old_run(tmp_path / "old", [packed(tmp_path / "old_faces", OLD)], old_world, before)
    data = packed(tmp_path / "new_faces", names)
    export(tmp_path / "m", before)
    config = replace(config, data=data.uri, warm_start=WarmStart(model=str(tmp_path / "m"), head=run).normalised())
    run_uri = storage.normalise(tmp_path / "new")
    prepare_warm_start(config, data, run_uri, NOWHERE)
    return config, run_uri


@pytest.mark.parametrize("old_world", [1, 2, 3])
@pytest.mark.parametrize("names", [GROWN, SHRUNK], ids=["grown", "shrunk"])
def test_centres_momentum_and_network_are_the_old_ones_at_any_number_of_ranks(tmp_path, old_world, names):
    config, run_uri = _prepared(tmp_path, old_world, names)
    for new_world in (1, 2, 3):
        run_distributed(new_world, _check, config, run_uri, names)
    _check(None, config, run_uri, names)
    classes = read_note(run_uri).classes
    assert (classes.num_kept, classes.num_new, classes.num_dropped) == ((7, 3, 0) if names is GROWN else (3, 1, 4))


@pytest.mark.parametrize(
    "config",
    [
        ADAMW,
        replace(BASE, step=StepConfig(ema_decay=0.9)),
        replace(BASE, head=HeadConfig(name="cosface", update="backward")),
        replace(BASE, model=replace(BASE.model, dropout=0.3, gradient_checkpointing=True)),
    ],
    ids=["adamw", "average", "backward", "training-only"],
)
def test_every_recipe_starts_warm(tmp_path, config):
    config, run_uri = _prepared(tmp_path, 2, GROWN, config, replace(config, model=BASE.model))
    run_distributed(2, _check, config, run_uri, GROWN)


def test_momentum_of_another_kind_of_optimizer_stays_zero(tmp_path):
    config, run_uri = _prepared(tmp_path, 1, GROWN, ADAMW)
    run_distributed(2, _check, config, run_uri, GROWN, False)


def test_updates_within_the_backward_pass_are_the_same_kind_as_momentum_sgd(tmp_path):
    config, run_uri = _prepared(tmp_path, 1, SHRUNK, replace(BASE, head=HeadConfig(name="cosface", update="backward")))
    _check(None, config, run_uri, SHRUNK)


def test_a_stopped_run_has_centres_too_and_object_stores_hold_them(tmp_path):
    place = f"memory://warm{tmp_path.name}"
    run = old_run(f"{place}/old", [packed(f"{place}/faces", OLD)], exports=False)
    data = packed(f"{place}/more", GROWN)
    export(f"{place}/m")
    config = replace(BASE, data=data.uri, warm_start=WarmStart(model=f"{place}/m", head=run))
    note = prepare_warm_start(config, data, f"{place}/new", NOWHERE)
    assert note.head.same_network is None
    assert (note.head.step, note.head.num_classes) == (STEPS, 7)
    _check(None, config, f"{place}/new", GROWN)


def test_the_network_alone(tmp_path):
    export(tmp_path / "m")
    data = packed(tmp_path / "faces", GROWN)
    config = replace(BASE, data=data.uri, warm_start=WarmStart(model=str(tmp_path / "m")).normalised())
    note = prepare_warm_start(config, data, str(tmp_path / "new"), NOWHERE)
    assert (note.head, note.classes) == (None, None)
    step, fresh = (train_step(config, len(GROWN), seed=3) for _ in range(2))
    apply_warm_start(config.warm_start, str(tmp_path / "new"), step)
    assert torch.equal(step.head.weight, fresh.head.weight)
    found = load_model(str(tmp_path / "m")).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in step.model.state_dict().items())
    assert started_from(str(tmp_path / "new")) == f"an exported model, SHA-256 `{note.model.fingerprint}`"


def test_without_a_warm_start_nothing_is_touched(tmp_path):
    data = packed(tmp_path / "faces", GROWN)
    assert prepare_warm_start(BASE, data, str(tmp_path / "new"), NOWHERE) is None
    step, fresh = (train_step(BASE, len(GROWN), seed=3) for _ in range(2))
    apply_warm_start(BASE.warm_start, str(tmp_path / "new"), step)
    assert torch.equal(step.head.weight, fresh.head.weight)
    assert not (tmp_path / "new").exists()
    assert started_from(str(tmp_path / "new")) == ""


def test_a_second_start_begins_as_the_first_though_all_it_came_from_moved_on(tmp_path):
    config, run_uri = _prepared(tmp_path, 1, GROWN)
    first = read_note(run_uri)
    export(tmp_path / "m", seed=9)  # another model at the same place
    storage.delete_tree(str(tmp_path / "old_faces"))
    again = prepare_warm_start(config, packed(tmp_path / "new_faces", GROWN), run_uri, NOWHERE)
    assert again == first
    step = train_step(config, len(GROWN))
    apply_warm_start(config.warm_start, run_uri, step)
    found = load_model(str(tmp_path / "new" / "warm_start" / "model")).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in step.model.state_dict().items())


def test_centres_that_changed_since_the_first_start_are_refused(tmp_path):
    config, run_uri = _prepared(tmp_path, 1, GROWN)
    data = packed(tmp_path / "new_faces", GROWN)
    storage.delete_tree(str(tmp_path / "old"))
    with pytest.raises(storage.StorageError, match="cannot be read"):
        prepare_warm_start(config, data, run_uri, NOWHERE)
    old_run(tmp_path / "old", [packed(tmp_path / "old_faces", OLD)])
    with pytest.raises(storage.StorageError, match=r"step_00000012: changed or gone since.*delete .*warm_start\.json"):
        prepare_warm_start(config, data, run_uri, NOWHERE)
    storage.delete_file(storage.join(run_uri, "warm_start.json"))
    assert prepare_warm_start(config, data, run_uri, NOWHERE).classes.num_kept == 7


def test_a_run_with_a_checkpoint_asks_for_nothing_any_more(tmp_path):
    config, run_uri = _prepared(tmp_path, 1, GROWN)
    note = read_note(run_uri)
    old_run(tmp_path / "new", [packed(tmp_path / "new_faces", GROWN)])  # it has one itself now
    for gone in ("old", "m", "old_faces"):
        storage.delete_tree(str(tmp_path / gone))
    assert prepare_warm_start(config, packed(tmp_path / "new_faces", GROWN), run_uri, NOWHERE) == note


def test_a_worker_without_a_note_says_so(tmp_path):
    config = replace(BASE, warm_start=WarmStart(model="x"))
    with pytest.raises(storage.StorageError, match=r"warm_start\.json: does not exist"):
        apply_warm_start(config.warm_start, str(tmp_path), train_step(config, 3))


def test_the_summary_is_for_people(tmp_path):
    _, run_uri = _prepared(tmp_path, 1, GROWN)
    text = read_note(run_uri).summary()
    assert "7 kept, 3 new, 0 dropped" in text
    assert f"{tmp_path}/old after 12 steps" in text
    assert "another network" not in text, "the model is that run's own"
    note = read_note(run_uri)
    assert "(that run trained them with another network)" in (
        replace(note, head=replace(note.head, same_network=False)).summary()
    )
