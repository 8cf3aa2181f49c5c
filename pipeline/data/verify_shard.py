"""Checking one shard: everything that is wrong with it, where reading for training ends at the first fault."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline import storage
from pipeline.data.images import decode_into
from pipeline.data.manifest import ShardInfo
from pipeline.data.shards import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    MIB,
    ShardError,
    block_crc32,
    fetch_verified,
    split_key,
)
from pipeline.data.ustar import TarError, members

# By key: the member's bytes and the byte of its header.
Images = dict[str, tuple[bytes, int]]
Labels = dict[str, tuple[bytes, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: Name of the shard, or of the file beside the shards.
        key: Of the sample; empty where it is not about one.
        byte: Of the file, where known: the header of the member, the place where the file ends or breaks, or the start
            of the MiB that has another checksum.
        what: What was found, and what was expected.
    """

    file: str
    key: str = ""
    byte: int | None = None
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One shard to check: where it is, what the manifest says of it and of the set, the index of its first sample."""

    uri: str
    info: ShardInfo
    first_sample: int
    num_classes: int
    image_side: int


@dataclass(kw_only=True, slots=True)
class ShardCheck:
    """What is known of one shard.

    Attributes:
        problems: First what concerns the shard, then sample by sample.
        labels: That occur, ascending: int64 [found].
        label_counts: How often each does: int64 [found].
        num_samples: With an image and a label.
        num_images: That decode in the right size.
        num_bytes: That were read.
        sha256: Of them, hex; empty where nothing was read.
    """

    problems: list[Problem] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    label_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_samples: int = 0
    num_images: int = 0
    num_bytes: int = 0
    sha256: str = ""


def check_shard(task: ShardTask) -> ShardCheck:
    """Check the size, checksum, archive, keys, labels and images of a shard; no fault in it is raised."""
    return _Checking(task).run()


class _Checking:
    def __init__(self, task: ShardTask) -> None:
        self._task = task
        self._found = ShardCheck()

    def run(self) -> ShardCheck:
        data = self._read()
        if data is not None:
            self._found.num_bytes, self._found.sha256 = len(data), hashlib.sha256(data).hexdigest()
            self._check(*self._samples(data))
        return self._found

    def _tell(self, what: str, key: str = "", byte: int | None = None) -> None:
        self._found.problems.append(Problem(file=self._task.info.name, key=key, byte=byte, what=what))

    def _without_uri(self, error: Exception) -> str:
        return str(error).removeprefix(f"{self._task.uri}: ")

    def _read(self) -> bytes | None:
        """The bytes of the shard, also where they are not what the manifest says; None where there are none."""
        try:
            try:
                return fetch_verified(self._task.uri, self._task.info)
            except ShardError as error:
                data = storage.read_bytes(self._task.uri)
                self._tell(self._without_uri(error), byte=_damaged_byte(data, self._task.info))
                return data
        except storage.MissingError:
            self._tell("does not exist")
        except storage.StorageError as error:
            self._tell(f"cannot be read: {self._without_uri(error)}")
        return None

    def _samples(self, data: bytes) -> tuple[Images, Labels]:
        """What is found up to where the archive breaks."""
        images: Images = {}
        labels: Labels = {}
        try:
            for member, body, byte in members(io.BytesIO(data), self._task.uri):
                key, extension = split_key(member)
                if extension in IMAGE_EXTENSIONS:
                    if key in images:
                        self._tell(f"a second image of the sample: {member}", key, byte)
                    images.setdefault(key, (body, byte))
                elif extension == LABEL_EXTENSION:
                    if key in labels:
                        self._tell(f"a second label of the sample: {member}", key, byte)
                    labels.setdefault(key, (body, byte))
        except TarError as error:
            text = self._without_uri(error)
            place = re.match(r"byte (\d+): ", text)
            self._tell(text[place.end() :] if place else text, byte=int(place[1]) if place else None)
        return images, labels

    def _check(self, images: Images, labels: Labels) -> None:
        for key in images.keys() - labels.keys():
            self._tell("the sample has no label", key, images[key][1])
        for key in labels.keys() - images.keys():
            self._tell("the sample has no image", key, labels[key][1])
        keys = [key for key in images if key in labels]
        self._found.num_samples = len(keys)
        if len(keys) != self._task.info.num_samples:
            self._tell(f"{len(keys)} samples, the manifest says {self._task.info.num_samples}")
        self._check_keys(keys, images)
        self._check_labels(labels)
        self._check_images(images)
        self._found.problems.sort(key=lambda problem: (problem.key != "", problem.byte if problem.key else 0))

    def _check_keys(self, keys: Sequence[str], images: Images) -> None:
        """Tell of the first key that is not where it belongs: after a lost sample, all others are moved."""
        expected = [f"{number:09d}" for number in range(self._task.first_sample, self._task.first_sample + len(keys))]
        moved = [(key, wanted) for key, wanted in zip(keys, expected, strict=True) if key != wanted]
        if moved:
            key, wanted = moved[0]
            others = f"; {len(moved)} keys are not where they belong" if len(moved) > 1 else ""
            self._tell(f"this key stands where {wanted} is expected{others}", key, images[key][1])

    def _check_labels(self, labels: Labels) -> None:
        valid = []
        for key, (text, byte) in labels.items():
            try:
                label = int(text)
            except ValueError:
                self._tell(f"{text[:20]!r} is not a class number", key, byte)
                continue
            if 0 <= label < self._task.num_classes:
                valid.append(label)
            else:
                self._tell(f"label {label}; labels go from 0 to {self._task.num_classes - 1}", key, byte)
        self._found.labels, self._found.label_counts = np.unique(np.array(valid, np.int64), return_counts=True)

    def _check_images(self, images: Images) -> None:
        pixels_HWC = np.empty((self._task.image_side, self._task.image_side, 3), np.uint8)
        for key, (encoded, byte) in images.items():
            try:
                decode_into(encoded, pixels_HWC, resize=False)  # as reading for training does
            except ValueError as error:
                self._tell(str(error), key, byte)
            else:
                self._found.num_images += 1


def _damaged_byte(data: bytes, info: ShardInfo) -> int | None:
    """Where a shard of another size ends, else the start of the first MiB that differs; None if it cannot be told."""
    if len(data) != info.num_bytes:
        return min(len(data), info.num_bytes)
    found, expected = block_crc32(data), info.crc32
    if len(found) != len(expected):
        return None
    places = range(0, len(found), 8)
    return next((place // 8 * MIB for place in places if found[place : place + 8] != expected[place : place + 8]), None)
