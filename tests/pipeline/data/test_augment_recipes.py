"""What every recipe promises, whatever its operations are."""

from __future__ import annotations

import importlib
import itertools
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.data.augment
from pipeline.data.augment import AUGMENTATIONS, Recipe, adaface, uniform_draws
from pipeline.data.augment.geometry import CROP, FLIP
from pipeline.data.augment.operation import Operation
from tests.pipeline.data.augment_oracle import SIDE, faces

NAMES = list(AUGMENTATIONS)
OPERATIONS = {operation.name: operation for recipe in AUGMENTATIONS.values() for operation, _ in recipe.steps}
# Gate, then first and last column of the parameters. Written down a second time: one that moves changes every run.
COLUMNS = {
    "flip": (0, None),
    "crop": (1, (4, 32)),
    "low resolution": (2, (6, 8)),
    "jitter": (3, (9, 12)),
    "warp": (33, (34, 39)),
    "erase": (40, (41, 49)),
    "holes": (50, (51, 91)),
    "mask": (92, (93, 99)),
    "sunglasses": (100, (101, 104)),
    "motion blur": (105, (106, 107)),
    "defocus": (108, (109, 109)),
    "Gaussian blur": (110, (111, 111)),
    "box blur": (112, (113, 113)),
    "noise": (114, (115, 117)),
    "JPEG": (118, (119, 119)),
    "low quality": (120, (121, 122)),
    "photometric": (123, (124, 127)),
}


def run(recipe: Recipe, images: np.ndarray, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return recipe(images.copy(), np.arange(len(images)), seed, np.full(len(images), epoch))


def test_the_recipes_that_users_name():
    expected = {"none", "flip", "adaface", "gridsample", "occlusion", "motion_blur", "jpeg", "strong"}
    assert set(NAMES) == expected
    assert AUGMENTATIONS["adaface"] is adaface


def test_no_operation_moved_its_draws():
    found = {
        name: (operation.gate, (operation.columns[0], operation.columns[-1]) if operation.columns else None)
        for name, operation in OPERATIONS.items()
    }
    assert found == COLUMNS


def test_no_two_operations_share_a_draw():
    taken = [column for operation in OPERATIONS.values() for column in (operation.gate, *operation.columns)]
    assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_its_operations_one_after_another(name):
    recipe, images = AUGMENTATIONS[name], faces(60)
    expected, drawn = images.copy(), set()
    for number, image in enumerate(expected):
        for operation, probability in recipe.steps:
            place = np.array([2]), np.array([number])
            if uniform_draws(7, *place, [operation.gate])[0, 0] < probability:
                operation.apply(image, *operation.plan(uniform_draws(7, *place, operation.columns), SIDE)[0])
                drawn.add(operation.name)
    np.testing.assert_array_equal(run(recipe, images, seed=7, epoch=2), expected)
    assert len(drawn) >= len(recipe.steps) - 3  # the rare ones of gridsample may be missing


@settings(max_examples=40)
@given(data=st.data(), name=st.sampled_from(NAMES), seed=st.integers(0, 2**64 - 1))
def test_permuting_and_cutting_the_rows_permutes_and_cuts_the_result(data, name, seed):
    images, recipe = faces(12), AUGMENTATIONS[name]
    index, epoch = np.arange(12) * 5, np.arange(12) // 4
    whole = recipe(images.copy(), index, seed, epoch)
    order = np.array(data.draw(st.permutations(range(12))))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, 12), max_size=3))), 12]
    parts = [order[low:high] for low, high in itertools.pairwise(cuts)]
    results = [recipe(images[rows].copy(), index[rows], seed, epoch[rows]) for rows in parts]
    np.testing.assert_array_equal(np.concatenate(results), whole[order])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none"}))
