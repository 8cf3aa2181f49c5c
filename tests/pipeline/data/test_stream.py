"""From a packed set to batches: the planned samples, whatever the blocks, the ranks, and where a run resumes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import pacing
from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.images import decode_rgb
from pipeline.data.order import stream_slots
from pipeline.data.shards import ShardError
from pipeline.data.stream import (
    BatchAssembler,
    PlannedDataConfig,
    StreamConfig,
    StreamPlan,
    _DecodeAugment,
    _PieceReader,
    rank_dataset,
)
from tests.pipeline.data.writers import jpeg, label_of, packed_set

SIZES = (9, 14, 11, 6, 12)
SEED, BATCH, STREAMS = 21, 12, 3
STEPS_PER_EPOCH = sum(SIZES) // BATCH


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_set(tmp_path_factory.mktemp("stream") / "set", SIZES)


def stream_plan(manifest, *, total_steps: int = 2 * STEPS_PER_EPOCH, augmentation: str = "adaface") -> StreamPlan:
    config = StreamConfig(num_streams=STREAMS, augmentation=augmentation, block_rows=8)
    return StreamPlan(manifest=manifest, config=config, seed=SEED, batch=BATCH, total_steps=total_steps)


def tables(plan: StreamPlan, world_size: int, rank: int, start: int = 0) -> list[pa.Table]:
    """What Ray's read tasks of one rank give, in order."""
    return [table for piece in plan.pieces(world_size, rank, start) for table in _PieceReader(plan, piece)()]


def assembler(blocks, world_size: int = 1, rank: int = 0) -> BatchAssembler:
    return BatchAssembler(iter(blocks), batch=BATCH, num_streams=STREAMS, world_size=world_size, rank=rank)


def columns(streams: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": index[:, None] + 1000, "label": index % 7, "index": index, "stream": streams}


def cut_blocks(block: dict[str, np.ndarray], cuts: list[int]) -> list[dict[str, np.ndarray]]:
    edges = [0, *sorted(cuts), len(block["index"])]
    return [{name: column[a:b] for name, column in block.items()} for a, b in itertools.pairwise(edges)]


@st.composite
def dealings(draw):
    """Batch, streams, ranks, one rank, its rows in some order that a plan may have, and its expected batches."""
    streams, period, steps = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    world_size = draw(st.integers(1, min(6, streams * period)))
    rank = draw(st.integers(0, world_size - 1))
    slots = stream_slots(streams * period, streams, world_size, rank)
    expected = [[] for _ in range(steps)]
    rows: dict[int, list[int]] = {}
    number = 0
    for stream, low, high in slots:
        for step in range(steps):
            taken = list(range(number, number + high - low))
            number += high - low
            rows.setdefault(stream, []).extend(taken)
            expected[step] += taken
    # Runs of the streams one after another, as the pieces of a plan come: any interleaving that keeps each in order.
    order: list[tuple[int, int]] = []
    queues = {stream: list(values) for stream, values in rows.items() if values}
    while queues:
        stream = draw(st.sampled_from(sorted(queues)))
        count = draw(st.integers(1, len(queues[stream])))
        order += [(stream, row) for row in queues[stream][:count]]
        queues[stream] = queues[stream][count:]
        if not queues[stream]:
            del queues[stream]
    cuts = draw(st.lists(st.integers(0, len(order)), max_size=12))
    block = columns(np.array([s for s, _ in order], np.int64), np.array([r for _, r in order], np.int64))
    return streams * period, streams, world_size, rank, cut_blocks(block, cuts), np.array(expected)


@settings(max_examples=150)
@given(dealings())
def test_blocks_cut_anywhere_give_the_same_batches(dealing):
    batch, streams, world_size, rank, blocks, expected = dealing
    batches = list(BatchAssembler(iter(blocks), batch=batch, num_streams=streams, world_size=world_size, rank=rank))
    assert len(batches) == len(expected)
    for got, index in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(got.indices, index)
        np.testing.assert_array_equal(got.labels, index % 7)
        np.testing.assert_array_equal(got.images, index[:, None] + 1000)


@settings(max_examples=150)
@given(dealings(), st.data())
def test_rows_that_are_missing_at_the_end_are_never_passed_over_in_silence(dealing, data):
    batch, streams, world_size, rank, blocks, expected = dealing
    whole = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    stream = data.draw(st.sampled_from(sorted(set(whole["stream"].tolist()))))
    own = np.flatnonzero(whole["stream"] == stream)
    lost = data.draw(st.integers(1, len(own)))
    keep = np.setdiff1d(np.arange(len(whole["index"])), own[-lost:])
    part = {name: column[keep] for name, column in whole.items()}
    low, high = next((low, high) for s, low, high in stream_slots(batch, streams, world_size, rank) if s == stream)
    only_whole_batches = len(set(whole["stream"].tolist())) == 1 and lost % (high - low) == 0
    if only_whole_batches:
        return  # a shorter plan would look the same
    assembling = BatchAssembler(iter([part]), batch=batch, num_streams=streams, world_size=world_size, rank=rank)
    whole_batches = (len(own) - lost) // (high - low)
    for index in expected[:whole_batches]:
        np.testing.assert_array_equal(next(assembling).indices, index)  # what comes before the loss is right
    with pytest.raises(ShardError, match=r"end in the middle of a batch"):
        next(assembling)


def test_rows_that_end_in_the_middle_of_a_batch_are_an_error():
    batches = assembler([columns(np.zeros(6, np.int64), np.arange(6)), columns(np.ones(4, np.int64), np.arange(6, 10))])
    with pytest.raises(ShardError, match=r"the samples of stream 2 end in the middle of a batch"):
        next(batches)


def test_no_rows_at_all_is_the_end():
    assert list(assembler([])) == []


# --- a packed set on disk ---


def oracle(manifest, total_steps: int) -> np.ndarray:
    """Global batches [steps, batch] from the description of the order alone."""
    steps = []
    for epoch in range(-(-total_steps // STEPS_PER_EPOCH)):
        shards = np.random.default_rng((SEED, epoch)).permutation(len(SIZES))
        sequence = np.concatenate(
            [
                manifest.offsets[shard] + np.random.default_rng((SEED, epoch, shard)).permutation(SIZES[shard])
                for shard in shards
            ]
        )[: STEPS_PER_EPOCH * BATCH]
        runs = sequence.reshape(STREAMS, STEPS_PER_EPOCH, BATCH // STREAMS)
        steps.append(runs.transpose(1, 0, 2).reshape(STEPS_PER_EPOCH, BATCH))
    return np.concatenate(steps)[:total_steps]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 12])
def test_the_read_rows_are_the_planned_samples_with_their_labels(packed, world_size):
    plan, parts = stream_plan(packed), []
    for rank in range(world_size):
        blocks = [
            {
                "image": np.array([hash(image.as_py()) for image in table["image"]]),
                "label": table["label"].to_numpy(),
                "index": table["index"].to_numpy(),
                "stream": table["stream"].to_numpy(),
            }
            for table in tables(plan, world_size, rank)
        ]
        batches = list(assembler(blocks, world_size, rank))
        assert len(batches) == plan.total_steps
        for batch in batches:
            assert batch.labels.tolist() == [label_of(i) for i in batch.indices.tolist()]
            assert batch.images.tolist() == [hash(jpeg(i)) for i in batch.indices.tolist()]
        parts.append(np.stack([batch.indices for batch in batches]))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), oracle(packed, plan.total_steps))


