"""Verifying packed data: each kind of damage is found and named, all of it at once, and a good set has none."""

from __future__ import annotations

import io
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.checks import ImageStatistics
from pipeline.data.manifest import Manifest
from pipeline.data.pack_report import PackReport
from pipeline.data.verify import Problem, verify
from pipeline.data.verify_shard import ShardTask, check_shard
from tests.pipeline.data.writers import jpeg, label_of, packed_set, shard_info, tar_bytes

CLASSES = 5
Samples = list[tuple[str, bytes, bytes]]


def samples(first: int, count: int) -> Samples:
    return [(f"{i:09d}", jpeg(i), str(label_of(i)).encode()) for i in range(first, first + count)]


def remade(folder, shards: list[Samples]) -> Manifest:
    """Shards of given samples under a manifest that is right about their bytes: only what is in them can be wrong."""
    infos = []
    for number, content in enumerate(shards):
        data = tar_bytes(content)
        storage.write_bytes(f"{folder}/shard-{number:06d}.tar", data)
        infos.append(shard_info(f"shard-{number:06d}.tar", data, len(content)))
    manifest = replace(packed_set("memory://remade-names", [1], CLASSES), uri=storage.normalise(folder))
    return replace(manifest, shards=tuple(infos))


def header_of(uri: str, member: str) -> int:
    """The byte of a member's header, as the standard library finds it."""
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as archive:
        return archive.getmember(member).offset


def task(manifest: Manifest, number: int = 0) -> ShardTask:
    return ShardTask(
        uri=manifest.shard_uri(number),
        info=manifest.shards[number],
        first_sample=int(manifest.offsets[number]),
        num_classes=manifest.num_classes,
        image_side=manifest.image_side,
    )


def report(samples_per_identity: list[int]) -> PackReport:
    return PackReport(
        num_read=sum(samples_per_identity),
        dropped={},
        duplicates_across=0,
        duplicate_examples=[],
        samples_per_identity=samples_per_identity,
        fewer_than=2,
        num_few=0,
        few_examples=[],
        statistics=ImageStatistics(),
    )


# --- one shard, without Ray ---


def test_a_good_shard_has_no_problem_and_all_of_it_is_counted(tmp_path):
    manifest = remade(tmp_path, [samples(0, 4), samples(4, 3)])
    checked = check_shard(task(manifest, 1))
    assert checked.problems == []
    assert (checked.num_samples, checked.num_images) == (3, 3)
    assert (checked.num_bytes, checked.sha256) == (manifest.shards[1].num_bytes, manifest.shards[1].sha256)
    assert dict(zip(checked.labels.tolist(), checked.label_counts.tolist(), strict=True)) == {0: 1, 1: 1, 3: 1}


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_altered_byte_is_found_in_its_shard(place, flip):
    manifest = remade("memory://altered", [samples(0, 3)])
    data = bytearray(storage.read_bytes(manifest.shard_uri(0)))
    data[int(place * len(data))] ^= flip
    storage.write_bytes(manifest.shard_uri(0), bytes(data))
    problems = check_shard(task(manifest)).problems
    assert {problem.file for problem in problems} == {"shard-000000.tar"}
    assert any(problem.byte == 0 and "sha256" in problem.what for problem in problems)


@given(length=st.floats(0, 1, exclude_max=True))
def test_any_cut_is_found_and_its_place_told(length):
    manifest = remade("memory://cut", [samples(0, 3)])
    data = storage.read_bytes(manifest.shard_uri(0))
    kept = int(length * len(data))
    storage.write_bytes(manifest.shard_uri(0), data[:kept])
    problems = check_shard(task(manifest)).problems
    expected = f"truncated or altered: {kept} bytes, the manifest says {len(data)}"
    assert Problem(file="shard-000000.tar", byte=kept, what=expected) in problems


