"""From a packed set to batches: the planned samples, whatever the blocks, the ranks, and where a run resumes."""

from __future__ import annotations

import itertools
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import pacing
from pipeline.data.augment import AUGMENTATIONS
from pipeline.data.decoding import Decoder
from pipeline.data.images import decode_rgb
from pipeline.data.order import rank_slots
from pipeline.data.quarantine import Quarantine, read_quarantine
from pipeline.data.reading import PlanReader
from pipeline.data.shards import ShardError
from pipeline.data.stream import BatchAssembler, PlannedDataConfig, Share, rank_dataset
from pipeline.data.stream_plan import StreamConfig, StreamPlan
from tests.pipeline.data.writers import jpeg, label_of, packed_set

SIZES = (9, 14, 11, 6, 12)
SEED, BATCH, STREAMS = 21, 12, 3
STEPS_PER_EPOCH = sum(SIZES) // BATCH
SHARE = Share(1.0, 256 << 20)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_set(tmp_path_factory.mktemp("stream") / "set", SIZES)


def stream_plan(data, *, total_steps: int = 2 * STEPS_PER_EPOCH, **config) -> StreamPlan:
    settings = StreamConfig(**{"num_streams": STREAMS, "block_rows": 8} | config)
    return StreamPlan(data=data, config=settings, seed=SEED, batch=BATCH, total_steps=total_steps)


def tables(plan: StreamPlan, world_size: int, rank: int, start: int = 0) -> list[pa.Table]:
    """What the reading actor of one rank gives, in order."""
    reader = PlanReader(plan, world_size, rank, start)
    return list(reader({"chunk": np.arange(plan.num_chunks(world_size, start))}))


def assembler(blocks, world_size: int = 1, rank: int = 0) -> BatchAssembler:
    low, high = rank_slots(BATCH, world_size, rank)
    return BatchAssembler(iter(blocks), high - low)


def indices(plan: StreamPlan, table: pa.Table) -> np.ndarray:
    return plan.data.offsets[table["shard"].to_numpy()] + table["row"].to_numpy()


@settings(max_examples=150)
@given(size=st.integers(1, 9), steps=st.integers(0, 9), cuts=st.lists(st.integers(0, 81), max_size=12))
def test_blocks_cut_anywhere_give_the_same_batches(size, steps, cuts):
    index = np.arange(size * steps)
    edges = sorted({0, len(index), *(min(cut, len(index)) for cut in cuts)})
    blocks = [
        {"image": index[a:b, None] + 1000, "label": index[a:b] % 7, "index": index[a:b]}
        for a, b in itertools.pairwise(edges)
    ]
    batches = list(BatchAssembler(iter(blocks), size))
    assert len(batches) == steps
    for got, expected in zip(batches, index.reshape(steps, size), strict=True):
        np.testing.assert_array_equal(got.indices, expected)
        np.testing.assert_array_equal(got.labels, expected % 7)
        np.testing.assert_array_equal(got.images, expected[:, None] + 1000)


def test_rows_that_end_in_the_middle_of_a_batch_are_an_error():
    index = np.arange(10)
    batches = BatchAssembler(iter([{"image": index, "label": index, "index": index}]), 6)
    assert next(batches).indices.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ShardError, match=r"end in the middle of a batch: 2 of 6 are missing"):
        next(batches)


# --- a packed set on disk ---


