"""AdaFace's augmentation by torchvision's own functions, to hold `tests.benchmarks.data_adaface` to them.

Runs where torchvision is: the environment that `tests.benchmarks.data_watch.rivals_python` makes.
"""

# numpy's global generator is what AdaFace draws from.
# ruff: noqa: NPY002

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tests.benchmarks.data_adaface import JITTER, RATIO, SCALE, Augmenter, load_and_augment, lower_resolution
from tests.benchmarks.data_set import DataSet

CHECKED = 300


@functools.cache
def declare_operators() -> Any:
    """Let torchvision be imported beside a CPU build of torch; the value must be kept.

    Its compiled part wants CUDA's libraries and stays out; the import then fails for want of the names of two operators
    of detection, which nothing here calls.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@functools.cache
def transforms() -> tuple[Any, Callable[[Image.Image], Tensor]]:
    """torchvision's functions, and AdaFace's last transforms."""
    declare_operators()
    import torchvision.transforms as tv
    from torchvision.transforms import functional

    last = [tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])]
    return functional, tv.Compose(last)


class TorchvisionAugmenter:
    """As `Augmenter`, with torchvision's crop and colours."""

    def __init__(self, probability: float = 0.2) -> None:
        declare_operators()
        import torchvision.transforms as tv

        self._probability, self._box = probability, tv.RandomResizedCrop(size=(112, 112), scale=SCALE, ratio=RATIO)
        self._colours = tv.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=JITTER, hue=0)

    def __call__(self, sample: Image.Image) -> Image.Image:
        """The augmented image."""
        functional, _ = transforms()
        if np.random.random() < self._probability:
            top, left, height, width = self._box.get_params(sample, self._box.scale, self._box.ratio)
            canvas = np.zeros_like(np.array(sample))
            cropped = functional.crop(sample, top, left, height, width)
            canvas[top : top + height, left : left + width, :] = np.array(cropped)
            sample = Image.fromarray(canvas.astype(np.uint8))
        if np.random.random() < self._probability:
            sample = Image.fromarray(lower_resolution(np.array(sample)).astype(np.uint8))
        if np.random.random() < self._probability:
            sample = self._colours(sample)
        return sample


class TorchvisionDataset(Dataset[tuple[Tensor, int]]):
    """As `AdaFaceDataset`, with torchvision's functions."""

    def __init__(self, images: Sequence[bytes], labels: np.ndarray) -> None:
        self._images, self._labels, self._augment = images, labels.tolist(), TorchvisionAugmenter()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(io.BytesIO(self._images[index])) as image:
            sample = image.convert("RGB")
        return transforms()[1](self._augment(sample)), self._labels[index]


def check_equal(data: DataSet) -> None:
    """The program ends unless `data_adaface` gives torchvision's pixels from the same draws."""
    images = data.jpegs()
    theirs, augment = TorchvisionDataset(images, data.labels), Augmenter()
    for index in range(CHECKED):
        _seed(index)
        expected, _ = theirs[index]
        _seed(index)
        if not torch.equal(expected, load_and_augment(images[index], augment)):
            raise SystemExit(f"image {index}: data_adaface.py does not give torchvision's pixels from the same draws")


def _seed(seed: int) -> None:
    np.random.seed(seed)
    torch.manual_seed(seed)