def test_the_mib_of_an_altered_byte_is_told(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, body in [("000000000.jpg", jpeg(0)), ("000000000.cls", b"3"), ("other.txt", bytes(3 << 20))]:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    data = bytearray(buffer.getvalue())
    info = shard_info("shard-000000.tar", bytes(data), 1)
    manifest = replace(remade(tmp_path, [samples(0, 1)]), shards=(info,))
    data[(2 << 20) + 5] ^= 1
    (tmp_path / "shard-000000.tar").write_bytes(data)
    (problem,) = check_shard(task(manifest)).problems
    assert problem.byte == 2 << 20
    assert problem.what.startswith("corrupt, bytes 2097152 to 3145728: sha256 is ")
    (problem,) = check_shard(task(replace(manifest, shards=(replace(info, crc32=""),)))).problems
    assert problem.byte is None, "a manifest without sums of blocks cannot tell"


def test_a_truncated_shard_is_told_with_the_samples_that_it_takes_along(tmp_path):
    manifest = remade(tmp_path, [samples(0, 3)])
    path = tmp_path / "shard-000000.tar"
    label, image = (header_of(manifest.shard_uri(0), f"000000001.{extension}") for extension in ("cls", "jpg"))
    cut = image + 512 + 1  # webdataset writes the label first
    path.write_bytes(path.read_bytes()[:cut])
    checked = check_shard(task(manifest))
    size = manifest.shards[0].num_bytes
    assert [(problem.key, problem.byte, problem.what) for problem in checked.problems] == [
        ("", cut, f"truncated or altered: {cut} bytes, the manifest says {size}"),
        ("", cut, f"truncated: it ends inside the member at byte {image}"),
        ("", None, "1 samples, the manifest says 3"),
        ("000000001", label, "the sample has no image"),
    ]
    assert (checked.num_samples, checked.num_images) == (1, 1)


@pytest.mark.parametrize(
    ("change", "member", "what"),
    [
        ({1: ("000000001", b"no image", b"0")}, "000000001.jpg", "not a readable image (8 bytes)"),
        ({1: ("000000001", jpeg(1)[:900], b"0")}, "000000001.jpg", "not a readable image (900 bytes)"),
        ({1: ("000000001", jpeg(1, side=96), b"0")}, "000000001.jpg", "the image is 96x96, 112x112 is expected"),
        ({1: ("000000001", jpeg(1), b"5")}, "000000001.cls", "label 5; labels go from 0 to 4"),
        ({1: ("000000001", jpeg(1), b"-1")}, "000000001.cls", "label -1; labels go from 0 to 4"),
        ({1: ("000000001", jpeg(1), b"Ann")}, "000000001.cls", "b'Ann' is not a class number"),
        ({1: ("7", jpeg(1), b"0")}, "7.jpg", "this key stands where 000000001 is expected"),
    ],
    ids=["garbage", "half", "size", "label above", "label below", "no number", "key"],
)
def test_what_is_wrong_inside_is_named_by_key_and_byte(tmp_path, change, member, what):
    content = [change.get(place, sample) for place, sample in enumerate(samples(0, 4))]
    manifest = remade(tmp_path, [content])
    (problem,) = check_shard(task(manifest)).problems
    assert (problem.file, problem.key) == ("shard-000000.tar", member.partition(".")[0])
    assert problem.byte == header_of(manifest.shard_uri(0), member)
    assert problem.what.startswith(what)
    assert "keys are not where they belong" not in problem.what, "it is the only one"


def test_samples_out_of_order_are_one_problem(tmp_path):
    content = samples(0, 6)
    content[1], content[3] = content[3], content[1]
    (problem,) = check_shard(task(remade(tmp_path, [content]))).problems
    assert problem.key == "000000003"
    assert problem.what == "this key stands where 000000001 is expected; 2 keys are not where they belong"


def test_lone_and_doubled_members_are_named(tmp_path):
    buffer = io.BytesIO()
    bodies = {
        "000000000.jpg": jpeg(0),
        "000000000.png": jpeg(1),
        "000000000.cls": b"0",
        "a.jpg": jpeg(2),
        "b.cls": b"1",
    }
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, body in [*bodies.items(), ("000000000.cls", b"2")]:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    (tmp_path / "s.tar").write_bytes(buffer.getvalue())
    manifest = replace(remade(tmp_path, [samples(0, 1)]), shards=(shard_info("s.tar", buffer.getvalue(), 1),))
    checked = check_shard(task(manifest))
    assert [(problem.key, problem.what) for problem in checked.problems] == [
        ("000000000", "a second image of the sample: 000000000.png"),
        ("a", "the sample has no label"),
        ("b", "the sample has no image"),
        ("000000000", "a second label of the sample: 000000000.cls"),
    ]
    assert checked.num_samples == 1


@pytest.mark.parametrize(
    ("data", "what"), [(b"", "empty"), (bytes(1024), "an archive without members"), (b"x" * 2000, "not a tar header")]
)
def test_a_file_that_is_no_archive_is_named(tmp_path, data, what):
    manifest = remade(tmp_path, [samples(0, 1)])
    (tmp_path / "shard-000000.tar").write_bytes(data)
    manifest = replace(manifest, shards=(shard_info("shard-000000.tar", data, 1),))
    problems = check_shard(task(manifest)).problems
    assert {problem.what for problem in problems} == {what, "0 samples, the manifest says 1"}


# --- whole sets ---


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestWholeSets:
    def test_a_good_set_is_good(self, tmp_path):
        manifest = packed_set(tmp_path, [4, 4, 2])
        report([2] * CLASSES).save(manifest.uri)
        (tmp_path / "data_card.md").write_text("words")
        seen: list[tuple[int, int]] = []
        found = verify(manifest, lambda done, total: seen.append((done, total)))
        assert found.ok
        assert found.problems == ()
        assert (found.num_shards, found.num_samples, found.num_images) == (3, 10, 10)
        assert found.num_bytes == sum(info.num_bytes for info in manifest.shards)
        assert (found.uri, found.fingerprint) == (manifest.uri, manifest.fingerprint)
        assert seen[-1] == (3, 3)

    def test_all_that_is_wrong_is_told_at_once(self, tmp_path):
        manifest = packed_set(tmp_path, [4, 4, 4, 4])
        (tmp_path / "shard-000000.tar").unlink()
        flipped = bytearray((tmp_path / "shard-000001.tar").read_bytes())
        flipped[600] ^= 255
        (tmp_path / "shard-000001.tar").write_bytes(flipped)
        (tmp_path / "shard-000003.tar").write_bytes((tmp_path / "shard-000003.tar").read_bytes()[:-1])
        (tmp_path / "shard-000009.tar").write_bytes(b"more")
        found = verify(manifest)
        assert not found.ok
        assert found.problems[0] == Problem(
            file="shard-000009.tar", what="looks like a shard, and the manifest does not know it"
        )
        assert Problem(file="shard-000000.tar", what="does not exist") in found.problems
        assert {problem.file for problem in found.problems} == {f"shard-00000{n}.tar" for n in (0, 1, 3, 9)}
        assert found.num_samples == 12

    def test_files_that_look_like_shards_are_told_and_others_are_not(self, tmp_path):
        manifest = packed_set(tmp_path, [5])
        strange = ["shard-000001.tar", ".shard-000000.tar.0a1b.partial", "copy.tar", "shard-000000.tar.bak"]
        for name in [*strange, "report.txt", "quarantine.jsonl", "README"]:
            (tmp_path / name).write_bytes(b"x")
        assert sorted(problem.file for problem in verify(manifest).problems) == sorted(strange)

    def test_swapped_files_are_told_from_the_bytes_and_from_the_keys(self, tmp_path):
        manifest = remade(tmp_path / "a", [samples(0, 4), samples(4, 4)])
        first, second = tmp_path / "a" / "shard-000000.tar", tmp_path / "a" / "shard-000001.tar"
        contents = first.read_bytes(), second.read_bytes()
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
        problems = verify(manifest).problems
        for name, key, expected in [("shard-000000.tar", 4, 0), ("shard-000001.tar", 0, 4)]:
            own = [problem for problem in problems if problem.file == name]
            assert any("the manifest says" in problem.what for problem in own)
            assert any(
                problem.key == f"{key:09d}" and f"stands where {expected:09d} is expected; 4 keys" in problem.what
                for problem in own
            )
        # A manifest that was made again from the swapped files knows their sums: the keys still tell.
        again = verify(remade(tmp_path / "b", [samples(4, 4), samples(0, 4)]))
        assert [(problem.file, problem.key) for problem in again.problems] == [
            ("shard-000000.tar", "000000004"),
            ("shard-000001.tar", "000000000"),
        ]

    def test_equal_shards_are_told(self, tmp_path):
        problems = verify(remade(tmp_path, [samples(0, 5), samples(0, 5)])).problems
        assert Problem(file="shard-000001.tar", what="has the same bytes as shard-000000.tar") in problems
        assert {problem.file for problem in problems} == {"shard-000001.tar"}

    def test_labels_without_samples_are_told(self, tmp_path):
        content = [(key, image, b"1" if label in (b"2", b"4") else label) for key, image, label in samples(0, 10)]
        (problem,) = verify(remade(tmp_path, [content])).problems
        assert problem == Problem(file="manifest.json", what="2 of 5 labels have no sample: 2, 4")

    def test_a_report_that_counts_otherwise_is_told(self, tmp_path):
        manifest = packed_set(tmp_path, [10])
        report([2, 3, 2, 1, 2]).save(manifest.uri)
        (problem,) = verify(manifest).problems
        assert problem.file == "report.json"
        assert problem.what == "it says label 1 has 3 samples, 2 are found (labels that differ: 1, 3)"
        report([2] * 4).save(manifest.uri)
        (problem,) = verify(manifest).problems
        assert problem.what == "it is about 4 people, the manifest has 5"
        (tmp_path / "report.json").write_text("[1, 2]")
        (problem,) = verify(manifest).problems
        assert (problem.file, problem.what[:15]) == ("report.json", "cannot be read:")

    def test_lost_samples_do_not_make_the_report_wrong(self, tmp_path):
        manifest = packed_set(tmp_path, [5, 5])
        report([2] * CLASSES).save(manifest.uri)
        (tmp_path / "shard-000001.tar").unlink()
        (problem,) = verify(manifest).problems
        assert problem == Problem(file="shard-000001.tar", what="does not exist")

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda m: {"identities": m.identities[:3]}, "it names 3 people, num_classes is 5"),
            (lambda m: {"identities": ("p1", "p1", *m.identities[2:])}, "two labels have one name: 'p1'"),
            (
                lambda m: {"shards": (replace(m.shards[0], num_samples=3), *m.shards[1:])},
                "all shards but the last, which may be smaller, have equal numbers of samples: shard-000000.tar has 3, "
                "shard-000001.tar has 4",
            ),
            (
                lambda m: {"shards": (replace(m.shards[0], num_samples=1), m.shards[2])},
                "all shards but the last, which may be smaller, have equal numbers of samples: shard-000000.tar has 1, "
                "shard-000002.tar has 2",
            ),
            (lambda m: {"shards": (m.shards[0], m.shards[0])}, "it lists shard-000000.tar 2 times"),
            (lambda m: {"shards": ()}, "it lists no shards"),
        ],
        ids=["names", "name twice", "uneven", "last is larger", "shard twice", "none"],
    )
    def test_what_is_wrong_in_the_manifest_itself_is_told(self, tmp_path, change, what):
        manifest = packed_set(tmp_path, [4, 4, 2])
        found = verify(replace(manifest, **change(manifest)))
        assert Problem(file="manifest.json", what=what) in found.problems

    def test_a_report_of_a_check_is_plain_data(self, tmp_path):
        manifest = packed_set(tmp_path, [3, 3])
        (tmp_path / "shard-000000.tar").unlink()
        found = asdict(verify(manifest))
        assert storage.plain_json(found)["problems"][-1]["what"] == "does not exist"
        assert np.sum([info.num_samples for info in manifest.shards]) == found["num_samples"] + 3

    def test_a_missing_folder_is_a_problem_of_each_shard(self, tmp_path):
        manifest = replace(packed_set(tmp_path, [3, 2]), uri=storage.normalise(tmp_path / "gone"))
        found = verify(manifest)
        missing = [problem.file for problem in found.problems if problem.what == "does not exist"]
        assert missing == ["shard-000000.tar", "shard-000001.tar"]