@pytest.mark.parametrize("total_steps", [1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH + 2])
@pytest.mark.parametrize("world_size", [1, 5])
def test_the_batches_end_where_the_run_ends_also_within_an_epoch(packed, total_steps, world_size):
    plan = stream_plan(packed, total_steps=total_steps)
    for rank in range(world_size):
        blocks = [
            {name: table[name].to_numpy() for name in ("label", "index", "stream")}
            | {"image": table["index"].to_numpy()}
            for table in tables(plan, world_size, rank)
        ]
        assert len(list(assembler(blocks, world_size, rank))) == total_steps


def expected_images(plan: StreamPlan, index: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    images = np.stack([decode_rgb(jpeg(i)) for i in index.tolist()])
    return AUGMENTATIONS[plan.config.augmentation](images, index, plan.seed, epoch)


@settings(max_examples=10)
@given(rows=st.integers(1, 40), world_size=st.sampled_from([1, 2, 3, 4]))
@pytest.mark.parametrize("augmentation", ["adaface", "flip", "none"])
def test_images_are_the_augmented_originals_for_every_block_cut_and_world_size(packed, augmentation, rows, world_size):
    plan = stream_plan(packed, augmentation=augmentation)
    decode, parts = _DecodeAugment(augmentation, SEED), []
    for rank in range(world_size):
        whole = pa.concat_tables(tables(plan, world_size, rank))
        blocks = [decode(whole.slice(start, rows)) for start in range(0, len(whole), rows)]
        parts.append(list(assembler(blocks, world_size, rank)))
    for step, ranks in enumerate(zip(*parts, strict=True)):
        images, index = (np.concatenate([batch[column] for batch in ranks]) for column in (0, 2))
        expected = expected_images(plan, index, np.full(BATCH, step // STEPS_PER_EPOCH))
        np.testing.assert_array_equal(images, expected)
    assert len(parts[0]) == plan.total_steps


def test_an_image_that_cannot_be_decoded_names_shard_and_sample():
    table = pa.table(
        {
            "image": pa.array([jpeg(0), b"no image"], pa.large_binary()),
            "key": ["s3://b/shard-000003.tar: 000000001", "s3://b/shard-000003.tar: 000000002"],
            "label": [0, 1],
            "index": [0, 1],
            "epoch": [0, 0],
            "stream": [0, 0],
        }
    )
    with pytest.raises(ShardError, match=r"s3://b/shard-000003\.tar: 000000002: not a readable image \(8 bytes\)"):
        _DecodeAugment("none", 0)(table)


def test_a_damaged_shard_is_named_by_the_rank_that_needs_it(tmp_path):
    manifest = packed_set(tmp_path / "set", SIZES)
    data = storage.read_bytes(manifest.shard_uri(2))
    storage.write_bytes(manifest.shard_uri(2), data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"shard-000002\.tar: truncated or altered"):
        tables(stream_plan(manifest), 1, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("num_streams", 0), ("block_rows", 0), ("num_streams", -3), ("augmentation", "mixup")]
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=rf"stream\.{field}"):
        StreamConfig(**{field: value})


# --- through Ray Data ---


def ray_batches(datasets, world_size: int):
    """The batches of all ranks by step, as the training loop iterates them."""
    parts = []
    for rank, dataset in enumerate(datasets):
        blocks = dataset.iter_batches(batch_size=None, batch_format="numpy")
        parts.append(list(assembler(blocks, world_size, rank)))
    return [
        tuple(np.concatenate([batch[column] for batch in ranks]) for column in range(3))
        for ranks in zip(*parts, strict=True)
    ]


@pytest.mark.ray
def test_ray_delivers_the_same_global_sequence_for_every_world_size_and_the_tail_on_resuming(packed, ray_cluster):
    plan = stream_plan(packed)
    expected = oracle(packed, plan.total_steps)
    for world_size, start in ((1, 0), (2, 0), (1, 3), (2, STEPS_PER_EPOCH + 1)):
        seen = ray_batches([rank_dataset(plan, world_size, rank, start, 1.0) for rank in range(world_size)], world_size)
        np.testing.assert_array_equal(np.stack([index for _, _, index in seen]), expected[start:])
        for step, (images, labels, index) in enumerate(seen, start=start):
            assert labels.tolist() == [label_of(i) for i in index.tolist()]
            epoch = np.full(BATCH, step // STEPS_PER_EPOCH)
            np.testing.assert_array_equal(images, expected_images(plan, index, epoch))


@pytest.mark.ray
def test_the_data_config_asks_for_the_start_at_every_start(packed, ray_cluster):
    plan, starts = stream_plan(packed, augmentation="none"), iter([0, 5])
    config = PlannedDataConfig(plan, start_step=lambda: next(starts))
    expected = oracle(packed, plan.total_steps)
    for world_size, start in ((2, 0), (1, 5)):
        shards = config.configure({"train": None}, world_size, None, None)
        assert [set(shard) for shard in shards] == [{"train"}] * world_size
        seen = ray_batches([shard["train"] for shard in shards], world_size)
        np.testing.assert_array_equal(np.stack([index for _, _, index in seen]), expected[start:])


@pytest.mark.ray
def test_a_damaged_shard_stops_the_stream_and_is_named(tmp_path, ray_cluster):
    manifest = packed_set(tmp_path / "set", SIZES)
    data = bytearray(storage.read_bytes(manifest.shard_uri(1)))
    data[700] ^= 1
    storage.write_bytes(manifest.shard_uri(1), bytes(data))
    with pytest.raises(Exception, match=r"shard-000001\.tar: corrupt: sha256"):
        ray_batches([rank_dataset(stream_plan(manifest), 1, 0, 0, 1.0)], 1)


@pytest.mark.ray
def test_the_scheduling_loop_rests_while_the_consumer_is_slow(packed, ray_cluster, monkeypatch):
    turns = []
    paced = pacing.PacedScheduling.max_task_output_bytes_to_read

    def counted(self, op):
        if op is self._first_operator:
            turns.append(time.monotonic())
        return paced(self, op)

    monkeypatch.setattr(pacing.PacedScheduling, "max_task_output_bytes_to_read", counted)
    blocks = iter(rank_dataset(stream_plan(packed), 1, 0, 0, 1.0).iterator().iter_batches(batch_size=None))
    next(blocks)
    time.sleep(2)  # the loop meanwhile has blocks that it may not take
    # None at all would mean that Ray no longer calls the hook; without its pause there are thousands.
    assert 0 < len(turns) <= (turns[-1] - turns[0]) / pacing.TURN_S + 2