def oracle(manifest, total_steps: int) -> np.ndarray:
    """Global batches [steps, batch] from the description of the order alone."""
    steps = []
    for epoch in range(-(-total_steps // STEPS_PER_EPOCH)):
        shards = np.random.default_rng((SEED, epoch, 0)).permutation(len(SIZES))
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
        low, high = rank_slots(BATCH, world_size, rank)
        whole = pa.concat_tables(tables(plan, world_size, rank))
        index = indices(plan, whole)
        assert whole["label"].to_pylist() == [label_of(i) for i in index.tolist()]
        assert whole["image"].to_pylist() == [jpeg(i) for i in index.tolist()]
        parts.append(index.reshape(-1, high - low))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), oracle(packed, plan.total_steps))


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 3 * STEPS_PER_EPOCH),
    data=st.data(),
    world_size=st.integers(1, 12),
    block_rows=st.sampled_from([1, 5, 8, 100]),
)
def test_chunks_are_the_steps_of_a_run_from_any_step_to_its_end(packed, total, data, world_size, block_rows):
    plan = stream_plan(packed, total_steps=total, block_rows=block_rows)
    start = data.draw(st.integers(0, total))
    chunks = [plan.chunk(c, world_size, start) for c in range(plan.num_chunks(world_size, start))]
    assert [step for chunk in chunks for step in chunk] == list(range(start, total))
    expected = oracle(packed, total)
    for chunk in chunks:
        assert len(chunk) > 0
        for rank in (0, world_size - 1):
            low, high = rank_slots(BATCH, world_size, rank)
            samples = plan.samples(world_size, rank, chunk)
            index = packed.offsets[samples.shard] + samples.row
            np.testing.assert_array_equal(index.reshape(-1, high - low), expected[chunk.start : chunk.stop, low:high])
            assert (samples.lap == np.repeat([step // STEPS_PER_EPOCH for step in chunk], high - low)).all()


def test_resuming_opens_only_the_shards_that_are_still_needed(packed, monkeypatch):
    opened = []

    def noted(source, number):
        opened.append(number)
        return read(source, number)

    plan = stream_plan(packed, total_steps=STEPS_PER_EPOCH)
    read = type(plan.shard_source()).read
    monkeypatch.setattr("pipeline.data.shard_source.ShardSource.read", noted)
    start = STEPS_PER_EPOCH - 1
    tables(plan, 1, 0, start)
    needed = (
        np.searchsorted(packed.offsets, oracle(packed, STEPS_PER_EPOCH)[start:].ravel(), side="right") - 1
    ).tolist()
    assert sorted(opened) == sorted(set(needed))
    assert len(opened) < len(SIZES)


def test_a_plan_travels_without_what_it_can_make_again(packed):
    plan = stream_plan(packed)
    plan.samples(1, 0, range(2))
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again._orders == {}
    for _ in range(2):  # and keeps few epochs
        for epoch in range(5):
            plan.order(epoch)
    assert len(plan._orders) <= 2


def expected_images(plan: StreamPlan, index: np.ndarray, lap: np.ndarray) -> np.ndarray:
    images = np.stack([decode_rgb(jpeg(i)) for i in index.tolist()])
    return AUGMENTATIONS[plan.config.augmentation](images, index, plan.seed, lap)


@settings(max_examples=10)
@given(rows=st.integers(1, 40), world_size=st.sampled_from([1, 2, 3, 4]))
@pytest.mark.parametrize("augmentation", ["adaface", "flip", "none"])
def test_images_are_the_augmented_originals_for_every_block_cut_and_world_size(packed, augmentation, rows, world_size):
    plan = stream_plan(packed, augmentation=augmentation)
    decode, parts = Decoder(plan), []
    for rank in range(world_size):
        whole = pa.concat_tables(tables(plan, world_size, rank))
        blocks = [decode(whole.slice(start, rows)) for start in range(0, len(whole), rows)]
        parts.append(list(assembler(blocks, world_size, rank)))
    for step, ranks in enumerate(zip(*parts, strict=True)):
        images, index = (np.concatenate([batch[column] for batch in ranks]) for column in (0, 2))
        expected = expected_images(plan, index, np.full(BATCH, step // STEPS_PER_EPOCH))
        np.testing.assert_array_equal(images, expected)
    assert len(parts[0]) == plan.total_steps


def test_a_damaged_shard_is_named_by_the_rank_that_needs_it(tmp_path):
    manifest = packed_set(tmp_path / "set", SIZES)
    data = storage.read_bytes(manifest.shard_uri(2))
    storage.write_bytes(manifest.shard_uri(2), data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"shard-000002\.tar: truncated or altered"):
        tables(stream_plan(manifest), 1, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_streams", 0),
        ("block_rows", 0),
        ("num_streams", -3),
        ("augmentation", "mixup"),
        ("max_bad_images", -1),
        ("wrong_size", "crop"),
        ("cache_gib", 0.0),
    ],
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
        seen = ray_batches(
            [rank_dataset(plan, world_size, rank, start, SHARE) for rank in range(world_size)], world_size
        )
        np.testing.assert_array_equal(np.stack([index for _, _, index in seen]), expected[start:])
        for step, (images, labels, index) in enumerate(seen, start=start):
            assert labels.tolist() == [label_of(i) for i in index.tolist()]
            epoch = np.full(BATCH, step // STEPS_PER_EPOCH)
            np.testing.assert_array_equal(images, expected_images(plan, index, epoch))


@pytest.mark.ray
def test_the_data_config_gives_each_rank_its_rows_from_the_start_on(packed, ray_cluster):
    plan = stream_plan(packed, augmentation="none")
    config = PlannedDataConfig(plan)
    expected = oracle(packed, plan.total_steps)
    for world_size, start in ((2, 0), (1, 5)):
        given = SimpleNamespace(first_step=start)
        shards = config.configure({"train": given}, world_size, None, None)
        assert [set(shard) for shard in shards] == [{"train"}] * world_size
        assert all(shard["train"].start is given for shard in shards)
        seen = ray_batches([shard["train"].rows for shard in shards], world_size)
        np.testing.assert_array_equal(np.stack([index for _, _, index in seen]), expected[start:])


@pytest.mark.ray
def test_a_damaged_shard_stops_the_stream_and_is_named(tmp_path, ray_cluster):
    manifest = packed_set(tmp_path / "set", SIZES)
    data = bytearray(storage.read_bytes(manifest.shard_uri(1)))
    data[700] ^= 1
    storage.write_bytes(manifest.shard_uri(1), bytes(data))
    with pytest.raises(Exception, match=r"shard-000001\.tar: corrupt, bytes 0 to \d+: sha256"):
        ray_batches([rank_dataset(stream_plan(manifest), 1, 0, 0, SHARE)], 1)


@pytest.mark.ray
def test_bad_images_are_listed_and_replaced_and_too_many_end_the_stream(tmp_path, ray_cluster):
    manifest = packed_set(tmp_path / "set", SIZES, images={3: b"not an image", 20: jpeg(20)[:90]})
    plan, uri = stream_plan(manifest, augmentation="none"), f"{tmp_path}/quarantine.jsonl"
    expected = oracle(manifest, plan.total_steps)
    expected[expected == 3], expected[expected == 20] = 4, 21  # the next ones of their shards
    for world_size in (1, 2):
        quarantine = Quarantine(uri, budget=2)  # the second time they are known
        ranks = [rank_dataset(plan, world_size, rank, 0, SHARE, quarantine) for rank in range(world_size)]
        seen = ray_batches(ranks, world_size)
        np.testing.assert_array_equal(np.stack([index for _, _, index in seen]), expected)
        for images, labels, index in seen:
            assert labels.tolist() == [label_of(i) for i in index.tolist()]
            np.testing.assert_array_equal(images, np.stack([decode_rgb(jpeg(i)) for i in index.tolist()]))
        assert quarantine.count() == 2
    listed = {bad.index: bad for bad in read_quarantine(uri)}
    assert sorted(listed) == [3, 20]
    assert listed[3].shard == manifest.shard_uri(0)
    assert (listed[3].key, listed[20].key) == ("000000003", "000000020")
    assert "not a readable image (12 bytes)" in listed[3].reason
    with pytest.raises(Exception, match=r"bad image 2, stream\.max_bad_images=1 are allowed"):
        ray_batches([rank_dataset(plan, 1, 0, 0, SHARE, Quarantine(f"{tmp_path}/other.jsonl", budget=1))], 1)


@pytest.mark.ray
@pytest.mark.slow  # every run of the suite kills workers, controller and driver: tests/chaos/test_short.py
def test_a_killed_reader_and_a_killed_decoder_change_nothing(packed, ray_cluster):
    import psutil

    plan = stream_plan(packed, total_steps=300)
    blocks = rank_dataset(plan, 1, 0, 0, SHARE).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
    batches, seen = assembler(blocks), []
    mine = psutil.Process().children(recursive=True)
    for step in range(plan.total_steps):
        if step in (20, 120):
            wanted = "PlanReader" if step == 20 else "Decoder"
            actors = [p for p in psutil.Process().children(recursive=True) if wanted in " ".join(p.cmdline())]
            assert actors, [p.cmdline() for p in mine]
            for actor in actors:
                actor.kill()
        seen.append(next(batches).indices)
    np.testing.assert_array_equal(np.stack(seen), oracle(packed, plan.total_steps))
    assert next(batches, None) is None


@pytest.mark.ray
def test_the_scheduling_loop_rests_while_the_consumer_is_slow(packed, ray_cluster, monkeypatch):
    turns = []
    paced = pacing.PacedScheduling.max_task_output_bytes_to_read

    def counted(self, op):
        if op is self._first_operator:
            turns.append(time.monotonic())
        return paced(self, op)

    monkeypatch.setattr(pacing.PacedScheduling, "max_task_output_bytes_to_read", counted)
    blocks = iter(
        rank_dataset(stream_plan(packed, total_steps=200), 1, 0, 0, SHARE).iterator().iter_batches(batch_size=None)
    )
    next(blocks)
    time.sleep(2)  # the loop meanwhile has blocks that it may not take
    # None at all would mean that Ray no longer calls the hook; without its pause there are thousands.
    assert 0 < len(turns) <= (turns[-1] - turns[0]) / pacing.TURN_S + 2
