"""AdaFace's loader, the rival of the data benchmark, written anew from its published behaviour.

https://github.com/mk-minchul/AdaFace, ``data.py`` and ``dataset/augmenter.py``: images as PIL has them, three
independent augmentations, then torchvision's flip, ``ToTensor`` and ``Normalize``, one image at a time. torchvision
from PyPI does not load beside a CPU build of torch, so its few functions are here too, with the same draws from torch's
generator; where the real ones are to be had (`tests.benchmarks.data_rivals.adaface_torchvision`), they are timed too
and the results must be equal bit by bit. Left out is the picture that AdaFace saves of its first sample.
"""

# numpy's global generator is what AdaFace draws from.
# ruff: noqa: NPY002

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import Dataset

SCALE, RATIO, JITTER = (0.2, 1.0), (3 / 4, 4 / 3), (0.5, 1.5)
INTERPOLATIONS = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class Augmenter:
    """AdaFace's three augmentations of a PIL image, each drawn on its own; 0.2 each is what its scripts train with."""

    def __init__(self, crop: float = 0.2, low_resolution: float = 0.2, photometric: float = 0.2) -> None:
        self._crop, self._low_resolution, self._photometric = crop, low_resolution, photometric

    def __call__(self, sample: Image.Image) -> Image.Image:
        """The augmented image."""
        if np.random.random() < self._crop:
            sample = paste_crop(sample, *crop_box(*sample.size))
        if np.random.random() < self._low_resolution:
            sample = Image.fromarray(lower_resolution(np.array(sample)).astype(np.uint8))
        if np.random.random() < self._photometric:
            sample = jitter(sample)
        return sample


def crop_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box, as torchvision's ``RandomResizedCrop.get_params`` draws them."""
    low, high = torch.log(torch.tensor(RATIO)).tolist()
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*SCALE).item()
        ratio = torch.exp(torch.empty(1).uniform_(low, high)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, size=(1,)).item()
            left = torch.randint(0, width - w + 1, size=(1,)).item()
            return int(top), int(left), h, w
    # torchvision's fall-back for an image whose own ratio is allowed, as a square's is.
    return 0, 0, height, width


def paste_crop(sample: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """The box at its own place, black around it."""
    canvas = np.zeros_like(np.array(sample))
    box = sample.crop((left, top, left + width, top + height))
    canvas[top : top + height, left : left + width] = np.array(box)
    return Image.fromarray(canvas)


def lower_resolution(image: np.ndarray) -> np.ndarray:
    """Shrunk to a random size and enlarged back, each by a random interpolation; uint8 [H, W, 3]."""
    side = int(np.random.uniform(0.2, 1.0) * image.shape[0])
    small = cv2.resize(image, (side, side), interpolation=np.random.choice(INTERPOLATIONS))
    return cv2.resize(small, (image.shape[1], image.shape[0]), interpolation=np.random.choice(INTERPOLATIONS))


def jitter(sample: Image.Image) -> Image.Image:
    """torchvision's ``ColorJitter(0.5, 0.5, 0.5, 0)``."""
    order = torch.randperm(4)
    factors = [float(torch.empty(1).uniform_(*JITTER)) for _ in ENHANCERS]
    for which in order:
        if which < 3:
            sample = ENHANCERS[which](sample).enhance(factors[which])
    return sample


def to_normalised(sample: Image.Image) -> Tensor:
    """torchvision's ``RandomHorizontalFlip``, ``ToTensor`` and ``Normalize(0.5, 0.5)``: float32 [3, H, W]."""
    if torch.rand(1) < 0.5:
        sample = sample.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(sample, np.uint8, copy=True))
    tensor = pixels.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)
    mean, deviation = (torch.as_tensor([0.5, 0.5, 0.5], dtype=tensor.dtype).view(-1, 1, 1) for _ in range(2))
    return tensor.clone().sub_(mean).div_(deviation)


def load_and_augment(encoded: bytes, augment: Augmenter) -> Tensor:
    """One image through AdaFace's loader: float32 [3, H, W]."""
    with Image.open(io.BytesIO(encoded)) as image:
        sample = image.convert("RGB")
    return to_normalised(augment(sample))


class AdaFaceDataset(Dataset[tuple[Tensor, int]]):
    """AdaFace's data set over images in memory, where its own opens a file each: the more favourable case."""

    def __init__(self, images: Sequence[bytes], labels: np.ndarray) -> None:
        self._images, self._labels, self._augment = images, labels.tolist(), Augmenter()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return load_and_augment(self._images[index], self._augment), self._labels[index]
