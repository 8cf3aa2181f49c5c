"""Training augmentations as named recipes, drawn from (seed, epoch, sample index): not from workers, batches or order.

`AUGMENTATIONS` holds them all. `adaface`, the default, is the AdaFace repository's, which the paper uses.
docs/augmentation.md shows each one. A new recipe is one entry in `recipes.py` and, where it needs one, one operation.
"""

from __future__ import annotations

import cv2

from pipeline.data.augment.draws import uniform_draws
from pipeline.data.augment.recipes import AUGMENTATIONS, Augmentation, Recipe, adaface

# Data workers are one process per core: OpenCV's own threads would take the cores of the others, and an image of
# 112x112 is too small to gain from them. It changes no result.
cv2.setNumThreads(0)

__all__ = ["AUGMENTATIONS", "Augmentation", "Recipe", "adaface", "uniform_draws"]
