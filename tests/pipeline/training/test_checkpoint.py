"""Checkpoints: any number of ranks writes them, any other reads the same bits; half-written ones do not count."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lgaf.distributed import rank_in
from lgaf.heads.margins import create_margin
from lgaf.heads.screening import SampleScreening
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.models import LGAFConfig
from lgaf.optim import OptimizerConfig
from lgaf.schedule import Schedule
from lgaf.state import training_state
from lgaf.step import TrainStep
from pipeline import storage
from pipeline.training import checkpoint
from pipeline.training.checkpoint import DamagedCheckpointError, restore_checkpoint
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.commits import (
    MARKER,
    Checkpoint,
    checkpoint_uri,
    committed_steps,
    latest_checkpoint,
    latest_step,
    read_marker,
)
from tests.distributed import run_distributed

WRITERS = {1: 7, 2: 7, 3: 7, 4: 5}  # ranks that write -> classes: uneven shards, and a rank without any (5 over 4)
READERS = (1, 2, 3)


def _train_step(group=None, num_classes: int = 7, seed: int = 0) -> TrainStep:
    torch.manual_seed(seed)
    model = LGAFConfig(backbone="micro", embedding_dim=8, num_heads=2).build()
    # A margin with a learned scalar and a screening with statistics: what every rank holds alike.
    margin, screening = create_margin("uniface"), SampleScreening()
    head = ShardedMarginHead(num_classes, 8, margin, group=group, seed=seed, screening=screening)
    return TrainStep(model, head, OptimizerConfig(), Schedule(), 100, group=group)


def _scramble(step: TrainStep, seed: int) -> None:
    """Put different numbers everywhere: network, buffers, centres, momentum; class rows from their global ids."""
    generator = torch.Generator().manual_seed(seed)

    def random(like: torch.Tensor) -> torch.Tensor:
        return (torch.rand(like.shape, generator=generator) * 100).to(like.dtype)

    with torch.no_grad():
        for value in step.model.state_dict().values():
            value.copy_(random(value))
        for name, value in step.head.state_dict().items():
            if name != "weight":
                value.copy_(random(value))
        for parameter in [*step.model.parameters(), *step.head.margin_state.parameters()]:
            step.optimizer.state[parameter]["momentum_buffer"].copy_(random(parameter))
        every = torch.empty(step.head.num_classes, *step.head.weight.shape[1:])
        own = slice(step.head.classes.start, step.head.classes.stop)
        step.head.weight.copy_(random(every)[own])
        step.optimizer.state[step.head.weight]["momentum_buffer"].copy_(random(every)[own])


def _flat(step: TrainStep) -> dict[str, torch.Tensor]:
    state = training_state(step)
    found = {f"{part}/{name}": value for part, values in state.items() for name, value in values.items()}
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in found.items()}


def _checkpoint(run_uri: str, step: int) -> Checkpoint:
    return Checkpoint(step, "", checkpoint_uri(run_uri, step))


def _write(group, run_uri: str, num_classes: int) -> None:
    step = _train_step(group, num_classes)
    _scramble(step, seed=num_classes)
    step.num_steps_done = 12
    Checkpointer(run_uri, step, keep=2, details={"note": "test"}).save_now(60)


def _read_all(group, folders: dict[int, str]) -> None:
    for writers, run_uri in folders.items():
        num_classes = WRITERS[writers]
        step, expected = (_train_step(group, num_classes, seed=9) for _ in range(2))
        _scramble(expected, seed=num_classes)
        _scramble(step, seed=1000)
        assert not torch.equal(step.model.fusion.global_quality.std, expected.model.fusion.global_quality.std)
        restore_checkpoint(latest_checkpoint(run_uri), step)
        assert step.num_steps_done == 12
        found, wanted = _flat(step), _flat(expected)
        assert found.keys() == wanted.keys()
        for part in ("model/fusion.local_quality.mean", "head/weight", "head_optimizer/weight.momentum_buffer"):
            assert part in found
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), f"{name}, written by {writers}"
        # What is loaded is what trains, not a copy beside it.
        assert torch.equal(step.head.weight.detach(), wanted["head/weight"])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[int, str]:
    folders = {}
    for writers, num_classes in WRITERS.items():
        run_uri = storage.normalise(tmp_path_factory.mktemp(f"by_{writers}"))
        if writers == 1:
            _write(None, run_uri, num_classes)
        else:
            run_distributed(writers, _write, run_uri, num_classes)
        folders[writers] = run_uri
    return folders


@pytest.mark.parametrize("readers", READERS)
def test_any_number_of_ranks_reads_what_any_other_wrote(written, readers):
    run_distributed(readers, _read_all, written)


def test_without_a_group_what_ranks_wrote_is_read(written):
    _read_all(None, written)


def test_the_marker_says_what_it_marks(written):
    for writers, run_uri in written.items():
        marker = read_marker(checkpoint_uri(run_uri, 12))
        assert (marker["note"], marker["step"]) == ("test", 12), writers
        folder = storage.local_path(checkpoint_uri(run_uri, 12))
        found = {path.name: path for path in folder.iterdir() if path.name != MARKER}
        assert marker["files"].keys() == found.keys()
        assert sum(name.endswith(".distcp") for name in found) >= writers
        for name, path in found.items():
            content = path.read_bytes()
            assert marker["files"][name] == {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert committed_steps(run_uri) == [12]


def _save(run_uri: str, step: int, keep: int = 10, seed: int = 0) -> TrainStep:
    train_step = _train_step()
    _scramble(train_step, seed)
    train_step.num_steps_done = step
    Checkpointer(run_uri, train_step, keep=keep).save_now(60)
    return train_step


def _folders(run_uri: str) -> list[str]:
    return sorted(path.name for path in (storage.local_path(run_uri) / "checkpoints").iterdir())


def test_nothing_there_is_step_zero(tmp_path):
    assert latest_step(str(tmp_path)) == 0
    assert committed_steps(str(tmp_path / "absent")) == []


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999_99, 100_000_000, 5):
        storage.write_json(storage.join(checkpoint_uri(str(tmp_path), step), MARKER), {})
    assert committed_steps(str(tmp_path)) == [5, 99_999_999, 100_000_000]


def test_an_uncommitted_folder_does_not_count_and_the_next_save_sweeps_it(tmp_path):
    run_uri = str(tmp_path)
    _save(run_uri, 5, seed=1)
    _save(run_uri, 10, seed=2)
    storage.delete_file(storage.join(checkpoint_uri(run_uri, 10), MARKER))  # the kill came before the marker
    assert latest_step(run_uri) == 5
    resumed = _train_step()
    restore_checkpoint(latest_checkpoint(run_uri), resumed)
    expected = _train_step()
    _scramble(expected, 1)
    assert all(torch.equal(value, _flat(expected)[name]) for name, value in _flat(resumed).items())
    _save(run_uri, 15)
    assert _folders(run_uri) == ["step_00000005", "step_00000015"]


def test_a_step_left_half_written_is_written_again(tmp_path):
    run_uri = str(tmp_path)
    remains = storage.local_path(checkpoint_uri(run_uri, 5))
    remains.mkdir(parents=True)
    (remains / "__3_0.distcp").write_bytes(b"of a larger attempt")
    expected = _flat(_save(run_uri, 5, seed=3))
    assert not (remains / "__3_0.distcp").exists()
    restored = _train_step()
    restore_checkpoint(_checkpoint(run_uri, 5), restored)
    assert all(torch.equal(value, expected[name]) for name, value in _flat(restored).items())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    run_uri = str(tmp_path)
    for step in (1, 2, 9, 10):
        _save(run_uri, step, keep)
    assert committed_steps(run_uri) == [1, 2, 9, 10][-keep:]
    assert len(_folders(run_uri)) == keep


def _damage(run_uri: str, pattern: str, how: str) -> None:
    files = sorted(storage.local_path(checkpoint_uri(run_uri, 5)).glob(pattern))
    assert files
    for path in files:
        content = path.read_bytes()
        path.unlink() if how == "gone" else path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("how", ["truncated", "gone"])
@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
def test_a_cut_checkpoint_gives_way_to_the_one_before(tmp_path, pattern, how):
    run_uri = str(tmp_path)
    _save(run_uri, 3)
    _save(run_uri, 5)
    _damage(run_uri, pattern, how)
    assert latest_step(run_uri) == 3
    shutil.rmtree(storage.local_path(checkpoint_uri(run_uri, 3)))
    with pytest.raises(storage.StorageError, match=r"step_00000005.*COMMITTED.json says.*no checkpoint of the run is"):
        latest_step(run_uri)


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
def test_a_bit_that_changed_is_found_and_the_checkpoint_counts_no_more(tmp_path, pattern):
    run_uri = str(tmp_path)
    _save(run_uri, 3)
    _save(run_uri, 5)
    (path,) = storage.local_path(checkpoint_uri(run_uri, 5)).glob(pattern)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert latest_step(run_uri) == 5
    with pytest.raises(DamagedCheckpointError, match=rf"step_00000005.*{path.name}: is not what was written"):
        restore_checkpoint(_checkpoint(run_uri, 5), _train_step())
    assert latest_step(run_uri) == 3
    _save(run_uri, 7)
    assert _folders(run_uri) == ["step_00000003", "step_00000007"]


def test_a_marker_that_is_out_of_reach_is_no_damage(tmp_path, monkeypatch):
    run_uri = str(tmp_path)
    _save(run_uri, 3)
    _save(run_uri, 5)
    read = storage.read_bytes

    def refuse(uri):
        if "step_00000005" in uri:
            raise storage.StorageError(f"{uri}: cannot read") from PermissionError()
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(storage.StorageError, match=r"step_00000005/COMMITTED.json: cannot read"):
        latest_step(run_uri)


@pytest.mark.parametrize("content", [b"", b'{"files": {', b"\xff\xfe"])
def test_a_marker_that_cannot_be_read_gives_way_too(tmp_path, content):
    run_uri = str(tmp_path)
    _save(run_uri, 3)
    _save(run_uri, 5)
    storage.write_bytes(storage.join(checkpoint_uri(run_uri, 5), MARKER), content)
    assert latest_step(run_uri) == 3
    _save(run_uri, 7)
    assert latest_step(run_uri) == 7
    storage.delete_tree(checkpoint_uri(run_uri, 7))
    storage.delete_tree(checkpoint_uri(run_uri, 3))
    storage.write_bytes(storage.join(checkpoint_uri(run_uri, 5), MARKER), content)
    with pytest.raises(
        storage.StorageError, match=r"step_00000005/COMMITTED.json: is not valid JSON.*no checkpoint of"
    ):
        latest_step(run_uri)


def _check_damage_on_ranks(group, run_uri: str) -> None:
    if rank_in(group) == 0:
        for info in storage.list_files(run_uri):
            if info.uri.endswith("__1_0.distcp"):
                path = storage.local_path(info.uri)
                content = path.read_bytes()
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier(group)
    with pytest.raises(DamagedCheckpointError, match=r"step_00000012: the checkpoint cannot be read"):
        restore_checkpoint(_checkpoint(run_uri, 12), _train_step(group))
    with pytest.raises(storage.StorageError, match="step_00000012: is damaged: no checkpoint of the run is whole"):
        latest_step(run_uri)


def test_damage_is_named_on_every_rank(written, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(storage.local_path(written[2]), copied)
    run_distributed(2, _check_damage_on_ranks, str(copied))


def test_an_object_store_holds_the_same(tmp_path):
    run_uri = f"memory://checkpoints{Path(tmp_path).name}"
    _save(run_uri, 3, keep=1)
    expected = copy.deepcopy(_flat(_save(run_uri, 7, keep=1, seed=5)))
    assert committed_steps(run_uri) == [7]
    assert not storage.list_files(checkpoint_uri(run_uri, 3))
    restored = _train_step(seed=8)
    restore_checkpoint(_checkpoint(run_uri, 7), restored)
    assert restored.num_steps_done == 7
    assert all(torch.equal(value, expected[name]) for name, value in _flat(restored).items())
    storage.delete_file(storage.join(checkpoint_uri(run_uri, 7), MARKER))
    assert latest_step(run_uri) == 0


def _write_rank_statistics(group, run_uri: str) -> None:
    step = _train_step(group)
    with torch.no_grad():
        for name, value in step.model.state_dict().items():
            if "running_" in name:
                value.fill_(rank_in(group))
    step.num_steps_done = 1
    Checkpointer(run_uri, step, keep=1).save_now(60)


def test_batch_norm_statistics_are_those_of_the_rank_that_is_exported(tmp_path):
    run_distributed(2, _write_rank_statistics, str(tmp_path))
    step = _train_step()
    restore_checkpoint(_checkpoint(str(tmp_path), 1), step)
    statistics = [value for name, value in step.model.state_dict().items() if "running_" in name]
    assert statistics
    assert all((value == 0).all() for value in statistics)


def _read_own_part(group, run_uri: str) -> None:
    opened, open_read = [], storage.open_read

    def noted(uri):
        opened.append(uri.rsplit("/", 1)[1])
        return open_read(uri)

    storage.open_read = noted  # this process ends with the test
    step = _train_step(group)
    state = training_state(step)
    opened.clear()
    checkpoint.read_checkpoint(checkpoint_uri(run_uri, 12), state, group)
    parts = [name for name in opened[len(_share_of_files(run_uri, group)) :] if name.endswith(".distcp")]
    # Rank 0 wrote what all ranks have alike.
    assert set(parts) == {"__0_0.distcp", f"__{rank_in(group)}_0.distcp"}


def _share_of_files(run_uri: str, group) -> list[str]:
    return sorted(read_marker(checkpoint_uri(run_uri, 12))["files"])[rank_in(group) :: 2]


def test_a_rank_reads_its_own_part_of_a_checkpoint(written):
    """Beside the files whose checksums are its share to compare."""
    run_distributed(2, _read_own_part, written[2])


def test_a_marker_that_is_gone_is_damage(tmp_path):
    run_uri = str(tmp_path)
    _save(run_uri, 3)
    found = latest_checkpoint(run_uri)
    storage.delete_file(storage.join(found.uri, MARKER))
    with pytest.raises(DamagedCheckpointError, match=r"step_00000003: the checkpoint cannot be read: COMMITTED.json"):
        restore_checkpoint(found, _train_step())