def test_seed_epoch_and_index_each_change_the_draws(name):
    recipe, images = AUGMENTATIONS[name], faces(40)
    index, epoch = np.arange(40), np.zeros(40, np.int64)
    first = recipe(images.copy(), index, 0, epoch)
    for other in ((index, 1, epoch), (index, 0, epoch + 1), (index + 40, 0, epoch)):
        assert (recipe(images.copy(), *other) != first).any()


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    side=st.sampled_from([8, 33, 96, 112, 128]),
    count=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_shape_and_dtype_stay_for_any_side_and_number_of_images(name, side, count, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    out = run(AUGMENTATIONS[name], images, seed)
    assert (out.dtype, out.shape) == (np.uint8, images.shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_may_be_written_is_changed_in_place(name):
    images = faces(30)
    out = AUGMENTATIONS[name](images, np.arange(30), 0, np.zeros(30, np.int64))
    assert np.shares_memory(out, images)
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_or_strided_block_is_left_as_it_is(name):
    images = faces(30)
    expected, before = run(AUGMENTATIONS[name], images), images.copy()
    frozen = images.copy()
    frozen.flags.writeable = False  # as a block from Ray's object store
    strided = np.repeat(images, 2, axis=2)[:, :, ::2]
    for block in (frozen, strided):
        out = AUGMENTATIONS[name](block, np.arange(30), 0, np.zeros(30, np.int64))
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(block, before)


@pytest.mark.parametrize(
    ("name", "untouched"),
    [
        ("none", 1.0),
        ("flip", 1.0),
        ("adaface", 0.512),
        ("gridsample", 0.0),
        ("occlusion", 0.85 * 0.85 * 0.75),
        ("motion_blur", 0.7 * 0.8),
        ("jpeg", 0.8 * 0.7),
        ("strong", 0.9**3 * 0.7 * 0.9 * 0.7 * 0.8 * 0.9 * 0.7 * 0.8 * 0.85 * 0.85),
    ],
)
def test_as_many_images_come_back_untouched_as_the_recipe_says(name, untouched):
    recipe, count, face = AUGMENTATIONS[name], 1200, faces(1)
    assert recipe.untouched == pytest.approx(untouched)
    out = run(recipe, np.repeat(face, count, axis=0))
    plain, mirrored = (out == face).all(axis=(1, 2, 3)), (out == face[:, :, ::-1]).all(axis=(1, 2, 3))
    error = 4 * math.sqrt(untouched * (1 - untouched) / count)
    assert (plain | mirrored).mean() == pytest.approx(untouched, abs=error + 0.01)  # some draws change nothing
    halves = 1.0 if name == "none" else 0.5
    error = 4 * math.sqrt(halves * untouched * (1 - halves * untouched) / count)
    assert plain.mean() == pytest.approx(halves * untouched, abs=error + 0.01)


def test_none_gives_the_same_object_back():
    images = faces(4)
    assert AUGMENTATIONS["none"](images, np.arange(4), 0, np.zeros(4, np.int64)) is images


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    images = faces(200)
    out = run(AUGMENTATIONS["flip"], images, seed=6)
    mirrored = uniform_draws(6, np.zeros(200, np.int64), np.arange(200))[:, 0] < 0.5
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(out[mirrored], images[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(out[~mirrored], images[~mirrored])


def test_operations_that_recipes_have_in_common_fall_on_the_same_images():
    # A recipe with one operation more leaves the draws of the others: runs stay comparable.
    images = faces(100)
    crop = Recipe(summary="", steps=((CROP, 0.2),))
    touched = (run(crop, images) != images).any(axis=(1, 2, 3))
    assert touched[(run(adaface, images) == images).all(axis=(1, 2, 3))].sum() == 0
    assert 5 < touched.sum() < 40


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"images must be uint8 \[N, H, H, 3\], got float32 \[2, 8, 8, 3\]"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"got uint8 \[2, 8, 9, 3\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got uint8 \[2, 3, 8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), r"got uint8 \[8, 8, 3\]"),
    ],
)
@pytest.mark.parametrize("name", ["none", "adaface"])
def test_another_shape_or_type_is_refused(name, images, message):
    with pytest.raises(ValueError, match=message):
        AUGMENTATIONS[name](images, np.arange(2), 0, np.arange(2))


@pytest.mark.parametrize(("indices", "epochs"), [(3, 2), (2, 1)])
def test_index_and_epoch_must_fit_the_images(indices, epochs):
    message = rf"one entry for each of the 2 images, got shapes \[{indices}\] and \[{epochs}\]"
    with pytest.raises(ValueError, match=message):
        adaface(faces(2), np.arange(indices), 0, np.arange(epochs))


def test_an_operation_comes_once_in_a_recipe():
    with pytest.raises(ValueError, match=r"each operation once, got flip, crop, flip"):
        Recipe(summary="", steps=((FLIP, 0.5), (CROP, 0.1), (FLIP, 0.2)))


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, math.nan])
def test_a_probability_lies_above_0_and_up_to_1(probability):
    with pytest.raises(ValueError, match=rf"probability of crop must be in \(0, 1\], got {probability}"):
        Recipe(summary="", steps=((CROP, probability),))


def test_a_new_operation_is_one_entry():
    invert = Operation(
        name="invert",
        gate=10_000,
        columns=(10_001,),
        plan=lambda draws, side: [(int(256 * draw), side) for draw in draws[:, 0]],
        apply=lambda image, value, side: image.fill(value),
        ranges="",
        source="",
    )
    images = run(Recipe(summary="", steps=((invert, 1.0),)), faces(5))
    wanted = uniform_draws(0, np.zeros(5, np.int64), np.arange(5), [10_001])[:, 0]
    assert images[:, 0, 0, 0].tolist() == (256 * wanted).astype(int).tolist()


def test_opencv_stays_on_one_core_where_augmentation_is_loaded():
    cv2.setNumThreads(2)
    importlib.reload(pipeline.data.augment)
    assert cv2.getNumThreads() == 1
