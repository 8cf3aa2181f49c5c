"""Packing again: after a stop at any point, after a change of anything, over anything that is there."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.checks import PackChecks
from pipeline.data.manifest import Manifest
from pipeline.data.pack import PackSettings, pack
from pipeline.data.shards import read_shard
from pipeline.data.sources import SourceSpec
from pipeline.data.spill import PackError
from tests.pipeline.data.packing import assert_complete, in_process, new_place, recordio, samples, shard_bytes
from tests.pipeline.data.writers import jpeg

LABELS = [float(i % 7) for i in range(24)]
BAD = {5: b"broken"}


class CrashError(BaseException):
    """Ends a packing as a kill would: nothing catches it."""


@contextmanager
def crash(at: int) -> Iterator[list[str]]:
    """Let storage work until its operation ``at``; gives what was done. A tree that is being deleted stays half there.

    Even numbers stop before an operation, odd ones behind it.
    """
    done: list[str] = []

    def stopping(name: str, original: Any) -> Any:
        def work(uri: str, *rest: Any) -> None:
            place = 2 * len(done)
            if place == at and name == "delete_tree":
                for info in storage.list_files(uri)[::2]:
                    original_delete(info.uri)
            if place == at:
                raise CrashError
            original(uri, *rest)
            done.append(f"{name} {uri}")
            if place + 1 == at:
                raise CrashError

        return work

    original_delete = storage.delete_file
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_bytes", "delete_file", "delete_tree"):
            patch.setattr(storage, name, stopping(name, getattr(storage, name)))
        yield done


def one(source: SourceSpec, output: str, variant: int = 0) -> Manifest:
    """Pack; variants differ in a setting each."""
    chosen: list[tuple[dict[str, int], dict[str, Any]]] = [
        ({}, {}),
        ({"seed": 1}, {}),
        ({"samples_per_shard": 3}, {}),
        ({}, {"duplicates": "drop"}),
    ]
    wanted, checks = chosen[variant]
    return pack(
        source,
        output,
        PackSettings(**{"samples_per_shard": 5} | wanted),
        PackChecks(**{"bad_images": "drop", "decode": True} | checks),
    )


@pytest.fixture(scope="module")
def source() -> SourceSpec:
    return recordio(new_place(), LABELS, {**BAD, 9: jpeg(8)})


@pytest.fixture(scope="module")
def references(source) -> list[Manifest]:
    with in_process():
        return [one(source, new_place(), variant) for variant in range(4)]


def assert_equal(found: Manifest, reference: Manifest) -> None:
    assert found.fingerprint == reference.fingerprint
    assert shard_bytes(found) == shard_bytes(reference)
    assert_complete(found)


def assert_no_manifest_of_less(output: str) -> None:
    """A manifest that is there is one of shards that are there."""
    if storage.exists(f"{output}/manifest.json"):
        manifest = Manifest.load(output)
        for number, info in enumerate(manifest.shards):
            read_shard(manifest.shard_uri(number), info, manifest.num_classes)


def test_after_a_stop_at_any_point_the_same_bytes_come_out(source, references):
    with in_process():
        for at in itertools.count():
            output = new_place()
            with crash(at) as done:
                try:
                    one(source, output)
                    stopped = False
                except CrashError:
                    stopped = True
            assert_no_manifest_of_less(output)
            assert_equal(one(source, output), references[0])
            if not stopped:
                break
    assert at >= 50
    # All that is written or deleted was stopped at, the manifest last.
    names = [line.rpartition("/")[2] for line in done]
    assert names.index("manifest.json") < len(names) - 2
    assert set(names) >= {"plan.json", "report.json", "shard-000004.tar", "part-000001.json", ".packing"}


def test_after_a_stop_while_an_older_set_is_cleared_any_packing_goes_on(source, references):
    with in_process():
        for at in range(30):
            output = new_place()
            one(source, output)
            with crash(at) as done, pytest.raises(CrashError):
                one(source, output, 2)
            assert_no_manifest_of_less(output)
            assert_equal(one(source, output, 1), references[1])
    # So far: the older manifest and all of its shards were deleted.
    assert sum("delete_file" in line for line in done) == 1 + len(references[0].shards)


@settings(max_examples=20)
@given(
    before=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 80)), min_size=1, max_size=4), last=st.integers(0, 3)
)
def test_after_stops_of_different_packings_the_last_one_comes_out(source, references, before, last):
    output = new_place()
    with in_process():
        for variant, at in before:
            with crash(at), suppress(CrashError):
                one(source, output, variant)
            assert_no_manifest_of_less(output)
        assert_equal(one(source, output, last), references[last])


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the shards."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("shard-*.tar")}


def stopped_behind_shard(source: SourceSpec, output: str, number: int, **cut: int) -> None:
    """Pack until the note of a shard is written; ``cut`` goes to `in_process`."""
    with in_process(**cut), crash(10**9) as done:
        one(source, new_place())
    at = next(i for i, line in enumerate(done) if line.endswith(f"shards/shard-{number:06d}.tar.json"))
    with in_process(**cut), crash(2 * at + 1), pytest.raises(CrashError):
        one(source, output)


def test_finished_parts_are_not_read_and_finished_shards_not_written_again(tmp_path, source, references, monkeypatch):
    out = tmp_path / "out"
    stopped_behind_shard(source, str(out), 2)
    before = state(out)
    assert sorted(before) == [f"shard-{i:06d}.tar" for i in range(3)]
    monkeypatch.setattr("pipeline.data.spill.checked_image", None)  # reading a part would fail
    with in_process():
        manifest = one(source, str(out))
    after = state(out)
    assert {name: after[name] for name in before} == before
    assert_equal(manifest, references[0])


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, source, references, damage):
    out = tmp_path / "out"
    stopped_behind_shard(source, str(out), 2)
    before = state(out)
    shard = out / "shard-000001.tar"
    data = shard.read_bytes()
    shard.unlink()
    if damage != "delete":
        shard.write_bytes(data[:-512] if damage == "cut" else data[:600] + b"?" + data[601:])
    with in_process():
        manifest = one(source, str(out))
    after = state(out)
    assert all(after[name] == before[name] for name in ("shard-000000.tar", "shard-000002.tar"))
    assert_equal(manifest, references[0])


def test_another_number_of_processors_goes_on_with_the_parts_of_before(tmp_path, source, references):
    out = str(tmp_path / "out")
    stopped_behind_shard(source, out, 2)
    before = state(tmp_path / "out")
    with in_process(num_cpus=64, min_task_bytes=1):
        manifest = one(source, out)
    assert before.items() <= state(tmp_path / "out").items()
    assert_equal(manifest, references[0])


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_other_settings_start_over_and_leave_no_shard_of_before(tmp_path, source, references, variant):
    out = str(tmp_path / "out")
    stopped_behind_shard(source, out, 4)
    with in_process():
        assert_equal(one(source, out, variant), references[variant])


def test_a_source_that_changed_starts_over(tmp_path):
    out, place = str(tmp_path / "out"), tmp_path / "source"
    source = recordio(place, LABELS)
    stopped_behind_shard(source, out, 2)
    assert recordio(place, [1.0, 2.0, 3.0]) == source
    with in_process():
        manifest = one(source, out)
    assert sorted(samples(manifest)) == sorted((jpeg(i), str(i + 1)) for i in range(3))
    assert_complete(manifest)


def test_a_list_whose_images_changed_is_not_cut_anew_under_the_old_parts(tmp_path):
    images = [tmp_path / "images" / f"{i}.jpg" for i in range(200)]
    images[0].parent.mkdir()
    for i, path in enumerate(images):
        path.write_bytes(jpeg(i))
    (tmp_path / "list.txt").write_text("".join(f"{path} {i % 5}\n" for i, path in enumerate(images)))
    source = SourceSpec(format="list", uri=str(tmp_path / "list.txt"))
    two_parts = 128 * len(jpeg(0)) + 100_000
    stopped_behind_shard(source, str(tmp_path / "out"), 3, min_task_bytes=two_parts)
    assert len(list((tmp_path / "out" / ".packing").glob("*/parts/*.json"))) == 2
    images[0].write_bytes(jpeg(300) + bytes(two_parts))  # the list is cut by the sizes of a few of its images
    with in_process(min_task_bytes=two_parts):
        manifest = one(source, str(tmp_path / "out"))
    assert sorted(samples(manifest)) == sorted((path.read_bytes(), str(i % 5)) for i, path in enumerate(images))


def test_a_spilled_byte_that_was_altered_is_told_once_and_mended_by_the_next_run(tmp_path, source, references):
    out = tmp_path / "out"
    stopped_behind_shard(source, str(out), 0)
    spilled = sorted(path for path in (out / ".packing").glob("*/parts/*") if path.suffix != ".json")
    data = bytearray(spilled[1].read_bytes())
    data[len(data) // 2] ^= 4
    spilled[1].write_bytes(data)
    with in_process():
        with pytest.raises(PackError, match=r"part-000001-0000: bytes \d+ to \d+ were altered.*run it again"):
            one(source, str(out))
        assert not (out / "manifest.json").exists()
        assert_equal(one(source, str(out)), references[0])


def test_what_a_kill_left_of_half_written_files_is_removed(tmp_path, source, references):
    out = tmp_path / "out"
    stopped_behind_shard(source, str(out), 1)
    (out / f".shard-000002.tar.{os.urandom(16).hex()}.partial").write_bytes(b"half")
    (out / ".notes.partial").write_text("the user's own")
    with in_process():
        manifest = one(source, str(out))
    assert [path.name for path in out.iterdir() if path.name.endswith(".partial")] == [".notes.partial"]
    (out / ".notes.partial").unlink()
    assert_equal(manifest, references[0])


def test_packing_again_over_a_finished_set_gives_it_again_or_the_new_one(tmp_path, source, references):
    out = str(tmp_path / "out")
    with in_process():
        for variant in (0, 0, 2, 1):
            assert_equal(one(source, out, variant), references[variant])


def test_a_failure_over_a_finished_set_leaves_no_manifest_of_shards_that_are_gone(tmp_path, source):
    out = str(tmp_path / "out")
    with in_process():
        one(source, out)
        with pytest.raises(PackError, match=r"record 5: not a readable image"):
            pack(source, out, PackSettings(samples_per_shard=5))
    assert not storage.exists(f"{out}/manifest.json")
    assert not list(Path(out).glob("*.tar"))


def test_what_a_late_task_of_another_packing_writes_is_not_believed(tmp_path, source, references):
    """On an object store nothing locks the output, and tasks may outlive their driver."""
    out, other = tmp_path / "out", tmp_path / "other"
    stopped_behind_shard(source, str(out), 2)
    with in_process(), crash(10**9) as done:
        one(source, new_place(), 1)
    at = max(i for i, line in enumerate(done) if line.endswith(".tar.json"))
    with in_process(), crash(2 * at + 1), pytest.raises(CrashError):
        one(source, str(other), 1)
    # All of its notes, and a shard that they speak of, land beside ours.
    shutil.copytree(
        other / ".packing", out / ".packing", ignore=shutil.ignore_patterns("plan.json"), dirs_exist_ok=True
    )
    shutil.copy(other / "shard-000003.tar", out / "shard-000003.tar")
    with in_process():
        assert_equal(one(source, str(out)), references[0])
