"""The recipes as tables, pictures and speeds: what docs/augmentation.md shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from pipeline.data.augment.recipes import AUGMENTATIONS, Augmentation
from pipeline.data.face_renderer import Factors, render_face, sample_identity

PICTURE_FACES: Final = 4
PICTURE_DRAWS: Final = 9
_GAP_PX: Final = 6
_WEBP_QUALITY: Final = 85


def synthetic_faces(count: int) -> np.ndarray:
    """Rendered people seen from the front, uint8 [count, 112, 112, 3]; nobody real."""
    return np.stack([render_face(sample_identity(0, person), Factors(), person) for person in range(count)])


def operations_table() -> str:
    """Every operation of every recipe, in the order of its use, as Markdown."""
    lines = ["| recipe | operation | probability | parameters, uniform | source |", "|---|---|---|---|---|"]
    for name, recipe in AUGMENTATIONS.items():
        lines += [
            f"| `{name}` | {operation.name} | {probability:g} | {operation.ranges} | {operation.source} |"
            for operation, probability in recipe.steps
        ]
    return "\n".join(lines)


def recipes_table() -> str:
    """What each recipe is for and how many images it leaves as they are, as Markdown."""
    lines = ["| recipe | what it is | P(untouched), the flip apart |", "|---|---|---|"]
    lines += [f"| `{name}` | {recipe.summary} | {recipe.untouched:.3f} |" for name, recipe in AUGMENTATIONS.items()]
    return "\n".join(lines)


def picture(augmentation: Augmentation) -> np.ndarray:
    """A grid: a row per face, the original first, then its draws in the first epochs; RGB uint8."""
    rows = []
    for index, face in enumerate(synthetic_faces(PICTURE_FACES)):
        epoch = np.arange(PICTURE_DRAWS)
        draws = augmentation(np.repeat(face[None], PICTURE_DRAWS, 0), np.full(PICTURE_DRAWS, index), 0, epoch)
        gap = np.full((len(face), _GAP_PX, 3), 255, np.uint8)
        rows.append(np.hstack([face, gap, *draws]))
    return np.vstack(rows)


def write_pictures(folder: Path) -> list[Path]:
    """Write ``augment_<recipe>.webp`` for every recipe; gives the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, recipe in AUGMENTATIONS.items():
        path = folder / f"augment_{name}.webp"
        bgr = cv2.cvtColor(picture(recipe), cv2.COLOR_RGB2BGR)
        encoded, data = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, _WEBP_QUALITY])
        if not encoded:
            raise RuntimeError(f"{path}: OpenCV could not encode the picture")
        path.write_bytes(data.tobytes())
        paths.append(path)
    return paths


def microseconds(augmentation: Augmentation, images: np.ndarray, repeats: int = 5) -> float:
    """Time per image on one core, the best of several repeats: others share the machine."""
    index, best = np.arange(len(images)), float("inf")
    for repeat in range(repeats):
        block = images.copy()
        start_s = time.perf_counter()
        augmentation(block, index, repeat, np.zeros(len(images), np.int64))
        best = min(best, time.perf_counter() - start_s)
    return best / len(images) * 1e6


def speed_table(num_images: int = 2000) -> str:
    """Measured time and images a second of each recipe on one core, as Markdown."""
    images = np.resize(synthetic_faces(50), (num_images, 112, 112, 3))
    lines = ["| recipe | us per image | images/s |", "|---|---|---|"]
    for name, recipe in AUGMENTATIONS.items():
        if recipe.steps:
            taken = microseconds(recipe, images)
            lines.append(f"| `{name}` | {taken:.1f} | {1e6 / taken:,.0f} |")
    return "\n".join(lines)
