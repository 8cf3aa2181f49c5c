"""Embeddings of face images, with the flip test that every published verification number uses."""

# Shape legend: N = images, B = images of one batch, D = embedding, H, W = height and width, C = 3 channels (RGB)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lgaf.models import FaceEmbedding

Floats = NDArray[np.float32]


class ImageEmbeddings(NamedTuple):
    """Embeddings of N images, float32 arrays in the images' order.

    Attributes:
        embeddings: [N, D], un-normalised; with the flip test the sum over both passes.
        norms_local: [N], norm of the local feature, mean over the passes.
        norms_global: [N], norm of the global feature, mean over the passes.
        weight_local: [N], share of the local feature in the fusion, mean over the passes.
        norms: [N], norm of the un-normalised embedding, mean over the passes: its mean is insightface's XNorm. It is
            not the norm of `embeddings`, in which the two passes may partly cancel.
    """

    embeddings: Floats
    norms_local: Floats
    norms_global: Floats
    weight_local: Floats
    norms: Floats


def embed_images(
    model: nn.Module, images_uint8_NHWC: NDArray[np.uint8], *, flip: bool = True, batch_size: int = 256
) -> tuple[Floats, Floats, Floats, Floats]:
    """Embed images: the first four fields of `embed_with_norms`, which see."""
    return embed_with_norms(model, images_uint8_NHWC, flip=flip, batch_size=batch_size)[:4]


def embed_with_norms(
    model: nn.Module, images_uint8_NHWC: NDArray[np.uint8], *, flip: bool = True, batch_size: int = 256
) -> ImageEmbeddings:
    """Embed images on the model's device, in eval mode; the training mode of every submodule is put back.

    The flip test adds the un-normalised embeddings of an image and its mirror image; the protocol normalises the sum.
    Pixels are mapped to ((x / 255) - 0.5) / 0.5. Source: insightface ``arcface_torch/eval/verification.py`` (`test`).

    Args:
        model: Takes float images [B, 3, H, W] in [-1, 1] and gives a `FaceEmbedding`.
        images_uint8_NHWC: RGB uint8 [N, H, W, 3], N >= 1.
        flip: Whether to add the mirror image's pass.
        batch_size: Images of one forward pass; it bounds memory, and changes the result by float rounding at most.

    Raises:
        ValueError: The images are not uint8 [N, H, W, 3] with N >= 1, or ``batch_size < 1``.
    """
    images = images_uint8_NHWC
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 3] with N >= 1")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batches = []
    with _evaluating(model):
        for start in range(0, len(images), batch_size):
            pixels_BHWC = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size])).to(device)
            images_BCHW = ((pixels_BHWC.permute(0, 3, 1, 2).float() / 255) - 0.5) / 0.5
            batches.append(_embed_batch(model, images_BCHW.contiguous(), flip))
    return ImageEmbeddings(*(torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True)))


def _embed_batch(model: nn.Module, images_BCHW: Tensor, flip: bool) -> tuple[Tensor, ...]:
    passes = [images_BCHW, images_BCHW.flip(3)] if flip else [images_BCHW]
    outputs: list[FaceEmbedding] = [model(images) for images in passes]
    embeddings = torch.stack([output.embedding_BD.float() for output in outputs])
    others = [
        torch.stack([values.float() for values in of_passes]).mean(0)
        for of_passes in zip(*(output[1:4] for output in outputs), strict=True)
    ]
    return (embeddings.sum(0), *others, embeddings.norm(dim=2).mean(0))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # A frozen submodule may be in eval mode inside a training model, so one flag for the whole would not do.
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
