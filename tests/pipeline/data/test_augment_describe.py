"""The page about augmentation shows what the code does today."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from pipeline.data.augment import AUGMENTATIONS, describe
from pipeline.data.augment.__main__ import main
from pipeline.data.stream_plan import StreamConfig
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "augmentation.md").read_text()
PICTURES = ROOT / "docs" / "pictures"


def picture(name: str) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(PICTURES / f"augment_{name}.webp")), cv2.COLOR_BGR2RGB)


def test_the_page_states_the_tables():
    assert describe.recipes_table() in PAGE
    assert describe.operations_table() in PAGE


def test_the_tables_name_every_recipe_and_operation():
    table = describe.operations_table()
    for name, recipe in AUGMENTATIONS.items():
        assert f"| `{name}` | {recipe.summary} | {recipe.untouched:.3f} |" in describe.recipes_table()
        for operation, probability in recipe.steps:
            assert f"| `{name}` | {operation.name} | {probability:g} |" in table
    assert table.count("\n") == 1 + sum(len(recipe.steps) for recipe in AUGMENTATIONS.values())


def test_the_page_shows_a_picture_of_every_recipe():
    shown = re.findall(r"\(pictures/augment_(\w+)\.webp\)", PAGE)
    assert shown == list(AUGMENTATIONS)
    for name in shown:
        assert (PICTURES / f"augment_{name}.webp").stat().st_size < 300_000


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_pictures_are_todays(name):
    drawn = describe.picture(AUGMENTATIONS[name]).astype(int)
    # WebP loses a little; a face drawn otherwise would differ by far more in its tile.
    tiles = np.abs(drawn - picture(name)).reshape(4, 112, -1, 3).mean(axis=(1, 3))
    assert cv2.blur(tiles, (112, 1)).max() < 12
    assert np.abs(drawn - picture("none" if name != "none" else "strong")).mean() > (1 if name != "none" else 12)


def test_the_picture_starts_with_the_originals():
    drawn, faces = describe.picture(AUGMENTATIONS["strong"]), describe.synthetic_faces(4)
    assert drawn.shape == (4 * 112, 10 * 112 + 6, 3)
    np.testing.assert_array_equal(drawn[:, :112].reshape(4, 112, 112, 3), faces)
    again = AUGMENTATIONS["strong"](faces[2:3].copy(), np.array([2]), 0, np.array([5]))
    np.testing.assert_array_equal(drawn[2 * 112 : 3 * 112, 118 + 5 * 112 : 118 + 6 * 112], again[0])


def test_every_recipe_can_be_chosen():
    for name in AUGMENTATIONS:
        assert StreamConfig(augmentation=name).augmentation == name


def test_the_fastest_repeat_is_what_an_augmentation_takes():
    def slower_each_time(images: np.ndarray, index: np.ndarray, seed: int, epoch: np.ndarray) -> np.ndarray:
        time.sleep((0.02, 0.3)[seed])
        return images

    images = np.zeros((10, 8, 8, 3), np.uint8)
    assert 2000 <= describe.microseconds(slower_each_time, images, repeats=2) < 25_000


def test_the_speed_table_has_a_row_for_every_recipe_that_does_something():
    lines = describe.speed_table(num_images=20).splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == [name for name in AUGMENTATIONS if name != "none"]
    stated = re.findall(r"^\| `(\w+)` \| [\d.]+ \| [\d,]+ \|$", PAGE, flags=re.MULTILINE)
    assert stated == [line.split("`")[1] for line in lines]


def test_the_command_writes_pictures_and_prints_tables(tmp_path, capsys):
    assert main(["pictures", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        f"augment_{name}.webp" for name in AUGMENTATIONS
    )
    assert capsys.readouterr().out.count("wrote ") == len(AUGMENTATIONS)
    assert main(["tables"]) == 0
    assert describe.operations_table() in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["pictures"], ["speed", "fast"], ["draw", "here"]])
def test_the_command_says_how_it_is_used(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: python -m pipeline.data.augment pictures FOLDER | tables | speed" in capsys.readouterr().err


def test_workers_load_neither_torch_nor_the_renderer_with_the_recipes():
    code = (
        "import sys, pipeline.data.augment\n"
        "print([name for name in ('torch', 'PIL', 'pipeline.data.face_renderer') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
